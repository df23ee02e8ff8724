"""Start verbs of MegaKD one after another: in processes of their own, to which signals are passed on, or here."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from megakd.errors import UserError
from megakd.system.logging import say
from megakd.system.signals import STOP_SIGNALS, STOPPED, USER_ERROR, end_with_parent


class VerbFailed(Exception):
    """A verb ended with another exit code than 0."""

    def __init__(self, verb: str, code: int):
        super().__init__(f"{verb} ended with exit code {code}")
        self.verb, self.code = verb, code


def to_go_on(code: int, command: str = "the same command") -> str:
    """What goes on after a verb ended with this exit code; 2 is a mistake of the user's, which it has named."""
    return f"correct that, then {command} goes on" if code == USER_ERROR else f"{command} goes on"


def start(*argv: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """`megakd ARGV` in a process of its own, which gets SIGTERM when this one is killed (on Linux)."""
    words = [sys.executable, "-m", "megakd", *argv]
    return subprocess.Popen(
        words, env=None if env is None else {**os.environ, **env}, preexec_fn=end_with_parent(signal.SIGTERM)
    )


class Verbs:
    """Starts verbs in processes of their own, so that each one's memory is free for the next; signals go to them."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator["Verbs"]:
        verbs = cls()
        before = {number: signal.signal(number, verbs._pass_on) for number in STOP_SIGNALS}
        try:
            yield verbs
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def check_stopped(self, verb: str) -> None:
        """VerbFailed with the code of a stop, where a signal came between two verbs."""
        if self.stopped:
            raise VerbFailed(verb, STOPPED)

    def run(self, *argv: str) -> int:
        """`megakd ARGV` to its end; its exit code, 85 where a stop signal ended it, 128 + N where another signal N."""
        self.process = start(*argv)
        if self.stopped:  # the signal came before there was a process to pass it to
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # a terminal sends it to both
                self.process.send_signal(signal.SIGINT)
            self.process.wait()
            raise
        finally:
            self.process = None
        if code and self.stopped:
            return STOPPED
        return code if code >= 0 else 128 - code


class VerbsHere(Verbs):
    """Runs verbs in this process, for models so small that the imports of a process take longer than the verb.

    apart: train has a process of its own all the same, where it may start a launcher, and joins the ranks.
    """

    def __init__(self, here: Callable[[list[str]], None], apart: bool = True) -> None:
        super().__init__()
        self.here, self.apart = here, apart

    def run(self, *argv: str) -> int:
        if argv[0] == "train" and self.apart:
            return super().run(*argv)
        try:
            self.here(list(argv))
        except UserError as error:
            if argv[0] != "evaluate":  # what it could not measure does not stop the verbs after it
                raise
            say(str(error))
            return 2
        finally:
            gc.collect()  # models point to themselves: without it the next verb meets them on the device
        return 0
