"""Fit one projection's experts: a shared core and two low-rank wrappers an expert, by alternating least squares.

Model, for E matrices W_e [d_out, d_in] (docs/compression.md, sections 1 and 3):
    W_e ~ L_e C + Q_e V_e^T,   L_e = I + U_e S_e^T,   C [d_out, d_in]; U, S, Q [d_out, R]; V [d_in, R]
`down` is fitted transposed, so that the core's short side is always the expert's hidden size.
Every block has a closed form, and the error never grows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

OVER_RELAXATION = 1.9  # of the core's step
# Output wrappers act on the core's singular directions above this share of the largest. Below it they would have to be
# huge (|U S^T| 272 instead of 19 on a trained 192 x 192 layer, for 0.3 % less error): bad for bf16 and any optimizer.
CORE_FLOOR = 0.05


class Fit(NamedTuple):
    """Factors of all experts and the relative Frobenius error ||W_e - fit_e|| / ||W_e|| of each, [E]."""

    core: Tensor
    u: Tensor
    s: Tensor
    q: Tensor
    v: Tensor
    errors: Tensor
    sweeps: int


def fit_projection(
    weights: Tensor,
    projection: str,
    rank: int,
    sweeps: int,
    tolerance: float,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], Fit]:
    """Tensors of one layer's projection by student parameter name, and the fit they come from.

    weights: [E, d_out, d_in]. The names are those below `…mlp.` (`shared_core.gate_proj.weight`, …), float32.
    """
    if projection != "down":
        fit = fit_shared_core(weights.float(), rank, sweeps, tolerance, progress)
        core, inner, outer = fit.core, (fit.q, fit.v), (fit.u, fit.s)
    else:
        # W^T = L C + Q V^T, hence W = C^T (I + S U^T) + V Q^T
        fit = fit_shared_core(weights.float().transpose(1, 2), rank, sweeps, tolerance, progress)
        core, inner, outer = fit.core.T.contiguous(), (fit.s, fit.u), (fit.v, fit.q)
    tensors = {f"shared_core.{projection}_proj.weight": core}
    for wrapper, (left, right) in (("input", inner), ("output", outer)):
        tensors[f"experts.{wrapper}_wrapper_{projection}_left"] = left
        tensors[f"experts.{wrapper}_wrapper_{projection}_right"] = right
    return tensors, fit


def fit_shared_core(
    weights: Tensor, rank: int, sweeps: int, tolerance: float, progress: Callable[[], None] = lambda: None
) -> Fit:
    """ALS from C = mean W_e, U = S = 0 and the best rank-R Q V^T; stops at a relative gain below `tolerance`."""
    experts, rows, columns = weights.shape
    rank = min(rank, rows, columns)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, min(rank + 8, rows), generator=generator, dtype=weights.dtype)
    core = weights.mean(0)
    u, s = weights.new_zeros(experts, rows, rank), weights.new_zeros(experts, rows, rank)
    q, v = weights.new_zeros(experts, rows, rank), weights.new_zeros(experts, columns, rank)
    for e in range(experts):
        q[e], v[e] = truncated_svd(weights[e] - core, rank, start)
    norms = weights.square().sum((1, 2)).clamp(min=torch.finfo(weights.dtype).tiny)  # an expert of zeros has error 0
    errors = _errors(weights, core, u, s, q, v)
    done = 0
    while done < sweeps:
        done += 1
        before, kept_factors = errors, (core, u.clone(), s.clone(), q.clone(), v.clone())
        core = _fit_core(weights, core, u, s, q, v)
        left, sigma, right = torch.linalg.svd(core, full_matrices=False)
        kept = sigma > sigma[0] * CORE_FLOOR
        left, sigma, right = left[:, kept], sigma[kept], right[kept]
        for e in range(experts):
            # S^T C = (S^T T) Z with C = T Z, Z orthonormal: the best U (T^T S)^T is a truncated SVD of residual Z^T
            residual = (weights[e] - core - q[e] @ v[e].T) @ right.T
            u[e], projected = truncated_svd(residual, rank, right @ start)
            s[e] = left @ (projected / sigma[:, None])
            q[e], v[e] = truncated_svd(weights[e] - core - u[e] @ (s[e].T @ core), rank, start)
        errors = _errors(weights, core, u, s, q, v)
        progress()
        if errors.sum() > before.sum():  # only the floor can do that: the directions it keeps move with the core
            errors, (core, u, s, q, v) = before, kept_factors
            break
        if before.sum() - errors.sum() <= tolerance * before.sum():
            break
    return Fit(core, *balance(u, s), *balance(q, v), (errors / norms).sqrt(), done)


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same products left right^T with columns of equal norm on both sides, [E, d, R] each.

    ALS leaves all scale on one side; an optimizer with one step size for both then breaks the model at once (measured:
    cross entropy 3.8 to 9.5 in the first step of Adam at lr 2e-4).
    """
    norms_left, norms_right = left.norm(dim=1, keepdim=True), right.norm(dim=1, keepdim=True)
    scale = (norms_right / norms_left.clamp(min=1e-12)).sqrt()
    scale = torch.where((norms_left > 0) & (norms_right > 0), scale, 1.0)
    return left * scale, right / scale


def truncated_svd(matrix: Tensor, rank: int, start: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """(left [m, rank], right [n, rank]) with left right^T close to the best approximation of `matrix` [m, n].

    Exact for small matrices; else a randomised range finder with power iterations (Halko et al. 2011, algorithm 4.4)
    from the fixed test matrix `start` [n, >= rank], so that equal input gives equal output.
    """
    if start.shape[1] * 3 >= min(matrix.shape):
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        left, right = left[:, :rank] * sigma[:rank], right[:rank].T
    else:
        basis, _ = torch.linalg.qr(matrix @ start)
        for _ in range(iterations):
            basis, _ = torch.linalg.qr(matrix @ (matrix.T @ basis))
        small, sigma, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left, right = basis @ small[:, :rank] * sigma[:rank], right[:rank].T
    missing = rank - left.shape[1]
    if missing > 0:
        left, right = (torch.nn.functional.pad(x, (0, missing)) for x in (left, right))
    return left, right


def _fit_core(weights: Tensor, core: Tensor, u: Tensor, s: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """Solve (sum L_e^T L_e) C = sum L_e^T (W_e - Q_e V_e^T); then go beyond it."""
    rows = core.shape[0]
    gram, target = core.new_zeros(rows, rows), torch.zeros_like(core)
    for e in range(len(weights)):
        residual = weights[e] - q[e] @ v[e].T
        # L^T L = I + U S^T + S U^T + S (U^T U) S^T, and L^T R = R + S (U^T R): never an L of full size
        us = u[e] @ s[e].T
        gram += us + us.T + s[e] @ (u[e].T @ u[e]) @ s[e].T
        target += residual + s[e] @ (u[e].T @ residual)
    gram += len(weights) * torch.eye(rows, dtype=core.dtype)
    solved = torch.linalg.solve(gram, target)
    # in C the error is quadratic: a step to 1.9 of the way leaves 0.81 of what C could still gain, so it never grows,
    # and the other blocks converge in fewer sweeps
    return core + OVER_RELAXATION * (solved - core)


def _errors(weights: Tensor, core: Tensor, u: Tensor, s: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """Squared Frobenius error of each expert, [E]."""
    parts = [weights[e] - core - u[e] @ (s[e].T @ core) - q[e] @ v[e].T for e in range(len(weights))]
    return torch.stack([part.square().sum() for part in parts])
