import errno
import gc
import json
import os
import resource
import shutil
import subprocess
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from megakd.config import LogitsConfig
from megakd.data import codec
from megakd.data.book import Book, build_book, save_book
from megakd.data.records import IGNORED, Sample, TeacherTargets
from megakd.data.shards import (
    DamagedSample,
    ShardSet,
    Stored,
    finished,
    layout_of,
    shard_name,
    summary_of,
    write_manifest,
    write_shard,
    write_stored,
)
from megakd.errors import UserError
from megakd.files import digest, read_json, write_json
from megakd.models.teacher import targets_from_logits

VOCABULARY, LENGTH = 400, 40
TOKENS = {"part": "train", "tokenizer": {"hash": "abc", "vocab_size": VOCABULARY}, "sequence_length": LENGTH}
BOOK = build_book(np.arange(VOCABULARY).repeat(np.arange(VOCABULARY, 0, -1) % 7 + 1), VOCABULARY)
CONFIGS = {
    "topk": LogitsConfig(profile="topk", top_k=6, pmin=0.02),
    "sampled": LogitsConfig(profile="sampled", draws=9),
    "hybrid": LogitsConfig(profile="hybrid", top_k=4, draws=5, draw_temperature=2.0),
}


LAYOUTS: dict[str, codec.Layout] = {}


def facts(kind: str | None = "topk") -> dict[str, Any]:
    """Of token shards (None), or of targets of a profile."""
    if kind is None:
        return TOKENS
    config = CONFIGS[kind]
    return {
        "tokens": TOKENS,
        "codec": codec.NAME,
        "book": BOOK.digest,
        "vocab_size": VOCABULARY,
        "levels": config.levels,
        "top_k": config.top_k if kind != "sampled" else 0,
        "draws": config.draws if kind != "topk" else 0,
        "temperatures": list(config.declared_temperatures),
    }


@pytest.fixture(scope="module", autouse=True)
def layouts(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("book")
    save_book(folder, BOOK)
    LAYOUTS.update({kind: layout_of(facts(kind), folder) for kind in CONFIGS})


def samples(first: int, count: int, kind: str | None = "topk") -> list[Sample]:
    """Windows of odd lengths; key = index."""
    found = []
    for index in range(first, first + count):
        chooser, generator = np.random.default_rng(index), torch.Generator().manual_seed(index)
        length = int(chooser.integers(2, LENGTH + 1))
        tokens = chooser.integers(0, VOCABULARY, length).astype(np.int32)
        starts = np.unique([0, *chooser.integers(0, length, 2)]).astype(np.int32)
        targets = None
        if kind is not None:
            labels = torch.from_numpy(tokens[1:].astype(np.int64))
            labels[[s - 1 for s in starts if s]] = IGNORED
            logits = 5 * torch.randn(length - 1, VOCABULARY, generator=generator)
            offsets = torch.rand(length - 1, generator=generator, dtype=torch.float64)
            whole = targets_from_logits(logits, labels, CONFIGS[kind], offsets)
            targets = TeacherTargets(*(field.numpy() for field in whole))
        found.append(Sample(f"{index:09d}", tokens, starts, targets))
    return found


def write(folder: Path, counts: tuple[int, ...] = (3, 1, 4), kind: str | None = "topk") -> Path:
    """A folder of shards with its manifest."""
    done, shards = 0, []
    if kind is not None:
        save_book(folder, BOOK)
    for number, count in enumerate(counts):
        name = shard_name(number)
        sidecar = write_shard(folder, name, samples(done, count, kind), facts(kind), LAYOUTS.get(kind or ""))
        assert finished(folder, name, facts(kind), reread=True) == sidecar
        shards.append(summary_of(name, sidecar))
        done += count
    write_manifest(folder, facts(kind), shards, complete=True, windows=done)
    return folder


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


def error_of(folder: Path, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        ShardSet(folder, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(found: Sample, expected: Sample, kind: str = "topk") -> bool:
    """Equal; targets as far as the codec keeps them."""
    if expected.targets is not None:
        layout = LAYOUTS[kind]
        expected = codec.decode(expected.key, codec.encode(expected, layout), layout)
    assert (found.key, found.targets is None) == (expected.key, expected.targets is None)
    pairs = [
        *zip(found[1:3], expected[1:3], strict=True),
        *zip(found.targets or (), expected.targets or (), strict=True),
    ]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


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


def test_no_manifest(folder, tmp_path):
    """What makes one: tokenize for tokens, generate-logits for targets (there is a book), wherever they lie."""
    tokens = write(tmp_path / "tokens", kind=None)
    logits = Path(shutil.copytree(tokens, tmp_path / "logits" / "train"))
    for each, verb in ((folder, "generate-logits"), (tokens, "tokenize"), (logits, "generate-logits")):
        (each / "manifest.json").unlink()
        assert str(each) in error_of(each) and f"megakd {verb}" in error_of(each)


@pytest.mark.parametrize("change", [{"version": 1}, {"version": 3}, {"format": "other"}, {"format": None}])
@pytest.mark.parametrize("name", ["manifest", "shard-00001"])
def test_index_of_another_format(folder, name, change):
    path = folder / f"{name}.json"
    value = {**read_json(path), **change}
    value.pop("seal")
    write_json(path, {**value, "seal": digest(value)})
    assert f"{name}.json" in error_of(folder) and ("version" in error_of(folder) or "format" in error_of(folder))


def edits(value: Any) -> Iterator[Any]:
    """The value with one thing in it changed, for every thing."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: changed} for changed in edits(inner))
        yield {**value, "new": 1}
    elif isinstance(value, list):
        yield [*value, value[0] if value else 1]
        for i, inner in enumerate(value):
            yield value[:i] + value[i + 1 :]
            yield from ([*value[:i], changed, *value[i + 1 :]] for changed in edits(inner))
    else:
        yield not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value}x"


@pytest.mark.parametrize("name", ["manifest", "shard-00001"])
def test_any_edit_of_an_index_is_refused(folder, name):
    path = folder / f"{name}.json"
    value = read_json(path)
    count = 0
    for edited in edits(value):
        write_json(path, edited)
        assert str(path) in error_of(folder)
        count += 1
    assert count > 40
    path.write_text(json.dumps(value))  # written another way, it is still the same
    ShardSet(folder).verify()


@pytest.mark.parametrize("suffix", ["tar", "json"])
def test_missing_shard(folder, suffix):
    (folder / f"shard-00001.{suffix}").unlink()
    for how in ({}, {"tolerant": True}):
        assert f"shard-00001.{suffix}" in error_of(folder, **how) and "missing" in error_of(folder, **how)


def test_manifest_of_nothing(tmp_path):
    write_manifest(tmp_path, TOKENS, [], complete=True)
    assert "no samples" in error_of(tmp_path)


def test_cut_tar(folder):
    tar = folder / "shard-00002.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert "shard-00002.tar" in error_of(folder) and "cut short" in error_of(folder)


def test_sidecar_of_other_facts(folder):
    write_shard(folder, shard_name(1), samples(3, 1), {**facts(), "part": "holdout"}, LAYOUTS["topk"])
    assert "shard-00001.json" in error_of(folder) and "other data" in error_of(folder)


@pytest.mark.parametrize("first, count", [(3, 2), (4, 1)])
def test_sidecar_of_another_shard_of_the_same_data(folder, first, count):
    write_shard(folder, shard_name(1), samples(first, count), facts(), LAYOUTS["topk"])
    assert "shard-00001.json" in error_of(folder) and "not the shard" in error_of(folder)


def test_cut_sidecar(folder):
    sidecar = folder / "shard-00001.json"
    sidecar.write_text(sidecar.read_text()[:-20])
    assert "shard-00001.json" in error_of(folder)


def test_book_that_is_missing_or_of_another_vocabulary(folder, tmp_path):
    book = folder / BOOK.file_name
    book.rename(tmp_path / "aside")
    assert str(book) in error_of(folder) and "missing" in error_of(folder)
    other: Book = build_book(np.arange(300), 300)
    save_book(folder, other)
    write_manifest(folder, {**facts(), "book": other.digest}, [], complete=True)
    assert "300 ids where the data has 400" in error_of(folder)


def test_other_codec_is_refused(folder):
    write_manifest(folder, {**facts(), "codec": "mkd-1"}, [], complete=True)
    assert "'mkd-1'" in error_of(folder) and f"'{codec.NAME}'" in error_of(folder)


def test_flipped_byte_names_shard_and_sample(folder):
    whole = ShardSet(folder)
    number = 5  # the second sample of shard 2
    entry = whole.entry(number)
    for offset in range(entry.offset, entry.offset + entry.size, 97):
        flip(folder / "shard-00002.tar", offset)
        shards = ShardSet(folder)
        with pytest.raises(DamagedSample, match=r"shard-00002\.tar.*sample 000000005.*delete the shard"):
            shards[number]
        assert all(same(shards[other], samples(other, 1)[0]) for other in (0, 4, 6))
        shards.close()
        flip(folder / "shard-00002.tar", offset)
    assert same(ShardSet(folder)[number], samples(number, 1)[0])


def test_a_record_that_does_not_decode_is_a_damaged_sample(folder):
    """Its checksum in the index fits, but it was written for another layout: the name of shard and sample again."""
    layout = LAYOUTS["topk"]._replace(temperatures=(1.0, 2.0, 3.0))
    three = [s._replace(targets=s.targets._replace(log_tails=s.targets.log_tails[:, [0, 1, 1]])) for s in samples(3, 1)]
    sidecar = write_shard(folder, shard_name(1), three, facts(), layout)
    manifest = read_json(folder / "manifest.json")
    manifest["shards"][1] = summary_of(shard_name(1), sidecar)
    write_manifest(folder, facts(), manifest["shards"], complete=True)
    with pytest.raises(DamagedSample, match=r"shard-00001\.tar: sample 000000003: was written with another profile"):
        ShardSet(folder)[3]


def test_tolerant_loses_only_what_lies_beyond_the_cut(folder):
    tar, whole = folder / "shard-00002.tar", ShardSet(folder)
    entries = [whole.entry(i) for i in range(4, 8)]
    content = tar.read_bytes()
    tar.write_bytes(content[: entries[2].offset + 700])  # into the third sample of four
    assert "cut short" in error_of(folder)
    shards = ShardSet(folder, tolerant=True)
    assert all(same(shards[i], samples(i, 1)[0]) for i in range(6))
    for number in (6, 7):
        with pytest.raises(DamagedSample, match=f"sample 00000000{number}: checksum"):
            shards[number]
    tar.write_bytes(b"")
    with pytest.raises(DamagedSample):
        ShardSet(folder, tolerant=True)[4]


def test_a_shard_that_vanishes_later_is_damage_of_each_of_its_samples(folder):
    shards = ShardSet(folder)
    (folder / "shard-00002.tar").unlink()
    for number in (4, 7):
        with pytest.raises(DamagedSample, match=rf"shard-00002\.tar: sample 00000000{number}: cannot be read: No such"):
            shards[number]
    assert same(shards[0], samples(0, 1)[0])


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
        gc.collect()
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


def test_scratch_that_is_full_is_a_user_error(written, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="No space left") as caught:
        ShardSet(written, scratch=tmp_path)[0]
    assert str(tmp_path) in str(caught.value)


def test_more_shards_than_files_may_be_open(tmp_path):
    folder = write(tmp_path / "train", (1,) * 60)
    shards, before = ShardSet(folder), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, before[1]))
    try:
        assert all(same(shards[i], expected) for i, expected in enumerate(samples(0, 60)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        shards.close()
