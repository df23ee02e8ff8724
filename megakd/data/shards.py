"""WebDataset tar shards: plain ustar, a sidecar index, a manifest; checked when read, written by shard_writer.py.

FOLDER/manifest.json      what the data is (facts) and which shards it consists of
FOLDER/shard-00000.tar    KEY.tokens.npy KEY.starts.npy of every sample, of conversations KEY.mask.npy too; with
                          teacher targets KEY.mkd, everything in one
FOLDER/shard-00000.json   the sidecar: facts, sha256 of the tar, and (key, offset, size, crc32, labels) of every sample
FOLDER/book-DIGEST.npy    with teacher targets: what ids in the records mean

The sidecar is renamed into place after its tar: a shard is finished when its sidecar stands there. Manifest and
sidecars carry a checksum of themselves.
"""

import errno
import gc
import io
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from megakd.data import codec
from megakd.data.codebook import load_book
from megakd.data.records import Sample, TeacherTargets
from megakd.errors import UserError
from megakd.system.files import read_sealed, sha256

BLOCK = tarfile.BLOCKSIZE
OPEN_FILES = 512  # at once; half of what a process may usually have
MANIFEST, SIDECAR, VERSION = "megakd-shards", "megakd-shard-index", 2
MASKED_VERSION = 3  # of shards with a label mask: readers of version 2 alone would train on every label
VERSIONS = (VERSION, MASKED_VERSION)

Members = dict[str, bytes]  # what a tar holds of a sample, by suffix: mkd, or tokens.npy and starts.npy
# numpy reads a header by ast.literal_eval, at which Python 3.11 fails now and then when threads do so at once:
# SystemError: AST constructor recursion depth mismatch
PARSING = Lock()
BLANK = "blank"  # key of the sample that stands for a damaged one


class DamagedSample(UserError):
    """A sample whose bytes are not those that were written."""


class Entry(NamedTuple):
    """Where a sample lies in its tar: bytes [offset, offset + size), and how many labels it has."""

    key: str
    offset: int
    size: int
    crc32: int
    labels: int


class Index(NamedTuple):
    """The entries of one shard column by column, [samples]: 29 bytes for each instead of 270 as Python objects."""

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, rows: list[list[Any]], sidecar: Path) -> "Index":
        """From the rows of a sidecar; UserError when they are not what one has."""
        try:
            keys, offsets, sizes, crc32, labels = zip(*rows, strict=True) if rows else ((),) * 5
            return cls(
                np.array([key.encode() for key in keys], "S"),
                np.array(offsets, np.int64),
                np.array(sizes, np.uint32 if max(sizes, default=0) < 2**32 else np.int64),
                np.array(crc32, np.uint32),
                np.array(labels, np.int32),
            )
        except (ValueError, TypeError, OverflowError, AttributeError) as error:
            raise UserError(f"{sidecar}: its samples are no list of [key, offset, size, crc32, labels]") from error

    def entry(self, at: int) -> Entry:
        key, *numbers = (column[at] for column in self)
        return Entry(key.decode(), *map(int, numbers))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's garbage collector off: parsing 100,000 rows makes it look through all objects of the process, again and
    again, which takes longer than the parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder}: no manifest.json here; {_maker(folder)}")
    return read_sealed(folder / "manifest.json", MANIFEST, *VERSIONS)


def label_masked(facts: dict[str, Any]) -> bool:
    """Whether the samples of a folder with these facts, of tokens or of logits, have a label mask."""
    tokens = facts.get("tokens", facts)
    return any(source.get("format", "text") != "text" for source in tokens.get("sources", [tokens]))


def unfinished(folders: Iterable[Path]) -> str | None:
    """Why one of the folders cannot be read to its end: it is missing, cut short or changed; None: all can be."""
    for folder in folders:
        try:
            ShardSet(folder)
        except UserError as error:
            return str(error)
    return None


class ShardSet:
    """Random access to the samples of a folder of shards, in manifest order; threads may share it.

    Opening reads the manifest and every sidecar and compares tar sizes; reading checks each sample's crc32.
    Anything missing, cut short or changed is a UserError that names the shard; a sample whose bytes are lost or changed
    is a DamagedSample, which names both.
    growing: shards may be missing while a capture still runs; `missing` says which of them samples need.
    tolerant: a tar may be cut short; its samples beyond the cut are then damaged one by one.
    scratch: a folder on a local disk, to which a shard is copied when it is first read, at most `copies` at a time.
    """

    def __init__(
        self, folder: Path, growing: bool = False, tolerant: bool = False, scratch: Path | None = None, copies: int = 4
    ):
        self.folder, self.tolerant, self.scratch, self.copies = folder, tolerant, scratch, copies
        self.manifest: dict[str, Any] = read_manifest(folder)
        if not self.manifest["complete"] and not growing:
            raise UserError(f"{folder}: the capture is not finished; {_maker(folder)}, or set stream.follow=true")
        self.facts: dict[str, Any] = self.manifest["facts"]
        self.layout, self.masked = _layout(folder, self.facts), label_masked(self.facts)
        self.names: list[str] = [shard["name"] for shard in self.manifest["shards"]]
        self.sizes: list[int] = [shard["samples"] for shard in self.manifest["shards"]]
        self._first = np.concatenate([[0], np.cumsum(self.sizes)])
        self._entries: dict[int, Index] = {}
        self._files: dict[int, _Descriptor] = {}
        self._lock = Lock()
        self.tokens: int = sum(shard["tokens"] for shard in self.manifest["shards"])
        with _without_collector():
            for number, name in enumerate(self.names):
                if not growing or (folder / f"{name}.json").exists():
                    self._open_sidecar(number)
        if not len(self):
            raise UserError(f"{folder}: the manifest lists no samples; {_maker(folder)}")

    def _open_sidecar(self, number: int) -> None:
        name, shard = self.names[number], self.manifest["shards"][number]
        sidecar, tar = self.folder / f"{name}.json", self.folder / f"{name}.tar"
        for path in (sidecar, tar):
            if not path.exists():
                raise UserError(f"{path}: listed in the manifest but missing; {_maker(self.folder)}")
        found = read_sealed(sidecar, SIDECAR, *VERSIONS)
        if found["facts"] != self.facts:
            raise UserError(
                f"{sidecar}: was written for other data than the manifest next to it; {_maker(self.folder)}"
            )
        if len(found["samples"]) != shard["samples"] or found["sha256"] != shard.get("sha256", found["sha256"]):
            raise UserError(f"{sidecar}: is not the shard that the manifest next to it lists; {_maker(self.folder)}")
        if tar.stat().st_size != found["bytes"] and not self.tolerant:
            raise UserError(
                f"{tar}: {tar.stat().st_size} bytes where its index says {found['bytes']}: cut short or changed; "
                f"delete it and {_maker(self.folder)}"
            )
        self._entries[number] = Index.of(found["samples"], sidecar)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def bytes(self) -> int:
        """Of the existing tars."""
        return sum((self.folder / f"{self.names[number]}.tar").stat().st_size for number in self._entries)

    def missing(self, indices: Iterable[int]) -> list[str]:
        """The shards that these samples need and that are not there yet."""
        absent = {self._shard(i) for i in indices} - self._entries.keys()
        for number in sorted(absent):
            if (self.folder / f"{self.names[number]}.json").exists():
                self._open_sidecar(number)
        return [self.names[number] for number in sorted(absent - self._entries.keys())]

    def entry(self, index: int) -> Entry:
        number = self._shard(index)
        return self._entries[number].entry(index - self._first[number])

    def length(self, index: int) -> int:
        """What orders samples by length: the positions of one document, T of a packed window.

        Of a sample with a label mask it is its bytes.
        """
        entry = self.entry(index)
        if self.masked:
            return entry.size
        facts = self.facts.get("tokens", self.facts)
        return entry.labels if facts.get("packing") == "documents" else facts["sequence_length"]

    def place(self, index: int) -> str:
        """Which shard and sample an index is, in words."""
        return f"{self.folder / self.names[self._shard(index)]}.tar: sample {self.entry(index).key}"

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def __getitem__(self, index: int) -> Sample:
        key = self.entry(index).key
        try:
            return _sample(key, self.members(index), self.layout, self.masked)
        except (codec.DamagedRecord, ValueError, KeyError) as error:
            raise DamagedSample(f"{self.place(index)}: {error}; {self._again()}") from error

    def members(self, index: int) -> Members:
        """The bytes of a sample, checked by its crc32 and not decoded."""
        entry, number = self.entry(index), self._shard(index)
        file = self._open(number)  # held while it is read: another thread may take it out of the table
        chunk = _read(file, entry.size, entry.offset, self.place(index))
        if zlib.crc32(chunk) != entry.crc32:
            raise DamagedSample(f"{self.place(index)}: checksum does not match; {self._again()}")
        return _members(entry.key, chunk)

    def _again(self) -> str:
        return f"delete the shard and run: megakd {'generate-logits' if self.layout else 'tokenize'} RUN"

    def _open(self, number: int) -> "_Descriptor":
        with self._lock:
            if number not in self._files:
                while len(self._files) >= (self.copies if self.scratch else OPEN_FILES):
                    del self._files[next(iter(self._files))]
                path = self.folder / f"{self.names[number]}.tar"
                try:
                    self._files[number] = self._opened(path)
                except OSError as error:
                    advice = f"; {_maker(self.folder)}" if error.errno == errno.ENOENT else ""
                    raise UserError(f"{path}: cannot be opened: {error.strerror or error}{advice}") from error
            return self._files[number]

    def _opened(self, path: Path) -> "_Descriptor":
        make = self._copy if self.scratch else _Descriptor
        try:
            return make(path)
        except OSError as error:
            if error.errno != errno.EMFILE or not self._files:
                raise
            self._files.clear()  # fewer may be open than we thought
            return make(path)

    def _copy(self, path: Path) -> "_Descriptor":
        """An open copy on the scratch disk without a name there: it goes when it is closed, or the process ends.

        A tar that its disk cannot read to the end is read where it lies, where each sample tells whether it is lost.
        """
        assert self.scratch is not None
        source, size = _Descriptor(path), 0
        try:
            with tempfile.TemporaryFile(dir=self.scratch) as copy:
                # what _read raises is no OSError: those are the scratch disk's
                while chunk := _read(source, 1 << 24, size, str(path)):
                    size += copy.write(chunk)
                copy.flush()
                return _Descriptor(copy.fileno())
        except DamagedSample:
            return source
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            reason = error.strerror or error
            raise UserError(f"{self.scratch}: cannot take a copy of {path}: {reason}; see stream.scratch") from error

    def blank(self) -> Sample:
        """A sample of one position without a label, in the place of one that is damaged."""
        layout = self.layout
        top_k, draws, columns = (layout.top_k, layout.draws, len(layout.temperatures)) if layout else (0, 0, 0)
        zeros, ids = np.zeros(1, np.float32), np.zeros((1, 1), np.int32)
        targets = TeacherTargets(
            ids.repeat(top_k, 1), np.zeros((1, top_k), np.float32), np.zeros((1, columns), np.float32),
            ids.repeat(draws, 1), np.zeros((1, draws), np.float32), zeros, zeros,
        )  # fmt: skip
        return Sample(BLANK, np.zeros(2, np.int32), np.array([0, 1], np.int32), targets if layout else None)

    def verify(self) -> None:
        """Re-read everything: the sha256 of every tar, then every sample; raises UserError at the first fault."""
        for number, name in enumerate(self.names):
            if sha256(self.folder / f"{name}.tar") != self.manifest["shards"][number]["sha256"]:
                raise UserError(
                    f"{self.folder / name}.tar: sha256 differs from its index; delete it and {_maker(self.folder)}"
                )
        for index in range(len(self)):
            sample = self[index]
            if sample.label_count != self.entry(index).labels:
                raise DamagedSample(f"{self.place(index)}: has other labels than its index says; {_maker(self.folder)}")

    def close(self) -> None:
        with self._lock:
            self._files.clear()


class _Descriptor:
    """An open file (a path, or a duplicate of a descriptor) that closes when the last thread releases it."""

    def __init__(self, file: Path | int):
        self.number = os.dup(file) if isinstance(file, int) else os.open(file, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the interpreter's end `os` may be gone
        if hasattr(self, "number"):
            close(self.number)


def _read(file: _Descriptor, size: int, offset: int, place: str) -> bytes:
    """Bytes of a tar, fewer at its end. A disk that has lost them is damage; any other error is not the sample's."""
    try:
        return os.pread(file.number, size, offset)
    except OSError as error:
        kind = DamagedSample if error.errno == errno.EIO else UserError
        raise kind(f"{place}: cannot be read: {error.strerror or error}") from error


def _layout(folder: Path, facts: dict[str, Any]) -> codec.Layout | None:
    if "codec" not in facts:
        return None
    if facts["codec"] not in (codec.NAME, codec.MASKED_NAME):
        raise UserError(f"{folder}: targets of codec {facts['codec']!r}, this MegaKD reads {codec.NAME!r}")
    return layout_of(facts, folder)


def layout_of(facts: dict[str, Any], folder: Path) -> codec.Layout:
    """The layout that the facts of a folder of teacher targets state, with its codebook."""
    length = facts["tokens"]["sequence_length"]
    book = load_book(folder, facts["book"])
    if len(book.places) != facts["vocab_size"]:
        raise UserError(f"{folder / book.file_name}: {len(book.places)} ids where the data has {facts['vocab_size']}")
    temperatures, masked = tuple(facts["temperatures"]), facts["codec"] == codec.MASKED_NAME
    return codec.Layout(facts["top_k"], facts["draws"], facts["levels"], temperatures, length, book, masked)


def _members(key: str, chunk: bytes) -> Members:
    members: Members = {}
    at = 0
    while at < len(chunk):  # the headers `_member` wrote; the checksum has vouched for them
        name = chunk[at : at + 100].rstrip(b"\0").decode()
        size = int(chunk[at + 124 : at + 135], 8)
        members[name.removeprefix(f"{key}.")] = chunk[at + BLOCK : at + BLOCK + size]
        at += BLOCK + size + -size % BLOCK
    return members


def _sample(key: str, members: Members, layout: codec.Layout | None, masked: bool) -> Sample:
    if layout is not None:
        return codec.decode(key, members["mkd"], layout)
    with PARSING:
        arrays = {name: np.load(io.BytesIO(data), allow_pickle=False) for name, data in members.items()}
    tokens, starts, mask = arrays["tokens.npy"], arrays["starts.npy"], arrays.get("mask.npy")
    if masked and (mask is None or mask.shape != (len(tokens) - 1,) or mask.dtype != bool):
        raise ValueError("has no label mask of its length")
    return Sample(key, tokens, starts, mask=mask)


def _maker(folder: Path) -> str:
    logits = folder.parent.name == "logits" or any(folder.glob("book-*.npy"))
    verb = "generate-logits" if logits else "tokenize"
    return f"run: megakd {verb} RUN"
