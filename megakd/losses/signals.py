"""Where the teacher's side of a loss comes from: cached teacher logits (Sparse), or logits that exist (Dense)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from megakd.data.records import TeacherTargets

Tail = Literal["ghost", "truncated", "sampled", "hybrid"]


class Stored(NamedTuple):
    """What the targets of a data set are: temperatures with a tail, that of the draws (None: there are none)."""

    head: bool
    temperatures: tuple[float, ...]
    draw_temperature: float | None

    def column(self, temperature: float) -> int:
        return self.temperatures.index(temperature)


class Sparse(NamedTuple):
    """Cached teacher logits of N tokens: their stored entries, and what stands for the tokens outside the head."""

    targets: TeacherTargets
    stored: Stored
    tail: Tail


class Dense(NamedTuple):
    """Logits of the teacher [N, >= V], or what computes those of a slice of the tokens. Right at any temperature.

    A function is called without gradients and without autocast.
    """

    logits: Tensor | Callable[[slice], Tensor]

    def of(self, chunk: slice) -> Tensor:
        """The logits of some tokens, [n, >= V]."""
        return self.logits[chunk] if isinstance(self.logits, Tensor) else self.logits(chunk)


TeacherSignal = Sparse | Dense
