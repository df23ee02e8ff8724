"""What the loss to stored entries knows of each row: the student's sums, the teacher's slopes, the gradient's factors.

K stored entries, E draws, B = K + 1 buckets. A row of the gradient is exp(x) and its power, each times a number
(`factors`), and a few entries of their own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.losses.head_chunk import Job


class Slopes(NamedTuple):
    """By log Q of the stored entries, of the bucket for the rest and of the draws; and the sum of all of them."""

    head_cK: Tensor
    rest_c: Tensor
    draws_cE: Tensor
    total_c: Tensor


class Student(NamedTuple):
    """What the loss knows of the student: x = logits / flat at the stored entries, and sums over all others.

    top_c: the largest x of the others, or what else was taken off; flat_c, sharp_c: sums of exp(x - top) and its power.
    """

    x_cK: Tensor
    top_c: Tensor
    flat_c: Tensor
    sharp_c: Tensor
    flat: float
    power: float

    def scale(self, temperature: float) -> float:
        """logits / temperature = scale * x."""
        return self.flat / temperature

    def sum(self, temperature: float) -> Tensor:
        return self.flat_c if temperature == self.flat else self.sharp_c

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the sums of exp(x) and of its power over the stored entries."""
        return self.x_cK.logsumexp(-1), (self.power * self.x_cK).logsumexp(-1)

    def log_rest(self, temperature: float) -> Tensor:
        return self.scale(temperature) * self.top_c + self.sum(temperature).log()

    def log_z(self, temperature: float) -> Tensor:
        stored_c = self.stored[temperature != self.flat]
        return torch.logaddexp(stored_c, self.log_rest(temperature))

    def log_q(self, temperature: float) -> Tensor:
        """[c, K + 1]: the stored entries, and one bucket for all others."""
        x_cB = torch.cat([self.scale(temperature) * self.x_cK, self.log_rest(temperature)[:, None]], 1)
        return x_cB - self.log_z(temperature)[:, None]

    def unit(self, temperature: float) -> Tensor:
        """Q of a token whose x is top: exp(scale * top - log_z)."""
        stored_c = self.stored[temperature != self.flat] - self.scale(temperature) * self.top_c
        return 1 / (self.sum(temperature) + stored_c.exp())


def factors(job: Job, sum_at_t: Any, unit_at_t: Any, unit_at_1: Any, rest: Any, total: Any) -> tuple[Any, Any]:
    """What exp(x - top) and its power are multiplied by in the gradient by x; tensors, or floats of one row."""
    by_divergence, by_ce = job.slopes
    at_t, at_1 = by_divergence * (rest / sum_at_t - total * unit_at_t), by_ce * unit_at_1
    if job.power == 1:
        return at_t + at_1, at_1
    return (at_t, at_1) if job.temperature > 1 else (at_1, at_t)


def to_power(x: Tensor, power: float, out: Tensor) -> Tensor:
    """x ** power of numbers >= 0; torch's own is 5 times as slow but for some powers."""
    if power in (0.5, 2, 3):
        return torch.pow(x, power, out=out)
    return torch.log(x, out=out).mul_(power).exp_()
