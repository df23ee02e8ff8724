"""Where the teacher's side of a loss comes from: cached teacher logits (Sparse), or a live teacher (Dense)."""

from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from megakd.data.records import TeacherTargets

Tail = Literal["ghost", "truncated", "sampled", "hybrid"]


class Stored(NamedTuple):
    """What the targets of a data set are: temperatures with a tail, that of the draws (None: there are none).

    vocab_size: real entries, which tails between the declared temperatures need (losses/tails.py).
    """

    head: bool
    temperatures: tuple[float, ...]
    draw_temperature: float | None
    vocab_size: int = 0

    def column(self, temperature: float) -> int:
        return self.temperatures.index(temperature)


class Sparse(NamedTuple):
    """Cached teacher logits of N tokens: their stored entries, and what stands for the tokens outside the head."""

    targets: TeacherTargets
    stored: Stored
    tail: Tail


class Head(Protocol):
    """What a signal knows of a model's `FusedHead`, which itself takes a signal."""

    weight: nn.Parameter
    vocab_size: int
    scale: float
    softcap: float | None

    def logits(self, hidden_ND: Tensor) -> Tensor: ...


class Dense(NamedTuple):
    """A live teacher of N tokens: its head and its last hidden states [N, G]. Right at any temperature.

    Gradients reach both where they are asked for. weights_N: how much each token's divergence counts, a constant; 1
    each where it is None.
    """

    head: Head
    hidden_NG: Tensor
    weights_N: Tensor | None = None


TeacherSignal = Sparse | Dense
