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
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress

import psutil
import torch

from megakd.errors import UserError
from megakd.finish import missing_training
from megakd.names import shipped
from megakd.run import Run
from megakd.system.dist import (
    close_world,
    join_world,
    read_world,
    take_device,
)
from megakd.system.files import locked
from megakd.system.logging import say
from megakd.system.signals import STOPPED, USER_ERROR, StopSignals
from megakd.train.checks import check, check_world, finished_training, was_launched
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
SECONDS_BETWEEN_SIGNALS = 5


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


def launch(run: Run) -> int:
    """Start launch/train.sh for this machine's ranks; its exit code. SIGTERM and SIGUSR1 go to the ranks themselves.

    DeepSpeed's launchers would end at the first signal and leave the ranks behind, or kill them before they saved.
    """
    if os.environ.get("HOSTFILE"):
        raise UserError(
            f"HOSTFILE={os.environ['HOSTFILE']}: megakd train starts ranks on this machine alone; for its "
            f"hosts run launch/train.sh {run.folder}, or unset HOSTFILE"
        )
    accelerator = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    own = {"PYTHON": sys.executable, "RANKS": str(run.config.engine.ranks), "DS_ACCELERATOR": accelerator}
    words = ["bash", str(shipped("launch", "train.sh")), str(run.folder)]
    with StopSignals() as stop:
        process = subprocess.Popen(words, env={**os.environ, **own}, preexec_fn=_ignore_sigusr1)
        told = -math.inf
        while (code := _ended(process, stop)) is None:
            # again and again: a rank may start after the signal, or get it before its handlers are set
            if stop.asked and time.monotonic() - told > SECONDS_BETWEEN_SIGNALS:
                if told == -math.inf and stop.number is not None:  # of Ctrl-C, run.sh says it
                    say("train: stopping: the ranks save")
                told = time.monotonic()
                _stop_ranks(process.pid, stop.number or signal.SIGTERM)
    return STOPPED if stop.asked and code not in (0, USER_ERROR) else code


def _ignore_sigusr1() -> None:
    """Slurm signals all processes of a job step: the launchers must survive that, for the ranks to save."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _ended(process: subprocess.Popen[bytes], stop: StopSignals) -> int | None:
    try:
        return process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None
    except KeyboardInterrupt:  # a stop too, as it is to launch/run.sh, which a terminal sends it to as well
        stop.asked = True
        return None


def _stop_ranks(launcher: int, number: int) -> None:
    with suppress(psutil.NoSuchProcess):  # it ended meanwhile: no rank is left
        for child in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                words = child.cmdline()
                if words[-3:-1] == ["megakd", "train"] and not any("deepspeed.launcher" in w for w in words):
                    child.send_signal(number)
