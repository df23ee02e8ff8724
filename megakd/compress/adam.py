"""The original proposal's W_e ~ (I + U_e S_e^T) C (I + A_e V_e^T), fitted by Adam: a solver, and a baseline.

The result is converted exactly to the form that is stored: Q_e = (I + U_e S_e^T) C A_e (docs/compression.md).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.compress.metric import Metric, times
from megakd.compress.threads import Threads


def fit_seed_form(
    whitened: Tensor,
    metric: Metric,
    free: int,
    inner: int,
    threads: Threads,
    *,
    steps: int,
    lr: float,
    progress: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """[C, U, S, A, V] of a small sum p_e ||W_e - M_e (I + U_e S_e^T) C (I + A_e V_e^T)||^2, whitened W_e [E, F, D].

    C starts as the mean, left factors at zero. The rate falls to 0 as a half cosine. Matrices are scaled to a mean
    square of 1 first, so that a rate means the same for every model.
    """
    experts, rows, columns = whitened.shape
    p = metric.importance
    scale = float((whitened.square().mean((1, 2)).double() * p).sum().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(0)

    def noise(size: int, rank: int) -> Tensor:
        return (torch.randn(experts, size, rank, generator=generator) * size**-0.5).to(whitened)

    core = torch.einsum("e,efd->fd", p.to(whitened), whitened) / scale
    u, a = whitened.new_zeros(experts, rows, inner), whitened.new_zeros(experts, columns, free)
    parameters = [core, u, noise(rows, inner), a, noise(columns, free)]
    gradients = [torch.empty_like(x) for x in parameters]
    moments = [_Moments(torch.zeros_like(x), torch.zeros_like(x)) for x in parameters]

    def work(chunks: list[slice]) -> Tensor:
        """The gradient of the core from a thread's experts; those of their factors are written where they belong."""
        total = torch.zeros_like(core)
        for chunk in chunks:
            own = [parameters[0], *(factor[chunk] for factor in parameters[1:])]
            leaves = [x.detach().requires_grad_() for x in own]
            fit = times(None if metric.left is None else metric.left[chunk], seed_form(*leaves))
            squares = (fit - whitened[chunk] / scale).square().sum((1, 2))
            # a factor of 1/E less of the gradient would do nothing to Adam but for its epsilon
            loss = (squares * p[chunk].to(fit)).sum() * experts
            of_core, *of_factors = torch.autograd.grad(loss, leaves)
            total += of_core
            for gradient, part in zip(gradients[1:], of_factors, strict=True):
                gradient[chunk] = part
        return total

    for step in range(steps):
        gradients[0] = torch.stack(threads.map(work)).sum(0)
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
        for x, gradient, moment in zip(parameters, gradients, moments, strict=True):
            _adam_step(x, gradient, moment, rate, step + 1)
        progress()
    parameters[0] *= scale
    return parameters


class _Moments(NamedTuple):
    """Running means of a parameter's gradient and of its square."""

    first: Tensor
    second: Tensor


def _adam_step(x: Tensor, gradient: Tensor, moments: _Moments, rate: float, step: int) -> None:
    """Kingma and Ba 2015, algorithm 1, in place: beta 0.9 and 0.999, epsilon 1e-8; step counts from 1."""
    moments.first.lerp_(gradient, 0.1)
    moments.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    denominator = (moments.second / (1 - 0.999**step)).sqrt_().add_(1e-8)
    x.addcdiv_(moments.first, denominator, value=-rate / (1 - 0.9**step))


def seed_form(core: Tensor, u: Tensor, s: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """(I + U S^T) C (I + A V^T), [E, F, D]."""
    left = core + u @ (s.mT @ core)
    return left + (left @ a) @ v.mT


def fused(core: Tensor, u: Tensor, s: Tensor, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(C, U, S, Q, V) with the same products: Q = (I + U S^T) C A, [E, F, free]."""
    inner = core @ a
    return core, u, s, inner + u @ (s.mT @ inner), v
