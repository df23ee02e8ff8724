"""Documents, one string each, from the hub, parquet, jsonl, txt, or the text that every CPython carries."""

import ast
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from megakd.errors import UserError
from megakd.files import digest

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")


def iter_documents(
    source: str,
    subset: str | None = None,
    split: str = "train",
    text_field: str = "text",
    streaming: bool = True,
    skip: int = 0,
) -> Iterator[str]:
    """The documents of `source` in a fixed order, without the first `skip`.

    source: `python-docs` (no network), a file, folder or glob of parquet / jsonl[.gz|.zst] / txt files
    (a txt file is one document a paragraph separated by two blank lines), else a data set on the hub,
    streamed (`HuggingFaceFW/fineweb`). Raises UserError naming the file, line or field that is wrong.
    """
    if source == "python-docs":
        return islice(python_documents(), skip, None)
    files = _files(source)
    if files:
        return islice(_from_files(files, text_field), skip, None)
    return _from_hub(source, subset, split, text_field, streaming, skip)


def source_files(source: str) -> dict[str, Any] | None:
    """How many files a source has, their bytes, and a digest of their names and sizes in order.

    None: it is given by name, or nothing is there (any more). Names are those below the folder that holds all files.
    """
    try:
        files = [] if source == "python-docs" else _files(source)
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
    """Whether a document belongs to the hold-out: a function of its text alone, so no run ever trains on it."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < fraction * 2**64


def python_documents(roots: list[Path] | None = None) -> Iterator[str]:
    """The language reference (`pydoc_data.topics`), then every module's docstrings, one document a module.

    Each docstring appears once. roots: package folders to read instead of the standard library.
    The text follows the Python version; its sha256 stands in the manifest beside every figure.
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


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        # Spark's data sets are folders named like files
        files = sorted(f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and not f.is_dir())
        if not files:
            raise UserError(f"data.source: the folder {path} holds no file ending in {', '.join(SUFFIXES)}")
        return files
    files = [path] if path.is_file() else sorted(Path(f) for f in glob.glob(str(path), recursive=True))
    if not files and (
        path.suffix in (".parquet", ".jsonl", ".txt", ".gz", ".zst") or source.startswith(("/", ".", "~"))
    ):
        raise UserError(f"data.source: no file at {source}")
    for file in files:
        if file.is_dir():
            raise UserError(f"data.source: {file} is a folder; a pattern must name files: {file}/*{file.suffix}")
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"data.source: {file} is none of {', '.join(SUFFIXES)}")
    return files


def _from_files(files: list[Path], text_field: str) -> Iterator[str]:
    for path in files:
        try:
            yield from _from_file(path, text_field)
        except (EOFError, OSError, UnicodeDecodeError, zlib.error, zstandard.ZstdError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{path}: cannot be read to its end: {error}") from error


def _from_file(path: Path, text_field: str) -> Iterator[str]:
    if path.name.endswith(".parquet"):
        return _from_parquet(path, text_field)
    if path.name.endswith(".txt"):
        return (part for part in path.read_text(encoding="utf-8").split("\n\n\n") if part.strip())
    return _from_jsonl(path, text_field)


def _from_parquet(path: Path, text_field: str) -> Iterator[str]:
    table = pyarrow.parquet.ParquetFile(path)
    if text_field not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise UserError(f"{path}: no column {text_field!r}; data.text_field may be {names}")
    kind = table.schema_arrow.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {text_field!r} holds {kind}, not text")
    for batch in table.iter_batches(batch_size=256, columns=[text_field]):
        yield from (_encodable(text) for text in batch.column(0).to_pylist() if text)


def _from_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: not a JSON object with a field {text_field!r}") from error
            if text is not None and not isinstance(text, str):
                raise UserError(f"{path}:{number}: field {text_field!r} holds {type(text).__name__}, not text")
            if text:
                yield _encodable(text)


def _encodable(text: str) -> str:
    """The text with lone surrogates, which JSON may hold and UTF-8 may not, as question marks."""
    return text.encode("utf-8", "replace").decode()


def _open_text(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    if path.name.endswith(".zst"):
        return io.TextIOWrapper(io.BufferedReader(_WholeZstd(path)), encoding="utf-8")
    return path.open(encoding="utf-8")


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
    source: str, subset: str | None, split: str, text_field: str, streaming: bool, skip: int
) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(source, subset, split=split, streaming=streaming)
    except Exception as error:  # the hub's own errors are many; every one of them means: this source cannot be read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"data.source: cannot open {source!r} as a file or a hub data set: {reason}") from error
    row: Any
    for row in rows.skip(skip):
        if text_field not in row:
            raise UserError(
                f"data.source: {source} has no column {text_field!r}; data.text_field may be {', '.join(row)}"
            )
        if row[text_field]:
            yield _encodable(row[text_field])
