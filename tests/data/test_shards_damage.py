"""Shards that are missing, cut short, changed or of other data: the error names the place."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakd.data import codec
from megakd.data.codebook import Book, build_book, save_book
from megakd.data.shard_writer import shard_name, summary_of, write_manifest, write_shard
from megakd.data.shards import DamagedSample, ShardSet
from megakd.errors import UserError
from megakd.system.files import digest, read_json, write_json
from tests.data.small_shards import BOOK, LAYOUTS, TOKENS, error_of, facts, flip, same, samples, write


def test_no_manifest(folder, tmp_path):
    """What makes one: tokenize for tokens, generate-logits for targets (there is a codebook), wherever they lie."""
    tokens = write(tmp_path / "tokens", kind=None)
    logits = Path(shutil.copytree(tokens, tmp_path / "logits" / "train"))
    for each, verb in ((folder, "generate-logits"), (tokens, "tokenize"), (logits, "generate-logits")):
        (each / "manifest.json").unlink()
        assert str(each) in error_of(each) and f"megakd {verb}" in error_of(each)


@pytest.mark.parametrize("change", [{"version": 1}, {"version": 4}, {"format": "other"}, {"format": None}])
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
