"""Work that any number of processes share through a folder: a task is done when its file is there.

No coordinator and no ranks: a process takes any task that is ready and not held by another. A killed one
releases its task (the lock is the kernel's), and the next process does it again. Start as many as there are machines,
at any time.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from megakd.system.logging import Progress, say

# between two looks at the folder while nothing changes: twice as long each time, up to the last
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.5, 8.0


class Task(NamedTuple):
    """`work` publishes `output` (a file that appears whole); it may begin when all of `needs` are there."""

    name: str
    output: Path
    needs: tuple[Path, ...]
    work: Callable[[], None]

    @property
    def done(self) -> bool:
        return self.output.exists()

    def ready(self, there: set[Path]) -> bool:
        return there.issuperset(self.needs)


def run_tasks(title: str, tasks: Sequence[Task], finished: Path, locks: Path) -> int:
    """Do what others do not, wait for what they do, until `finished` is there; how many tasks this process did.

    finished: the output of the task that needs all others; from then on their outputs, and `locks`, may be gone.
    A task that raises ends this process; another that waits for it will try it, and fail the same way.
    """
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError):  # the process that did the last task removed it at this moment
        if not finished.exists():
            raise
    counted = _list_files(tasks) & {task.output for task in tasks}
    progress = Progress(title, len(tasks), "tasks", done=len(counted))
    own, said, pause = 0, time.monotonic(), POLL_SECONDS / 2
    outputs = {task.output for task in tasks}
    while not finished.exists():
        there = _list_files(tasks)
        missing = [task for task in tasks if task.output not in there]
        taken = _take_one(missing, there, finished, locks)
        own += taken is not None
        # what another removed after it had finished is done too
        found = outputs & (there | ({taken.output} if taken else set())) if not finished.exists() else outputs
        new = found - counted
        counted |= found
        if taken is not None:
            pause = POLL_SECONDS / 2
            progress.add_others(len(new) - 1)
            progress.update(1, taken.name)
        else:
            progress.add_others(len(new))
            if missing and time.monotonic() - said > 60:
                said = time.monotonic()
                say(f"{title}: waiting for another process to finish {missing[0].name}")
            pause = POLL_SECONDS if new else min(2 * pause, LONGEST_POLL_SECONDS)
            if not finished.exists():
                time.sleep(pause)
    progress.close()
    return own


def _list_files(tasks: Sequence[Task]) -> set[Path]:
    """What lies in the folders of outputs and needs: one listing of each, not one look at every file."""
    there: set[Path] = set()
    for folder in {path.parent for task in tasks for path in (task.output, *task.needs)}:
        with suppress(FileNotFoundError, NotADirectoryError):
            there |= {folder / name for name in os.listdir(folder)}
    return there


def _take_one(tasks: Sequence[Task], there: set[Path], finished: Path, locks: Path) -> Task | None:
    """Do the first task that is ready and free; None when there is none."""
    for task in tasks:
        if task.ready(there):
            with claimed(locks / f"{task.output.name}.lock") as mine:
                if mine and not task.done and not finished.exists():  # another may have done it, or all, in between
                    task.work()
                    assert task.done, task
                    return task
    return None


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process holds `path` alone meanwhile; never waits. Not when its folder is gone."""
    try:
        file = path.open("w")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
