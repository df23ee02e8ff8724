"""WebDataset tar shards: plain ustar, a sidecar index, a manifest; published whole, checked when read.

FOLDER/manifest.json      what the data is (facts) and which shards it consists of
FOLDER/shard-00000.tar    KEY.tokens.npy KEY.starts.npy [KEY.targets.mkd] for every sample
FOLDER/shard-00000.json   the sidecar: facts, sha256 of the tar, and (key, offset, size, crc32, labels) of every sample

The sidecar is renamed into place after its tar: a shard is finished when its sidecar stands there.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megakd.data import codec
from megakd.data.records import Sample
from megakd.errors import UserError
from megakd.files import publishing, read_json, sha256, write_json

BLOCK = tarfile.BLOCKSIZE


class Entry(NamedTuple):
    """Where a sample lies in its tar: bytes [offset, offset + size), and how many labels it has."""

    key: str
    offset: int
    size: int
    crc32: int
    labels: int


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def write_shard(
    folder: Path, name: str, samples: Iterable[Sample], facts: dict[str, Any], state: Callable[[], Any] = lambda: None
) -> int:
    """Write one tar and its sidecar, each atomically; returns the number of samples. Same samples, same bytes.

    state: asked after the last sample, kept in the sidecar: where the writer of the next shard goes on.
    """
    entries: list[Entry] = []
    tokens = 0
    with publishing(folder / f"{name}.tar") as temporary, temporary.open("wb") as file:
        for sample in samples:
            chunk = b"".join(_member(f"{sample.key}.{suffix}", data) for suffix, data in _members(sample))
            labels = len(sample.tokens) - len(sample.starts)
            entries.append(Entry(sample.key, file.tell(), len(chunk), zlib.crc32(chunk), labels))
            tokens += len(sample.tokens) - 1
            file.write(chunk)
        file.write(bytes(2 * BLOCK))
        file.flush()
        size, digest = file.tell(), sha256(temporary)
    summary = {"tokens": tokens, "bytes": size, "sha256": digest, "state": state()}
    write_json(folder / f"{name}.json", {"facts": facts, **summary, "samples": [list(e) for e in entries]})
    return len(entries)


def finished(folder: Path, name: str, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The sidecar of a shard that is complete and was written with these facts, else None."""
    sidecar, tar = folder / f"{name}.json", folder / f"{name}.tar"
    if not sidecar.exists() or not tar.exists():
        return None
    found = read_json(sidecar)
    return found if found["facts"] == facts and found["bytes"] == tar.stat().st_size else None


def write_manifest(folder: Path, facts: dict[str, Any], shards: list[str], **extra: Any) -> None:
    """State what the folder holds; identical input gives identical bytes, so any worker may write it."""
    write_json(
        folder / "manifest.json", {"format": "megakd-shards", "version": 1, "facts": facts, "shards": shards, **extra}
    )


class ShardSet:
    """Random access to the samples of a folder of shards, in manifest order.

    Opening reads the manifest and every sidecar and compares tar sizes; reading checks each sample's crc32.
    Anything missing, cut short or changed is a UserError that names shard and sample.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = folder / "manifest.json"
        if not manifest.exists():
            raise UserError(f"{folder}: no manifest.json here; {_maker(folder)}")
        self.manifest: dict[str, Any] = read_json(manifest)
        if self.manifest.get("format") != "megakd-shards" or self.manifest.get("version") != 1:
            raise UserError(f"{manifest}: not a manifest of version 1 that this MegaKD reads")
        self.facts: dict[str, Any] = self.manifest["facts"]
        self.entries: list[Entry] = []
        self.names: list[str] = []
        self._shard_of: list[int] = []
        self._files: dict[int, int] = {}
        self.sidecars = [self._open_sidecar(name) for name in self.manifest["shards"]]
        for number, (name, sidecar) in enumerate(zip(self.manifest["shards"], self.sidecars, strict=True)):
            self.names.append(name)
            self.entries.extend(Entry(*row) for row in sidecar["samples"])
            self._shard_of.extend([number] * len(sidecar["samples"]))
        if not self.entries:
            raise UserError(f"{folder}: the manifest lists no samples; {_maker(folder)}")

    def _open_sidecar(self, name: str) -> dict[str, Any]:
        sidecar, tar = self.folder / f"{name}.json", self.folder / f"{name}.tar"
        for path in (sidecar, tar):
            if not path.exists():
                raise UserError(f"{path}: listed in the manifest but missing; {_maker(self.folder)}")
        found = read_json(sidecar)
        if found["facts"] != self.facts:
            raise UserError(f"{sidecar}: was written for other data than the manifest beside it; {_maker(self.folder)}")
        if tar.stat().st_size != found["bytes"]:
            raise UserError(
                f"{tar}: {tar.stat().st_size} bytes where its index says {found['bytes']}: cut short or changed; "
                f"delete it and {_maker(self.folder)}"
            )
        return found

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def tokens(self) -> int:
        return sum(sidecar["tokens"] for sidecar in self.sidecars)

    @property
    def bytes(self) -> int:
        return sum(sidecar["bytes"] for sidecar in self.sidecars)

    def __getitem__(self, index: int) -> Sample:
        entry, number = self.entries[index], self._shard_of[index]
        place = f"{self.folder / self.names[number]}.tar: sample {entry.key}"
        if number not in self._files:
            self._files[number] = os.open(self.folder / f"{self.names[number]}.tar", os.O_RDONLY)
        chunk = os.pread(self._files[number], entry.size, entry.offset)
        if zlib.crc32(chunk) != entry.crc32:
            raise UserError(f"{place}: checksum does not match; delete the shard and {_maker(self.folder)}")
        try:
            return _sample(entry.key, chunk)
        except (codec.DamagedRecord, ValueError, KeyError) as error:
            raise UserError(f"{place}: {error}; delete the shard and {_maker(self.folder)}") from error

    def verify(self) -> None:
        """Re-read everything: the sha256 of every tar, then every sample; raises UserError at the first fault."""
        for name, sidecar in zip(self.names, self.sidecars, strict=True):
            if sha256(self.folder / f"{name}.tar") != sidecar["sha256"]:
                raise UserError(
                    f"{self.folder / name}.tar: sha256 differs from its index; delete it and {_maker(self.folder)}"
                )
        for index in range(len(self)):
            self[index]

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def _members(sample: Sample) -> list[tuple[str, bytes]]:
    members = [("tokens.npy", _npy(sample.tokens)), ("starts.npy", _npy(sample.starts))]
    if sample.targets is not None:
        members.append(("targets.mkd", codec.encode(sample.targets)))
    return members


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array.astype("<i4"), allow_pickle=False)
    return buffer.getvalue()


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def _sample(key: str, chunk: bytes) -> Sample:
    members = {}
    with tarfile.open(fileobj=io.BytesIO(chunk + bytes(2 * BLOCK))) as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None, info.name
            members[info.name.removeprefix(f"{key}.")] = file.read()
    tokens, starts = (np.load(io.BytesIO(members[f"{n}.npy"]), allow_pickle=False) for n in ("tokens", "starts"))
    targets = codec.decode(members["targets.mkd"]) if "targets.mkd" in members else None
    return Sample(key, tokens, starts, targets)


def _maker(folder: Path) -> str:
    verb = "generate-logits" if folder.parent.name == "logits" else "tokenize"
    return f"run: megakd {verb} RUN"
