"""The metric a projection is fitted in: what calibration measured about its inputs.

All matrices are in the frame of the fit, W_e [F, D] (down is transposed): J = sum_e p_e ||M_e (W_e - fit_e) N||^2. The
inputs of gate and up are shared by all experts, N N^T = H [D, D]; M_e is diagonal: what an error of each unit costs the
expert's output. The inputs of down are each expert's own hidden states, M_e^T M_e = H_e [F, F], N = I. Roots are
Cholesky factors: whitening and its inverse are triangular.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megakd.compress.threads import Threads

SHARE_FLOOR = 0.1  # of an expert's mean weight: a rare expert is not thrown away
ROW_FLOOR = 0.05  # of the mean cost of a unit
SMALLEST_DAMPING = 1e-6  # a second moment of fewer tokens than dimensions has no root


class Statistics(NamedTuple):
    """What calibration measured about the inputs of one projection.

    share: [E], each expert's share of the sum of squared routing weights; sums to 1.
    covariance: second moments, of tokens for gate and up [D, D]; for down [E, F, F], sum w^2 h h^T / sum w^2 of each
        expert's hidden states h and routing weights w: share * covariance is what an expert adds to the layer's output.
    held_out: the same of other tokens.
    counts: [E], routed tokens seen.
    rows: [E, F], gate and up: what a squared error of each unit costs the expert's output; None: all the same.
    """

    share: Tensor
    covariance: Tensor
    held_out: Tensor
    counts: Tensor
    rows: Tensor | None = None


class Metric(NamedTuple):
    """importance: [E], p_e, sums to 1; left: M_e^T, [E, F, F], or its diagonal as a column [E, F, 1]; right: [D, D], N.

    Both are lower triangular.
    """

    importance: Tensor
    left: Tensor | None
    right: Tensor | None


def make_metric(
    statistics: Statistics | None,
    projection: str,
    damping: float,
    exempt: tuple[int, ...],
    weights: Tensor,
    threads: Threads,
) -> Metric:
    """The damped metric; without statistics all experts and directions count the same. weights: [E, F, D]."""
    if statistics is None:
        return Metric(_importance(torch.ones(len(weights)), exempt).to(weights.device), None, None)
    share, covariance = statistics.share.double().cpu(), statistics.covariance
    dtype = torch.promote_types(weights.dtype, torch.float32)
    if projection != "down":
        right = root(covariance.to(weights.device).double(), damping).to(dtype)
        importance = _importance(share, exempt).to(weights.device)
        return Metric(importance, _unit_costs(statistics.rows, exempt, weights), right)
    left = torch.empty(covariance.shape, dtype=dtype, device=weights.device)
    scale = torch.empty(len(share), dtype=torch.float64, device=weights.device)

    def fill(chunks: list[slice]) -> None:
        for chunk in chunks:
            exact = covariance[chunk].to(weights.device).double()
            shrink = shrinkage(exact, statistics.counts[chunk].to(exact))
            left[chunk] = root(exact, damping + (1 - damping) * shrink)
            scale[chunk] = exact.diagonal(dim1=1, dim2=2).mean(1)

    threads.map(fill)
    return Metric(_importance(share * scale.cpu(), exempt).to(weights.device), left, None)


def _unit_costs(rows: Tensor | None, exempt: tuple[int, ...], weights: Tensor) -> Tensor | None:
    """M_e, diagonal [E, F, 1], from the costs of units [E, F], their mean 1; those that hardly cost get a floor."""
    if rows is None:
        return None
    exact = rows.double().cpu()
    taking_part = torch.ones(len(exact), dtype=torch.bool)
    taking_part[list(exempt)] = False
    mean = exact[taking_part].mean()
    if not mean > 0:
        return None
    dtype = torch.promote_types(weights.dtype, torch.float32)
    return (exact / mean + ROW_FLOOR).sqrt()[:, :, None].to(weights.device, dtype)


def times(left: Tensor | None, x: Tensor) -> Tensor:
    """M_e X_e of [.., F, r]."""
    return x if left is None else left * x if left.shape[-1] == 1 else left.mT @ x


def times_transposed(left: Tensor | None, x: Tensor) -> Tensor:
    """M_e^T X_e of [.., F, r]."""
    return x if left is None else left * x if left.shape[-1] == 1 else left @ x


def root(covariance: Tensor, damping: Tensor | float) -> Tensor:
    """Lower L [..., d, d] with L L^T = (1 - damping) H / m + damping I, m = tr(H)/d. A measurement of zeros: L = I."""
    size = covariance.shape[-1]
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damping = torch.as_tensor(damping, dtype=covariance.dtype, device=covariance.device)[..., None, None]
    damping = torch.where(mean > 0, damping.clamp(min=SMALLEST_DAMPING), 1.0)
    eye = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky((1 - damping) * covariance / torch.where(mean > 0, mean, 1.0) + damping * eye)


def shrinkage(covariance: Tensor, counts: Tensor) -> Tensor:
    """How far second moments [B, d, d] of `counts` tokens should move towards a multiple of the identity, [B] in 0 … 1.

    Oracle approximating shrinkage (Chen, Wiesel, Eldar, Hero 2010, equation 23): the share with the least expected
    squared error for Gaussian samples, from the measurement itself. A spectrum far from flat is shrunk less than a flat
    one of as many tokens, and no tokens mean the identity.
    """
    size = covariance.shape[-1]
    squares = covariance.square().sum((1, 2))  # tr(H^2)
    trace2 = covariance.diagonal(dim1=1, dim2=2).sum(1).square()
    noise = (1 - 2 / size) * squares + trace2
    spread = (counts + 1 - 2 / size) * (squares - trace2 / size)
    return torch.where((counts > 0) & (spread > noise), noise / spread.clamp(min=torch.finfo(spread.dtype).tiny), 1.0)


def whiten(weights: Tensor, metric: Metric, threads: Threads) -> Tensor:
    """M_e W_e N of all experts in float32 (float64 stays); the weights themselves where nothing changes."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    if metric.left is None and metric.right is None and weights.dtype == dtype:
        return weights
    whitened = torch.empty(weights.shape, dtype=dtype, device=weights.device)

    def fill(chunks: list[slice]) -> None:
        for chunk in chunks:
            exact = weights[chunk].to(dtype)
            if metric.right is not None:
                exact = exact @ metric.right
            whitened[chunk] = times(None if metric.left is None else metric.left[chunk], exact)

    threads.map(fill)
    return whitened


def unwhiten_left(factors: Tensor, metric: Metric, threads: Threads) -> Tensor:
    """M_e^-1 X_e of factors [E, F, r]."""
    if metric.left is None or factors.shape[2] == 0:
        return factors
    if metric.left.shape[-1] == 1:
        return factors / metric.left
    plain, left = torch.empty_like(factors), metric.left

    def fill(chunks: list[slice]) -> None:
        for chunk in chunks:
            plain[chunk] = torch.linalg.solve_triangular(left[chunk].mT, factors[chunk], upper=True)

    threads.map(fill)
    return plain


def unwhiten_right(rows: Tensor, metric: Metric) -> Tensor:
    """X N^-1 of [..., D]."""
    if metric.right is None or rows.numel() == 0:
        return rows
    flat = torch.linalg.solve_triangular(metric.right, rows.reshape(-1, rows.shape[-1]), upper=False, left=False)
    return flat.view(rows.shape)


def _importance(weights: Tensor, exempt: tuple[int, ...]) -> Tensor:
    """Weights [E] with a floor, zero for exempt experts, that sum to 1."""
    taking_part = torch.ones(len(weights), dtype=torch.bool)
    taking_part[list(exempt)] = False
    weights = torch.where(taking_part, weights.double(), 0.0)
    mean = weights.sum() / max(1, int(taking_part.sum()))
    weights = torch.where(taking_part, weights.clamp(min=SHARE_FLOOR * mean) if mean > 0 else 1.0, 0.0)
    return weights / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)
