"""Mixtures of bases: W_e ~ A_e sum_g m_eg Z_g by alternating least squares, Z_g [k, D] shared by all experts.

The linear form of MoBE (Chen et al. 2025, arXiv 2508.05257). W_e [F, D] are whitened (metric.py). A basis in groups is
the mixture in which one coefficient of an expert is 1 and the others are 0; the fit begins there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megakd.compress.basis import fit_basis
from megakd.compress.metric import Metric
from megakd.compress.threads import Threads

OVER_RELAXATION = 1.9  # of the bases' step, as of a core's in als.py
NOISE = 0.3  # of the coefficients at the start: those that are 0 would hardly leave it
RIDGE = 1e-6  # of the mean of a Gram matrix's diagonal
GROWTH = 1e-6  # of the squared norm: a smaller growth of the objective is rounding


class Mixture(NamedTuple):
    """z [G, k, D], a [E, F, k], mix [E, G]."""

    z: Tensor
    a: Tensor
    mix: Tensor

    def expand(self, chunk: slice) -> Tensor:
        return self.a[chunk] @ mixed(self.mix[chunk], self.z)


def mixed(mix: Tensor, z: Tensor) -> Tensor:
    """sum_g m_eg Z_g, [E, k, D]."""
    return (mix @ z.flatten(1)).unflatten(1, z.shape[1:])


def fit_mixture(
    whitened: Tensor,
    metric: Metric,
    size: int,
    count: int,
    threads: Threads,
    *,
    sweeps: int,
    tolerance: float,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Mixture, int, float]:
    """A small sum p_e ||W_e - A_e sum_g m_eg Z_g||^2, with the number of sweeps and that sum.

    size: k; count: G. Experts of importance 0 get factors of zeros. It stops at a relative gain below `tolerance`.
    """
    state = _start(whitened, metric, size, count, threads)
    sums = _sweep(whitened, metric, state, threads)
    done = 0
    while done < sweeps:
        done += 1
        solved = _solve(sums.gram, sums.target).view_as(state.z)
        # in Z the error is quadratic: see als.py
        after = Mixture(state.z + OVER_RELAXATION * (solved - state.z), sums.a, sums.mix)
        new = _sweep(whitened, metric, after, threads)
        progress()
        gain = float(sums.lost - new.lost)
        if gain < -GROWTH * float(sums.energy):
            break
        state, sums = after, new
        if gain <= tolerance * float(sums.lost + gain):
            break
    return Mixture(state.z, sums.a, sums.mix), done, float(sums.lost)


def _start(whitened: Tensor, metric: Metric, size: int, count: int, threads: Threads) -> Mixture:
    """The bases of as many groups, with noise in the coefficients."""
    z, group = fit_basis(whitened, metric, size, count, threads)
    draw = torch.randn(len(whitened), count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mix = functional.one_hot(group.cpu(), count) + NOISE * draw
    return Mixture(z, whitened.new_empty(0), mix.to(whitened))


class _Sums(NamedTuple):
    """The best A_e and m_e for some bases, and the bases' normal equations with these; sums over experts.

    gram [G k, G k], target [G k, D]; lost: the objective; energy: sum p ||W||^2.
    """

    a: Tensor
    mix: Tensor
    gram: Tensor
    target: Tensor
    lost: Tensor
    energy: Tensor


def _sweep(whitened: Tensor, metric: Metric, state: Mixture, threads: Threads) -> _Sums:
    """A_e for the coefficients, then the coefficients for A_e."""
    z, p = state.z, metric.importance
    count, size, columns = z.shape
    between = torch.einsum("gkd,hld->ghkl", z, z)
    a, mix = whitened.new_zeros(*whitened.shape[:2], size), torch.zeros_like(state.mix)

    def work(chunks: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
        gram = whitened.new_zeros(count, size, count, size)
        target, numbers = whitened.new_zeros(count, size, columns), torch.zeros(2, dtype=torch.float64)
        for chunk in chunks:
            w, weight = whitened[chunk], p[chunk].to(whitened)
            own = mixed(state.mix[chunk], z)
            factor = _solve(own @ own.mT, own @ w.mT).mT
            squares, turned = factor.mT @ factor, factor.mT @ w
            aims = torch.einsum("ekd,gkd->eg", turned, z)
            costs = torch.einsum("ekl,ghkl->egh", squares, between)
            best = _solve(costs, aims[:, :, None])[:, :, 0]
            alive = (weight > 0).to(w)
            a[chunk], mix[chunk] = factor * alive[:, None, None], best * alive[:, None]
            energy = w.square().sum((1, 2)).double()
            lost = energy - (2 * best * aims).sum(1) + torch.einsum("eg,egh,eh->e", best, costs, best)
            numbers += torch.stack([lost.double() @ weight.double(), energy @ weight.double()]).cpu()
            gram += torch.einsum("e,eg,eh,ekl->gkhl", weight, best, best, squares)
            target += torch.einsum("e,eg,ekd->gkd", weight, best, turned)
        return gram, target, numbers

    grams, targets, numbers = zip(*threads.map(work), strict=True)
    gram, target = (torch.stack(parts).sum(0) for parts in (grams, targets))
    lost, energy = torch.stack(numbers).sum(0)
    return _Sums(a, mix, gram.reshape(count * size, count * size), target.flatten(0, 1), lost, energy)


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    """gram^-1 target in float64, with a ridge of RIDGE of the mean of the diagonal."""
    exact = gram.double()
    diagonal = exact.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    eye = torch.eye(exact.shape[-1], dtype=exact.dtype, device=exact.device)
    return torch.linalg.solve(exact + RIDGE * diagonal[..., None, None] * eye, target.double()).to(target)


def balance_mixture(found: Mixture) -> Mixture:
    """The same products: bases of one norm, coefficients of norm 1, and factors of one mean square on both sides."""
    z, a, mix = found
    norms = z.flatten(1).norm(dim=1)
    norms = torch.where(norms > 0, norms / norms.mean().clamp(min=1e-30), 1.0)
    z, mix = z / norms[:, None, None], mix * norms
    own = mix.norm(dim=1, keepdim=True)
    own = torch.where(own > 0, own, 1.0)
    mix, a = mix / own, a * own[:, :, None]
    of_a, of_z = a.square().mean((0, 1)).sqrt(), z.square().mean((0, 2)).sqrt()
    scale = torch.where((of_a > 0) & (of_z > 0), (of_a / of_z.clamp(min=1e-30)).sqrt(), 1.0)
    return Mixture(z * scale[:, None], a / scale, mix)
