"""Evaluate checkpoints while training publishes them: validation set, lm-eval tasks, curves; the best one is kept.

Start it during a training, on a device or machine of its own that sees the run's folder; start several, they share the
work. Training never waits for it. It ends when the last checkpoint of the last stage has its line in RUN/evals.jsonl,
and with exit code 2 when training failed for good 10 minutes ago: its job gave up or was cancelled, and none has begun
since.
What cannot be measured is null in the line, which says why, and stops nothing else; the exit code at the end is then 2.
Killed at any moment and started again, it loses and repeats none. SIGTERM and SIGUSR1 end it with exit code 85.

examples:
  megakd watch runs/a
  megakd watch runs/a --once                                   the checkpoints that exist, then end
  megakd watch runs/a eval.tasks='["hellaswag"]' eval.limit=500
  megakd watch runs/a --follow eval.best=hellaswag/acc_norm
"""

import argparse
import sys

from megakd.config.checks import check_evaluation
from megakd.evals.measure import Meter, raise_failures
from megakd.evals.watch import Stopped, raising_stopped, watch
from megakd.evals.watcher import Follower
from megakd.run import Run
from megakd.system.logging import say
from megakd.system.signals import STOPPED

SECTIONS = ("eval", "checkpoint", "log")  # of the configuration


def arguments(parser: argparse.ArgumentParser) -> None:
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--once", action="store_true", help="evaluate the existing checkpoints, then end")
    ends.add_argument("--follow", action="store_true", help="do not end when training has ended")


def main(run: Run, args: argparse.Namespace) -> None:
    try:
        with raising_stopped():
            check_evaluation(run.config.eval)
            follower = Follower(run, Meter(run), watching=True)
            watch(run, follower, args.once, args.follow)
            raise_failures(follower.failures())
    except Stopped:
        say(f"watch: stopped by a signal; megakd watch {run.folder} goes on from here")
        sys.exit(STOPPED)
