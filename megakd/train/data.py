"""The data of a stage as optimizer steps: what each rank trains on, in the order that one integer gives.

It is the same whatever the number of ranks, and where training goes on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megakd.config.run import RunConfig
from megakd.config.train import StageConfig
from megakd.data.batches import Reader, batch_width, collate
from megakd.data.curriculum import Curriculum
from megakd.data.lengths import longest_first, open_groups
from megakd.data.records import IGNORED, Batch, Paired, Sample
from megakd.data.shards import BLANK, ShardSet
from megakd.data.spans import pair, unaligned_labels
from megakd.data.stream import Stream, share
from megakd.data.tokenizers import pair_bos
from megakd.engine.checkpoint import Progress
from megakd.models.checks import LiveTeacher
from megakd.models.hub import load_config
from megakd.system.dist import World
from megakd.system.logging import say
from megakd.system.signals import StopSignals

LOOKED_AT = 50  # steps
Pairing = Callable[[Sequence[Sample]], Paired]


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
    config: RunConfig,
    dataset: ShardSet,
    progress: Progress,
    steps: int,
    world: World,
    teacher: LiveTeacher | None = None,
    curriculum: Curriculum | None = None,
) -> Iterator[Step | None]:
    """The remaining steps of a stage, in the order of the data, whatever the number of ranks; None while they wait."""
    stream = Stream(dataset.sizes, config.seed, config.stream.lanes, curriculum, open_groups(config.stream, dataset))
    reader = Reader(dataset, config.stream.workers, config.stream.on_damage == "skip")
    pairing = find_pairing(config, dataset.facts, teacher)
    windows = config.windows_per_step
    try:
        for step in range(steps - progress.stage_step):
            indices = stream.take(progress.samples + step * windows, windows)
            yield from wait_for(dataset, indices, world)
            indices = longest_first(dataset, indices)
            mine = share(indices, world.rank, world.size, config.optim.micro_batch)
            yield read_step(reader, mine, count_labels(dataset, indices), config.data.sequence_length, pairing)
    finally:
        reader.close()


def in_step(data: Iterator[Step | None], world: World, stop: StopSignals) -> Iterator[Step]:
    """The steps of `data`, each once all ranks have theirs; ends early when some rank got a signal.

    A rank without its next step (None) meets the others all the same: they wait together, and hear of a signal. Ranks
    meet once a step, more often only while one of them waits.
    """
    for step in data:
        all_ready = stop.agree(world, step is not None)
        # a rank that has its step waits here, one that has none goes round the outer loop: each meets once a round
        while step is not None and not all_ready and not stop.agreed:
            all_ready = stop.agree(world)
        if stop.agreed:
            return
        if step is not None:
            yield step
    stop.agree(world)  # the signals of the last step


def read_step(reader: Reader, micro: list[list[int]], tokens: int, length: int, pairing: Pairing | None) -> Step:
    """The micro-batches of the samples at the indices `micro`, and what of them is damaged or unaligned."""
    mine = [index for part in micro for index in part]
    # all at once: a micro-batch may be a single sample, too few for the reader's threads
    samples = reader.read(mine)
    parts = (list(islice(samples, len(part))) for part in micro)  # lazily: it collates while later samples are decoded
    batches = [collate(part, length) if pairing is None else pair_intact(part, pairing) for part in parts]
    # after reading, which finds the damaged ones
    damaged = [index for index in mine if index in reader.damaged]
    lost = count_labels(reader.dataset, damaged)
    step = Step(batches, tokens, [reader.damaged[index] for index in damaged], lost)
    if pairing is None:
        return step
    own = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    unscored = sum(int(unaligned_labels(b.paired.student).sum()) for b in batches if b.paired is not None)
    dropped = count_labels(reader.dataset, mine) - lost - own
    return step._replace(own=own, unaligned=unscored + max(dropped, 0))


def count_labels(dataset: ShardSet, indices: Sequence[int]) -> int:
    """Labels of the samples at `indices`, from the shards' sidecars: damaged samples count too."""
    return sum(dataset.entry(index).labels for index in indices)


def padding_share(config: RunConfig, stage: StageConfig, dataset: ShardSet) -> float:
    """The share of positions without a token in the batches of a stage, of LOOKED_AT steps at most.

    As from the beginning of the data, without a curriculum; the same for any number of ranks. dataset: the tokens.
    """
    stream = Stream(dataset.sizes, config.seed, config.stream.lanes, groups=open_groups(config.stream, dataset))
    staged, length = config.at(stage), config.data.sequence_length
    step, tokens, positions = staged.windows_per_step, 0, 0
    for number in range(min(config.steps_of(stage, len(dataset)), LOOKED_AT)):
        indices = longest_first(dataset, stream.take(number * step, step))
        for batch in share(indices, 0, 1, staged.optim.micro_batch):
            lengths = [len(dataset[index].tokens) - 1 for index in batch]
            tokens += sum(lengths)
            positions += len(batch) * batch_width(lengths, length)
    return 1 - tokens / positions


def find_pairing(config: RunConfig, facts: dict[str, Any], live: LiveTeacher | None) -> Pairing | None:
    """How samples are aligned with a live teacher of another tokenizer; None where one tokenizer serves both."""
    if live is None or live.tokenizers is None:
        return None
    student, teacher = live.tokenizers
    length = config.data.sequence_length
    return partial(
        pair,
        student=student,
        teacher=teacher,
        student_length=length,
        teacher_length=length + length // 4,
        teacher_limit=teacher_positions(live.folder),
        bos=pair_bos(facts, teacher, config.data.bos),
    )


def pair_intact(samples: Sequence[Sample], pairing: Pairing) -> Batch:
    """A batch of both models' views of the samples, where damaged ones have no spans."""
    paired = without_blanks(pairing(samples), samples)
    return Batch(*paired.student[:3], paired=paired)


def teacher_positions(folder: Path) -> int:
    """How many tokens of a live teacher a sequence may become: its position limit, or no limit."""
    settings = load_config(folder).get_text_config()
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
