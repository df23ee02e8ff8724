"""Signals that ask a training to save a checkpoint and stop."""

import signal
from types import FrameType

from megakd.system.dist import (
    World,
    sum_over_ranks,
)


class StopSignals:
    """SIGTERM and SIGUSR1 ask for a checkpoint and an end; all ranks agree on the step.

    asked: this process got a signal. agreed: some rank had one when all ranks last met.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False

    def __enter__(self) -> "StopSignals":
        self.previous = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            # after a stop, a late signal must not end the process before its exit code is given
            signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def agree(self, world: World, ready: bool = True) -> bool:
        """Let all ranks meet: sets `agreed`, and says whether every one of them is `ready`."""
        # a signal may come while the ranks meet: `asked` stays for the next time
        asked, waiting = sum_over_ranks([float(self.asked), float(not ready)], world.device)
        self.agreed = asked > 0
        return waiting == 0


STOPPED = 85  # exit code: stopped by a signal, what is finished is saved; schedulers requeue on it
