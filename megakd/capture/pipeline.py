"""Run the teacher over token shards and write the same samples with its targets."""

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megakd.capture.source import TRANSFORMERS, Capture, Work
from megakd.config.data import LogitsConfig
from megakd.data import codec
from megakd.data.batches import prefetch
from megakd.data.codebook import Book, build_book, load_book, save_book
from megakd.data.records import Sample, TeacherTargets
from megakd.data.shard_writer import finished, known_manifest, summary_of, write_manifest, write_shard
from megakd.data.shards import ShardSet, label_masked, layout_of
from megakd.errors import listed
from megakd.identity import TeacherIdentity, TokenizerIdentity
from megakd.measured import Stopwatch
from megakd.run import Run
from megakd.system.dist import barrier, sum_over_ranks
from megakd.system.files import locked, settle
from megakd.system.logging import Progress, say

BOOK_POSITIONS = 4096  # of the training set; from 1024 on they save 2 bytes per token, beyond 4096 0.2
AHEAD = 64  # samples that may wait for the writer


class Worker(NamedTuple):
    """Number `number` of `workers` that share the shards; ranks of one sharded teacher are workers too."""

    number: int
    workers: int


class Part(NamedTuple):
    """The training or the validation set: its tokens, the folder of its logits, and what these store."""

    name: str
    tokens: ShardSet
    folder: Path
    config: LogitsConfig


def part_of(run: Run, name: str, tokens: ShardSet) -> Part:
    """train, as configured, or the validation set, whose logits are always the most probable tokens."""
    config = run.config.logits
    if name != "train":
        config = config.model_copy(update={"profile": "topk"})
    return Part(name, tokens, run.path("data", "logits", name), config)


def logits_facts(
    part: Part, teacher: TeacherIdentity, seed: int, book: str, engine: str = TRANSFORMERS
) -> dict[str, Any]:
    """What a folder of logits says of itself: whose they are, of which tokens, and how they are stored.

    engine: stated where it is not transformers.
    """
    tokens, logits = part.tokens.facts, part.config
    draws: dict[str, Any] = {"draws": 0, "draw_temperature": None, "draw_seed": None}
    if logits.profile != "topk":
        draws = {"draws": logits.draws, "draw_temperature": logits.draw_temperature, "draw_seed": seed}
    return {
        "tokens": tokens,
        "teacher": teacher.record(),
        "vocab_size": TokenizerIdentity.of(tokens["tokenizer"]).vocab_size,
        "codec": codec.MASKED_NAME if label_masked(tokens) else codec.NAME,
        "book": book,
        "profile": logits.profile,
        "top_k": logits.top_k if logits.profile != "sampled" else 0,
        "pmin": logits.pmin,
        "levels": logits.levels,
        **draws,
        **_shared_facts(logits),
        **({} if engine == TRANSFORMERS else {"engine": engine}),
    }


def _shared_facts(logits: LogitsConfig) -> dict[str, Any]:
    return {
        "temperatures": list(logits.declared_temperatures),
        "tails": logits.profile != "sampled",
        "dtype": logits.dtype,
    }


def capture_part(
    capture: Capture,
    part: Part,
    worker: Worker,
    book: Book,
    *,
    limit: float | None = None,
    reread: bool = False,
    stopwatch: Stopwatch | None = None,
) -> list[str]:
    """Write a worker's share of a part, and the manifest if that was the last; the names of the shards written.

    limit: tokens to capture, in whole shards. reread: hash finished shards again and write damaged ones anew.
    stopwatch: counts this worker's tokens.
    """
    facts = logits_facts(part, capture.teacher, capture.seed, book.digest, capture.engine)
    settle(part.folder)
    save_book(part.folder, book)
    before = known_manifest(part.folder, facts)
    shards = _wanted_shards(part.tokens, limit, before)
    done = {shard["name"] for shard in shards if finished(part.folder, shard["name"], facts, reread)}
    share = _works(part.tokens, len(shards))[worker.number :: worker.workers]
    mine = [work for work in share if work.name not in done]
    if len(done) < len(shards):
        _announce(part.folder, facts, shards, before)
    layout = layout_of(facts, part.folder)
    watch = _Watch(
        f"generate-logits {part.name}", part.folder, facts, shards, done, {work.name for work in mine}, stopwatch
    )
    with closing(prefetch(capture.targets(part.tokens, mine, part.config), AHEAD)) as samples:
        for work in mine:
            write_shard(part.folder, work.name, watch.count(islice(samples, len(work.indices))), facts, layout)
        rest = next(samples, None)  # runs the teacher on, in step with the other ranks
        assert rest is None, rest
    watch.look()
    watch.progress.close()
    _complete(part, facts, shards, worker)
    return [work.name for work in mine]


def _wanted_shards(tokens: ShardSet, limit: float | None, before: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The shards that hold the first `limit` tokens, or all that a complete manifest lists."""
    shards, total = [], 0
    for shard in tokens.manifest["shards"]:
        if limit is not None and total >= limit:
            break
        shards.append(shard)
        total += shard["tokens"]
    if before and before["complete"] and len(before["shards"]) > len(shards):
        return tokens.manifest["shards"][: len(before["shards"])]  # a smaller limit takes nothing away
    return shards


def _works(tokens: ShardSet, count: int) -> list[Work]:
    """The first `count` shards with the indices of their samples."""
    works, first = [], 0
    for name, size in zip(tokens.names[:count], tokens.sizes[:count], strict=True):
        works.append(Work(name, range(first, first + size)))
        first += size
    return works


def _announce(folder: Path, facts: dict[str, Any], shards: list[dict[str, Any]], before: dict[str, Any] | None) -> None:
    """Write the manifest of what is going to be: training that follows the capture reads it.

    One that lists the same stays: another worker may be about to complete it.
    """
    planned = [{key: shard[key] for key in ("name", "samples", "tokens")} for shard in shards]
    if not before or before["complete"] or before["shards"] != planned:
        write_manifest(folder, facts, planned, complete=False)


def _complete(part: Part, facts: dict[str, Any], shards: list[dict[str, Any]], worker: Worker) -> None:
    """Write the manifest of all shards, unless some are left to other workers; say which are missing."""
    sidecars = {shard["name"]: finished(part.folder, shard["name"], facts) for shard in shards}
    summaries = [summary_of(name, sidecar) for name, sidecar in sidecars.items() if sidecar]
    if missing := [index for index, sidecar in enumerate(sidecars.values()) if not sidecar]:
        workers = sorted({index % worker.workers for index in missing})
        say(
            f"generate-logits {part.name}: the share of worker {worker.number} of {worker.workers} is done; "
            f"{len(missing)} of {len(shards)} shards are missing, of workers {listed(workers)}"
        )
        return
    write_manifest(part.folder, facts, summaries, complete=True)
    # from what was seen here: a worker that came late may say once more that the set is not complete, until it ends
    size, count = (sum(summary[key] for summary in summaries) for key in ("bytes", "tokens"))
    say(f"generate-logits {part.name}: complete, {len(shards)} shards; {size / count:.1f} bytes per token")


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
        stopwatch: Stopwatch | None = None,
    ):
        tokens: dict[str, int] = {shard["name"]: shard["tokens"] for shard in shards}
        self.folder, self.facts, self.looked, self.stopwatch = folder, facts, time.perf_counter(), stopwatch
        self.others = {name: count for name, count in tokens.items() if name not in done | mine}
        before, own = (sum(tokens[name] for name in names) for names in (done, mine))
        self.progress = Progress(name, sum(tokens.values()), "tokens", done=before, own=own)

    def count(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            yield sample
            if time.perf_counter() - self.looked > 5:
                self.look()
            self.progress.update(len(sample.tokens) - 1)
            if self.stopwatch is not None:
                self.stopwatch.count(len(sample.tokens) - 1)

    def look(self) -> None:
        """Count the shards that others have finished since."""
        self.looked = time.perf_counter()
        for name in [name for name in self.others if finished(self.folder, name, self.facts)]:
            self.progress.add_others(self.others.pop(name))


def make_codebook(capture: Capture, train: Part) -> Book:
    """The data set's codebook, made by the first worker, from the first positions of the training set."""
    folder, sharded = train.folder.parent, capture.sharded(train.config)
    with nullcontext() if sharded else locked(folder / "book.lock"):
        stored = sorted(folder.glob("book-*.npy"))
        if sharded and sum_over_ranks([float(not stored)], capture.world.device)[0] > 0:
            stored = []  # the ranks run the teacher together: all make the codebook, or none
        if stored:
            return load_book(folder, stored[0].stem.removeprefix("book-"))
        count = min(-(-BOOK_POSITIONS // train.tokens.facts["sequence_length"]), len(train.tokens))
        ids = []
        for sample in capture.targets(train.tokens, [Work("book", range(count))], train.config):
            targets = sample.targets
            assert targets is not None
            if sample.mask is not None:
                targets = TeacherTargets(*(field[sample.mask] for field in targets))
            ids += [targets.ids[targets.logprobs > -np.inf], targets.draw_ids[targets.draw_shares > 0]]
        book = build_book(np.concatenate(ids), capture.vocab_size)
        if capture.world.first or not sharded:
            save_book(folder, book)
        barrier()
        return book
