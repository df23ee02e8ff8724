import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megakd.data import codec
from megakd.data.records import Sample, TeacherTargets
from megakd.data.shards import ShardSet, finished, shard_name, write_manifest, write_shard
from megakd.errors import UserError

FACTS = {"part": "train", "tokenizer": {"hash": "abc", "vocab_size": 400}, "sequence_length": 9}


def samples(first: int, count: int, targets: bool = True) -> list[Sample]:
    """Windows of odd lengths; key = index."""
    found = []
    for index in range(first, first + count):
        chooser = np.random.default_rng(index)
        length = int(chooser.integers(2, 40))
        starts = np.unique([0, *chooser.integers(0, length, 2)]).astype(np.int32)
        row = np.sort(np.log(chooser.dirichlet(np.ones(6), length - 1)).astype(np.float32))[:, ::-1]
        record = TeacherTargets(
            chooser.integers(0, 400, (length - 1, 5)).astype(np.int32),
            row[:, :5],
            np.repeat(row[:, 5:], 2, 1),
            -row[:, 0],
        )
        found.append(
            Sample(
                f"{index:09d}", chooser.integers(0, 400, length).astype(np.int32), starts, record if targets else None
            )
        )
    return found


def write(folder: Path, counts: tuple[int, ...] = (3, 1, 4), targets: bool = True) -> Path:
    """A folder of shards with its manifest."""
    done = 0
    for number, count in enumerate(counts):
        assert write_shard(folder, shard_name(number), samples(done, count, targets), FACTS) == count
        done += count
    write_manifest(folder, FACTS, [shard_name(n) for n in range(len(counts))], windows=done)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("written"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "train"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        ShardSet(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal(found: Sample, expected: Sample) -> None:
    assert found.key == expected.key
    assert np.array_equal(found.tokens, expected.tokens) and np.array_equal(found.starts, expected.starts)
    assert (found.targets is None) == (expected.targets is None)
    if expected.targets is not None:
        through = codec.decode(codec.encode(expected.targets))
        assert all(np.array_equal(a, b) for a, b in zip(found.targets, through, strict=True))


@pytest.mark.parametrize("targets", [False, True])
def test_round_trip(tmp_path, targets):
    shards = ShardSet(write(tmp_path, targets=targets))
    expected = samples(0, 8, targets)
    assert len(shards) == 8 and shards.facts == FACTS and shards.manifest["windows"] == 8
    for index in (7, 0, 3, 5, 1, 2, 6, 4, 4):
        assert_equal(shards[index], expected[index])
    assert shards.tokens == sum(len(s.tokens) - 1 for s in expected)
    assert shards.bytes == sum(p.stat().st_size for p in tmp_path.glob("*.tar"))
    assert [e.labels for e in shards.entries] == [len(s.tokens) - len(s.starts) for s in expected]
    shards.verify()
    shards.close()


def test_tar_lists_the_members(written):
    listed = subprocess.run(["tar", "tf", str(written / "shard-00002.tar")], capture_output=True, text=True, check=True)
    keys = [f"{i:09d}" for i in range(4, 8)]
    assert listed.stdout.split() == [
        f"{key}.{suffix}" for key in keys for suffix in ("tokens.npy", "starts.npy", "targets.mkd")
    ]
    assert listed.stderr == ""
    assert (written / "shard-00002.tar").read_bytes().endswith(bytes(1024))  # the two empty blocks that end an archive


def test_webdataset_opens_the_shards(written):
    paths = [str(path) for path in sorted(written.glob("*.tar"))]
    found = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [row["__key__"] for row in found] == [f"{i:09d}" for i in range(8)]
    for row, expected in zip(found, samples(0, 8), strict=True):
        assert_equal(
            Sample(row["__key__"], row["tokens.npy"], row["starts.npy"], codec.decode(row["targets.mkd"])), expected
        )


def test_same_samples_same_bytes(written, tmp_path):
    write(tmp_path)
    names = sorted(p.name for p in written.iterdir())
    assert names == sorted(p.name for p in tmp_path.iterdir()) and len(names) == 7
    for name in names:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name


def test_a_shard_whose_samples_fail_leaves_nothing(tmp_path):
    def broken() -> Iterator[Sample]:
        yield from samples(0, 2)
        raise RuntimeError("source ended badly")

    with pytest.raises(RuntimeError, match="source ended badly"):
        write_shard(tmp_path, shard_name(0), broken(), FACTS)
    assert list(tmp_path.iterdir()) == []


def test_finished_gives_the_sidecar_with_the_state_after_the_last_sample(tmp_path):
    taken: list[str] = []

    def source() -> Iterator[Sample]:
        for sample in samples(0, 3):
            taken.append(sample.key)
            yield sample

    write_shard(tmp_path, shard_name(0), source(), FACTS, lambda: {"taken": list(taken)})
    sidecar = finished(tmp_path, shard_name(0), FACTS)
    assert sidecar is not None and sidecar["state"] == {"taken": taken} and len(taken) == len(sidecar["samples"]) == 3


def test_finished_is_false_for_what_must_be_written_again(folder):
    name, tar, sidecar = shard_name(1), folder / "shard-00001.tar", folder / "shard-00001.json"
    assert finished(folder, name, FACTS) is not None
    assert finished(folder, name, {**FACTS, "sequence_length": 10}) is None
    assert finished(folder, shard_name(3), FACTS) is None
    content = tar.read_bytes()
    tar.write_bytes(content[:-1])
    assert finished(folder, name, FACTS) is None
    tar.unlink()
    assert finished(folder, name, FACTS) is None
    tar.write_bytes(content)
    sidecar.unlink()
    assert finished(folder, name, FACTS) is None


def test_no_manifest(folder):
    (folder / "manifest.json").unlink()
    assert str(folder) in error_of(folder) and "megakd tokenize" in error_of(folder)
    logits = Path(shutil.copytree(folder, folder.parent / "logits" / "train"))
    assert "megakd generate-logits" in error_of(logits)


@pytest.mark.parametrize("change", [{"version": 2}, {"format": "other"}])
def test_manifest_of_another_format(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    assert "manifest.json" in error_of(folder)


@pytest.mark.parametrize("suffix", ["tar", "json"])
def test_missing_shard(folder, suffix):
    (folder / f"shard-00001.{suffix}").unlink()
    assert f"shard-00001.{suffix}" in error_of(folder) and "missing" in error_of(folder)


def test_manifest_of_nothing(tmp_path):
    write_manifest(tmp_path, FACTS, [])
    assert "no samples" in error_of(tmp_path)


def test_cut_tar(folder):
    tar = folder / "shard-00002.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert "shard-00002.tar" in error_of(folder) and "cut short" in error_of(folder)


def test_sidecar_of_other_facts(folder):
    write_shard(folder, shard_name(1), samples(3, 1), {**FACTS, "part": "holdout"})
    assert "shard-00001.json" in error_of(folder)


def test_cut_sidecar(folder):
    sidecar = folder / "shard-00001.json"
    sidecar.write_text(sidecar.read_text()[:-20])
    assert "shard-00001.json" in error_of(folder)


def test_flipped_byte_names_shard_and_sample(folder):
    entries = ShardSet(folder).entries
    number = 5  # the second sample of shard 2
    for offset in range(entries[number].offset, entries[number].offset + entries[number].size, 97):
        flip(folder / "shard-00002.tar", offset)
        shards = ShardSet(folder)
        with pytest.raises(UserError, match=r"shard-00002\.tar.*sample 000000005"):
            shards[number]
        for other in (0, 4, 6):
            assert_equal(shards[other], samples(other, 1)[0])
        shards.close()
        flip(folder / "shard-00002.tar", offset)
    assert_equal(ShardSet(folder)[number], samples(number, 1)[0])


def test_verify_notices_a_flipped_byte_anywhere(folder):
    tar = folder / "shard-00001.tar"
    size = tar.stat().st_size
    ShardSet(folder).verify()
    for offset in [*range(0, size, 61), size - 1]:  # headers, content, padding, and the zero blocks at the end
        flip(tar, offset)
        with pytest.raises(UserError, match=r"shard-00001\.tar"):
            ShardSet(folder).verify()
        flip(tar, offset)
    ShardSet(folder).verify()
