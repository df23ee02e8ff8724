"""Easy sequences first: how hard each is for the teacher, and the share of the data that training may draw from.

Competence-based pacing (Platanios et al. 2019, eq. 8): of N sequences ordered from easy to hard, training draws from
the c(t) N easiest, c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2)). Here t counts sequences, so that no batch size and no
number of ranks changes the order, and within an epoch nothing is drawn twice.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np

from megakd.config.data import StreamConfig
from megakd.data.batches import Reader
from megakd.data.records import Sample
from megakd.data.shards import ShardSet
from megakd.system.files import digest, locked, publishing
from megakd.system.logging import Progress, say

Measure = Literal["nll", "entropy"]
CHUNK = 256  # samples that are decoded at once


class Curriculum(NamedTuple):
    """easiest: sample numbers from the easiest on, [N]. start: c0. epochs: T, in passes over the N sequences."""

    easiest: np.ndarray
    start: float
    epochs: float

    def competence(self, position: int | np.ndarray) -> np.ndarray:
        """The share of the sequences, easiest first, that may be drawn at a position of training."""
        passed = np.asarray(position) / (self.epochs * len(self.easiest))
        return np.minimum(1.0, np.sqrt(passed * (1 - self.start**2) + self.start**2))

    def order(self, epoch: int, generator: np.random.Generator) -> np.ndarray:
        """The sample numbers of an epoch, each once.

        Each place takes one that was not drawn before, uniformly from the c N easiest. Where these are all drawn it
        takes the next harder one.
        """
        size = len(self.easiest)
        places = np.arange(size)
        allowed = np.ceil(self.competence(epoch * size + places) * size).astype(np.int64)
        allowed = np.maximum(allowed, places + 1)
        others = places + (generator.random(size) * (allowed - places)).astype(np.int64)
        pool = self.easiest.tolist()  # drawn ones first, then those that are left: a shuffle whose end moves away
        for place, other in enumerate(others.tolist()):
            pool[place], pool[other] = pool[other], pool[place]
        return np.array(pool, np.int64)

    def digest(self) -> str:
        """What a position means by it: another curriculum has other samples there."""
        return digest([hashlib.sha256(self.easiest.astype("<i8").tobytes()).hexdigest(), self.start, self.epochs])


def open_curriculum(config: StreamConfig, dataset: ShardSet) -> Curriculum | None:
    """The curriculum of a data set with teacher targets; None where there is none."""
    if config.curriculum == "off":
        return None
    values = difficulties(dataset, config.curriculum, config.workers, config.on_damage == "skip")
    easiest = np.argsort(values, kind="stable")  # equal ones in the order of the manifest
    return Curriculum(easiest, config.curriculum_start, config.curriculum_epochs)


def difficulties(dataset: ShardSet, measure: Measure, workers: int, skip: bool = False) -> np.ndarray:
    """How hard each sequence is, float32 [N]: from the file next to the shards, which is made in one pass over them.

    skip: damaged samples are the hardest; values with them are not kept.
    """
    shards = [[shard["name"], shard["samples"], shard["sha256"]] for shard in dataset.manifest["shards"]]
    file = dataset.folder / f"difficulty-{measure}-{digest(shards)}.npz"
    known = _stored(file, len(dataset))
    if known is not None:
        return known
    with locked(dataset.folder / "difficulty.lock"):
        known = _stored(file, len(dataset))  # another rank may have made it meanwhile
        if known is not None:
            return known
        values = np.fromiter(_measured(dataset, MEASURES[measure], workers, skip), np.float32, len(dataset))
        damaged = int(np.isinf(values).sum())
        if damaged:
            say(f"{dataset.folder}: {damaged} damaged samples count as the hardest of the curriculum")
            return values
        with publishing(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, difficulty=values)
        return values


def label_nll(sample: Sample) -> float:
    """The teacher's negative log-likelihood, mean over the labels, in nats."""
    targets = sample.targets
    assert targets is not None, sample.key
    return float(targets.label_nll.sum(dtype=np.float64)) / max(sample.label_count, 1)


def entropy(sample: Sample) -> float:
    """The entropy of the teacher's next token, mean over positions, in nats.

    Of the stored tokens and all others as one, a lower bound; where there are draws alone, that of the draws' capture.
    """
    targets = sample.targets
    assert targets is not None, sample.key
    rows = slice(None) if sample.mask is None else sample.mask  # masked labels have no targets
    if sample.mask is not None and not sample.label_count:
        return 0.0
    if not targets.ids.shape[1]:
        return float(targets.entropy[rows].mean(dtype=np.float64))
    logs = np.concatenate([targets.logprobs, targets.log_tails[:, :1]], 1)[rows].astype(np.float64)
    finite = np.where(np.isfinite(logs), logs, 0.0)
    return float(-(np.exp(logs) * finite).sum(1).mean())


MEASURES: dict[Measure, Callable[[Sample], float]] = {"nll": label_nll, "entropy": entropy}


def _measured(dataset: ShardSet, measure: Callable[[Sample], float], workers: int, skip: bool) -> Iterator[float]:
    reader = Reader(dataset, workers, skip)
    progress = Progress("curriculum: difficulty of sequences", len(dataset), "sequences")
    try:
        for first in range(0, len(dataset), CHUNK):
            indices = range(first, min(first + CHUNK, len(dataset)))
            for index, sample in zip(indices, reader.read(indices), strict=True):
                yield float("inf") if index in reader.damaged else measure(sample)
            progress.update(len(indices))
        progress.close()
    finally:
        reader.close()


def _stored(file: Path, count: int) -> np.ndarray | None:
    """The values of a file; None where it is missing, cut short or damaged: then it is made again."""
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as opened:
            values = opened["difficulty"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return values if values.shape == (count,) and values.dtype == np.float32 else None
