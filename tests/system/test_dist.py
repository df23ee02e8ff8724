import os
import signal

import torch

from megakd.system import dist
from megakd.system.dist import World
from megakd.system.signals import StopSignals


def test_signal_that_comes_while_the_ranks_meet_counts_at_the_next_meeting(monkeypatch):
    """It was lost when agreeing overwrote what the handler had set; two ranks wait in the meeting most of the time."""
    world = World(0, 1, torch.device("cpu"))

    def meet(values: list[float], device: torch.device) -> list[float]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return values

    with StopSignals() as stop:
        monkeypatch.setattr(dist, "sum_over_ranks", meet)
        stop.agree(world)
        assert not stop.agreed
        monkeypatch.undo()
        stop.agree(world)
        assert stop.agreed


def test_without_a_signal_nothing_is_agreed():
    with StopSignals() as stop:
        stop.agree(World(0, 1, torch.device("cpu")))
        assert not stop.agreed
