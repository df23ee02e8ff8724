"""The steps of a stage: the same samples in the same order, decoded by as many threads as `stream.workers` says."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.config.parsing import load_recipe
from megakd.data.shards import ShardSet
from megakd.engine.checkpoint import Progress
from megakd.system.dist import World
from megakd.train.data import stage_data


def steps_of(recipe: Path, dataset: ShardSet, *overrides: str) -> list[torch.Tensor]:
    """The tokens of each of two steps, its micro-batches one below the other."""
    config = load_recipe(recipe, overrides)
    data = stage_data(config, dataset, Progress(), 2, World(0, 1, torch.device("cpu")))
    return [torch.cat([batch.tokens for batch in step.micro_batches]) for step in data if step is not None]


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_workers_decode_at_once_at_any_micro_batch(recipe, dataset, monkeypatch, micro_batch):
    """One micro-batch of one sample at a time left all threads but one idle."""
    expected = steps_of(recipe, dataset, "optim.micro_batch=16")
    lock, now, most = threading.Lock(), 0, 0
    original = ShardSet.__getitem__

    def slow(self: ShardSet, index: int) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1
        return original(self, index)

    monkeypatch.setattr(ShardSet, "__getitem__", slow)
    found = steps_of(recipe, dataset, f"optim.micro_batch={micro_batch}", "stream.workers=5")
    assert most == 5
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
