"""A step whose update was skipped: said and recorded, or the end of the training."""

import math

from megakd.engine.base import StepReport
from megakd.engine.checkpoint import Progress
from megakd.engine.guard import GRADIENT, Health, after_step, wrong_with
from megakd.errors import UserError
from megakd.run import Run
from megakd.system.dist import World
from megakd.system.logging import say


def judge(run: Run, progress: Progress, report: StepReport, tokens: int, world: World) -> Health:
    """The run's health after a step; UserError where the run should stop at what failed with it."""
    guard, loss = run.config.guard, report.sums["total"] / tokens
    if report.left_out:
        why = wrong_with(loss, progress.health, guard) or report.left_out
        step = progress.step + 1
        if world.first:
            say(f"train: step {step} makes no update: {why}")
            run.record("skipped", step=step, reason=why)
        if guard.nonfinite == "stop" and (report.left_out == GRADIENT or not math.isfinite(loss)):
            raise UserError(
                f"{run.folder}: step {step}: {why}; the weights are as they were, the last checkpoint stands. Lower "
                "optim.lr in a new run, or go on without such steps: guard.nonfinite=skip"
            )
    return after_step(progress.health, loss, report.left_out, guard)
