"""Evaluate checkpoints as they appear, until training has ended."""

import calendar
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from types import FrameType
from typing import Any

from megakd.engine.checkpoint import best_file
from megakd.errors import UserError
from megakd.evals.watcher import Follower
from megakd.run import Run
from megakd.system.files import read_json, read_json_lines
from megakd.system.logging import say
from megakd.system.signals import STOP_SIGNALS
from megakd.system.slurm import in_queue
from megakd.system.text import clock
from megakd.tracking import wandb_mode
from megakd.train.checks import open_dataset

# after its training failed for good: so long may the user take to correct it and submit it again
FAILED_SECONDS = 600.0
SECONDS_BETWEEN_QUESTIONS = 60.0


class Stopped(BaseException):
    """SIGTERM or SIGUSR1: nothing below may take it for an error."""


def watch(run: Run, follower: Follower, once: bool = False, follow: bool = False) -> None:
    """Evaluate checkpoints as they appear, oldest first, until training has ended and every checkpoint is settled."""
    follower.scan()
    follower.pin()  # of the existing lines, maybe by another measure than before
    if once:
        for name in follower.pending():
            if not follower.take(name):
                say(f"watch: {name} is being evaluated by another process")
        return
    own, seconds, said = 0, 0.0, -math.inf
    begun, job = time.monotonic(), TrainingJob(run)
    with scanning(follower, run.config.eval.poll_seconds) as check_scan:
        while True:
            check_scan()
            start, waiting = time.monotonic(), follower.pending()
            if any(follower.take(name) for name in waiting):
                own, seconds, said = own + 1, seconds + time.monotonic() - start, time.monotonic()
                say(progress(run, follower, seconds / own))
            elif not waiting and not follow and ended(run, follower):
                break
            elif (
                not waiting and not follow and time.monotonic() - begun > FAILED_SECONDS and (failed(run) or job.gone())
            ):
                raise UserError(
                    f"{run.folder}: training failed for good, and every checkpoint it left is settled; when training "
                    f"goes on, start this again: megakd watch {run.folder}"
                )
            else:
                if time.monotonic() - said > 60:
                    said = time.monotonic()
                    first = next(iter(waiting), None)
                    what = f"another process is at {first}" if first else f"waiting for a checkpoint of {run.folder}"
                    say(f"watch: {what}")
                time.sleep(min(run.config.eval.poll_seconds, 1.0))
    file = best_file(run.path("checkpoints"))
    if file.exists():
        best = read_json(file)
        say(f"watch: the best by {best['metric']} is {best['model']}, {best['value']:.4g}: {file}")
    if wandb_mode(run.config.log) == "online":  # two processes that send to one run at once lose lines (log_evaluation)
        say(f"watch: to send the curves to W&B, when training has ended: cd {run.path('watch')} && wandb sync")


def progress(run: Run, follower: Follower, seconds: float) -> str:
    """`watch  3/12 checkpoints  25%  1 waits  ETA 6:09`; seconds: what one takes; the ETA is without training's own."""
    settled = follower.lines().keys() | follower.settled()
    waiting = follower.pending().keys() - settled  # of another process: one that has its line already
    done, total = len(settled), len(settled | waiting | expected_checkpoints(run))
    left = clock(seconds * (total - done))
    return f"watch  {done}/{total} checkpoints  {done / total:4.0%}  {len(waiting)} waiting  ETA {left}"


def expected_checkpoints(run: Run) -> set[str]:
    """The names of the checkpoints of an undisturbed training; a stop saves more."""
    names, first, every, epochs = set(), 0, run.config.checkpoint.every_steps, run.config.checkpoint.every_epochs
    for stage, steps in zip(run.config.stages, stage_steps(run), strict=True):
        saves = {*range(every, steps, every), steps}
        if epochs and stage.epochs is not None:
            saves |= set(run.config.epoch_ends(stage, len(open_dataset(run)))[epochs - 1 :: epochs])
        names |= {f"{stage.name}/step-{first + step:06d}" for step in saves}
        first += steps
    return names


def ended(run: Run, follower: Follower) -> bool:
    """Whether the last checkpoint of the last stage is settled, and so is every other published one."""
    settled = follower.lines().keys() | follower.settled()
    last = f"{run.config.stages[-1].name}/step-{sum(stage_steps(run)):06d}"
    return last in settled and follower.published().keys() <= settled


def failed(run: Run) -> bool:
    """Whether the job of the training gave up some time ago, and no training has begun since."""
    last = last_event(run)
    if last.get("event") != "train failed":
        return False
    at = calendar.timegm(time.strptime(last["time"], "%Y-%m-%dT%H:%M:%SZ"))
    return time.time() - at > FAILED_SECONDS


def last_event(run: Run) -> dict[str, Any]:
    """The last beginning of a training, or the last one that failed for good."""
    rows = read_json_lines(run.path("history.jsonl"), "event")
    return next((row for row in reversed(rows) if row["event"] in ("train", "train failed")), {})


class TrainingJob:
    """The Slurm job of the last training, which `scancel` ends without a trace in the run."""

    def __init__(self, run: Run):
        self.run = run
        self.asked = self.seen = time.monotonic()

    def gone(self) -> bool:
        """Whether it has not been in the queue for some time, and trained nothing; Slurm is asked once a minute."""
        job, metrics = last_event(self.run).get("job"), self.run.path("metrics.jsonl")
        if job is None:
            return False
        now = time.monotonic()
        if now - self.asked > SECONDS_BETWEEN_QUESTIONS:
            self.asked = now
            trains = metrics.exists() and time.time() - metrics.stat().st_mtime < FAILED_SECONDS
            if trains or in_queue(job) is not False:
                self.seen = now
        return now - self.seen > FAILED_SECONDS


def stage_steps(run: Run) -> list[int]:
    """How many steps each stage takes; passes over the training samples count those that the capture lists."""
    stages = run.config.stages
    windows = len(open_dataset(run)) if any(stage.epochs is not None for stage in stages) else None
    return [run.config.steps_of(stage, windows) for stage in stages]


@contextmanager
def scanning(follower: Follower, seconds: float) -> Iterator[Callable[[], None]]:
    """Scan in a thread, so that rotation takes nothing while a checkpoint is measured; gives what raises its error."""
    stop, errors = Event(), []

    def scan() -> None:
        while not stop.wait(seconds):
            try:
                follower.scan()
            except BaseException as error:  # passed on, not handled
                errors.append(error)
                return

    def check() -> None:
        if errors:
            raise errors[0]

    thread = Thread(target=scan, name="scan", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        stop.set()
        thread.join(10)


@contextmanager
def raising_stopped() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise Stopped, at once: pieces of an evaluation outlive it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
