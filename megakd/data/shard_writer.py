"""Write WebDataset tar shards: a tar and its sidecar index, each atomically, and the manifest of a folder.

megakd/data/shards.py has the format and reads it.
"""

import io
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megakd.data import codec
from megakd.data.records import Sample
from megakd.data.shards import (
    BLOCK,
    MANIFEST,
    MASKED_VERSION,
    SIDECAR,
    VERSION,
    VERSIONS,
    Entry,
    Members,
    label_masked,
    read_manifest,
)  # fmt: skip
from megakd.errors import UserError
from megakd.system.files import publishing, read_sealed, sha256, write_sealed
from megakd.system.version import made_with


class Stored(NamedTuple):
    """A sample as a tar holds it, and how many tokens and labels it has."""

    key: str
    members: Members
    tokens: int
    labels: int


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def write_shard(
    folder: Path,
    name: str,
    samples: Iterable[Sample],
    facts: dict[str, Any],
    layout: codec.Layout | None = None,
    state: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Write one tar and its sidecar, each atomically; returns the sidecar. Same samples, same bytes.

    layout: how targets are stored. state: asked after the last sample, kept in the sidecar: where the writer of the
    next shard goes on.
    """
    return write_stored(folder, name, (_stored(sample, layout) for sample in samples), facts, state)


def write_stored(
    folder: Path,
    name: str,
    samples: Iterable[Stored],
    facts: dict[str, Any],
    state: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """`write_shard` of samples that are bytes already; `ShardSet.members` gives those of another shard."""
    entries: list[Entry] = []
    tokens = 0
    with publishing(folder / f"{name}.tar") as temporary, temporary.open("wb") as file:
        for sample in samples:
            chunk = b"".join(_member(f"{sample.key}.{suffix}", data) for suffix, data in sample.members.items())
            entries.append(Entry(sample.key, file.tell(), len(chunk), zlib.crc32(chunk), sample.labels))
            tokens += sample.tokens - 1
            file.write(chunk)
        file.write(bytes(2 * BLOCK))
        file.flush()
        size, digest = file.tell(), sha256(temporary)
    summary = {"tokens": tokens, "bytes": size, "sha256": digest, "state": state()}
    head = {"format": SIDECAR, "version": _version(facts), "facts": facts}
    sidecar = {**head, **summary, "samples": [list(e) for e in entries]}
    write_sealed(folder / f"{name}.json", sidecar, compact=True)
    return sidecar


def finished(folder: Path, name: str, facts: dict[str, Any], reread: bool = False) -> dict[str, Any] | None:
    """The sidecar of a shard that is complete and was written with these facts, else None.

    reread: compare the tar's sha256 too. A damaged sidecar counts as none: the shard is made again.
    """
    sidecar, tar = folder / f"{name}.json", folder / f"{name}.tar"
    if not sidecar.exists() or not tar.exists():
        return None
    try:
        found = read_sealed(sidecar, SIDECAR, *VERSIONS)
    except UserError:
        return None
    if found["facts"] != facts or found["bytes"] != tar.stat().st_size:
        return None
    return None if reread and sha256(tar) != found["sha256"] else found


def write_manifest(
    folder: Path, facts: dict[str, Any], shards: list[dict[str, Any]], complete: bool, **extra: Any
) -> None:
    """State what the folder holds, or will hold; identical input gives identical bytes, so any worker may write it.

    A complete one also says which MegaKD completed it. It stays as it is where a later one has nothing else to say.
    """
    head = {"format": MANIFEST, "version": _version(facts), "facts": facts}
    value = {**head, "complete": complete, "shards": shards, **extra}
    if complete:
        before = known_manifest(folder, facts)
        if before and {key: before[key] for key in before.keys() - {"megakd"}} == value:
            return
        value["megakd"] = made_with()
    write_sealed(folder / "manifest.json", value)


def known_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder that its writer comes back to; None when it is missing, damaged or of other data."""
    try:
        found = read_manifest(folder)
    except UserError:
        return None
    return found if found["facts"] == facts else None


def summary_of(name: str, sidecar: dict[str, Any]) -> dict[str, Any]:
    """A manifest's line about a finished shard."""
    own = {key: sidecar[key] for key in ("tokens", "bytes", "sha256")}
    return {"name": name, "samples": len(sidecar["samples"]), **own}


def _version(facts: dict[str, Any]) -> int:
    return MASKED_VERSION if label_masked(facts) else VERSION


def _stored(sample: Sample, layout: codec.Layout | None) -> Stored:
    if sample.targets is None:
        members: Members = {"tokens.npy": _npy(sample.tokens), "starts.npy": _npy(sample.starts)}
        if sample.mask is not None:
            members["mask.npy"] = _npy(sample.mask, "|b1")
    else:
        assert layout is not None, sample.key
        members = {"mkd": codec.encode(sample, layout)}
    return Stored(sample.key, members, len(sample.tokens), sample.label_count)


def _npy(array: np.ndarray, dtype: str = "<i4") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array.astype(dtype), allow_pickle=False)
    return buffer.getvalue()


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
