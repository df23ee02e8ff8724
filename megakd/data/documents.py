"""Documents, one string each, from the hub, parquet, jsonl, txt, or the text that every CPython carries."""

import ast
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from megakd.data.folders import Listing, data_files, sort_out
from megakd.data.hub import hub_rows
from megakd.data.lines import BOM, OnBad, json_lines, open_text, refuse
from megakd.data.tables import is_text, open_table, saved_set
from megakd.errors import UserError, foreign, listed
from megakd.system.files import digest

SUFFIXES = (
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".jsonl.zst",
    ".jsonl",
    ".txt",
)  # of one file in several, the first is read


def iter_documents(
    source: str,
    subset: str | None = None,
    split: str = "train",
    text_field: str = "text",
    streaming: bool = True,
    skip: int = 0,
    revision: str | None = None,
    on_bad: OnBad = refuse,
) -> Iterator[str]:
    """The documents of `source` in a fixed order, without the first `skip`.

    source: `python-docs` (no network), a file, folder or glob of parquet / arrow / jsonl[.gz|.zst] / txt files
    (a txt file is one document a paragraph separated by two blank lines), a folder to which `datasets` saved a data
    set, else a data set on the hub at `revision`, streamed (`HuggingFaceFW/fineweb`). Rows, lines and paragraphs
    without text are no documents: `skip` does not count them. Raises UserError naming the file, line or field that is
    wrong. on_bad: is told of a single line or row that is wrong; where it returns, that is no document.
    """
    if source == "python-docs":
        return islice(python_documents(), skip, None)
    files = find_files(source, split).taken
    if files:
        return islice(_from_files(files, text_field, on_bad), skip, None)
    return _from_hub(source, subset, split, text_field, streaming, skip, revision, on_bad)


def find_files(source: str, split: str = "train") -> Listing:
    """The files that a source consists of, in the order in which they are read, and those that were passed over.

    Of a data set that `datasets` saved, or of its `split`, the folder stands for its files. None at all: the source is
    no path. UserError when it is one and names no file that can be read.
    """
    if source == "python-docs":
        return Listing([], {})
    path = Path(source).expanduser()
    if path.is_dir():
        if saved := saved_set(path, split):
            return Listing([saved], {})
        found = data_files(path, SUFFIXES)
        if not found.taken:
            raise UserError(
                f"data.source: the folder {path} holds no file ending in {', '.join(SUFFIXES)}{found.passed_over()}"
            )
        return found
    if path.is_file():
        _check_suffixes([path])
        return Listing([path], {})
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches and (
        path.suffix in (".parquet", ".arrow", ".jsonl", ".txt", ".gz", ".zst") or source.startswith(("/", ".", "~"))
    ):
        raise UserError(f"data.source: no file at {source}")
    _check_suffixes(matches)
    literal = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
    found = sort_out(Path(*literal), matches, SUFFIXES)
    if matches and not found.taken:
        raise UserError(f"data.source: {source} matches no file of text{found.passed_over()}")
    return found


def _check_suffixes(files: list[Path]) -> None:
    for file in files:
        if file.is_dir():
            raise UserError(f"data.source: {file} is a folder; a pattern must name files: {file}/*{file.suffix}")
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"data.source: {file} is none of {', '.join(SUFFIXES)}")


def source_files(source: str, split: str = "train") -> dict[str, Any] | None:
    """How many files a source has, their bytes, and a digest of their names and sizes in order.

    None: it is given by name, or nothing is there (any more). Names are those below the folder that holds all files.
    """
    try:
        files = find_files(source, split).taken
    except UserError:  # iter_documents says it when it is asked for them
        files = []
    if not files:
        return None
    if files[0].is_dir():
        files = sorted(file for file in files[0].rglob("*") if file.is_file())
    root = os.path.commonpath([file.parent for file in files])
    try:
        sizes = [[os.path.relpath(file, root), file.stat().st_size] for file in files]
    except OSError as error:
        raise UserError(f"data.source: {error.filename}: cannot be read: {error.strerror}") from error
    return {"count": len(files), "bytes": sum(size for _, size in sizes), "digest": digest(sizes)}


def held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the validation set: a function of its text alone, so no run ever trains on it."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < fraction * 2**64


def python_documents(roots: list[Path] | None = None) -> Iterator[str]:
    """The language reference (`pydoc_data.topics`), then every module's docstrings, one document a module.

    Each docstring appears once. roots: package folders to read instead of the standard library.
    The text follows the Python version; its sha256 stands in the manifest next to every figure.
    """
    if roots is None:
        from pydoc_data import topics

        yield from (topics.topics[name] for name in sorted(topics.topics))
    skipped = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idle_test"}
    seen: set[str] = set()
    for root in roots or [Path(sysconfig.get_paths()["stdlib"])]:
        for path in sorted(root.rglob("*.py")):
            if skipped.isdisjoint(path.relative_to(root).parts):
                document = "\n\n".join(_new_docstrings(path, seen))
                if document:
                    yield document


def _new_docstrings(path: Path, seen: set[str]) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # files that are broken on purpose, for 2to3 and the like
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 80 and docstring not in seen:
                seen.add(docstring)
                yield docstring


def _from_files(files: list[Path], text_field: str, on_bad: OnBad) -> Iterator[str]:
    for path in files:
        with foreign(f"{path}: cannot be read to its end"):
            if path.name.endswith(".txt"):
                yield from _from_text(path)
            elif ".jsonl" in path.suffixes[-2:] and not path.is_dir():
                yield from _from_jsonl(path, text_field, on_bad)
            else:
                yield from _from_table(path, text_field)


def _from_table(path: Path, text_field: str) -> Iterator[str]:
    with open_table(path) as table:
        table.check_columns([text_field], "data.text_field may be")
        kind = table.schema.field(text_field).type
        if not is_text(kind):
            raise UserError(f"{path}: column {text_field!r} holds {kind}, not text")
        for batch in table.batches([text_field]):
            yield from (encodable(text) for text in batch.column(0).to_pylist() if text)


def _from_text(path: Path) -> Iterator[str]:
    """Paragraphs between two blank lines, the newlines before the next one skipped; never a file at once."""
    lines: list[str] = []
    newlines = 0  # at the end of `lines`
    with open_text(path) as file:
        for line in file:
            line = line.removeprefix(BOM)  # files that were put together have one before each
            lines.append(line)
            newlines = newlines + 1 if line == "\n" else int(line.endswith("\n"))
            if newlines == 3:
                yield from _if_text("".join(lines)[:-3])
                lines, newlines = [], 0
        yield from _if_text("".join(lines))


def _if_text(document: str) -> Iterator[str]:
    if document.strip():
        yield document


def _from_jsonl(path: Path, text_field: str, on_bad: OnBad) -> Iterator[str]:
    for number, row in json_lines(path, on_bad):
        if not isinstance(row, dict) or text_field not in row:
            on_bad(UserError(f"{path}:{number}: not a JSON object with a field {text_field!r}"))
            continue
        text = row[text_field]
        if text is not None and not isinstance(text, str):
            on_bad(UserError(f"{path}:{number}: field {text_field!r} holds {type(text).__name__}, not text"))
        elif text:
            yield encodable(text)


def encodable(text: str) -> str:
    """The text with lone surrogates, which JSON may hold and UTF-8 may not, as question marks."""
    return text.encode("utf-8", "replace").decode()


def _from_hub(
    source: str,
    subset: str | None,
    split: str,
    text_field: str,
    streaming: bool,
    skip: int,
    revision: str | None = None,
    on_bad: OnBad = refuse,
) -> Iterator[str]:
    """The documents of a data set on the hub without the first `skip`; rows without text are none."""
    rows = hub_rows(source, subset, split, streaming, revision)
    return islice(_hub_texts(source, rows, text_field, on_bad), skip, None)


def _hub_texts(source: str, rows: Iterator[dict[str, Any]], text_field: str, on_bad: OnBad) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        if text_field not in row:
            raise UserError(
                f"data.source: {source} has no column {text_field!r}; data.text_field may be {listed(row, 30)}"
            )
        text = row[text_field]
        if text is not None and not isinstance(text, str):
            place = f"data.source: {source}: row {number}"
            on_bad(UserError(f"{place}: column {text_field!r} holds {type(text).__name__}, not text"))
        elif text:
            yield encodable(text)
