"""What tests of the converters share: a tool as a module, small logit shards of a random teacher, their comparison."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megakd.capture.targets import targets_from_logits
from megakd.cli import run_verb
from megakd.config.data import LogitsConfig
from megakd.data import codec
from megakd.data.codebook import build_book, save_book
from megakd.data.records import IGNORED, Sample, TeacherTargets
from megakd.data.shard_writer import shard_name, summary_of, write_manifest, write_shard
from megakd.data.shards import ShardSet, layout_of
from megakd.data.tokenizers import identify_tokenizer
from tests.conftest import ROOT

LENGTH, SAMPLES = 20, 9


def tool(path: str) -> ModuleType:
    """tools/PATH.py ("convert/reshard"), or a module of the package tools/bench ("bench.loss").

    The tools find one another as they do when Python runs one of them: its folder is on sys.path.
    """
    folder, _, name = path.rpartition("/")
    place = str((ROOT / "tools" / folder).resolve())
    if place not in sys.path:
        sys.path.append(place)
    return importlib.import_module(name)


def refused(module: ModuleType, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line with which the tool ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        module.main([str(arg) for arg in argv])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2, lines
    assert lines[-1].startswith(f"{module.__name__}: "), lines
    return lines[-1]


def converted(module: ModuleType, source: Path, out: Path, *argv: object) -> ShardSet:
    """What a converter makes of a foreign file, read again from disk."""
    module.main([str(arg) for arg in ("from", source, out, *argv)])
    run_verb(["inspect", str(out), "--verify"])
    return ShardSet(out)


def random_logits(positions: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Rows between near uniform and near certain, float32 [positions, vocabulary]."""
    generator = torch.Generator().manual_seed(seed)
    scale = 4 * torch.rand(positions, 1, generator=generator)
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(positions)])
    return scale * torch.randn(positions, vocabulary, generator=generator) - ranks.add(3).log()


def window(seed: int, vocabulary: int, tokens: int = LENGTH + 1) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and the offsets of two or three documents."""
    chooser = np.random.default_rng(seed)
    starts = np.unique([0, *chooser.integers(1, tokens, 2)]).astype(np.int32)
    return chooser.integers(0, vocabulary, tokens).astype(np.int32), starts


def make_shards(
    folder: Path, tokenizer: PreTrainedTokenizerFast, samples: int = SAMPLES, seed: int = 0, **logits: Any
) -> ShardSet:
    """Shards of 4 windows of 20 positions, the last window shorter; logits: of the LogitsConfig."""
    config = LogitsConfig(**{"top_k": 8, "pmin": 3e-3, "temperatures": (1.0, 2.0), **logits})
    reader = identify_tokenizer(tokenizer)
    vocabulary, head, draws = reader.vocab_size, config.profile != "sampled", config.profile != "topk"
    found = []
    for index in range(samples):
        tokens, starts = window(seed + index, vocabulary, LENGTH + 1 if index < samples - 1 else 7)
        labels = torch.from_numpy(tokens[1:].astype(np.int64))
        labels[starts[1:] - 1] = IGNORED
        raw = random_logits(len(labels), vocabulary, seed + index)
        targets = targets_from_logits(raw, labels, config, torch.full((len(labels),), 0.5, dtype=torch.float64))
        found.append(Sample(f"{index:09d}", tokens, starts, TeacherTargets(*(f.numpy() for f in targets))))
    book = build_book(np.concatenate([s.targets.ids[s.targets.logprobs > -np.inf] for s in found]), vocabulary)
    facts = {
        "tokens": {
            "part": "train", "tokenizer": reader.record(), "source": "text", "subset": None, "split": "train",
            "text_field": "text", "sequence_length": LENGTH, "shard_tokens": 4 * LENGTH, "holdout_fraction": 0.1,
        },
        "teacher": {"id": "random", "revision": None, "weights": "0123456789abcdef"},
        "vocab_size": vocabulary, "codec": codec.NAME, "book": book.digest, "profile": config.profile,
        "top_k": 8 * head, "pmin": config.pmin, "levels": config.levels, "draws": config.draws * draws,
        "draw_temperature": 1.0 if draws else None, "draw_seed": 0 if draws else None,
        "temperatures": list(config.declared_temperatures), "tails": head, "dtype": "float32",
    }  # fmt: skip
    save_book(folder, book)
    write(folder, found, facts, layout_of(facts, folder))
    return ShardSet(folder)


def token_shards(folder: Path, logits: ShardSet, **extra: Any) -> ShardSet:
    """The windows of logit shards without their targets."""
    samples = [logits[i]._replace(targets=None) for i in range(len(logits))]
    write(folder, samples, logits.facts["tokens"], None, **extra)
    return ShardSet(folder)


def write(folder: Path, samples: list[Sample], facts: Any, layout: codec.Layout | None, **extra: Any) -> None:
    shards = []
    for first in range(0, len(samples), 4):
        name = shard_name(len(shards))
        shards.append(summary_of(name, write_shard(folder, name, samples[first : first + 4], facts, layout)))
    write_manifest(folder, facts, shards, complete=True, **extra)


def head(targets: TeacherTargets, row: int) -> dict[int, float]:
    """id → log-probability of a row."""
    kept = targets.logprobs[row] > -np.inf
    return dict(zip(targets.ids[row][kept].tolist(), targets.logprobs[row][kept].tolist(), strict=True))


def assert_alike(found: ShardSet, expected: ShardSet, steps: float = 1.5) -> None:
    """Tokens, documents, keys and ids are equal; probabilities and tails within `steps` of the codec's rounding."""
    assert len(found) == len(expected)
    for index in range(len(found)):
        mine, theirs = found[index], expected[index]
        assert mine.key == theirs.key and np.array_equal(mine.tokens, theirs.tokens)
        assert np.array_equal(mine.starts, theirs.starts)
        assert mine.targets is not None and theirs.targets is not None
        for row in range(len(mine.tokens) - 1):
            left, right = head(mine.targets, row), head(theirs.targets, row)
            assert left.keys() == right.keys()
            levels = expected.facts["levels"]
            assert max(abs(np.exp(left[i] / 2) - np.exp(right[i] / 2)) for i in left) <= steps / levels
        # the angle of the tail: a step is pi / 2 / 255, and scaling moves it a little as well
        angles = [np.arcsin(np.exp(each.log_tails[:, 0] / 2)) for each in (mine.targets, theirs.targets)]
        assert np.abs(angles[0] - angles[1]).max() <= steps * np.pi / 2 / 255
        assert np.allclose(mine.targets.log_tails, theirs.targets.log_tails, atol=0.1)
        labelled = np.ones(len(mine.tokens) - 1, bool)
        labelled[mine.starts[1:] - 1] = False
        nll = [each.label_nll[labelled] for each in (mine.targets, theirs.targets)]
        assert np.allclose(np.log1p(nll[0]), np.log1p(nll[1]), atol=0.02)
