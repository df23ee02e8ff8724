"""A chunk of the fused head's logits, which become the gradient of the loss by them, in place.

With y the logits, T the temperature, flat = max(T, 1): x = y / flat. The exponentials at both temperatures that a loss
needs, 1 and T, are then exp(x) and a power of it.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.losses.divergence import Divergence
from megakd.losses.signals import Dense, Sparse, TeacherSignal


class Job(NamedTuple):
    """What the loss of a batch is, besides hidden states and weight, and how one model makes its logits.

    compute: the dtype of the matrix products. differentiate: whether gradients are asked for at all.
    kl_weight: of the divergence, besides alpha.
    """

    labels_N: Tensor
    teacher: TeacherSignal
    alpha: float
    temperature: float
    divergence: Divergence
    vocab_size: int
    scale: float
    softcap: float | None
    compute: torch.dtype
    differentiate: bool
    kl_weight: float = 1.0

    @property
    def work(self) -> torch.dtype:
        """Of everything after the first matrix product."""
        return torch.float64 if self.compute == torch.float64 else torch.float32

    @property
    def rounded(self) -> bool:
        """Whether the matrix products are of 16 bits."""
        return self.compute != self.work

    @property
    def in_place(self) -> bool:
        """Whether nothing but a factor lies between the head's product and x, so that both share one buffer."""
        return not self.rounded and self.softcap is None

    @property
    def factor(self) -> float:
        """Of the head's product: what comes in by 16 bits goes out by 16 bits, with the same factor on both ways."""
        return self.scale / (self.flat if self.softcap is None else self.softcap)

    @property
    def flat(self) -> float:
        """The higher one of the temperatures 1 and T: the exponentials of the other are powers of its own.

        Next to a live teacher 1: x are the logits, for each temperature has a softmax of its own.
        """
        return 1.0 if isinstance(self.teacher, Dense) else max(self.temperature, 1.0)

    @property
    def power(self) -> float:
        return self.flat / min(self.temperature, 1.0)

    @property
    def slopes(self) -> tuple[float, float]:
        """Of the total by the divergence and by the cross entropy, by logits / flat instead of logits / their T."""
        return self.alpha * self.kl_weight * self.temperature * self.flat, (1 - self.alpha) * self.flat

    @property
    def cap(self) -> float | None:
        """softcap in units of logits / flat."""
        return None if self.softcap is None else self.softcap / self.flat

    @property
    def slopes_known(self) -> bool:
        """Whether the slopes by log Q are the teacher's alone: draws, and KL(teacher || student)."""
        teacher = self.teacher
        return isinstance(teacher, Sparse) and (teacher.tail in ("sampled", "hybrid") or self.divergence.kind == "kl")


class Chunk:
    """The logits of some tokens, which become the gradient of the total by them, in place.

    raw_cV: products of the head as they came, and in the end their gradient. x_cV: logits / flat in between, the same
    tensor where nothing has to happen to raw_cV. factor: what raw_cV still has to be multiplied by.
    rows: how many go through all element-wise work together.
    left_c1: what rows of the gradient still have to be multiplied by, left to the other side of the products, or None.
    """

    def __init__(self, raw_cV: Tensor, x_cV: Tensor, factor: float, job: Job, differentiate: bool, rows: int):
        self.raw_cV, self.x_cV, self.factor, self.job, self.differentiate = raw_cV, x_cV, factor, job, differentiate
        self.rows = rows
        self.left_c1: Tensor | None = None
        if not job.in_place:
            for x, raw in self.blocks(raw_cV):
                self._scaled(raw, x)
                if job.cap is not None:
                    x.tanh_().mul_(job.cap)

    @cached_property
    def scratch(self) -> Tensor:
        """A block without values."""
        return torch.empty_like(self.x_cV[: self.rows])

    def blocks(self, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Views of x_cV and others of as many rows, some rows at a time."""
        return zip(*(each.split(self.rows) for each in (self.x_cV, *others)), strict=True)

    def to_raw(self, gradient: Tensor, raw: Tensor) -> None:
        """The gradient by x becomes the gradient by raw, in its place."""
        if self.job.in_place:
            return
        if self.job.cap is not None:
            tanh = self._scaled(raw, self.scratch[: len(gradient)]).tanh_()
            gradient.mul_(tanh.square_().neg_().add_(1).mul_(self.job.cap))
        raw.copy_(gradient.mul_(self.factor) if self.factor != 1 else gradient)

    def _scaled(self, raw: Tensor, out: Tensor) -> Tensor:
        """raw as it came, in `out`'s precision."""
        out.copy_(raw)
        return out.mul_(self.factor) if self.factor != 1 else out
