"""A folder of three small shards, of tokens or of a random teacher's targets, and what tests ask of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakd.capture.targets import targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.data import codec
from megakd.data.codebook import build_book, save_book
from megakd.data.records import IGNORED, Sample, TeacherTargets
from megakd.data.shard_writer import finished, shard_name, summary_of, write_manifest, write_shard
from megakd.data.shards import ShardSet
from megakd.errors import UserError

VOCABULARY, LENGTH = 400, 40
TOKENS = {"part": "train", "tokenizer": {"hash": "abc", "vocab_size": VOCABULARY}, "sequence_length": LENGTH}
BOOK = build_book(np.arange(VOCABULARY).repeat(np.arange(VOCABULARY, 0, -1) % 7 + 1), VOCABULARY)
CONFIGS = {
    "topk": LogitsConfig(profile="topk", top_k=6, pmin=0.02),
    "sampled": LogitsConfig(profile="sampled", draws=9),
    "hybrid": LogitsConfig(profile="hybrid", top_k=4, draws=5, draw_temperature=2.0),
}


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


def _layout(kind: str) -> codec.Layout:
    own = facts(kind)
    return codec.Layout(own["top_k"], own["draws"], own["levels"], tuple(own["temperatures"]), LENGTH, BOOK)


LAYOUTS: dict[str | None, codec.Layout | None] = {None: None, **{kind: _layout(kind) for kind in CONFIGS}}


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
        sidecar = write_shard(folder, name, samples(done, count, kind), facts(kind), LAYOUTS[kind])
        assert finished(folder, name, facts(kind), reread=True) == sidecar
        shards.append(summary_of(name, sidecar))
        done += count
    write_manifest(folder, facts(kind), shards, complete=True, windows=done)
    return folder


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
        assert layout is not None
        expected = codec.decode(expected.key, codec.encode(expected, layout), layout)
    assert (found.key, found.targets is None) == (expected.key, expected.targets is None)
    pairs = [
        *zip(found[1:3], expected[1:3], strict=True),
        *zip(found.targets or (), expected.targets or (), strict=True),
    ]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
