"""What a step cannot learn from: damaged samples and unaligned labels, counted over all ranks and said once a run."""

from megakd.run import Run
from megakd.system.dist import World, sum_over_ranks
from megakd.system.logging import say
from megakd.train.data import Step


def count_damage(run: Run, step: Step, world: World) -> tuple[int, int]:
    """The tokens that a step really counts, over all ranks, and how many samples it skipped."""
    if run.config.stream.on_damage == "raise" and step.own is None:
        return step.tokens, 0
    name_damage(run, step.damaged)
    own = step.own or 0
    lost, damaged, counted = sum_over_ranks([step.lost, len(step.damaged), own], world.device)
    return int(counted) if step.own is not None else step.tokens - int(lost), int(damaged)


def count_unaligned(run: Run, step: Step, number: int, tokens: int, world: World) -> float:
    """The labels of a step, over all ranks, that are in no span scored by a teacher of another tokenizer; said once.

    They count for the cross entropy alone: they are in the first span of a document (all of it, where two tokenizers
    share no boundary), or beyond the teacher's position limit.
    """
    (count,) = sum_over_ranks([step.unaligned], world.device)
    if count and world.first and not run.events("unaligned"):
        say(
            f"train: step {number}: {int(count):,} of {tokens:,} labels are in no scored span: in a document's first "
            "span, or beyond the teacher's position limit; they count for the cross entropy alone (metric: unaligned)"
        )
        run.record("unaligned", step=number, labels=int(count), of=tokens)
    return count


def name_damage(run: Run, reasons: list[str]) -> None:
    """Say and record what is damaged, once a run: what history knows, from another epoch or rank, is not new."""
    known = {event.get("sample") for event in run.events("damaged")} if reasons else set()
    for reason in dict.fromkeys(reasons):
        if reason not in known:
            say(f"train: skipped: {reason}")
            run.record("damaged", sample=reason)
