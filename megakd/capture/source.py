"""The teacher of a capture: loaded when the first sample needs it, and refused when it changed since."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megakd.capture.teacher import Teacher, batch_targets
from megakd.capture.vllm_client import HiddenStates, Vllm
from megakd.capture.vllm_teacher import VllmTeacher
from megakd.config.data import LogitsConfig
from megakd.data.batches import collate
from megakd.data.lengths import longest_first
from megakd.data.records import Sample, TeacherTargets
from megakd.data.shards import MANIFEST, SIDECAR, VERSIONS, ShardSet
from megakd.errors import UserError
from megakd.identity import TeacherIdentity, changed_fingerprint, fingerprint
from megakd.models.checks import check_isolation, model_folders
from megakd.models.isolation import Packing
from megakd.models.loading import load_model
from megakd.run import Run
from megakd.system.dist import World, sum_over_ranks
from megakd.system.files import read_sealed


class Work(NamedTuple):
    """A shard to make: its name and the indices of its samples."""

    name: str
    indices: range


TRANSFORMERS = "transformers"  # the engine of logits whose manifest names none
SORTED_BATCHES = 16  # are sorted by length together; targets wait in memory for those of the samples before them


class Capture:
    """The teacher, loaded when the first sample needs it, and the samples it answers."""

    def __init__(self, run: Run, folder: Path, world: World, vocab_size: int, vllm: Vllm | None = None):
        """folder: of the teacher; vocab_size: real entries of its tokenizer; vllm: of logits.engine=vllm."""
        self.folder, self.world, self.vocab_size = folder, world, vocab_size
        self.models = run.config.model
        self.logits, self.seed = run.path("data", "logits"), run.config.seed
        self.packing: Packing = run.config.data.packing
        self.length = run.config.data.sequence_length
        self.vllm, self.engine = vllm, vllm.name if vllm else TRANSFORMERS
        check_engine(self.logits, self.engine)
        self.worker: HiddenStates | None = None
        weights = teacher_fingerprint(self.logits, folder)
        self.teacher = TeacherIdentity(run.config.model.teacher, run.config.model.revision, weights)
        self.model: Any = None

    def close(self) -> None:
        """Ends the process of vLLM."""
        if self.worker is not None:
            self.worker.close()

    def sharded(self, config: LogitsConfig) -> bool:
        """Whether all ranks hold one teacher together; each of its forwards is then a collective."""
        return self.world.size > 1 and config.parallel != "replica"

    def targets(self, tokens: ShardSet, works: list[Work], config: LogitsConfig) -> Iterator[Sample]:
        """Every sample of `works` in order, with targets. Ranks of one sharded teacher go on until all are done."""
        if not works and not self.sharded(config):
            return
        teacher = self._teacher(config)
        batches = self._batches(tokens, works, config.batch_size)
        if self.sharded(config):
            answers = map(partial(self._answer, teacher, tokens, size=config.batch_size), self._in_step(batches))
        else:
            answers = map(partial(self._answer, teacher, tokens), batches)
        waiting: dict[int, Sample] = {}
        for index in chain.from_iterable(indices for _, indices in works):
            while index not in waiting:
                waiting |= next(answers)
            yield waiting.pop(index)
        for _ in answers:
            pass  # of a rank that is done before the others

    def _batches(self, tokens: ShardSet, works: list[Work], size: int) -> Iterator[list[int]]:
        """`size` samples of about one length each, of the samples of a shard as they come, SORTED_BATCHES at a time."""
        for _, indices in works:
            for start in range(0, len(indices), SORTED_BATCHES * size):
                order = longest_first(tokens, indices[start : start + SORTED_BATCHES * size])
                yield from (order[first : first + size] for first in range(0, len(order), size))

    def _in_step(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        """The batches of this rank, then empty ones until no rank has any: all call the teacher equally often."""
        while True:
            indices = next(batches, [])
            if not sum_over_ranks([float(len(indices) > 0)], self.world.device)[0]:
                return
            yield indices

    def _answer(self, teacher: Any, tokens: ShardSet, indices: list[int], size: int | None = None) -> dict[int, Sample]:
        """The samples of `indices` with targets, by index.

        size: samples in every batch of a sharded teacher, filled up and padded to all positions, for equal shapes are
        equal numbers of calls on all ranks.
        """
        length = tokens.facts["sequence_length"]
        samples = [tokens[i] for i in indices or range(1)]  # a rank without work keeps step with the others
        if size is not None:
            samples += samples[:1] * (size - len(samples))
        offsets = torch.stack([_offsets(self.seed, sample.key, length) for sample in samples])
        batch = collate(samples, length, whole=size is not None)
        targets = batch_targets(teacher, batch, offsets[:, : batch.tokens.shape[1]], self.world.device)
        found = {}
        for row, (index, sample) in enumerate(zip(indices, samples, strict=False)):
            _check_finite(targets, row, sample, self.folder)
            count = len(sample.tokens) - 1
            found[index] = sample._replace(targets=TeacherTargets(*(field[row, :count].numpy() for field in targets)))
        return found

    def _teacher(self, config: LogitsConfig) -> Any:
        if self.model is None:
            self.model = self._load(config)
        module = self.model if isinstance(self.model, Teacher) else self.model.module
        module.kept = config  # one teacher for all parts
        return self.model

    def _start(self, dtype: torch.dtype) -> HiddenStates:
        assert self.vllm is not None
        self.worker = HiddenStates(self.vllm, self.folder, dtype, self.length, self.world.device)
        return self.worker

    def _load(self, config: LogitsConfig) -> Any:
        dtype = getattr(torch, config.dtype)

        def wrap(model: Any) -> Teacher:
            return Teacher(model, config, self.vocab_size, self.packing)

        if self.world.first:
            check_isolation(model_folders(self.models), self.packing)
        loaded: Any
        if self.vllm:
            loaded = VllmTeacher(
                load_model(self.folder, dtype).eval(),
                config,
                self.vocab_size,
                self.packing,
                partial(self._start, dtype),
            )
        elif config.parallel == "replica":
            loaded = wrap(load_model(self.folder, dtype)).eval().to(self.world.device)
        else:
            from megakd.capture.sharded import load_shared

            loaded = load_shared(self.folder, wrap, config.parallel, dtype, self.world)
        teacher_fingerprint(self.logits, self.folder, self.teacher.weights)  # it may have changed before it was loaded
        return loaded


def check_engine(logits: Path, engine: str) -> None:
    """UserError when the logits captured so far were made by another engine, or another version of it."""
    for part in ("holdout", "train"):
        facts = next(_facts(logits / part), None)
        if facts is not None and (made_by := facts.get("engine", TRANSFORMERS)) != engine:
            raise UserError(
                f"{logits}: captured with {made_by}, this capture is with {engine}: go on with {made_by}, or capture "
                "everything again with --force"
            )


def teacher_fingerprint(logits: Path, folder: Path, recorded: str | None = None) -> str:
    """The fingerprint of the teacher in `folder`, of the version that the logits captured so far carry.

    UserError when those, or `recorded`, are of another teacher: one data set has one teacher.
    """
    known = [recorded] if recorded else [_captured_from(logits / part) for part in ("holdout", "train")]
    known = [weights for weights in known if weights]
    for weights in known:
        if now := changed_fingerprint(weights, folder):
            raise UserError(
                f"{logits}: captured from a teacher of fingerprint {weights}, {folder} has {now} "
                "now: its weights or its config.json were changed; restore them, or capture in a new run"
            )
    return known[0] if known else fingerprint(folder)


def _captured_from(part: Path) -> str | None:
    """The fingerprint that a part's manifest states, or where that is damaged, its first shard; None: nothing does."""
    for facts in _facts(part):
        with suppress(UserError):
            weights = TeacherIdentity.of(facts["teacher"]).weights
            return None if weights == "unknown" else weights  # converted from a file that names no teacher
    return None


def _facts(part: Path) -> Iterator[dict[str, Any]]:
    """What a part's manifest states, then what each of its shards does; missing and damaged ones state nothing."""
    sidecars = ((path, SIDECAR) for path in sorted(part.glob("*.json")))
    for path, kind in [(part / "manifest.json", MANIFEST), *sidecars]:
        try:
            yield read_sealed(path, kind, *VERSIONS)["facts"]
        except UserError:  # it is made again
            continue


def _check_finite(targets: TeacherTargets, row: int, sample: Sample, folder: Path) -> None:
    count = len(sample.tokens) - 1
    numbers = torch.cat([targets.label_nll[row, :count], targets.entropy[row, :count]])
    if targets.logprobs.shape[-1]:
        numbers = torch.cat([numbers, targets.logprobs[row, :count, 0]])
    if not numbers.isfinite().all():
        raise UserError(
            f"{folder}: answers sample {sample.key} with NaN or infinity; its weights are damaged, or too large for "
            "logits.dtype: try logits.dtype=float32 in a new run"
        )


def _offsets(seed: int, key: str, length: int) -> torch.Tensor:
    """Where the draws of each position begin: a function of (seed, sample), so of no worker and no batch."""
    name = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.from_numpy(np.random.default_rng(int.from_bytes(name[:8], "big")).random(length))
