"""The training loop: every stage from the last checkpoint on, until the end or a signal."""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from megakd.config.effects import notices
from megakd.config.train import StageConfig
from megakd.data.batches import prefetch, to_device
from megakd.data.shards import ShardSet
from megakd.data.stream import shards_digest
from megakd.engine.base import CarryOver, Engine, StepReport
from megakd.engine.checkpoint import (
    Progress,
    Saved,
    check_ranks,
    last_sound,
    remove_unpublished,
    rotate,
    save_checkpoint,
)
from megakd.engine.guard import GRADIENT, Health, after_step, wrong_with
from megakd.engine.optim import schedule
from megakd.errors import UserError
from megakd.models.checks import live_teacher, student_identity
from megakd.models.hub import copy_side_files, load_config, write_config
from megakd.run import Run
from megakd.system.dist import (
    World,
    seed_step,
    sum_over_ranks,
)
from megakd.system.logging import say
from megakd.system.signals import StopSignals
from megakd.system.version import made_with
from megakd.tracking import MetricLog, wandb_id
from megakd.train.build import build_engine, build_objective
from megakd.train.data import Step, stage_data
from megakd.train.metrics import StageWatch, StepRecord


def train(run: Run, dataset: ShardSet, world: World, stop: StopSignals) -> bool:
    """Every stage that remains after the last checkpoint; False when a signal ended it early."""
    saved, damaged = last_sound(run.path("checkpoints"), world)
    for reason in damaged:
        say(f"train: checkpoint skipped: {reason}")
        run.record("damaged checkpoint", reason=reason)
    progress = saved.progress if saved else Progress()
    # read once: every checkpoint of this process gets the config that its weights were trained with
    student_config, log = load_config(run.student_folder), None
    if world.first:
        remove_unpublished(run.path("checkpoints"))
        for line in notices(run.config):
            say(f"train: {line}")
        asked: dict[str, Any] = {"teacher": live_teacher(run)} if run.config.objective.live else {}
        resumed = str(saved.folder) if saved else None
        asked["student"] = student_identity(run).record()
        run.record("train", ranks=world.size, step=progress.step, resumed=resumed, megakd=made_with(), **asked)
        if saved:
            say(f"train: going on from {saved.folder}")
        frozen = run.config.model_dump(mode="json")
        log = MetricLog(run.folder, run.config.log, run.config.name, wandb_id(run.config), frozen, progress.step)
    carried = None
    try:
        for index, stage in enumerate(run.config.stages):
            reached = (saved.progress.stage, saved.progress.stage_step) if saved else (0, 0)
            if reached < (index, run.config.steps_of(stage, len(dataset))):
                saved, carried = train_stage(run, index, student_config, dataset, saved, carried, world, stop, log)
            if stop.agreed:
                return False
        return True
    finally:
        if log:
            log.close()


def train_stage(
    run: Run,
    index: int,
    student_config: Any,
    dataset: ShardSet,
    saved: Saved | None,
    carried: CarryOver | None,
    world: World,
    stop: StopSignals,
    log: MetricLog | None,
) -> tuple[Saved | None, CarryOver | None]:
    """Stage `index`, to its end or a signal: exactly on from `saved` if it is of this stage, else from its weights.

    carried: what the stage before passed on; None where it ended in another process.
    Returns the last checkpoint (None when a signal came before the first step of all), and what this stage passes on.
    """
    stage, config = run.config.stages[index], run.config.at(run.config.stages[index])
    steps = run.config.steps_of(stage, len(dataset))
    progress = saved.progress if saved else Progress()
    if saved and progress.stage < index and carried is None:
        carried = end_of_stage(run, saved, dataset, world)
    objective = build_objective(config, saved.weights if saved else run.student_folder, dataset, world.device)
    objective.restore(saved.auxiliary if saved else {})
    for name in objective.recall(progress.memory):
        if world.first:
            where = saved.folder if saved else "the checkpoint"
            say(f"train: {where}: what the objective remembers of {name} is not finite; it begins anew")
            run.record("memory", name=name)
    updates = carried.updates if carried else {}
    if saved and progress.stage == index:
        check_ranks(saved, world.size)
        updates = saved.updates
        engine = build_engine(config, objective, stage, world, updates)
        engine.load(saved.folder / "state")
    else:
        progress = progress._replace(stage=index, stage_step=0)
        engine = build_engine(config, objective, stage, world, updates)
        if carried:
            engine.import_state(carried)
            carried.tensors.clear()  # the engine has them now
    shards = shards_digest(dataset.names, dataset.sizes)
    watch = StageWatch(stage.name, steps, progress.stage_step, config.log.every_steps, log)
    with closing(prefetch(stage_data(config, dataset, progress, steps, world))) as data:
        for step in in_step(data, world, stop):
            watch.data_ready()
            seed_step(config.seed, progress.step, world.rank)
            objective.at(progress.stage_step / max(steps - 1, 1), progress.step)
            factor = schedule(config.optim, progress.stage_step, steps)
            tokens, damaged = count_damage(run, step, world)
            batches = (to_device(batch, world.device) for batch in step.micro_batches)
            show = (progress.stage_step + 1) % config.log.every_steps == 0
            # nothing to learn from: momentum and weight decay alone must not move the weights either
            report = StepReport({}, 0.0)
            if tokens:
                health = progress.health

                def accept(sums: dict[str, float], tokens: int = tokens, health: Health = health) -> bool:
                    return not wrong_with(sums["total"] / tokens, health, config.guard)

                report = engine.step(batches, tokens, factor, accept, show)
                if step.own is not None:
                    report.sums["unaligned"] = count_unaligned(run, step, progress.step + 1, tokens, world)
                progress = progress._replace(health=judge(run, progress, report, tokens, world))
                if report.left_out:
                    objective.forget_step()
                else:
                    objective.observe(report.sums, tokens)
            progress = Progress(
                stage=index,
                stage_step=progress.stage_step + 1,
                step=progress.step + 1,
                samples=progress.samples + config.windows_per_step,
                tokens=progress.tokens + tokens,
                shards=shards,
                health=progress.health,
                memory=dict(objective.memory),
            )
            watch.step_done(
                StepRecord(
                    stage_step=progress.stage_step,
                    step=progress.step,
                    seen=progress.tokens,
                    tokens=tokens,
                    sums=report.sums,
                    lr=config.optim.lr * factor,
                    norm=report.grad_norm,
                    damaged=damaged,
                    left_out=progress.health.left_out,
                    norms=report.norms,
                )
            )
            if config.guard.rollback and progress.health.in_a_row >= config.guard.rollback:
                progress = roll_back(run, engine, progress, saved, world)
            if progress.stage_step == steps or progress.stage_step % config.checkpoint.every_steps == 0:
                saved = save(run, stage, student_config, engine, progress, world, updates)
                watch.resume_clock()
        if progress.step > (saved.progress.step if saved else 0):  # a signal came in between
            saved = save(run, stage, student_config, engine, progress, world, updates)
    handed = engine.export_state() if index + 1 < len(run.config.stages) and not stop.agreed else None
    engine.close()
    return saved, handed


def end_of_stage(run: Run, saved: Saved, dataset: ShardSet, world: World) -> CarryOver:
    """What a stage that ended in another process passes on, from its last checkpoint."""
    stage = run.config.stages[saved.progress.stage]
    config = run.config.at(stage)
    objective = build_objective(config, saved.weights, dataset, world.device)
    objective.restore(saved.auxiliary)
    engine = build_engine(config, objective, stage, world, saved.updates)
    check_ranks(saved, world.size)
    engine.load(saved.folder / "state")
    carried = engine.export_state()
    engine.close()
    return carried


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


def roll_back(run: Run, engine: Engine, progress: Progress, saved: Saved | None, world: World) -> Progress:
    """Back to the weights and moments of the stage's last checkpoint; step, schedule and data go on."""
    back = saved if saved and saved.progress.stage == progress.stage else None
    if back:
        engine.load(back.folder / "state")
    if world.first:
        where = f"back to the weights of {back.folder}" if back else "no checkpoint of this stage to go back to"
        say(f"train: {progress.health.in_a_row} updates skipped in a row: {where}")
        run.record("rollback", step=progress.step, to=str(back.folder.relative_to(run.folder)) if back else None)
    return progress._replace(health=progress.health._replace(in_a_row=0))


def in_step(data: Iterator[Step | None], world: World, stop: StopSignals) -> Iterator[Step]:
    """The steps of `data`, each once all ranks have theirs; ends early when some rank got a signal.

    A rank without its next step (None) meets the others all the same: they wait together, and hear of a signal. Ranks
    meet once a step, more often only while one of them waits.
    """
    for step in data:
        all_ready = stop.agree(world, step is not None)
        while step is not None and not all_ready and not stop.agreed:
            all_ready = stop.agree(world)
        if stop.agreed:
            return
        if step is not None:
            yield step
    stop.agree(world)  # the signals of the last step


def save(
    run: Run,
    stage: StageConfig,
    student_config: Any,
    engine: Engine,
    progress: Progress,
    world: World,
    updates: dict[str, int],
) -> Saved:
    """Publish a checkpoint, then rotate the old ones; updates: what the stage began with (`CarryOver`)."""
    folder = run.path("checkpoints", stage.name, f"step-{progress.step:06d}")

    def describe(weights: Path) -> None:
        # from the student, which stays: rotation may have taken the checkpoint that the stage began with
        write_config(weights, student_config)
        copy_side_files(run.student_folder, weights)

    save_checkpoint(folder, engine, progress, world, describe, updates)
    if world.first:
        run.record("checkpoint", folder=str(folder.relative_to(run.folder)), step=progress.step)
        rotate(run.path("checkpoints"), run.config.checkpoint.keep, {folder})
    return Saved(folder, progress)


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
