"""Start DeepSpeed's launcher for the ranks of a training on this machine, and pass signals on to the ranks."""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import torch

from megakd.errors import UserError
from megakd.names import shipped
from megakd.run import Run
from megakd.system.logging import say
from megakd.system.signals import STOPPED, USER_ERROR, StopSignals

SECONDS_BETWEEN_SIGNALS = 5


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
