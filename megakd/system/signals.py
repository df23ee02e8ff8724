"""SIGTERM and SIGUSR1: a verb ends with exit code 85, at once or after it has saved; needs no torch."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import RLock, Thread
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megakd.system.dist import World

STOPPED = 85  # exit code: stopped by a signal, what is finished is saved; schedulers requeue on it
USER_ERROR = 2  # exit code
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # of prctl(2)
_ending = RLock()


def end_on_stop_signals() -> None:
    """From now on a stop signal ends this process with exit code 85, also in the midst of a long call of a library.

    What verbs write appears whole or not at all, so nothing has to be put in order first. Python calls a handler when
    the main thread is back from such a call, as from waiting for other ranks; so a thread reads the signals too.
    `signal.signal` with another handler takes a signal out of this, until it is set back.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _end)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_forget)
    Thread(target=_listen, args=(reading,), name="stop signals", daemon=True).start()


def ignore_stop_signals() -> None:
    """A late signal must not change an exit code; the interpreter keeps only SIG_IGN until its own end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(number: int) -> Callable[[], None]:
    """For a new process of this one, as `preexec_fn`: it gets the signal when this one is killed (on Linux)."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, number)
            if os.getppid() != parent:  # killed in between
                os._exit(128 + signal.SIGKILL)

    return prepare


def leave_code(code: int) -> None:
    """Tell launch/lib.sh, and the other ranks that srun then ends, of an error; srun's own code is their 85."""
    if prefix := os.environ.get("MEGAKD_EXIT_CODE"):
        with suppress(OSError):
            Path(f"{prefix}-{code}").touch()


def _listen(reading: int) -> None:
    while True:
        number = os.read(reading, 1)[0]
        if number in STOP_SIGNALS and signal.getsignal(number) is _end:
            _end(number)


def _end(number: int, frame: FrameType | None = None) -> None:
    with _ending:  # one line, whichever of the two threads comes first
        name = signal.Signals(number).name
        prefix = os.environ.get("MEGAKD_EXIT_CODE")
        if not prefix or not os.path.exists(f"{prefix}-{USER_ERROR}"):  # another rank has said what to correct
            os.write(2, f"megakd: stopped by {name}; what is finished is kept, the same command goes on\n".encode())
        os._exit(STOPPED)


def _hold_back() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _forget() -> None:
    """A forked child has the parent's pipe: its own signals must not end the parent."""
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)
    _let_through()


class StopSignals:
    """SIGTERM and SIGUSR1 ask for a checkpoint and an end; all ranks agree on the step.

    asked: this process got a signal. agreed: some rank had one when all ranks last met. number: of this process's.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False
        self.number: int | None = None

    def __enter__(self) -> "StopSignals":
        self.previous = {n: signal.signal(n, self._ask) for n in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            # after a stop, a late signal must not end the process before its exit code is given
            signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.number = True, number

    @property
    def name(self) -> str:
        """Such as SIGTERM; of a signal that other ranks got alone it is not known."""
        return "a signal" if self.number is None else signal.Signals(self.number).name

    def agree(self, world: "World", ready: bool = True) -> bool:
        """Let all ranks meet: sets `agreed`, and says whether every one of them is `ready`."""
        from megakd.system.dist import sum_over_ranks

        # a signal may come while the ranks meet: `asked` stays for the next time
        asked, waiting = sum_over_ranks([float(self.asked), float(not ready)], world.device)
        self.agreed = asked > 0
        return waiting == 0
