"""The student's perplexity on the validation set while it trains, every `eval.every_steps` steps, on all ranks."""

from collections.abc import Sequence

from megakd.config.run import RunConfig
from megakd.data.batches import collate, to_device
from megakd.data.lengths import longest_first
from megakd.data.records import Batch
from megakd.data.shards import ShardSet
from megakd.engine.base import Engine
from megakd.errors import UserError
from megakd.losses.per_token import perplexity
from megakd.run import Run
from megakd.system.dist import World


def open_holdout(run: Run) -> ShardSet | None:
    """The validation set, where it is measured while training; UserError where it has nothing to measure."""
    every = run.config.eval.every_steps
    if not every:
        return None
    off = f"or set eval.every_steps=0 (it is {every})"
    try:
        holdout = ShardSet(run.path("data", "tokens", "holdout"))
    except UserError as error:
        raise UserError(f"{error}; {off}") from error
    if not any(holdout.entry(index).labels for index in range(len(holdout))):
        raise UserError(
            f"{holdout.folder}: no position of the validation set has a label; raise data.holdout_tokens in a new run, "
            f"{off}"
        )
    return holdout


def read_holdout(run: Run, world: World) -> list[Batch]:
    """This rank's share of the validation set; no batches where it is not measured.

    Batches of optim.micro_batch sequences, for which training has the memory. Every rank has as many, blank sequences
    at the end where others have more: those without labels count for nothing.
    """
    holdout = open_holdout(run)
    if holdout is None:
        return []
    config = run.config
    samples = [holdout[index] for index in longest_first(holdout, range(len(holdout)))]
    holdout.close()
    size = config.optim.micro_batch
    samples += [holdout.blank()] * (-len(samples) % (size * world.size))
    mine = range(world.rank * size, len(samples), world.size * size)
    return [collate(samples[start : start + size], config.data.sequence_length) for start in mine]


def validate(engine: Engine, holdout: Sequence[Batch], world: World) -> dict[str, float]:
    """Mean -log p of the labels in nats, and its exponential, by their names in the log; called by all ranks together.

    Of the student with its weights as they are. It does not depend on the number of ranks.
    """
    sums = engine.measure(to_device(batch, world.device) for batch in holdout)
    nll = sums["total"] / sums["labels"]
    return {"validation_nll": nll, "validation_perplexity": perplexity(nll)}


def due(config: RunConfig, stage_step: int, steps: int) -> bool:
    """Whether it is measured behind this step of a stage of `steps`: at each interval, and at the stage's end."""
    every = config.eval.every_steps
    return every > 0 and (stage_step % every == 0 or stage_step == steps)
