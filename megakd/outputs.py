"""What may be replaced where a user wants output: one rule for every verb and every tool that writes where it is told.

Free is a place where nothing is, and for verbs that know their products an empty folder. Replaced is an earlier product
of the same verb: a folder whose megakd.json names the verb and lists every file in it, or a file with the mark of the
verb. Everything else is refused. --force, where a verb has it, also replaces a folder whose files are those of a model
and no others. A run, a place in a run that belongs to another verb, foreign files and the working directory are never
replaced.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megakd.errors import UserError
from megakd.names import expand, holds_run
from megakd.system.files import publishing, settle, write_json
from megakd.system.version import made_with

MARKER = "megakd.json"  # {"made_by": mark, "megakd": its version, "files": names of all others}
RUN_PARTS = {"config.json", "history.jsonl", "metrics.jsonl", "evals.jsonl", "report.html", "student-0", "compress"}
RUN_PARTS |= {"data", "checkpoints", "tensorboard", "wandb", "watch", "export", "export-dense", "samples.json"}
MODEL_FILE = re.compile(
    r"model[\w.-]*\.safetensors(\.index\.json)?|(router_update/)?router_update\.(safetensors|pt|json)"
    r"|(generation_|preprocessor_)?config\.json|tokenizer[\w.-]*\.(json|model)|(spiece|sentencepiece[\w.]*)\.model"
    r"|(vocab|added_tokens|special_tokens_map|chat_template|compress|training|megakd)\.json|(merges|vocab)\.txt"
    r"|chat_template\.jinja|compress\.png|README\.md|(student|shared_core|codes|rounding)\.py"
)


@contextmanager
def producing(path: Path, mark: str, force: bool | None = None, own: Path | None = None) -> Iterator[Path]:
    """`publishing` of a folder where the user wants it, with the marker by which `check_folder` knows it again."""
    place = check_folder(path, mark, force, own)
    with publishing(place) as temporary:
        yield temporary
        names = sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*") if not file.is_dir())
        write_json(temporary / MARKER, {"made_by": mark, "megakd": made_with(), "files": names})
        check_folder(path, mark, force, own)  # what came there meanwhile


def check_folder(path: Path, mark: str | None = None, force: bool | None = None, own: Path | None = None) -> Path:
    """The place of a folder to make, links followed; UserError when the existing one must not be replaced.

    mark: what the marker says of folders that the verb makes, "megakd export"; None: whatever exists is refused.
    force: None where the verb has no --force. own: the place in its run that belongs to the verb.
    """
    place = check_place(path, own)
    if not place.exists() or (mark is not None and place.is_dir() and not any(place.iterdir())):
        return place
    made_by, listed = _read_marker(place)
    ours = mark is not None and made_by == mark
    if not ours and not (force and place.is_dir()):
        by = f", and {mark} did not make it" if mark else ""
        remedy = ", or add --force to replace a model" if force is False and place.is_dir() else ""
        raise UserError(f"{path}: exists already{by}; remove it or name another{remedy}")
    for file in sorted(place.rglob("*")):
        name = str(file.relative_to(place))
        known = name in listed or (not ours and MODEL_FILE.fullmatch(name))
        if not known and (file.is_symlink() or not file.is_dir()):
            raise UserError(f"{path}: holds {name}, which {mark} did not write; name another place")
    return place


def check_file(path: Path, mark: str | None = None) -> Path:
    """The place of a file to write, links followed; UserError when one is there that does not contain `mark`.

    mark: bytes, as text, that every such product has and nothing else; None: whatever exists is refused.
    """
    place = check_place(path)
    if place.exists():
        if not place.is_file():
            raise UserError(f"{path}: is no file; name another")
        if mark is None or mark.encode() not in place.read_bytes():
            raise UserError(f"{path}: exists already, and is not what is written here; remove it or name another")
    return place


def check_place(path: Path, own: Path | None = None, part: str = "") -> Path:
    """A path with links followed; UserError where nothing may be written, whatever lies there.

    own: the one place of the verb in its run; part: of any run, where the verb may write ("data").
    """
    place = expand(path).resolve()
    if Path.cwd().is_relative_to(place):
        raise UserError(f"{path}: is the working directory, or holds it; name a place of its own")
    for run in (place, *place.parents):
        if holds_run(run):
            name = "" if run == place else place.relative_to(run).parts[0]
            if not name or (name in RUN_PARTS and name != part and (own is None or place != own.resolve())):
                raise UserError(f"{path}: is {name or 'the folder'} of the run {run}; name another place")
    if place.parent.is_dir():
        settle(place.parent, place.name)
    return place


def _read_marker(folder: Path) -> tuple[str | None, set[str]]:
    """Who made a folder, and the names of the files in it; (None, nothing) where no marker says so."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return marker["made_by"], {MARKER, *marker["files"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None, set()
