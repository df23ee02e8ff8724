"""Distil the student, stage by stage, from cached teacher logits or a live teacher; resumes from its last checkpoint.

With engine.kind=deepspeed and engine.ranks > 1 it starts the deepspeed launcher on this machine; on more machines start
it with launch/train.sh or launch/train.sbatch. SIGTERM and SIGUSR1 save a checkpoint and leave with exit code 85,
as does Ctrl-C where it started a launcher.

examples:
  megakd train runs/a
  megakd train runs/a engine.ranks=2 optim.micro_batch=4
  deepspeed --hostfile hostfile --module megakd train runs/a
"""

import argparse
import sys
from contextlib import nullcontext

from megakd.finish import missing_training
from megakd.run import Run
from megakd.system.dist import (
    close_world,
    join_world,
    read_world,
    take_device,
)
from megakd.system.files import locked
from megakd.system.logging import say
from megakd.system.signals import STOPPED, StopSignals
from megakd.train.checks import check, check_world, finished_training, was_launched
from megakd.train.launch import launch
from megakd.train.loop import finished_already, train

SECTIONS = (
    "model",
    "data",
    "stream",
    "objective",
    "optim",
    "stages",
    "engine",
    "guard",
    "checkpoint",
    "eval",
    "log",
)  # of the configuration


def main(run: Run, args: argparse.Namespace) -> None:
    dataset = check(run)
    if run.config.engine.kind == "deepspeed" and run.config.engine.ranks > 1 and not was_launched():
        if (saved := finished_training(run)) is not None:  # without starting ranks
            say(finished_already(saved))
            return
        code = launch(run)
        missing = missing_training(run) if code == 0 else None
        if missing:  # DeepSpeed's runner ends with 0 where a signal has killed the launcher below it
            say(f"train: the launcher ended before the training did: {missing}; the same command goes on")
        sys.exit(1 if missing else code)
    world = join_world() if run.config.engine.kind == "deepspeed" else take_device(read_world())
    check_world(run.config, world)
    # ranks outlive a launcher that was killed: a second training in the same folder must not start next to them
    alone = locked(run.path("train.lock"), "is being trained by another process; wait for it or stop it")
    with StopSignals() as stop:
        with alone if world.first else nullcontext():
            finished = train(run, dataset, world, stop)
        close_world()
    if not finished:
        sys.exit(STOPPED)
