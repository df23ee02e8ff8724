"""Distil the student, stage by stage, from the cached teacher targets; resumes from the last checkpoint by itself.

With engine.kind=deepspeed and engine.ranks > 1 it starts the deepspeed launcher on this machine; on more machines start
it with launch/train.sh or launch/train.sbatch. SIGTERM and SIGUSR1 save a checkpoint and leave with exit code 85.

examples:
  megakd train runs/a
  megakd train runs/a engine.ranks=2 optim.micro_batch=4
  deepspeed --hostfile hostfile --module megakd train runs/a
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from megakd.config import RunConfig, StageConfig
from megakd.data.batches import collate, prefetch, to_device
from megakd.data.records import Batch
from megakd.data.shards import ShardSet
from megakd.data.stream import Stream, share
from megakd.data.tokens import load_tokenizer, tokenizer_facts
from megakd.dist import World, close_world, join_world, read_world, seed_step, sum_over_ranks
from megakd.engine.base import Engine, StepReport
from megakd.engine.checkpoint import Progress, Saved, check_ranks, published, rotate, save_checkpoint
from megakd.engine.ds_json import deepspeed_config
from megakd.engine.optim import assign_rules, build_optimizer, schedule
from megakd.errors import UserError
from megakd.files import locked, read_json, shipped
from megakd.log import MetricLog, clock, say, short
from megakd.models.hub import copy_side_files, load_config, load_model, write_config
from megakd.objectives.cached import CachedDistillation
from megakd.run import Run

STOPPED = 85  # exit code: stopped by a signal, checkpoint saved; schedulers requeue on it


class Step(NamedTuple):
    """What one optimizer step needs: this rank's micro-batches, the counted tokens of all ranks, seconds it was waited for."""

    micro_batches: list[Batch]
    tokens: int


def main(run: Run, args: argparse.Namespace) -> None:
    dataset = check(run)
    if run.config.engine.kind == "deepspeed" and run.config.engine.ranks > 1 and not was_launched():
        sys.exit(launch(run))
    world = join_world() if run.config.engine.kind == "deepspeed" else read_world()
    check_world(run.config, world)
    # ranks outlive a launcher that was killed: a second training in the same folder must not start beside them
    alone = locked(run.path("train.lock"), "is being trained by another process; wait for it or stop it")
    with StopSignals() as stop, alone if world.first else nullcontext():
        saved = next(reversed(published(run.path("checkpoints"))), None)
        finished = train(run, dataset, saved, world, stop)
    close_world()
    if not finished:
        sys.exit(STOPPED)


def train(run: Run, dataset: ShardSet, saved: Saved | None, world: World, stop: "StopSignals") -> bool:
    """Every stage that remains after `saved`; False when a signal ended it early."""
    progress = saved.progress if saved else Progress()
    if world.first:
        run.record("train", ranks=world.size, step=progress.step, resumed=str(saved.folder) if saved else None)
        if saved:
            say(f"train: going on from {saved.folder}")
    log = (
        MetricLog(run.folder, run.config.log, run.config.name, *_identity(run), progress.step) if world.first else None
    )
    try:
        for index, stage in enumerate(run.config.stages):
            steps = stage_steps(run.config, stage)
            if (index, steps) <= (progress.stage, progress.stage_step):
                continue
            resumed = saved if saved and progress.stage == index else None
            if resumed is None:
                progress = progress._replace(stage=index, stage_step=0)
            saved = train_stage(run, stage, steps, dataset, progress, saved, resumed, world, stop, log)
            progress = saved.progress
            if stop.asked:
                return False
        return True
    finally:
        if log:
            log.close()


def train_stage(
    run: Run, stage: StageConfig, steps: int, dataset: ShardSet, progress: Progress, before: Saved | None, resumed: Saved | None,
    world: World, stop: "StopSignals", log: MetricLog | None,
) -> Saved:  # fmt: skip
    """One stage from `progress` to its end or a signal; starts from the weights of `before`, or exactly from `resumed`."""
    config = run.config
    start = before.weights if before else run.student_folder
    objective = build_objective(config, start, dataset)
    engine = build_engine(config, objective, stage, world)
    if resumed:
        check_ranks(resumed, world.size)
        engine.load(resumed.folder / "state")
    watch = Watch(config, stage, steps, progress, world)
    for step in prefetch(stage_data(config, dataset, progress, steps, world)):
        waited = watch.data_ready()
        seed_step(config.seed, progress.step, world.rank)
        factor = schedule(config.optim, progress.stage_step, steps)
        report = engine.step((to_device(batch, world.device) for batch in step.micro_batches), step.tokens, factor)
        windows = config.optim.batch_tokens // config.data.sequence_length
        progress = progress._replace(
            stage_step=progress.stage_step + 1,
            step=progress.step + 1,
            samples=progress.samples + windows,
            tokens=progress.tokens + step.tokens,
        )
        watch.step_done(report, step.tokens, (stage.lr or config.optim.lr) * factor, progress, waited, log)
        stop.agree(world)
        if stop.asked or progress.stage_step == steps or progress.stage_step % config.checkpoint.every_steps == 0:
            before = save(run, stage, engine, progress, start, world)
            watch.data_asked()
            if stop.asked:
                break
    engine.close()
    assert before is not None
    return before


def save(run: Run, stage: StageConfig, engine: Engine, progress: Progress, start: Path, world: World) -> Saved:
    """Publish a checkpoint, then rotate the old ones."""
    folder = run.path("checkpoints", stage.name, f"step-{progress.step:06d}")

    def describe(weights: Path) -> None:
        write_config(weights, load_config(start))
        copy_side_files(start, weights)

    save_checkpoint(folder, engine, progress, world, describe, world.size)
    if world.first:
        run.record("checkpoint", folder=str(folder.relative_to(run.folder)), step=progress.step)
        rotate(run.path("checkpoints"), run.config.checkpoint.keep, {folder})
    return Saved(folder, progress)


def stage_data(config: RunConfig, dataset: ShardSet, progress: Progress, steps: int, world: World) -> Iterator[Step]:
    """The remaining steps of a stage; the order is that of the data, whatever the number of ranks."""
    stream = Stream(len(dataset), config.seed)
    length = config.data.sequence_length
    windows = config.optim.batch_tokens // length
    for step in range(steps - progress.stage_step):
        indices = stream.take(progress.samples + step * windows, windows)
        micro = share(indices, world.rank, world.size, config.optim.micro_batch)
        tokens = sum(dataset.entries[i].labels for i in indices)
        yield Step([collate([dataset[i] for i in part], length) for part in micro], tokens)


def stage_steps(config: RunConfig, stage: StageConfig) -> int:
    """Optimizer steps of a stage: its tokens over the batch, rounded up."""
    return -(-stage.tokens // config.optim.batch_tokens)


def build_objective(config: RunConfig, folder: Path, dataset: ShardSet) -> CachedDistillation:
    """The student of `folder` inside the run's objective."""
    # without DeepSpeed's fp32 masters the weights themselves stay float32, and the forward runs under autocast
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" and config.engine.kind == "deepspeed" else torch.float32
    return CachedDistillation(
        load_model(folder, dtype), config.objective, dataset.facts["vocab_size"], dataset.facts["temperatures"]
    )


def build_engine(config: RunConfig, objective: CachedDistillation, stage: StageConfig, world: World) -> Engine:
    """The engine of a stage, with the stage's frozen parameters, groups and rates."""
    optimizer = build_optimizer(objective, stage.lr_multipliers, config.optim, stage.lr or config.optim.lr)
    if not objective.student.get_input_embeddings().weight.requires_grad:
        # ZeRO-3's backward needs an input that requires gradients when all that comes first is frozen
        objective.student.enable_input_require_grads()
    if config.engine.kind == "local":
        from megakd.engine.local import LocalEngine

        return LocalEngine(objective, optimizer, config.optim.clip_norm, config.model.dtype, world.device)
    from megakd.engine.deepspeed import DeepSpeedEngine

    windows = config.optim.batch_tokens // config.data.sequence_length
    return DeepSpeedEngine(objective, optimizer, deepspeed_config(config, world.size, windows), world)


def check(run: Run) -> ShardSet:
    """Everything that can be wrong before any process starts: data, student and rules belong to this run."""
    config, student = run.config, run.student_folder
    if not (student / "config.json").exists():
        raise UserError(f"{student}: no student here; run: megakd compress {run.folder}")
    dataset = ShardSet(run.path("data", "logits", "train"))
    facts = dataset.facts
    theirs = facts["teacher"]
    origin = read_json(student / "compress.json")["teacher"] if (student / "compress.json").exists() else None
    mine = origin or {"id": config.model.teacher, "revision": config.model.revision, "weights": theirs["weights"]}
    if theirs != mine:
        raise UserError(
            f"{dataset.folder}: logits made by {theirs['id']} (weights {theirs['weights']}), but the student comes from "
            f"{mine['id']} (weights {mine['weights']}); run: megakd generate-logits RUN in a new run"
        )
    tokenizer = tokenizer_facts(load_tokenizer(student))
    if tokenizer != facts["tokens"]["tokenizer"]:
        raise UserError(
            f"{dataset.folder}: made with a tokenizer of {facts['tokens']['tokenizer']['vocab_size']} entries "
            f"({facts['tokens']['tokenizer']['hash']}), but {student} has one of {tokenizer['vocab_size']} ({tokenizer['hash']})"
        )
    if facts["tokens"]["sequence_length"] != config.data.sequence_length:
        raise UserError(
            f"{dataset.folder}: windows of {facts['tokens']['sequence_length']} tokens, data.sequence_length is {config.data.sequence_length}"
        )
    if config.optim.batch_tokens % config.data.sequence_length:
        raise UserError(
            f"optim.batch_tokens: {config.optim.batch_tokens} is no multiple of data.sequence_length {config.data.sequence_length}"
        )
    if config.engine.kind == "deepspeed":
        deepspeed_config(config, 1, 1)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        skeleton: Any = AutoModelForCausalLM.from_config(load_config(student))
    for stage in config.stages:
        try:
            assign_rules(skeleton, stage.lr_multipliers)
        except UserError as error:
            raise UserError(f"{run.folder}: stage {stage.name!r}: {error}") from error
    if not was_launched():
        check_world(
            config, World(0, config.engine.ranks if config.engine.kind == "deepspeed" else 1, torch.device("cpu"))
        )
    return dataset


def check_world(config: RunConfig, world: World) -> None:
    """The batch must divide among the ranks, and the local engine is one process."""
    if config.engine.kind == "local" and world.size > 1:
        raise UserError(
            f"engine.kind: local is one process, this is a world of {world.size}; set engine.kind=deepspeed in a new run"
        )
    windows = config.optim.batch_tokens // config.data.sequence_length
    if windows % (world.size * config.optim.micro_batch):
        raise UserError(
            f"optim.batch_tokens: {windows} windows a step do not divide among {world.size} ranks x optim.micro_batch "
            f"{config.optim.micro_batch}; change optim.micro_batch, engine.ranks or the batch"
        )


def was_launched() -> bool:
    """Whether a launcher or srun started this process as one rank of several."""
    return "RANK" in os.environ or read_world().size > 1


def launch(run: Run) -> int:
    """Start launch/train.sh for this machine's ranks and pass signals on; its exit code."""
    environment = {**os.environ, "PYTHON": sys.executable, "RANKS": str(run.config.engine.ranks)}
    process = subprocess.Popen(["bash", str(shipped("launch", "train.sh")), str(run.folder)], env=environment)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda n, _: process.send_signal(n))
    return process.wait()


def _identity(run: Run) -> tuple[str, dict[str, Any]]:
    """An id for W&B that a resumed run shares, and the frozen configuration."""
    return f"{run.config.name}-{run.config.fingerprint()[:8]}", run.config.model_dump(mode="json")


class StopSignals:
    """SIGTERM and SIGUSR1 ask for a checkpoint and an end; all ranks agree on the step."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignals":
        self.previous = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            # after a stop, a late signal must not end the process before its exit code is given
            signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def agree(self, world: World) -> None:
        self.asked = sum_over_ranks([float(self.asked)], world.device)[0] > 0


class Watch:
    """Times the steps of a stage, writes their metrics and the progress line."""

    def __init__(self, config: RunConfig, stage: StageConfig, steps: int, progress: Progress, world: World):
        self.config, self.stage, self.steps, self.world = config, stage, steps, world
        self.first_step = progress.stage_step
        self.start = self.asked = time.perf_counter()

    def data_asked(self) -> None:
        self.asked = time.perf_counter()

    def data_ready(self) -> float:
        return time.perf_counter() - self.asked

    def step_done(
        self, report: StepReport, tokens: int, lr: float, progress: Progress, waited: float, log: MetricLog | None
    ) -> None:
        now = time.perf_counter()
        seconds = now - self.asked
        self.asked = now
        if log is None:
            return
        means = {name: value / max(tokens, 1) for name, value in report.sums.items()}
        means["loss"] = means.pop("total")
        timing = {
            "tokens_per_second": tokens / seconds,
            "data_wait_share": waited / seconds,
            "memory_gb": peak_memory_gb(),
        }
        log.write(
            progress.step,
            {
                "stage": self.stage.name,
                "tokens": progress.tokens,
                **means,
                "lr": lr,
                "grad_norm": report.grad_norm,
                **timing,
            },
        )
        if progress.stage_step % self.config.log.every_steps == 0 or progress.stage_step == self.steps:
            left = (now - self.start) / (progress.stage_step - self.first_step) * (self.steps - progress.stage_step)
            losses = " ".join(f"{name} {means[name]:.4f}" for name in means)
            say(
                f"{self.stage.name} {progress.stage_step}/{self.steps} {progress.stage_step / self.steps:.0%} | {losses} | lr {lr:.2e} "
                f"| grad {report.grad_norm:.2f} | {short(timing['tokens_per_second'])} tokens/s | wait {timing['data_wait_share']:.1%} "
                f"| {timing['memory_gb']:.2f} GB | ETA {clock(left)}"
            )


def peak_memory_gb() -> float:
    """Peak memory of this rank: of its GPU where it has one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
