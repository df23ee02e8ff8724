"""Parquet and Arrow files, and data sets that `datasets` has saved to a folder, as batches of their columns."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megakd.errors import UserError, listed

ROWS = 256  # of a batch
SUFFIXES = (".parquet", ".arrow")
STATE, SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk writes of a data set, and of one with splits


class Table:
    """The schema of a file or of a saved data set, and its rows in order."""

    def __init__(self, path: Path, schema: pyarrow.Schema, source: Any):
        self.path, self.schema, self.source = path, schema, source

    def batches(self, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch | pyarrow.Table]:
        """These columns of all rows, some rows at a time."""
        if isinstance(self.source, pyarrow.parquet.ParquetFile):
            yield from self.source.iter_batches(batch_size=ROWS, columns=list(columns))
        elif isinstance(self.source, pyarrow.RecordBatchReader):
            for batch in self.source:
                yield from (batch.select(columns).slice(at, ROWS) for at in range(0, len(batch), ROWS))
        elif isinstance(self.source, pyarrow.ipc.RecordBatchFileReader):
            for number in range(self.source.num_record_batches):
                batch = self.source.get_batch(number).select(columns)
                yield from (batch.slice(at, ROWS) for at in range(0, len(batch), ROWS))
        else:
            yield from self.source.select_columns(list(columns)).with_format("arrow").iter(batch_size=ROWS)

    def check_columns(self, needed: Sequence[str], advice: str) -> None:
        """UserError unless each column is there, and there once; advice: which field names another one."""
        names = self.schema.names
        if missing := [name for name in needed if name not in names]:
            raise UserError(f"{self.path}: no column {listed(map(repr, missing))}; {advice} {listed(names, 30)}")
        if twice := [name for name in needed if names.count(name) > 1]:
            raise UserError(f"{self.path}: {names.count(twice[0])} columns are named {twice[0]!r}; rename all but one")


@contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """A file of SUFFIXES, or the folder of a saved data set."""
    if path.is_dir():
        import datasets

        saved = datasets.Dataset.load_from_disk(str(path))
        yield Table(path, saved.features.arrow_schema, saved)
    elif path.name.endswith(".parquet"):
        with pyarrow.parquet.ParquetFile(path) as file:
            yield Table(path, file.schema_arrow, file)
    else:
        if (path.parent / STATE).exists():  # which may say that rows are in another order, or not used
            raise UserError(f"{path}: is part of a saved data set; give the folder {path.parent}")
        with pyarrow.memory_map(str(path)) as mapped:
            whole = mapped.read_buffer(6) == b"ARROW1"
            mapped.seek(0)
            reader = pyarrow.ipc.open_file(mapped) if whole else pyarrow.ipc.open_stream(mapped)
            yield Table(path, reader.schema, reader)


def saved_set(folder: Path, split: str) -> Path | None:
    """The folder of a data set that `datasets` saved, of its split where it has several; None where it is none."""
    if (folder / SPLITS).exists():
        try:
            splits = json.loads((folder / SPLITS).read_text())["splits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / SPLITS}: does not list the splits of a saved data set") from error
        if split not in splits:
            raise UserError(f"data.split: {folder} has no split {split!r}; it has {listed(splits)}")
        folder = folder / split
    return folder if (folder / STATE).exists() and (folder / "dataset_info.json").exists() else None


def is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column's values are strings, however it stores them."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type  # type: ignore[attr-defined]
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
