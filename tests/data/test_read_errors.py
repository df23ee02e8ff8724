"""What the disk says when a sample is read: whose fault it is, and whether it is damage that may be skipped."""

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megakd.data.batches import Reader
from megakd.data.records import Sample
from megakd.data.shards import DamagedSample, ShardSet
from megakd.errors import UserError


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with targets; read-only."""
    copy = tmp_path_factory.mktemp("read") / "logits" / "train"
    return Path(shutil.copytree(prepared / "data" / "logits" / "train", copy))


@pytest.fixture(params=["in place", "copied"])
def opened(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[ShardSet]:
    shards = ShardSet(folder, tolerant=True, scratch=tmp_path if request.param == "copied" else None)
    yield shards
    shards.close()


def same(mine: Sample, theirs: Sample) -> bool:
    return np.array_equal(mine.tokens, theirs.tokens) and mine.key == theirs.key


def error_of(shards: ShardSet, index: int) -> UserError:
    """What a reader that skips damage raises all the same."""
    reader = Reader(shards, 1, skip=True)
    try:
        with pytest.raises(UserError) as caught:
            list(reader.read([index]))
    finally:
        reader.close()
    assert reader.damaged == {} and not isinstance(caught.value, DamagedSample) and "\n" not in str(caught.value)
    return caught.value


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def failing(number: int, at: int, reads: list[int]) -> Callable[[int, int, int], bytes]:
    """os.pread of a disk that answers with an error when the byte `at` is among those asked for."""
    pread = os.pread

    def read(file: int, size: int, offset: int) -> bytes:
        reads.append(size)
        if offset <= at < offset + size:
            raise OSError(number, os.strerror(number))
        return pread(file, size, offset)

    return read


def test_a_shard_that_vanishes_is_no_damage_of_its_samples(prepared: Path, opened: ShardSet):
    tar = opened.folder / "shard-00001.tar"
    aside = tar.rename(tar.with_suffix(".away"))
    try:
        for index in (opened.sizes[0], opened.sizes[0] + 3):
            message = str(error_of(opened, index))
            assert message == f"{tar}: cannot be opened: No such file or directory; run: megakd generate-logits RUN"
        assert same(opened[0], ShardSet(prepared / "data" / "logits" / "train")[0])
    finally:
        aside.rename(tar)
    assert opened[opened.sizes[0]].targets is not None


def test_too_many_open_files_are_no_damage(opened: ShardSet):
    """Neither that of a sample, nor that of the scratch disk; other shards are closed first."""
    free = os.dup(0)
    os.close(free)
    with limited(resource.RLIMIT_NOFILE, free):
        assert str(error_of(opened, 0)) == f"{opened.folder}/shard-00000.tar: cannot be opened: Too many open files"
    assert opened[0].targets is not None and opened[opened.sizes[0]].targets is not None
    free = os.dup(0)
    os.close(free)
    with limited(resource.RLIMIT_NOFILE, free):
        if opened.scratch is None:
            assert opened[sum(opened.sizes[:2])].targets is not None


def test_bytes_that_the_disk_has_lost_are_damage_of_their_sample_alone(opened: ShardSet, monkeypatch):
    lost, reads = opened.entry(5), []
    monkeypatch.setattr(os, "pread", failing(errno.EIO, lost.offset + 10, reads))
    with pytest.raises(DamagedSample, match=rf"shard-00000\.tar: sample {lost.key}: cannot be read: Input/output"):
        opened[5]
    assert all(opened[index].targets is not None for index in (0, 4, 6, opened.sizes[0]))
    if opened.scratch:
        assert reads.count(1 << 24) == 2  # one a shard, not one a sample
    reader = Reader(opened, 2, skip=True)
    assert [sample.key == "blank" for sample in reader.read(range(8))] == [i == 5 for i in range(8)]
    reader.close()


def test_another_error_in_reading_is_that_of_the_shard(opened: ShardSet, monkeypatch):
    monkeypatch.setattr(os, "pread", failing(errno.ESTALE, opened.entry(5).offset, []))
    message = str(error_of(opened, 5))
    assert f"{opened.folder}/shard-00000.tar" in message and message.endswith("cannot be read: Stale file handle")
    assert opened.scratch is None or f"{opened.scratch}:" not in message


def test_a_scratch_disk_that_cannot_take_a_copy_is_named_as_such(folder: Path, tmp_path: Path):
    shards = ShardSet(folder, scratch=tmp_path)
    with limited(resource.RLIMIT_FSIZE, 10_000):
        message = str(error_of(shards, 0))
    assert message == (
        f"{tmp_path}: cannot take a copy of {folder}/shard-00000.tar: File too large; see stream.scratch"
    )
    assert shards[0].targets is not None and list(tmp_path.iterdir()) == []
    shards.close()
