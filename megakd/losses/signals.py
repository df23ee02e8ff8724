"""Where the teacher's side of a loss comes from: cached teacher logits (Sparse), or a live teacher (Dense)."""

from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from megakd.data.records import TeacherTargets

if TYPE_CHECKING:  # the head takes a signal, and a live teacher's signal has a head
    from megakd.losses.head import FusedHead

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
    """A live teacher of N tokens: its head and its last hidden states [N, G]. Right at any temperature.

    Gradients reach both where they are asked for. weights_N: how much each token's divergence counts, a constant; 1
    each where it is None.
    """

    head: "FusedHead"
    hidden_NG: Tensor
    weights_N: Tensor | None = None


TeacherSignal = Sparse | Dense
