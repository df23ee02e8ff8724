"""Documents, one string each, from the hub, parquet, jsonl, txt, or the text that every CPython carries."""

import ast
import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
import time
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from megakd.data.folders import Listing, data_files, sort_out
from megakd.errors import UserError, foreign, listed, reason
from megakd.system.files import digest
from megakd.system.logging import say

SUFFIXES = (".parquet", ".jsonl.gz", ".jsonl.zst", ".jsonl", ".txt")  # of one file in several, the first is read
BOM = "\ufeff"
OTHER_ENCODINGS = {  # the longer marks first: that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
WAITS = (1, 2, 4, 8, 16)  # seconds before each new attempt to go on with rows of the hub
# what another attempt would meet again: the data is like that, or nobody may read it
LASTING = (ValueError, TypeError, LookupError, ArithmeticError, NotImplementedError, FileNotFoundError, PermissionError)


def iter_documents(
    source: str,
    subset: str | None = None,
    split: str = "train",
    text_field: str = "text",
    streaming: bool = True,
    skip: int = 0,
    revision: str | None = None,
) -> Iterator[str]:
    """The documents of `source` in a fixed order, without the first `skip`.

    source: `python-docs` (no network), a file, folder or glob of parquet / jsonl[.gz|.zst] / txt files
    (a txt file is one document a paragraph separated by two blank lines), else a data set on the hub at `revision`,
    streamed (`HuggingFaceFW/fineweb`). Rows, lines and paragraphs without text are no documents: `skip` does not count
    them. Raises UserError naming the file, line or field that is wrong.
    """
    if source == "python-docs":
        return islice(python_documents(), skip, None)
    files = find_files(source).taken
    if files:
        return islice(_from_files(files, text_field), skip, None)
    return _from_hub(source, subset, split, text_field, streaming, skip, revision)


def find_files(source: str) -> Listing:
    """The files that a source consists of, in the order in which they are read, and those that were passed over.

    None at all: the source is no path. UserError when it is one and names no file that can be read.
    """
    if source == "python-docs":
        return Listing([], {})
    path = Path(source).expanduser()
    if path.is_dir():
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
        path.suffix in (".parquet", ".jsonl", ".txt", ".gz", ".zst") or source.startswith(("/", ".", "~"))
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


def source_files(source: str) -> dict[str, Any] | None:
    """How many files a source has, their bytes, and a digest of their names and sizes in order.

    None: it is given by name, or nothing is there (any more). Names are those below the folder that holds all files.
    """
    try:
        files = find_files(source).taken
    except UserError:  # iter_documents says it when it is asked for them
        files = []
    if not files:
        return None
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


def _from_files(files: list[Path], text_field: str) -> Iterator[str]:
    for path in files:
        with foreign(f"{path}: cannot be read to its end"):
            yield from _from_file(path, text_field)


def _from_file(path: Path, text_field: str) -> Iterator[str]:
    if path.name.endswith(".parquet"):
        return _from_parquet(path, text_field)
    if path.name.endswith(".txt"):
        return _from_text(path)
    return _from_jsonl(path, text_field)


def _from_parquet(path: Path, text_field: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise UserError(f"{path}: no column {text_field!r}; data.text_field may be {listed(names, 30)}")
        if names.count(text_field) > 1:
            raise UserError(f"{path}: {names.count(text_field)} columns are named {text_field!r}; rename all but one")
        kind = table.schema_arrow.field(text_field).type
        if not _is_text(kind):
            raise UserError(f"{path}: column {text_field!r} holds {kind}, not text")
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            yield from (encodable(text) for text in batch.column(0).to_pylist() if text)


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column's values are strings, however it stores them."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type  # type: ignore[attr-defined]
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


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


def _from_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BOM)
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
            except RecursionError as error:
                raise UserError(f"{path}:{number}: a JSON value nested too deeply") from error
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: not a JSON object with a field {text_field!r}") from error
            if text is not None and not isinstance(text, str):
                raise UserError(f"{path}:{number}: field {text_field!r} holds {type(text).__name__}, not text")
            if text:
                yield encodable(text)


def encodable(text: str) -> str:
    """The text with lone surrogates, which JSON may hold and UTF-8 may not, as question marks."""
    return text.encode("utf-8", "replace").decode()


def open_text(path: Path) -> Any:
    """A file of text, unpacked; UserError when its first bytes show that it is not UTF-8."""
    if path.name.endswith(".gz"):
        file: Any = gzip.open(path, "rb")  # noqa: SIM115 (its caller closes it)
    elif path.name.endswith(".zst"):
        file = io.BufferedReader(_WholeZstd(path))
    else:
        file = path.open("rb")
    head = file.peek(4096)[:4096]
    mark = next((mark for mark in OTHER_ENCODINGS if head.startswith(mark)), None)
    if mark or b"\0" in head:
        file.close()
        what = f"text in {OTHER_ENCODINGS[mark]}" if mark else "no text, or text in UTF-16: it has bytes of value 0"
        raise UserError(f"{path}: {what}; convert it to UTF-8")
    return io.TextIOWrapper(file, encoding="utf-8")


class _WholeZstd(io.RawIOBase):
    """A zstd file as a stream that refuses to end inside a frame: zstandard's own reader ends there in silence."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        self.decoder = zstandard.ZstdDecompressor().decompressobj()
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data = self.decoder.unused_data if self.decoder.eof else b""
            if self.decoder.eof:
                data = data or self.file.read(1 << 20)
                if not data:
                    return 0
                self.decoder = zstandard.ZstdDecompressor().decompressobj()
            else:
                data = self.file.read(1 << 20)
                if not data:
                    raise EOFError("the compressed data ends before its end marker")
            self.ready = self.decoder.decompress(data)
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def _from_hub(
    source: str,
    subset: str | None,
    split: str,
    text_field: str,
    streaming: bool,
    skip: int,
    revision: str | None = None,
) -> Iterator[str]:
    """The documents of a data set on the hub without the first `skip`; rows without text are none."""
    texts = _hub_texts(source, subset, split, text_field, streaming, revision)
    return islice((encodable(text) for text in texts if text), skip, None)


def _hub_texts(
    source: str, subset: str | None, split: str, text_field: str, streaming: bool, revision: str | None
) -> Iterator[str | None]:
    """What each row of a hub data set holds in its text field."""
    for number, row in enumerate(hub_rows(source, subset, split, streaming, revision), 1):
        if text_field not in row:
            raise UserError(
                f"data.source: {source} has no column {text_field!r}; data.text_field may be {listed(row, 30)}"
            )
        text = row[text_field]
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"data.source: {source}: row {number}: column {text_field!r} holds {type(text).__name__}, not text"
            )
        yield text


def hub_rows(
    source: str, subset: str | None, split: str, streaming: bool, revision: str | None
) -> Iterator[dict[str, Any]]:
    """The rows of a hub data set in order.

    When reading fails, it begins again behind the last row that it gave, after 1, 2, 4, 8 and 16 seconds; the fifth
    attempt in a row without a new row is the last one. UserError then, or when another attempt cannot help.
    """
    import datasets

    place = f"data.source: cannot open {source!r} as a file or a hub data set"
    with foreign(place):
        try:
            rows = datasets.load_dataset(source, subset, split=split, streaming=streaming, revision=revision)
        except ConnectionError as error:
            files = "without a network: the path of a .parquet, .jsonl or .txt file, or of a folder of them"
            raise UserError(f"{place}: {reason(error)}; {files}") from error
        except RuntimeError as error:
            if "scripts" not in str(error):
                raise
            raise UserError(
                f"data.source: {source} comes with a script, which is not run; where the hub has its rows as Parquet: "
                "data.revision=refs/convert/parquet"
            ) from error
    given = attempts = 0
    while True:
        try:
            for row in rows.skip(given) if given else rows:
                given, attempts = given + 1, 0
                yield dict(row)
            return
        except Exception as error:
            place = f"data.source: {source}: reading broke off after {given:,} rows: {reason(error)}"
            if isinstance(error, LASTING) or attempts == len(WAITS):
                again = "" if isinstance(error, LASTING) else "; the same command goes on after the last finished shard"
                raise UserError(place + again) from error
            say(f"{place}; trying again in {WAITS[attempts]} s")
        time.sleep(WAITS[attempts])
        attempts += 1


def hub_commit(source: str, revision: str | None) -> str | None:
    """The commit at which a branch or tag of a hub data set is (None: its main branch).

    None when the hub cannot be asked, for there is no network or no such data set; reading it says which.
    """
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source, revision=revision, timeout=30).sha
    except Exception:  # every class of error there means the same here
        return None
