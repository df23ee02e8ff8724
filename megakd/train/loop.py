"""The training loop: every stage from the last checkpoint on, until the end or a signal."""

import os
from contextlib import closing, nullcontext
from typing import Any

from megakd.config.checks import notices
from megakd.data.curriculum import open_curriculum
from megakd.data.shards import ShardSet
from megakd.engine.base import CarryOver
from megakd.engine.checkpoint import Saved, last_sound, published, remove_unpublished
from megakd.identity import fingerprint
from megakd.models.checks import LiveTeacher, find_live_teacher, student_identity
from megakd.models.hub import load_config
from megakd.run import Run
from megakd.system.dist import World
from megakd.system.logging import say
from megakd.system.machine import describe_machine
from megakd.system.signals import StopSignals
from megakd.system.version import made_with
from megakd.tracking import MetricLog, wandb_id
from megakd.train.checks import reached_end
from megakd.train.stage import StageTrainer, Training
from megakd.train.validation import read_holdout


def train(run: Run, dataset: ShardSet, world: World, stop: StopSignals) -> bool:
    """Every stage that remains after the last checkpoint; False when a signal ended it early."""
    saved, damaged = last_sound(run.path("checkpoints"), world)
    for reason in damaged:
        say(f"train: checkpoint skipped: {reason}")
        run.record("damaged checkpoint", reason=reason)
    if saved and reached_end(run.config, saved, dataset):
        if world.first:
            remove_unpublished(run.path("checkpoints"))
            say(finished_already(saved))
        return True
    # before anything is recorded: a student without a config ends the training here
    student_config = load_config(run.student_folder)
    teacher = find_live_teacher(run.config, dataset.facts)
    curriculum, log = open_curriculum(run.config.stream, dataset), None
    if world.first:
        remove_unpublished(run.path("checkpoints"))
        announce(run, dataset, saved, teacher, world)
        log = open_log(run, saved)
    with closing(log) if log else nullcontext():
        holdout = read_holdout(run, world)
        shared = Training(run, dataset, holdout, teacher, curriculum, world, stop, student_config, log)
        finished = train_stages(shared, saved)
    if world.first:
        announce_end(run, finished, stop)
    return finished


def train_stages(training: Training, saved: Saved | None) -> bool:
    """The stages that `saved` has not finished; False when a signal ended one early."""
    config, carried = training.run.config, None
    reached = (saved.progress.stage, saved.progress.stage_step) if saved else (0, 0)
    for index, stage in enumerate(config.stages):
        if reached < (index, config.steps_of(stage, len(training.dataset))):
            saved, carried = train_stage(training, index, saved, carried)
        if training.stop.agreed:
            return False
    return True


def train_stage(
    training: Training, index: int, saved: Saved | None, carried: CarryOver | None
) -> tuple[Saved | None, CarryOver | None]:
    """Stage `index`, to its end or a signal: its last checkpoint, and what it passes on to the next stage.

    saved: the last checkpoint so far, of this stage or an earlier one; None as long as no step was made.
    carried: what the stage before passed on; None where it ended in another process.
    """
    if saved and saved.progress.stage < index and carried is None:
        # its checkpoint holds the same: open that stage at its end, for what it passes on
        carried = StageTrainer(training, saved.progress.stage, saved).carry_over()
    # local to this function: its models are freed before the next stage builds its own
    trainer = StageTrainer(training, index, saved, carried)
    trainer.train()
    last = index + 1 == len(training.run.config.stages)
    if last or training.stop.agreed:
        trainer.engine.close()
        return trainer.saved, None
    return trainer.saved, trainer.carry_over()


def announce(run: Run, dataset: ShardSet, saved: Saved | None, teacher: LiveTeacher | None, world: World) -> None:
    """Say and record that training starts, or from which checkpoint it goes on."""
    for line in notices(run.config, len(dataset), saved.progress.stage + 1 if saved else 0):
        say(f"train: {line}")
    models: dict[str, Any] = {"teacher": fingerprint(teacher.folder)} if teacher else {}
    models["student"] = student_identity(run).record()
    step, resumed = (saved.progress.step, str(saved.folder)) if saved else (0, None)
    machine = describe_machine(world.device)
    job = {"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}  # whose end `watch` asks for
    facts = {"ranks": world.size, "step": step, "resumed": resumed, "megakd": made_with(), "machine": machine}
    run.record("train", **facts, **models, **job)
    if saved:
        say(f"train: going on from {saved.folder}")


def announce_end(run: Run, finished: bool, stop: StopSignals) -> None:
    """Say that training is finished, or say and record that a signal stopped it, and what is saved."""
    saved = next(
        (str(each.folder.relative_to(run.folder)) for each in reversed(published(run.path("checkpoints")))), None
    )
    if finished:
        say(f"train: finished: {run.folder}/{saved}; next: evaluate, export, report")
        return
    run.record("stop", signal=stop.name, checkpoint=saved)
    kept = f"; saved {saved}" if saved else " before the first step"
    say(f"train: stopped by {stop.name}{kept}; the same command goes on")


def finished_already(saved: Saved) -> str:
    """What `train` says of a run whose last checkpoint is the end of its last stage."""
    return f"train: finished already: {saved.folder}; next: evaluate, export, report"


def open_log(run: Run, saved: Saved | None) -> MetricLog:
    """The run's metrics, without those of steps after the checkpoint: they are made again."""
    config, step = run.config, saved.progress.step if saved else 0
    return MetricLog(run.folder, config.log, config.name, wandb_id(config), config.model_dump(mode="json"), step)
