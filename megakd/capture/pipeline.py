"""Run the teacher over token shards and write the same samples with its targets."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megakd.capture.teacher import Teacher, batch_targets
from megakd.config.data import LogitsConfig
from megakd.data import codec
from megakd.data.batches import collate, prefetch
from megakd.data.codebook import Book, build_book, load_book, save_book
from megakd.data.records import Sample, TeacherTargets
from megakd.data.shards import (
    MANIFEST,
    SIDECAR,
    VERSION,
    ShardSet,
    finished,
    known_manifest,
    layout_of,
    summary_of,
    write_manifest,
    write_shard,
)
from megakd.errors import UserError
from megakd.identity import TeacherIdentity, TokenizerIdentity, changed_fingerprint, fingerprint
from megakd.models.checks import check_isolation
from megakd.models.hub import empty_model, load_model
from megakd.run import Run
from megakd.system.dist import (
    World,
    barrier,
    sum_over_ranks,
)
from megakd.system.files import locked, read_sealed, settle
from megakd.system.logging import Progress, say
from megakd.system.version import made_with

BOOK_POSITIONS = 4096  # of the training set; from 1024 on they save 2 bytes per token, beyond 4096 0.2


AHEAD = 64  # samples that may wait for the writer


class Worker(NamedTuple):
    """Number `number` of `workers` that share the shards; ranks of one sharded teacher are workers too."""

    number: int
    workers: int


class Work(NamedTuple):
    """A shard to make: its name and the indices of its samples."""

    name: str
    indices: range


def logits_facts(run: Run, part: str, tokens: dict[str, Any], weights: str, book: str) -> dict[str, Any]:
    """What a folder of logits says of itself: whose they are, of which tokens, and how they are stored."""
    model, logits = run.config.model, _logits_config(run, part)
    draws = logits.profile != "topk"
    return {
        "tokens": tokens,
        "teacher": TeacherIdentity(model.teacher, model.revision, weights).record(),
        "vocab_size": TokenizerIdentity.of(tokens["tokenizer"]).vocab_size,
        "codec": codec.NAME,
        "book": book,
        "profile": logits.profile,
        "top_k": logits.top_k if logits.profile != "sampled" else 0,
        "pmin": logits.pmin,
        "levels": logits.levels,
        "draws": logits.draws if draws else 0,
        "draw_temperature": logits.draw_temperature if draws else None,
        "draw_seed": run.config.seed if draws else None,
        "temperatures": list(logits.declared_temperatures),
        "tails": logits.profile != "sampled",
        "dtype": logits.dtype,
    }


def teacher_fingerprint(run: Run, folder: Path, recorded: str | None = None) -> str:
    """The teacher's fingerprint to record, of the version that the logits captured so far carry.

    UserError when those, or `recorded`, are of another teacher: one data set has one teacher.
    """
    found = [recorded] if recorded else [w for part in ("holdout", "train") if (w := _captured_from(run, part))]
    for weights in found:
        if now := changed_fingerprint(weights, folder):
            raise UserError(
                f"{run.path('data', 'logits')}: captured from a teacher of fingerprint {weights}, {folder} has {now} "
                "now: its weights or its config.json were changed; restore them, or capture in a new run"
            )
    return found[0] if found else fingerprint(folder)


def _captured_from(run: Run, part: str) -> str | None:
    """The fingerprint that a part's manifest states, or where that is damaged, its first shard; None: nothing does."""
    folder = run.path("data", "logits", part)
    for path, kind in [(folder / "manifest.json", MANIFEST), *((p, SIDECAR) for p in sorted(folder.glob("*.json")))]:
        try:
            weights = TeacherIdentity.of(read_sealed(path, kind, VERSION)["facts"]["teacher"]).weights
        except UserError:  # missing, or damaged: it is made again
            continue
        return None if weights == "unknown" else weights  # converted from a file that names no teacher
    return None


def _logits_config(run: Run, part: str) -> LogitsConfig:
    logits = run.config.logits
    return logits if part == "train" else logits.model_copy(update={"profile": "topk"})


def capture_part(
    run: Run,
    capture: "Capture",
    part: str,
    tokens: ShardSet,
    worker: Worker,
    book: Book,
    limit: float | None,
    reread: bool,
) -> None:
    target = run.path("data", "logits", part)
    facts = logits_facts(run, part, tokens.facts, capture.weights, book.digest)
    settle(target)
    save_book(target, book)
    shards = _first_shards(tokens, limit)
    found = known_manifest(target, facts)
    if found and found["complete"] and len(found["shards"]) > len(shards):
        shards = tokens.manifest["shards"][: len(found["shards"])]  # a smaller limit takes nothing away
    works, first = [], 0
    for name, size in zip(tokens.names, tokens.sizes, strict=True):
        works.append(Work(name, range(first, first + size)))
        first += size
    works = works[: len(shards)]
    done = {shard["name"] for shard in shards if finished(target, shard["name"], facts, reread)}
    mine = [work for work in works[worker.number :: worker.workers] if work.name not in done]
    planned = [{key: shard[key] for key in ("name", "samples", "tokens")} for shard in shards]
    # one that lists the same stays: another worker may be about to complete it
    if len(done) < len(shards) and (not found or found["complete"] or found["shards"] != planned):
        write_manifest(target, facts, planned, complete=False)
    layout = layout_of(facts, target)
    watch = _Watch(f"generate-logits {part}", target, facts, shards, done, {work.name for work in mine})
    with closing(prefetch(capture.targets(tokens, mine, _logits_config(run, part)), AHEAD)) as samples:
        for work in mine:
            write_shard(target, work.name, watch.count(islice(samples, len(work.indices))), facts, layout)
        rest = next(samples, None)  # runs the teacher on, in step with the other ranks
        assert rest is None, rest
    watch.look()
    watch.progress.close()
    run.record(
        "generate-logits",
        part=part,
        worker=f"{worker.number}/{worker.workers}",
        shards=[w.name for w in mine],
        megakd=made_with(),
    )
    sidecars = {shard["name"]: finished(target, shard["name"], facts) for shard in shards}
    summaries = [summary_of(name, sidecar) for name, sidecar in sidecars.items() if sidecar]
    if missing := len(shards) - len(summaries):
        say(f"generate-logits {part}: this worker's share is done; {missing} shards are left to others")
        return
    write_manifest(target, facts, summaries, complete=True)
    # from what was seen here: a worker that came late may say once more that the set is not complete, until it ends
    size, count = (sum(summary[key] for summary in summaries) for key in ("bytes", "tokens"))
    say(f"generate-logits {part}: {size / count:.1f} bytes per token, with tokens and tar")


def _first_shards(tokens: ShardSet, limit: float | None) -> list[dict[str, Any]]:
    """The shards that hold the first `limit` tokens."""
    shards, total = [], 0
    for shard in tokens.manifest["shards"]:
        if limit is not None and total >= limit:
            break
        shards.append(shard)
        total += shard["tokens"]
    return shards


class _Watch:
    """Progress over the whole set: the samples of this worker's shards (`mine`), and what others finish meanwhile.

    Rate and ETA are this worker's own: its share is fixed, and of others' shards nothing is seen until they are whole.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        facts: dict[str, Any],
        shards: list[dict[str, Any]],
        done: set[str],
        mine: set[str],
    ):
        tokens: dict[str, int] = {shard["name"]: shard["tokens"] for shard in shards}
        self.folder, self.facts, self.looked = folder, facts, time.perf_counter()
        self.others = {name: count for name, count in tokens.items() if name not in done | mine}
        before, own = (sum(tokens[name] for name in names) for names in (done, mine))
        self.progress = Progress(name, sum(tokens.values()), "tokens", done=before, own=own)

    def count(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            yield sample
            if time.perf_counter() - self.looked > 5:
                self.look()
            self.progress.update(len(sample.tokens) - 1)

    def look(self) -> None:
        """Count the shards that others have finished since."""
        self.looked = time.perf_counter()
        for name in [name for name in self.others if finished(self.folder, name, self.facts)]:
            self.progress.add_others(self.others.pop(name))


class Capture:
    """The teacher, loaded when the first sample needs it, and the samples it answers."""

    def __init__(self, run: Run, folder: Path, world: World, vocab_size: int):
        self.run, self.folder, self.world, self.vocab_size = run, folder, world, vocab_size
        self.weights = teacher_fingerprint(run, folder)
        self.model: Any = None

    def targets(self, tokens: ShardSet, works: list[Work], config: LogitsConfig) -> Iterator[Sample]:
        """Every sample of `works` in order, with targets. Ranks of one sharded teacher go on until all are done."""
        length, sharded = tokens.facts["sequence_length"], self.world.size > 1 and config.parallel != "replica"
        if not works and not sharded:
            return
        teacher = self._teacher(config)
        batches = (
            indices[i : i + config.batch_size]
            for _, indices in works
            for i in range(0, len(indices), config.batch_size)
        )
        while True:
            indices = next(batches, None)
            if sharded and not sum_over_ranks([float(indices is not None)], self.world.device)[0]:
                return
            if indices is None and not sharded:
                return
            samples = [tokens[i] for i in indices or range(1)]  # a rank without work keeps step with the others
            offsets = torch.stack([_offsets(self.run.config.seed, s.key, length) for s in samples])
            if sharded and len(samples) < config.batch_size:  # equal shapes: equal numbers of calls on all ranks
                samples += samples[:1] * (config.batch_size - len(samples))
                offsets = torch.cat([offsets, offsets[:1].repeat(len(samples) - len(offsets), 1)])
            targets = batch_targets(teacher, collate(samples, length), offsets, self.world.device)
            for row, sample in enumerate(samples[: len(indices or ())]):
                _check_finite(targets, row, sample, self.folder)
                count = len(sample.tokens) - 1
                yield sample._replace(targets=TeacherTargets(*(field[row, :count].numpy() for field in targets)))

    def _teacher(self, config: LogitsConfig) -> Any:
        if self.model is None:
            self.model = self._load(config)
        module = self.model if isinstance(self.model, Teacher) else self.model.module
        module.kept = config  # one teacher for all parts
        return self.model

    def _load(self, config: LogitsConfig) -> Any:
        def build() -> Teacher:
            model = load_model(self.folder, getattr(torch, config.dtype))
            return Teacher(model, config, self.vocab_size, self.run.config.data.packing)

        if self.world.first:
            check_isolation(self.run)
        if config.parallel == "replica":
            loaded: Any = build().eval().to(self.world.device)
        else:
            from megakd.capture.sharded import spread

            family = empty_model(self.folder).config.model_type
            loaded = spread(build, config.parallel, family, config.dtype, config.batch_size, self.world)
        teacher_fingerprint(self.run, self.folder, self.weights)  # it may have been changed before it was loaded
        return loaded


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


def make_codebook(run: Run, capture: Capture, tokens: ShardSet) -> Book:
    """The data set's codebook, made by the first worker, from the first positions of the training set."""
    folder, config = run.path("data", "logits"), _logits_config(run, "train")
    sharded = config.parallel != "replica" and capture.world.size > 1
    with nullcontext() if sharded else locked(folder / "book.lock"):
        there = sorted(folder.glob("book-*.npy"))
        if sharded:  # all ranks make it, or none
            there = there if sum_over_ranks([float(not there)], capture.world.device)[0] == 0 else []
        if there:
            return load_book(folder, there[0].stem.removeprefix("book-"))
        count = min(-(-BOOK_POSITIONS // tokens.facts["sequence_length"]), len(tokens))
        ids = []
        for sample in capture.targets(tokens, [Work("book", range(count))], config):
            targets = sample.targets
            assert targets is not None
            ids += [targets.ids[targets.logprobs > -np.inf], targets.draw_ids[targets.draw_shares > 0]]
        book = build_book(np.concatenate(ids), capture.vocab_size)
        if capture.world.first or not sharded:
            save_book(folder, book)
        barrier()
        return book
