"""One stage of a training: its objective and engine, step by step to its end or a signal, with checkpoints."""

import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megakd.data.batches import prefetch, to_device
from megakd.data.curriculum import Curriculum
from megakd.data.records import Batch
from megakd.data.shards import ShardSet
from megakd.data.stream import shards_digest
from megakd.engine.base import CarryOver, StepReport
from megakd.engine.checkpoint import Progress, Saved, check_ranks, rotate, save_checkpoint
from megakd.engine.guard import acceptable
from megakd.engine.optim import schedule
from megakd.errors import UserError
from megakd.measured import Stopwatch, record_rate
from megakd.models.checks import LiveTeacher
from megakd.models.flops import step_flops
from megakd.models.hub import copy_side_files, load_config, write_config
from megakd.run import Run
from megakd.system.dist import World, seed_step
from megakd.system.logging import say
from megakd.system.machine import describe_machine, machine_load
from megakd.system.signals import StopSignals
from megakd.system.text import clock
from megakd.tracking import MetricLog
from megakd.train.build import build_engine, build_objective
from megakd.train.damage import count_damage, count_unaligned
from megakd.train.data import Step, in_step, stage_data
from megakd.train.metrics import StageWatch, StepRecord, peak_memory_gb
from megakd.train.skipped import judge
from megakd.train.validation import due, validate


class Training(NamedTuple):
    """What the stages of a training share.

    validation_set: this rank's share, where it is measured.
    student_config: of the student that training started from; every checkpoint of this process gets it.
    log: of the first rank; None on the others.
    """

    run: Run
    dataset: ShardSet
    validation_set: list[Batch]
    teacher: LiveTeacher | None
    curriculum: Curriculum | None
    world: World
    stop: StopSignals
    student_config: Any
    log: MetricLog | None


class StageTrainer:
    """Trains stage `index`: exactly on from `saved` if it is of this stage, else from its weights.

    carried: what the stage before passed on. saved: the last checkpoint of any stage; None before the first step of
    all. updates: how often each parameter was updated before the stage (`CarryOver`).
    """

    def __init__(self, training: Training, index: int, saved: Saved | None, carried: CarryOver | None = None):
        self.run, self.dataset, self.validation_set, self.teacher, self.curriculum = training[:5]
        self.world, self.stop, self.student_config, self.log = training[5:]
        self.saved = saved
        self.stage = self.run.config.stages[index]
        self.config = self.run.config.at(self.stage)
        self.steps = self.run.config.steps_of(self.stage, len(self.dataset))
        every = self.config.checkpoint.every_epochs
        epochs = self.run.config.epoch_ends(self.stage, len(self.dataset)) if every else []
        self.epochs_to_save = set(epochs[every - 1 :: every]) if every else set()
        self.progress = saved.progress if saved else Progress()
        self.shards = shards_digest(self.dataset.names, self.dataset.sizes, self.curriculum)

        student = saved.weights if saved else self.run.student_folder
        self.objective = build_objective(self.config, student, self.dataset.facts, self.teacher, self.world)
        self.objective.restore(saved.auxiliary if saved else {})

        resumed = saved if saved and saved.progress.stage == index else None
        if resumed:
            check_ranks(resumed, self.world.size)
            self.updates = resumed.updates
        else:
            self.updates = carried.updates if carried else {}
            self.progress = self.progress._replace(stage=index, stage_step=0)
        self.engine = build_engine(self.config, self.objective, self.stage, self.world, self.updates)
        if resumed:
            self.engine.load(resumed.folder / "state")
        elif carried:
            self.engine.import_state(carried)
            carried.tensors.clear()  # the engine has them now

    def train(self) -> None:
        """Every step that remains; a checkpoint at each interval, at the end, and when a signal came in between."""
        self._recall_memory()
        source = self.config, self.dataset, self.progress, self.steps, self.world, self.teacher, self.curriculum
        data = stage_data(*source)
        watch = StageWatch(self.stage.name, self.steps, self.progress.stage_step, self.config.log.every_steps, self.log)
        with closing(prefetch(data)) as prefetched:
            for step in in_step(prefetched, self.world, self.stop):
                watch.data_ready()
                record = self.step(step)
                watch.step_done()
                if due(self.config, record.stage_step, self.steps):
                    record = record._replace(validation=self.validate())
                    watch.resume_clock()
                watch.write(record)
                if self._rollback_due():
                    self.roll_back()
                if self._checkpoint_due():
                    self.save()
                    watch.resume_clock()
            if self.progress.step > (self.saved.progress.step if self.saved else 0):
                self.save()
        if self.world.first:
            self._record_rate(watch.measured)

    def step(self, step: Step) -> StepRecord:
        """One optimizer step on the ranks' micro-batches, and what is logged of it."""
        before = self.progress
        # torch's random state, schedules and data follow from the number of the step alone: resume needs no more
        seed_step(self.config.seed, before.step, self.world.rank)
        self.objective.at(before.stage_step / max(self.steps - 1, 1), before.step)
        factor = schedule(self.config.optim, before.stage_step, self.steps)
        tokens, damaged = count_damage(self.run, step, self.world)
        # without tokens there is nothing to learn from: momentum and weight decay alone must not move the weights
        report = self._learn(step, tokens, factor) if tokens else StepReport({}, 0.0)
        after = self.progress._replace(
            stage_step=before.stage_step + 1,
            step=before.step + 1,
            samples=before.samples + self.config.windows_per_step,
            tokens=before.tokens + tokens,
            shards=self.shards,
            memory=dict(self.objective.memory),
        )
        self.progress = after
        return StepRecord(
            stage_step=after.stage_step,
            step=after.step,
            seen=after.tokens,
            tokens=tokens,
            sums=report.sums,
            lr=self.config.optim.lr * factor,
            norm=report.grad_norm,
            damaged=damaged,
            left_out=after.health.left_out,
            norms=report.norms,
            competence=float(self.curriculum.competence(before.samples)) if self.curriculum else None,
        )

    def validate(self) -> dict[str, float]:
        """Measure the validation set with the weights as they are."""
        start = time.perf_counter()
        found = validate(self.engine, self.validation_set, self.world)
        if self.world.first:
            took, value = clock(time.perf_counter() - start), found["validation_perplexity"]
            say(f"train: step {self.progress.step}: validation perplexity {value:.4g} ({took})")
        return found

    def save(self) -> None:
        """Publish a checkpoint, then delete the oldest ones."""
        folder = self.run.path("checkpoints", self.stage.name, f"step-{self.progress.step:06d}")
        save_checkpoint(folder, self.engine, self.progress, self.world, self._describe, self.updates)
        if self.world.first:
            place, load = str(folder.relative_to(self.run.folder)), machine_load(self.world.device)
            self.run.record("checkpoint", folder=place, step=self.progress.step, machine_load=load)
            rotate(self.run.path("checkpoints"), self.config.checkpoint.keep, {folder})
        self.saved = Saved(folder, self.progress)

    def roll_back(self) -> None:
        """Back to the weights and moments of the stage's last checkpoint; step, schedule and data go on."""
        back = self.saved if self.saved and self.saved.progress.stage == self.progress.stage else None
        if back:
            self.engine.load(back.folder / "state")
        health = self.progress.health
        if self.world.first:
            where = f"back to the weights of {back.folder}" if back else "no checkpoint of this stage to go back to"
            say(f"train: {health.in_a_row} updates skipped in a row: {where}")
            to = str(back.folder.relative_to(self.run.folder)) if back else None
            self.run.record("rollback", step=self.progress.step, to=to)
        self.progress = self.progress._replace(health=health._replace(in_a_row=0))

    def carry_over(self) -> CarryOver:
        """End the stage: what it passes on to the next one."""
        carried = self.engine.export_state()
        self.engine.close()
        return carried

    def _learn(self, step: Step, tokens: int, factor: float) -> StepReport:
        """Forward, backward and update; a step whose loss fails makes no update, or ends the training (`judge`)."""
        number = self.progress.step + 1
        accept = partial(acceptable, tokens=tokens, health=self.progress.health, config=self.config.guard)
        batches = (to_device(batch, self.world.device) for batch in step.micro_batches)
        norms = (self.progress.stage_step + 1) % self.config.log.every_steps == 0
        report = self.engine.step(batches, tokens, factor, accept, norms)
        if step.own is not None:
            report.sums["unaligned"] = count_unaligned(self.run, step, number, tokens, self.world)
        self.progress = self.progress._replace(health=judge(self.run, self.progress, report, tokens, self.world))
        if report.left_out:
            self.objective.forget_step()
        else:
            self.objective.observe(report.sums, tokens)
        return report

    def _record_rate(self, measured: Stopwatch) -> None:
        """Throughput of this process's steps in this stage, for `megakd plan --gpus`."""
        engine = self.config.engine
        settings: dict[str, Any] = {"engine": engine.config if engine.kind == "deepspeed" else engine.kind}
        settings |= {"expert_parallel": engine.expert_parallel, "micro_batch": self.config.optim.micro_batch}
        settings |= {"sequence_length": self.config.data.sequence_length, "memory_gb": round(peak_memory_gb(), 2)}
        teacher = load_config(self.teacher.folder) if self.teacher else None
        with suppress(UserError):  # a model whose FLOPs are not known
            settings["flops_per_token"] = step_flops(self.config, self.student_config, teacher)
        device = describe_machine(self.world.device)["device"]
        size = self.world.size
        record_rate(self.run.folder, "train", device, measured.tokens, measured.seconds, size, **settings)

    def _recall_memory(self) -> None:
        """Give the objective what steps before the checkpoint left for later ones."""
        for name in self.objective.recall(self.progress.memory):
            if self.world.first:
                where = self.saved.folder if self.saved else "the checkpoint"
                say(f"train: {where}: what the objective remembers of {name} is not finite; it begins anew")
                self.run.record("memory", name=name)

    def _rollback_due(self) -> bool:
        return 0 < self.config.guard.rollback <= self.progress.health.in_a_row

    def _checkpoint_due(self) -> bool:
        done = self.progress.stage_step
        return done == self.steps or done % self.config.checkpoint.every_steps == 0 or done in self.epochs_to_save

    def _describe(self, weights: Path) -> None:
        """Make the weights of a checkpoint a Hugging Face folder.

        With the config and tokenizer of the student, which stays: rotation may have deleted the checkpoint that the
        stage began with.
        """
        write_config(weights, self.student_config)
        copy_side_files(self.run.student_folder, weights)
