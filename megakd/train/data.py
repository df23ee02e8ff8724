"""The data of a stage as optimizer steps: what each rank trains on, in the order that one integer gives.

It is the same whatever the number of ranks, and where training goes on.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from megakd.config.run import RunConfig
from megakd.data.batches import Reader, collate
from megakd.data.records import IGNORED, Batch, Paired, Sample
from megakd.data.shards import BLANK, ShardSet
from megakd.data.spans import pair, unaligned_labels
from megakd.data.stream import Stream, share
from megakd.data.tokenizers import pair_bos
from megakd.engine.checkpoint import Progress
from megakd.models.checks import tokenizers
from megakd.models.hub import load_config
from megakd.names import resolve
from megakd.system.dist import World
from megakd.system.logging import say


class Step(NamedTuple):
    """What one optimizer step needs: this rank's micro-batches, and the counted tokens of all ranks.

    own: this rank's counted tokens alone, where nobody knows those of the others (None: `tokens` is right).
    unaligned: of `own`, those in no scored span, and what is lost of the samples' own labels.
    damaged: for each sample of this rank that was skipped, what is wrong; lost: their tokens, still in `tokens`.
    """

    micro_batches: list[Batch]
    tokens: int
    damaged: list[str]
    lost: int
    own: int | None = None
    unaligned: int = 0


def stage_data(
    config: RunConfig, dataset: ShardSet, progress: Progress, steps: int, world: World
) -> Iterator[Step | None]:
    """The remaining steps of a stage, in the order of the data, whatever the number of ranks; None while they wait."""
    stream = Stream(dataset.sizes, config.seed, config.stream.lanes)
    reader = Reader(dataset, config.stream.workers, config.stream.on_damage == "skip")
    length = config.data.sequence_length
    windows = config.windows_per_step
    student, teacher = tokenizers(config, dataset.facts)
    limit = None if teacher is None else teacher_positions(config)
    bos = ([], []) if teacher is None else pair_bos(dataset.facts, teacher, config.data.bos)

    def batch_of(samples: list[Sample]) -> Batch:
        if teacher is None:
            return collate(samples, length)
        paired = without_blanks(pair(samples, student, teacher, length, length + length // 4, limit, bos), samples)
        return Batch(*paired.student[:3], paired=paired)

    try:
        for step in range(steps - progress.stage_step):
            indices = stream.take(progress.samples + step * windows, windows)
            yield from wait_for(dataset, indices, world)
            micro = share(indices, world.rank, world.size, config.optim.micro_batch)
            tokens = sum(dataset.entry(i).labels for i in indices)
            samples = reader.read([index for part in micro for index in part])  # at once: a part may be one sample
            batches = [batch_of(list(islice(samples, len(part)))) for part in micro]
            bad = [i for part in micro for i in part if i in reader.damaged]
            lost = sum(dataset.entry(i).labels for i in bad)
            own = None if teacher is None else sum(int((batch.labels != IGNORED).sum()) for batch in batches)
            unaligned = 0
            if own is not None:
                labels = sum(dataset.entry(i).labels for part in micro for i in part) - lost
                beyond = sum(int(unaligned_labels(b.paired.student).sum()) for b in batches if b.paired is not None)
                unaligned = beyond + max(labels - own, 0)
            yield Step(batches, tokens, [reader.damaged[i] for i in bad], lost, own, unaligned)
    finally:
        reader.close()


def teacher_positions(config: RunConfig) -> int:
    """How many tokens of a live teacher a sequence may become: its position limit, or no limit."""
    settings = load_config(resolve(config.model.teacher, config.model.revision, weights=False)).get_text_config()
    limit = getattr(settings, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else 2**31


def without_blanks(paired: Paired, samples: Sequence[Sample]) -> Paired:
    """Blank samples, which stand for damaged ones, have no spans: no loss may compare what they hold."""
    blank_B = torch.tensor([sample.key == BLANK for sample in samples])
    student, teacher = (
        side._replace(
            spans=side.spans.masked_fill(blank_B[:, None], -1),
            label_spans=side.label_spans.masked_fill(blank_B[:, None], -1),
        )
        for side in (paired.student, paired.teacher)
    )
    return Paired(student, teacher, paired.span_count.masked_fill(blank_B, 0))


def wait_for(dataset: ShardSet, indices: list[int], world: World) -> Iterator[None]:
    """Until the shards of a step exist (stream.follow), twice a second; all ranks wait for the shards of all."""
    said, missing = 0.0, dataset.missing(indices)
    while missing:
        if world.first and time.monotonic() - said > 60:
            said = time.monotonic()
            say(f"train: waiting for {missing[0]} from the capture (the next step needs {len(missing)} shards more)")
        time.sleep(0.5)
        yield
        missing = dataset.missing(indices)
