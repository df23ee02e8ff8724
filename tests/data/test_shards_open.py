"""Shards that arrive while they are read, copies on a scratch disk, threads, many files."""

import gc
import json
import os
import resource
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megakd.data.shard_writer import shard_name, summary_of, write_manifest, write_shard
from megakd.data.shards import SIDECAR, VERSION, Index, ShardSet
from megakd.errors import UserError
from megakd.system.files import write_sealed
from tests.data.small_shards import LAYOUTS, error_of, facts, same, samples, write


def unfinished(folder: Path, absent: list[int]) -> None:
    """Make a whole folder look as a capture leaves it that has not yet come to some shards."""
    manifest = json.loads((folder / "manifest.json").read_text())
    planned = [{key: shard[key] for key in ("name", "samples", "tokens")} for shard in manifest["shards"]]
    write_manifest(folder, manifest["facts"], planned, complete=False)
    for number in absent:
        for suffix in ("tar", "json"):
            path = folder / f"{shard_name(number)}.{suffix}"
            path.rename(path.with_name(f"later-{path.name}"))


def arrive(folder: Path, number: int) -> None:
    for suffix in ("tar", "json"):
        path = folder / f"{shard_name(number)}.{suffix}"
        path.with_name(f"later-{path.name}").rename(path)


def test_unfinished_capture_is_refused_unless_growing(folder):
    unfinished(folder, [1, 2])
    assert "not finished" in error_of(folder) and "stream.follow=true" in error_of(folder)
    shards = ShardSet(folder, growing=True)
    assert len(shards) == 8 and shards.sizes == [3, 1, 4] and shards.tokens == ShardSet(folder, True).tokens
    assert shards.missing(range(3)) == [] and shards.missing([0, 4, 5]) == [shard_name(2)]
    assert shards.missing(range(8)) == [shard_name(1), shard_name(2)]
    assert shards.bytes == (folder / "shard-00000.tar").stat().st_size
    arrive(folder, 2)
    assert shards.missing(range(8)) == [shard_name(1)] and shards.missing([7, 1]) == []
    assert all(same(shards[i], samples(i, 1)[0]) for i in (0, 4, 7))
    arrive(folder, 1)
    assert shards.missing(range(8)) == [] and same(shards[3], samples(3, 1)[0])
    assert shards.bytes == sum(p.stat().st_size for p in folder.glob("*.tar"))


def test_a_shard_that_arrives_is_checked_as_the_others_are(folder):
    unfinished(folder, [1, 2])
    shards = ShardSet(folder, growing=True)
    arrive(folder, 2)
    tar = folder / "shard-00002.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"shard-00002\.tar.*cut short"):
        shards.missing([7])
    tar.write_bytes(content)
    assert shards.missing([7]) == []
    write_shard(folder, shard_name(1), samples(3, 1), {**facts(), "top_k": 7}, LAYOUTS["topk"])
    with pytest.raises(UserError, match=r"shard-00001\.json.*other data"):
        shards.missing([3])


def copies_open(scratch: Path) -> int:
    """Open files of this process that lie in the folder, with a name or without."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{scratch}/")
        except FileNotFoundError:
            continue
    return found


def test_scratch_holds_few_copies_and_none_has_a_name(written, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    shards = ShardSet(written, scratch=scratch, copies=2)
    assert copies_open(scratch) == 0
    opened = []
    for index in (0, 1, 3, 0, 7, 3, 3, 0, 5):
        assert same(shards[index], samples(index, 1)[0])
        opened.append(copies_open(scratch))
        assert list(scratch.iterdir()) == []
    assert opened == [1, 1, 2, 2, 2, 2, 2, 2, 2]
    shards.close()
    assert copies_open(scratch) == 0
    assert same(shards[4], samples(4, 1)[0]) and copies_open(scratch) == 1  # it opens again
    shards.close()


def test_scratch_reads_the_shard_once(written, tmp_path):
    """Remote storage is read from front to back, and a sample that is read again comes from the copy."""
    folder = Path(shutil.copytree(written, tmp_path / "remote"))
    shards = ShardSet(folder, scratch=tmp_path)
    assert same(shards[4], samples(4, 1)[0])
    (folder / "shard-00002.tar").unlink()
    assert all(same(shards[i], samples(i, 1)[0]) for i in range(4, 8))
    shards.close()


def test_copies_that_are_dropped_are_closed(written, tmp_path):
    """By close, not by the garbage collector, which would warn."""
    shards = ShardSet(written, scratch=tmp_path, copies=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in (0, 3, 4, 0):
            shards[index]
        gc.collect()
    assert [str(w.message) for w in caught] == []
    shards.close()


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_threads_read_while_copies_are_dropped(written, tmp_path, copies):
    shards, expected = ShardSet(written, scratch=tmp_path, copies=copies), samples(0, 8)

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, 8, 60)
        return all(same(shards[i], expected[i]) for i in order)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(12)))
    gc.collect()
    assert copies_open(tmp_path) <= copies
    shards.close()
    assert copies_open(tmp_path) == 0


def test_more_shards_than_files_may_be_open(tmp_path):
    folder = write(tmp_path / "train", (1,) * 60)
    shards, before = ShardSet(folder), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, before[1]))
    try:
        assert all(same(shards[i], expected) for i, expected in enumerate(samples(0, 60)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        shards.close()


def test_an_open_set_keeps_few_bytes_of_each_sample(tmp_path):
    """Python objects took 270 bytes for each, on every rank: 0.3 GB at two billion tokens."""
    count = 2000
    rows = [[f"{i:09d}", 1024 * i, 1024 + i, (i * 2654435761) % 2**32, i] for i in range(count)]
    (tmp_path / "shard-00000.tar").touch()
    sidecar = {"facts": {}, "tokens": 1, "bytes": 0, "sha256": "0", "state": None, "samples": rows}
    write_sealed(tmp_path / "shard-00000.json", {"format": SIDECAR, "version": VERSION, **sidecar})
    write_manifest(tmp_path, {}, [summary_of("shard-00000", sidecar)], complete=True)
    opened = ShardSet(tmp_path)
    assert [list(opened.entry(i)) for i in range(count)] == rows
    assert {type(value) for value in opened.entry(7)} == {str, int}
    assert sum(column.nbytes for column in opened._entries[0]) <= 30 * count
    for bad in ([["a", 0, 1, 2]], [["a", 0, 1, -1, 2]], [[7, 0, 1, 2, 3]], [None]):
        with pytest.raises(UserError, match=r"shard-00000\.json: its samples are no list of \[key, offset"):
            Index.of(bad, tmp_path / "shard-00000.json")
