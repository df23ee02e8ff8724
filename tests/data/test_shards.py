"""What is written is read, by ShardSet, tar and webdataset; what is finished is told apart."""

import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from megakd.data import codec
from megakd.data.records import Sample
from megakd.data.shard_writer import Stored, finished, shard_name, write_shard, write_stored
from megakd.data.shards import DamagedSample, ShardSet
from tests.data.small_shards import LAYOUTS, TOKENS, facts, flip, same, samples, write


@pytest.mark.parametrize("kind", [None, "topk", "sampled", "hybrid"])
def test_round_trip(tmp_path, kind):
    shards = ShardSet(write(tmp_path, kind=kind))
    expected = samples(0, 8, kind)
    assert len(shards) == 8 and shards.facts == facts(kind) and shards.manifest["windows"] == 8
    assert (shards.names, shards.sizes) == ([shard_name(n) for n in range(3)], [3, 1, 4])
    for index in (7, 0, 3, 5, 1, 2, 6, 4, 4):
        assert same(shards[index], expected[index], kind)
    assert shards.tokens == sum(len(s.tokens) - 1 for s in expected)
    assert shards.bytes == sum(p.stat().st_size for p in tmp_path.glob("*.tar"))
    assert [shards.entry(i).labels for i in range(8)] == [len(s.tokens) - len(s.starts) for s in expected]
    assert "shard-00002.tar: sample 000000004" in shards.place(4)
    assert shards.missing(range(8)) == []
    shards.verify()
    shards.close()


@pytest.mark.parametrize("kind", [None, "topk", "sampled", "hybrid"])
def test_a_blank_sample_fits_beside_the_others_and_has_no_label(tmp_path, kind):
    shards = ShardSet(write(tmp_path, kind=kind))
    blank, other = shards.blank(), shards[0]
    assert len(blank.tokens) - len(blank.starts) == 0 and len(blank.tokens) == 2
    for mine, theirs in zip(blank.targets or (), other.targets or (), strict=True):
        assert len(mine) == 1 and mine.shape[1:] == theirs.shape[1:] and mine.dtype == theirs.dtype
    assert {a.dtype for a in blank[1:3]} == {np.dtype(np.int32)} and (blank.targets is None) == (other.targets is None)


def test_tar_lists_the_members(written, tmp_path):
    def listed(tar: Path) -> list[str]:
        done = subprocess.run(["tar", "tf", str(tar)], capture_output=True, text=True, check=True)
        assert done.stderr == "" and tar.read_bytes().endswith(bytes(1024))  # two empty blocks end an archive
        return done.stdout.split()

    keys = [f"{i:09d}" for i in range(4, 8)]
    assert listed(written / "shard-00002.tar") == [f"{key}.mkd" for key in keys]
    tokens = write(tmp_path, kind=None) / "shard-00002.tar"
    assert listed(tokens) == [f"{key}.{s}" for key in keys for s in ("tokens.npy", "starts.npy")]


def test_webdataset_opens_the_shards(written, tmp_path):
    def opened(folder: Path) -> list[dict[str, Any]]:
        paths = [str(path) for path in sorted(folder.glob("*.tar"))]
        return list(webdataset.WebDataset(paths, shardshuffle=False).decode())

    found = opened(written)
    assert [row["__key__"] for row in found] == [f"{i:09d}" for i in range(8)]
    for row, expected in zip(found, samples(0, 8), strict=True):
        assert same(codec.decode(row["__key__"], row["mkd"], LAYOUTS["topk"]), expected)
    for row, expected in zip(opened(write(tmp_path, kind=None)), samples(0, 8, None), strict=True):
        assert same(Sample(row["__key__"], row["tokens.npy"], row["starts.npy"]), expected)


def test_same_samples_same_bytes(written, tmp_path):
    write(tmp_path)
    names = sorted(p.name for p in written.iterdir())
    assert names == sorted(p.name for p in tmp_path.iterdir()) and len(names) == 8
    for name in names:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name


@pytest.mark.parametrize("kind", [None, "topk"])
def test_members_are_the_bytes_in_the_tar_and_are_written_as_they_are(tmp_path, kind):
    shards = ShardSet(write(tmp_path / "a", kind=kind))
    with tarfile.open(tmp_path / "a" / "shard-00002.tar") as tar:
        contents = {name: content.read() for name in tar.getnames() if (content := tar.extractfile(name))}
    assert {f"{i:09d}.{suffix}": data for i in range(4, 8) for suffix, data in shards.members(i).items()} == contents
    expected = samples(4, 4, kind)
    stored = [
        Stored(s.key, shards.members(4 + i), len(s.tokens), shards.entry(4 + i).labels) for i, s in enumerate(expected)
    ]
    write_stored(tmp_path / "b", shard_name(2), stored, facts(kind))
    for name in ("shard-00002.tar", "shard-00002.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    flip(tmp_path / "a" / "shard-00002.tar", shards.entry(5).offset)
    with pytest.raises(DamagedSample, match=r"shard-00002\.tar: sample 000000005: checksum"):
        shards.members(5)


def test_a_shard_whose_samples_fail_leaves_nothing(tmp_path):
    def broken() -> Iterator[Sample]:
        yield from samples(0, 2, None)
        raise RuntimeError("source ended badly")

    with pytest.raises(RuntimeError, match="source ended badly"):
        write_shard(tmp_path, shard_name(0), broken(), TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_finished_gives_the_sidecar_with_the_state_after_the_last_sample(tmp_path):
    taken: list[str] = []

    def source() -> Iterator[Sample]:
        for sample in samples(0, 3, None):
            taken.append(sample.key)
            yield sample

    written = write_shard(tmp_path, shard_name(0), source(), TOKENS, state=lambda: {"taken": list(taken)})
    sidecar = finished(tmp_path, shard_name(0), TOKENS)
    assert sidecar == {**written, "samples": [list(row) for row in written["samples"]]}
    assert sidecar["state"] == {"taken": taken} and len(taken) == len(sidecar["samples"]) == 3


def test_finished_is_false_for_what_must_be_written_again(folder):
    name, tar, sidecar = shard_name(1), folder / "shard-00001.tar", folder / "shard-00001.json"
    assert finished(folder, name, facts()) is not None
    assert finished(folder, name, {**facts(), "top_k": 7}) is None
    assert finished(folder, shard_name(3), facts()) is None
    content, index = tar.read_bytes(), sidecar.read_bytes()
    tar.write_bytes(content[:-1])
    assert finished(folder, name, facts()) is None
    tar.unlink()
    assert finished(folder, name, facts()) is None
    tar.write_bytes(content)
    for damage in (index[:-20], b"", b"[]", index.replace(b"000000003", b"000000004")):
        sidecar.write_bytes(damage)
        assert finished(folder, name, facts()) is None
    sidecar.unlink()
    assert finished(folder, name, facts()) is None
    sidecar.write_bytes(index)
    assert finished(folder, name, facts()) is not None


def test_finished_reads_again_only_when_asked(folder):
    name, tar = shard_name(1), folder / "shard-00001.tar"
    size = tar.stat().st_size
    for offset in [*range(0, size, 301), size - 1]:
        flip(tar, offset)
        assert finished(folder, name, facts()) is not None  # its size alone says nothing
        assert finished(folder, name, facts(), reread=True) is None
        flip(tar, offset)
    assert finished(folder, name, facts(), reread=True) is not None
