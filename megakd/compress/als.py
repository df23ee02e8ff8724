"""Shared core and wrappers by alternating least squares: W_e ~ M_e L_e C + (M_e Q_e) V_e^T with L_e = I + U_e S_e^T.

W_e [F, D] are whitened (metric.py). Every block has a closed form (docs/compression.md). Nothing of full size
is made for an expert: residuals are known by their products with a few columns, and what M_e does to a product of full
size is done to its thin factors instead.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.compress.metric import Metric, times, times_transposed
from megakd.compress.threads import Threads

OVER_RELAXATION = 1.9  # of the core's step
OVERSAMPLING = 8  # columns of a range finder beyond the rank
# Power iterations of a range finder from random columns. One that starts from what it found in the sweep before has
# none: sweeps get cheaper rather than better (flat proxy in 1.8 s: 0.8144 with none, 0.8149 with one, 0.8155 with 3).
POWER_ITERATIONS = 3
# A ridge under the core's singular values, of their root mean square. Without it output wrappers lean on directions
# that the core hardly has: |U S^T| gets huge, which is bad for bf16 and any optimizer, and alternating is slower.
CORE_FLOOR = 0.05
NOISE = 1e-6  # of the squared norm: a smaller growth of the objective is rounding


class Wrappers(NamedTuple):
    """core [F, D]; u, s [E, F, core rank]; q [E, F, free rank]; v [E, D, free rank]."""

    core: Tensor
    u: Tensor
    s: Tensor
    q: Tensor
    v: Tensor

    def expand(self, chunk: slice) -> Tensor:
        """The fits of some experts, [B, F, D]."""
        return self.core + self.u[chunk] @ (self.s[chunk].mT @ self.core) + self.q[chunk] @ self.v[chunk].mT


def fit_wrappers(
    whitened: Tensor,
    metric: Metric,
    free: int,
    inner: int,
    threads: Threads,
    *,
    sweeps: int,
    tolerance: float,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Wrappers, int, float]:
    """ALS from the best C, U = S = 0 and the best Q V^T; stops at a relative gain below `tolerance`.

    whitened: [E, F, D]; free, inner: the free rank and the core rank. The result, with the number of sweeps and the
    objective, is in the whitened frame: C N, M u, s, M q, N^T v.
    """
    problem = _open_problem(whitened, metric, free, inner, threads)
    state, spare = _zeros(problem), _zeros(problem)
    state, sums = _sweep(problem, _prepare(_solve(problem.base.gram, problem.base.target)), state, state, 0)
    done = 0
    while done < sweeps:
        done += 1
        solved = _solve(sums.gram, sums.target)
        # in C the error is quadratic: a step to 1.9 of the way leaves 0.81 of what C could still gain, so it never
        # grows, and the other blocks converge in fewer sweeps
        core = _prepare(state.core + OVER_RELAXATION * (solved - state.core))
        new_state, new_sums = _sweep(problem, core, state, spare, done)
        progress()
        gain = float(sums.objective - new_sums.objective)
        if gain < -NOISE * float(problem.base.objective):  # only mu can do that, which moves with the core
            break
        spare, state, sums = state, new_state, new_sums
        if gain <= tolerance * float(sums.objective + gain):
            break
    used_s, used_v = state.s[..., : problem.inner], state.v[..., : problem.free]
    return Wrappers(state.core, state.u, used_s, state.q, used_v), done, float(sums.objective)


class _Sums(NamedTuple):
    """Sums over experts: gram [F, F] and target [F, D] of the core's normal equations, and the objective."""

    gram: Tensor
    target: Tensor
    objective: Tensor


class _Problem(NamedTuple):
    """What no sweep changes.

    free, inner: the ranks, at most the smaller side. start_v [D, width], start_s [F, width]: where the range finders
    begin. base: what all experts have in common, sum p H, sum p M^T W and sum p ||W||^2, with H = M^T M.
    """

    whitened: Tensor
    metric: Metric
    threads: Threads
    free: int
    inner: int
    start_v: Tensor
    start_s: Tensor
    base: _Sums


class _Core(NamedTuple):
    """The core and what a sweep needs of it, made once for all experts.

    gram: C C^T; T T^T = C C^T + mu I; rows: T^-1 C; back: T^-T; through: C rows^T.
    """

    core: Tensor
    gram: Tensor
    rows: Tensor
    factor: Tensor
    back: Tensor
    through: Tensor


class _State(NamedTuple):
    """Factors in the whitened frame (u and q are M u and M q); s and v with the range finders' spare columns."""

    core: Tensor
    u: Tensor
    s: Tensor
    q: Tensor
    v: Tensor


class _Experts(NamedTuple):
    """The experts of a chunk: w = M W N, m = M^T, p their importance; their factors as `_State` has them."""

    w: Tensor
    m: Tensor | None
    p: Tensor
    u: Tensor
    s: Tensor
    q: Tensor
    v: Tensor

    @property
    def on_core(self) -> tuple[Tensor, Tensor]:
        """(U, S) without spare columns."""
        return self.u, self.s[..., : self.u.shape[-1]]

    @property
    def added(self) -> tuple[Tensor, Tensor]:
        """(Q, V) without spare columns."""
        return self.q, self.v[..., : self.q.shape[-1]]


def _open_problem(whitened: Tensor, metric: Metric, free: int, inner: int, threads: Threads) -> _Problem:
    _, rows, columns = whitened.shape
    smallest = min(rows, columns)
    wide_free, wide_inner = (min(r + OVERSAMPLING, smallest) if r else 0 for r in (free, inner))
    # drawn on the CPU in float64, then converted: the same start on every device and in every type
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(columns + rows, max(wide_free, wide_inner), generator=generator, dtype=torch.float64)
    return _Problem(
        whitened,
        metric,
        threads,
        free=min(free, smallest),
        inner=min(inner, smallest),
        start_v=noise[:columns, :wide_free].to(whitened),
        start_s=noise[columns:, :wide_inner].to(whitened),
        base=_base_sums(whitened, metric, threads),
    )


def _base_sums(whitened: Tensor, metric: Metric, threads: Threads) -> _Sums:
    """sum p H, sum p M^T W and sum p ||W||^2, all whitened."""
    _, rows, columns = whitened.shape
    p, left = metric.importance, metric.left

    def moments(chunks: list[slice]) -> _Sums:
        gram, target = whitened.new_zeros(rows, rows), whitened.new_zeros(rows, columns)
        norm = whitened.new_zeros((), dtype=torch.float64)
        for chunk in chunks:
            weight = p[chunk].to(whitened)
            norm += (p[chunk] * whitened[chunk].square().sum((1, 2)).double()).sum()
            if left is None:
                target += torch.einsum("e,efd->fd", weight, whitened[chunk])
            elif left.shape[2] == 1:
                gram.diagonal().add_((weight[:, None] * left[chunk, :, 0].square()).sum(0))
                target += torch.einsum("ef,efd->fd", weight[:, None] * left[chunk, :, 0], whitened[chunk])
            else:
                scaled = left[chunk] * weight[:, None, None]
                gram += torch.einsum("efg,ehg->fh", scaled, left[chunk])
                target += torch.einsum("efg,egd->fd", scaled, whitened[chunk])
        return _Sums(gram, target, norm)

    sums = _total(threads.map(moments))
    if left is not None:
        return sums
    identity = torch.eye(rows, dtype=whitened.dtype, device=whitened.device)
    return sums._replace(gram=p.sum().to(whitened) * identity)


def _zeros(problem: _Problem) -> _State:
    """A buffer for the factors of all experts: sweeps read one and write the other, none is made anew."""
    experts, rows, columns = problem.whitened.shape
    zeros = problem.whitened.new_zeros
    return _State(
        core=problem.base.target,
        u=zeros(experts, rows, problem.inner),
        s=zeros(experts, rows, problem.start_s.shape[1]),
        q=zeros(experts, rows, problem.free),
        v=zeros(experts, columns, problem.start_v.shape[1]),
    )


def _sweep(problem: _Problem, core: _Core, old: _State, new: _State, number: int) -> tuple[_State, _Sums]:
    """(U, S), then (Q, V), of every expert into `new`; the objective, and the sums of the core's next step."""
    base = problem.base

    def work(chunks: list[slice]) -> _Sums:
        sums = _Sums(torch.zeros_like(base.gram), torch.zeros_like(base.target), torch.zeros_like(base.objective))
        for chunk in chunks:
            experts = _fit_chunk(problem, core, old, chunk, number)
            for whole, part in zip(new[1:], (experts.u, experts.s, experts.q, experts.v), strict=True):
                whole[chunk] = part
            sums = _add(sums, core, experts)
        return sums

    own = _total(problem.threads.map(work))
    # what all experts have in common: ||W||^2 - 2 <sum p M^T W, C> + <sum p H, C C^T>
    common = base.objective - 2 * (base.target * core.core).sum(dtype=torch.float64)
    common = common + (base.gram.double() * core.gram.double()).sum()
    # the experts' own part is symmetric: `_add` sums half of it
    gram = base.gram + own.gram + own.gram.T
    return new._replace(core=core.core), _Sums(gram, base.target + own.target, common + own.objective)


def _fit_chunk(problem: _Problem, core: _Core, old: _State, chunk: slice, number: int) -> _Experts:
    """The experts of a chunk with their best (U, S) for the core, then their best (Q, V) for both."""
    left = problem.metric.left
    experts = _Experts(
        problem.whitened[chunk],
        None if left is None else left[chunk],
        problem.metric.importance[chunk],
        *(factor[chunk] for factor in old[1:]),
    )
    size = len(experts.w)
    # each range finder begins with random columns the first time, and then with what it found in the sweep before
    if number > 0 and problem.inner > 0:
        first = number == 1
        start = problem.start_s.expand(size, -1, -1) if first else core.factor.T @ experts.s
        u, s = _best_inner(experts, core, start, problem.inner, POWER_ITERATIONS if first else 0)
        experts = experts._replace(u=u, s=s)
    if problem.free > 0:
        first = number == 0
        start = problem.start_v.expand(size, -1, -1) if first else experts.v
        q, v = _best_free(experts, core, start, problem.free, POWER_ITERATIONS if first else 0)
        experts = experts._replace(q=q, v=v)
    return experts


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    """gram^-1 target in float64; a hair of the identity, for experts that agree to leave a direction out."""
    exact = gram.double()
    eye = torch.eye(len(gram), dtype=exact.dtype, device=exact.device)
    shift = 1e-10 * exact.diagonal().mean().clamp(min=1e-30)
    return torch.cholesky_solve(target.double(), torch.linalg.cholesky(exact + shift * eye)).to(target)


def _prepare(core: Tensor) -> _Core:
    # in float64: C C^T squares the core's condition number, which float32 would lose
    exact = core.double()
    gram = exact @ exact.T
    mu = (CORE_FLOOR**2 * gram.diagonal().mean()).clamp(min=1e-30)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + mu * eye)
    back = torch.linalg.solve_triangular(factor, eye, upper=False).T
    rows = back.T @ exact
    return _Core(core, *(x.to(core) for x in (gram, rows, factor, back, factor - mu * back)))


def _best_inner(experts: _Experts, core: _Core, start: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """(M U, S) of the least ||M (W - C - Q V^T) - M U S^T C||^2 + mu ||M U S^T||^2.

    With T T^T = C C^T + mu I that is ||(...) C^T T^-T - M U (T^T S)^T||^2 and a constant: a truncated SVD. mu bounds
    how hard U S^T may lean on directions that the core hardly has.
    """
    w, m = experts.w, experts.m
    q, v = experts.added

    def forward(x: Tensor) -> Tensor:
        turned = core.rows.T @ x
        down = core.through @ x
        return w @ turned - times(m, down) - q @ (v.mT @ turned)

    def backward(y: Tensor) -> Tensor:
        return core.rows @ (w.mT @ y - v @ (q.mT @ y)) - core.through.T @ times_transposed(m, y)

    left, right = _leading(forward, backward, start, rank, iterations)
    return left, core.back @ right


def _best_free(experts: _Experts, core: _Core, start: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """(M Q, V) of the least ||M (W - L C) - M Q V^T||^2."""
    w, m = experts.w, experts.m
    u, s = experts.on_core

    def forward(x: Tensor) -> Tensor:
        down = core.core @ x
        return w @ x - times(m, down) - u @ (s.mT @ down)

    def backward(y: Tensor) -> Tensor:
        return w.mT @ y - core.core.T @ (times_transposed(m, y) + s @ (u.mT @ y))

    return _leading(forward, backward, start, rank, iterations)


def _leading(
    forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], start: Tensor, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """(left [B, m, rank] orthonormal, right [B, n, width]): left right[:rank]^T is close to the best of that rank.

    A randomised range finder with power iterations (Halko et al. 2011, algorithm 4.4) for matrices known by their
    products alone, from `start` [B, n, width >= rank]. Exact where width is the smaller side.
    """
    basis = torch.linalg.qr(forward(start))[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(forward(backward(basis)))[0]
    right = backward(basis)
    # the eigenvectors of a width x width matrix: the part they choose of basis basis^T A is a projection of A whatever
    # their rounding
    turn = torch.linalg.eigh(right.mT @ right)[1].flip(-1)
    return basis @ turn[..., :rank], right @ turn


def _add(sums: _Sums, core: _Core, experts: _Experts) -> _Sums:
    """Adds what these experts add to half of the gram, to the target and the objective; u and q stand for M u and M q.

    L^T H L - H = M^T U S^T + S U^T M + S U^T U S^T;  L^T M^T (W - Q V^T) - M^T W = S U^T W - (M^T Q + S U^T Q) V^T;
    the objective less what all experts have in common: -2 <U S^T C, W - M C> + ||U S^T C||^2 - ||V||^2, for Q V^T is
    the projection of the rest on Q, which is orthonormal.
    """
    w, p = experts.w, experts.p
    (u, s), (q, v) = experts.on_core, experts.added
    weight = p.to(w)[:, None, None]
    uw, uu = u.mT @ w, u.mT @ u
    mu, mq = times_transposed(experts.m, u), times_transposed(experts.m, q)
    _add_products(sums.gram, (mu + s @ (uu / 2)) * weight, s.mT)
    _add_products(sums.target, s * weight, uw)
    _add_products(sums.target, -(mq + s @ (u.mT @ q)) * weight, v.mT)
    sg = s.mT @ core.gram
    # in float64: these numbers are near each other, and `gain` is a difference of two of their sums
    against = (uw * (s.mT @ core.core)).sum((1, 2), dtype=torch.float64)  # <U S^T C, W>
    square = ((sg @ s) * uu).sum((1, 2), dtype=torch.float64)  # ||U S^T C||^2
    mixed = (sg * mu.mT).sum((1, 2), dtype=torch.float64)  # <U S^T C, M C>
    own = -2 * against + square + 2 * mixed - v.square().sum((1, 2), dtype=torch.float64)
    return sums._replace(objective=sums.objective + (p * own).sum())


def _add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += sum_e left_e right_e of [B, m, r] and [B, r, n], as one product."""
    if len(left) == 1:
        total.addmm_(left[0], right[0])
    else:
        total.addmm_(left.transpose(0, 1).flatten(1), right.flatten(0, 1))


def _total(parts: list[_Sums]) -> _Sums:
    """Their sum, in their order."""
    first, *others = parts
    for part in others:
        first.gram.add_(part.gram)
        first.target.add_(part.target)
    return first._replace(objective=sum((part.objective for part in others), first.objective))
