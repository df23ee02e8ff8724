"""Fit one projection's experts: a shared core and low-rank wrappers, or a shared basis, by alternating least squares.

In the frame of the fit every projection is E matrices W_e [F, D] (F expert hidden, D hidden; down is transposed):
    wrappers  W_e ~ L_e C + Q_e V_e^T,  L_e = I + U_e S_e^T;  U, S [F, core rank], Q [F, free rank], V [D, free rank]
    basis     W_e ~ A_e Z_g(e),  A_e [F, k], Z [G, k, D]
and the objective is J = sum_e p_e ||M_e (W_e - fit_e) N||^2 (metric.py). Every block has a closed form in whitened
matrices M_e W_e N (docs/compression.md); what M_e does to a product of full size is done to its thin factors instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megakd.models.lanes import Lanes, lanes_over
from megakd.models.metric import Metric, Statistics, make_metric, unwhiten_left, unwhiten_right, whiten
from megakd.models.shared_core import Form, free_and_core_rank

OVER_RELAXATION = 1.9  # of the core's step
OVERSAMPLING = 8  # columns of a range finder beyond the rank
COLD, WARM = 3, 1  # power iterations of a range finder from random columns, and from those of the sweep before
CORE_FLOOR = 0.05
NOISE = 1e-6  # of the squared norm: a smaller growth of the objective is rounding


class Settings(NamedTuple):
    """solver: als (sweeps, tolerance) or adam (steps, lr). damping: candidates for the share of the identity."""

    solver: str = "als"
    sweeps: int = 20
    tolerance: float = 1e-4
    damping: tuple[float, ...] = (0.1,)
    steps: int = 1000
    lr: float = 1e-2


class Fit(NamedTuple):
    """What came out, by expert [E]; 0 for those exempt.

    errors: ||W_e - fit_e|| / ||W_e||. weighted_errors: the same in the metric of the held-out inputs, without damping.
    damping: the one chosen; None without statistics.
    """

    errors: Tensor
    weighted_errors: Tensor | None
    sweeps: int
    damping: float | None


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


class Basis(NamedTuple):
    """z [G, k, D], a [E, F, k], group [E]."""

    z: Tensor
    a: Tensor
    group: Tensor

    def expand(self, chunk: slice) -> Tensor:
        return self.a[chunk] @ self.z[self.group[chunk]]


def fit_projection(
    weights: Tensor,
    projection: str,
    form: Form,
    settings: Settings,
    statistics: Statistics | None = None,
    exempt: tuple[int, ...] = (),
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], Fit]:
    """Tensors of one layer's projection by student parameter name, and how good they are.

    weights: [E, d_out, d_in] of any dtype. The names are those below `…mlp.` (`shared_core.gate_proj.weight`, …),
    float32 (float64 for float64). Of several dampings the one with the least error on held-out inputs is taken. Experts
    in `exempt` have no part in what is shared, and zero factors. `progress` is called after every sweep.
    """
    frame = weights.mT if projection == "down" else weights
    candidates = (None,) if statistics is None else settings.damping
    best: tuple[float, Wrappers | Basis, Fit] | None = None
    with lanes_over(frame) as lanes:
        for damping in candidates:
            metric = make_metric(statistics, projection, damping or 0.0, exempt, frame, lanes)
            factors, sweeps = _fit(frame, metric, projection, form, settings, lanes, progress)
            errors, weighted, total = _errors(frame, factors, projection, statistics, exempt, lanes)
            if best is None or total < best[0]:
                best = total, factors, Fit(errors, weighted, sweeps, damping)
    assert best is not None, candidates
    _, factors, fit = best
    if isinstance(factors, Basis):
        return _basis_tensors(factors, projection, form), fit
    return _wrapper_tensors(factors, projection), fit


def _fit(
    frame: Tensor,
    metric: Metric,
    projection: str,
    form: Form,
    settings: Settings,
    lanes: Lanes,
    progress: Callable[[], None],
) -> tuple[Wrappers | Basis, int]:
    """Whiten, fit, and go back."""
    free, inner = free_and_core_rank(form, projection)
    whitened = whiten(frame, metric, lanes)
    alive = metric.importance.to(whitened)[:, None, None] > 0
    if form.shape == "basis":
        z, group, sweeps = fit_basis(whitened, metric, inner, form.groups, settings.sweeps, lanes, progress)
        z_plain = unwhiten_right(z, metric)
        # A = W Z^T whatever M is: Z is orthonormal where it was found, so A_e is a projection of each row
        a = _project(whitened, z, group, lanes)
        return balance_basis(Basis(z_plain, unwhiten_left(a, metric, lanes) * alive, group)), sweeps
    fitted, sweeps = fit_wrappers(whitened, metric, free, inner, settings.sweeps, settings.tolerance, lanes, progress)
    u, q = (unwhiten_left(x, metric, lanes) for x in (fitted.u, fitted.q))
    core, v = unwhiten_right(fitted.core, metric), unwhiten_right(fitted.v.mT, metric).mT
    pairs = *balance(u * alive, fitted.s * alive), *balance(q * alive, v * alive)
    ranks = inner, inner, free, free  # zeros beyond the matrix's own
    return Wrappers(core, *(functional.pad(x, (0, r - x.shape[2])) for x, r in zip(pairs, ranks, strict=True))), sweeps


def _wrapper_tensors(factors: Wrappers, projection: str) -> dict[str, Tensor]:
    core, u, s, q, v = factors
    if projection != "down":
        core, near, far = core, (u, s), (q, v)
    else:  # W^T = L C + Q V^T, hence W = C^T (I + S U^T) + V Q^T
        core, near, far = core.T, (s, u), (v, q)
    names = ("input", "output") if projection == "down" else ("output", "input")
    tensors = {f"shared_core.{projection}_proj.weight": core.contiguous()}
    for name, pair in zip(names, (near, far), strict=True):
        if pair[0].shape[2] > 0:
            for side, factor in zip(("left", "right"), pair, strict=True):
                tensors[f"experts.{name}_wrapper_{projection}_{side}"] = factor.contiguous()
    return tensors


def _basis_tensors(factors: Basis, projection: str, form: Form) -> dict[str, Tensor]:
    stacked = factors.z.flatten(0, 1)
    name = "input_wrapper_down_right" if projection == "down" else f"output_wrapper_{projection}_left"
    tensors = {
        f"shared_core.{projection}_proj.weight": (stacked.T if projection == "down" else stacked).contiguous(),
        f"experts.{name}": factors.a.contiguous(),
    }
    if form.groups > 1:
        tensors[f"experts.basis_group_{projection}"] = factors.group
    return tensors


def _errors(
    frame: Tensor,
    factors: Wrappers | Basis,
    projection: str,
    statistics: Statistics | None,
    exempt: tuple[int, ...],
    lanes: Lanes,
) -> tuple[Tensor, Tensor | None, float]:
    """(relative errors, relative errors in the held-out metric, total of the latter by share) of expanded matrices."""
    dtype = factors[0].dtype

    def squares(matrices: Tensor, chunk: slice) -> Tensor:
        """tr(X^T X) and tr of X's second moment with the held-out inputs, [2, B]."""
        plain = matrices.square().sum((1, 2))
        if statistics is None:
            return torch.stack([plain, plain])
        if projection == "down":
            turned = statistics.held_out[chunk].to(matrices) @ matrices
        else:
            turned = matrices @ statistics.held_out.to(matrices)
        return torch.stack([plain, (turned * matrices).sum((1, 2))])

    def work(lane: list[slice]) -> Tensor:
        found = []
        for chunk in lane:
            exact = frame[chunk].to(dtype)
            found.append(torch.stack([squares(exact, chunk), squares(exact - factors.expand(chunk), chunk)]))
        return torch.cat(found, 2)

    # [weights or residual, plain or held out, E]
    found = torch.cat(lanes.map(work), 2).double()
    found[:, :, list(exempt)] = 0
    relative = (found[1] / found[0].clamp(min=torch.finfo(dtype).tiny)).sqrt().to(dtype)
    if statistics is None:
        return relative[0], None, float(found[1, 0].sum())
    return relative[0], relative[1], float((statistics.share.to(found) * found[1, 1]).sum())


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same products left right^T with columns of equal norm on both sides, [E, d, R] each.

    ALS leaves all scale on one side; an optimizer with one step size for both then breaks the model at once (measured:
    cross entropy 3.8 to 9.5 in the first step of Adam at lr 2e-4).
    """
    norms_left, norms_right = left.norm(dim=1, keepdim=True), right.norm(dim=1, keepdim=True)
    scale = (norms_right / norms_left.clamp(min=1e-12)).sqrt()
    scale = torch.where((norms_left > 0) & (norms_right > 0), scale, 1.0)
    return left * scale, right / scale


def balance_basis(basis: Basis) -> Basis:
    """The same products with entries of the same mean square in a basis vector and in what multiplies it."""
    z, a, group = basis
    scale = torch.ones(z.shape[:2], dtype=z.dtype, device=z.device)
    for g in range(len(z)):
        of_a = a[group == g].square().mean((0, 1)).sqrt()
        of_z = z[g].square().mean(1).sqrt()
        scale[g] = torch.where((of_a > 0) & (of_z > 0), (of_a / of_z.clamp(min=1e-30)).sqrt(), 1.0)
    return Basis(z * scale[:, :, None], a / scale[group][:, None, :], group)


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


def fit_wrappers(
    whitened: Tensor,
    metric: Metric,
    free: int,
    inner: int,
    sweeps: int,
    tolerance: float,
    lanes: Lanes,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Wrappers, int]:
    """ALS from the best C, U = S = 0 and the best Q V^T; stops at a relative gain below `tolerance`.

    whitened: [E, F, D]. The result is in the whitened frame: M u, s, M q, N^T v, C N.
    """
    experts, rows, columns = whitened.shape
    p, left = metric.importance, metric.left
    smallest = min(rows, columns)
    wide_free, wide_inner = (min(r + OVERSAMPLING, smallest) if r else 0 for r in (free, inner))
    free, inner = min(free, smallest), min(inner, smallest)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(columns + rows, max(wide_free, wide_inner), generator=generator, dtype=torch.float64)
    start_v, start_s = noise[:columns, :wide_free].to(whitened), noise[columns:, :wide_inner].to(whitened)

    def moments(lane: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
        """sum p H, sum p M^T W and sum p ||W||^2, all whitened."""
        gram, target = whitened.new_zeros(rows, rows), whitened.new_zeros(rows, columns)
        norm = whitened.new_zeros((), dtype=torch.float64)
        for chunk in lane:
            weight = p[chunk].to(whitened)
            norm += (p[chunk] * whitened[chunk].square().sum((1, 2)).double()).sum()
            if left is None:
                target += torch.einsum("e,efd->fd", weight, whitened[chunk])
            else:
                scaled = left[chunk] * weight[:, None, None]
                gram += torch.einsum("efg,ehg->fh", scaled, left[chunk])
                target += torch.einsum("efg,egd->fd", scaled, whitened[chunk])
        return gram, target, norm

    base_gram, base_target, norm = (torch.stack(x).sum(0) for x in zip(*lanes.map(moments), strict=True))
    if left is None:
        base_gram = p.sum().to(whitened) * torch.eye(rows, dtype=whitened.dtype, device=whitened.device)

    def sweep(prepared: _Core, old: _State, number: int) -> tuple[_State, Tensor, Tensor, Tensor]:
        """(U, S), then (Q, V), for every expert; the objective, and the sums of the core's next step."""
        core = prepared.core
        new = _State(core, *(torch.empty_like(x) for x in old[1:]))

        def work(lane: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
            gram, target = torch.zeros_like(base_gram), torch.zeros_like(core)
            objective = whitened.new_zeros((), dtype=torch.float64)
            for chunk in lane:
                w, m = whitened[chunk], None if left is None else left[chunk]
                u, s, q, v = (x[chunk] for x in old[1:])
                if number and inner:
                    x = start_s.expand(len(w), -1, -1) if number == 1 else prepared.factor.T @ s
                    u, s = _best_inner(w, m, prepared, q, v[..., :free], x, inner, COLD if number == 1 else WARM)
                if free:
                    x = v if number else start_v.expand(len(w), -1, -1)
                    q, v = _best_free(w, m, core, u, s[..., :inner], x, free, WARM if number else COLD)
                for x, y in zip(new[1:], (u, s, q, v), strict=True):
                    x[chunk] = y
                parts = _sums(w, m, prepared, u, s[..., :inner], q, v[..., :free], p[chunk])
                gram, target, objective = gram + parts[0], target + parts[1], objective + parts[2]
            return gram, target, objective

        gram, target, objective = (torch.stack(x).sum(0) for x in zip(*lanes.map(work), strict=True))
        # what all experts have in common: ||W||^2 - 2 <sum p M^T W, C> + <sum p H, C C^T>
        objective = objective + norm - 2 * (base_target * core).sum(dtype=torch.float64)
        objective = objective + (base_gram.double() * prepared.gram.double()).sum()
        return new, base_gram + gram, base_target + target, objective

    core = _solve(base_gram, base_target)
    state = _State(
        core,
        whitened.new_zeros(experts, rows, inner),
        whitened.new_zeros(experts, rows, wide_inner),
        whitened.new_zeros(experts, rows, free),
        whitened.new_zeros(experts, columns, wide_free),
    )
    state, gram, target, objective = sweep(_prepare(core), state, 0)
    done = 0
    while done < sweeps:
        done += 1
        solved = _solve(gram, target)
        # in C the error is quadratic: a step to 1.9 of the way leaves 0.81 of what C could still gain, so it never
        # grows, and the other blocks converge in fewer sweeps
        prepared = _prepare(state.core + OVER_RELAXATION * (solved - state.core))
        after, gram, target, found = sweep(prepared, state, done)
        progress()
        gain = float(objective - found)
        if gain < -NOISE * float(norm):
            break
        state, objective = after, found
        if gain <= tolerance * float(objective + gain):
            break
    core, u, s, q, v = state
    return Wrappers(core, u, s[..., :inner], q, v[..., :free]), done


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    """gram^-1 target in float64; a hair of the identity, for experts that agree to leave a direction out."""
    exact = gram.double()
    eye = torch.eye(len(gram), dtype=exact.dtype, device=exact.device)
    shift = 1e-10 * exact.diagonal().mean().clamp(min=1e-30)
    return torch.cholesky_solve(target.double(), torch.linalg.cholesky(exact + shift * eye)).to(target)


def _prepare(core: Tensor) -> _Core:
    exact = core.double()
    gram = exact @ exact.T
    mu = (CORE_FLOOR**2 * gram.diagonal().mean()).clamp(min=1e-30)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + mu * eye)
    back = torch.linalg.solve_triangular(factor, eye, upper=False).T
    rows = back.T @ exact
    return _Core(core, *(x.to(core) for x in (gram, rows, factor, back, factor - mu * back)))


def _best_inner(
    w: Tensor, m: Tensor | None, core: _Core, q: Tensor, v: Tensor, start: Tensor, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """(M U, S) of the least ||M (W - C - Q V^T) - M U S^T C||^2 + mu ||M U S^T||^2.

    With T T^T = C C^T + mu I that is ||(...) C^T T^-T - M U (T^T S)^T||^2 and a constant: a truncated SVD. mu bounds
    how hard U S^T may lean on directions that the core hardly has.
    """

    def forward(x: Tensor) -> Tensor:
        turned = core.rows.T @ x
        down = core.through @ x
        return w @ turned - (down if m is None else m.mT @ down) - q @ (v.mT @ turned)

    def backward(y: Tensor) -> Tensor:
        return core.rows @ (w.mT @ y - v @ (q.mT @ y)) - core.through.T @ (y if m is None else m @ y)

    left, right = _leading(forward, backward, start, rank, iterations)
    return left, core.back @ right


def _best_free(
    w: Tensor, m: Tensor | None, core: Tensor, u: Tensor, s: Tensor, start: Tensor, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """(M Q, V) of the least ||M (W - L C) - M Q V^T||^2."""

    def forward(x: Tensor) -> Tensor:
        down = core @ x
        return w @ x - (down if m is None else m.mT @ down) - u @ (s.mT @ down)

    def backward(y: Tensor) -> Tensor:
        return w.mT @ y - core.T @ ((y if m is None else m @ y) + s @ (u.mT @ y))

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


def _sums(
    w: Tensor, m: Tensor | None, core: _Core, u: Tensor, s: Tensor, q: Tensor, v: Tensor, p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What these experts add to the core's gram and target, and to the objective; u and q stand for M u and M q.

    L^T H L - H = M^T U S^T + S U^T M + S U^T U S^T;  L^T M^T (W - Q V^T) - M^T W = S U^T W - (M^T Q + S U^T Q) V^T;
    the objective less what all experts have in common: -2 <U S^T C, W - M C> + ||U S^T C||^2 - ||V||^2, for Q V^T is
    the projection of the rest on Q, which is orthonormal.
    """
    weight = p.to(w)[:, None, None]
    uw, uu = u.mT @ w, u.mT @ u
    mu, mq = (u, q) if m is None else (m @ u, m @ q)
    half = mu + s @ (uu / 2)  # half s^T + s half^T is the sum above
    gram = _together(half * weight, s.mT)
    lefts = torch.cat([s, -(mq + s @ (u.mT @ q))], 2) * weight
    target = _together(lefts, torch.cat([uw, v.mT], 1))
    sg = s.mT @ core.gram
    inner = -2 * (uw * (s.mT @ core.core)).sum((1, 2), dtype=torch.float64)
    inner = inner + ((sg @ s) * uu).sum((1, 2), dtype=torch.float64) + 2 * (sg * mu.mT).sum((1, 2), dtype=torch.float64)
    objective = (p * (inner - v.square().sum((1, 2), dtype=torch.float64))).sum()
    return gram + gram.T, target, objective


def _together(left: Tensor, right: Tensor) -> Tensor:
    """sum_e left_e right_e of [B, m, r] and [B, r, n] as one product."""
    return left.transpose(0, 1).reshape(left.shape[1], -1) @ right.reshape(-1, right.shape[2])


def fit_basis(
    whitened: Tensor,
    metric: Metric,
    size: int,
    groups: int,
    sweeps: int,
    lanes: Lanes,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor, int]:
    """(orthonormal bases [G, size, D], groups [E], rounds) of the least sum p_e ||W_e - A_e Z_g(e)||^2."""
    experts = len(whitened)
    device = whitened.device
    group = torch.zeros(experts, dtype=torch.int64, device=device)
    z = _bases(whitened, metric.importance, group, 1, size, lanes)
    return z, group, 0


def _bases(whitened: Tensor, p: Tensor, group: Tensor, groups: int, size: int, lanes: Lanes) -> Tensor:
    """The leading eigenvectors of sum p W^T W over the experts of each group, [G, size, D]; zeros beyond D."""
    columns = whitened.shape[2]

    def work(lane: list[slice]) -> Tensor:
        total = whitened.new_zeros(groups, columns, columns)
        for chunk in lane:
            for e in range(chunk.start, chunk.stop):
                total[group[e]].addmm_(whitened[e].mT, whitened[e] * p[e].to(whitened))
        return total

    total = torch.stack(lanes.map(work)).sum(0)
    found = torch.linalg.eigh(total.double())[1].flip(-1)[..., :size].mT.to(whitened)
    return functional.pad(found, (0, 0, 0, size - found.shape[1]))


def _project(whitened: Tensor, z: Tensor, group: Tensor, lanes: Lanes) -> Tensor:
    """W_e Z_g(e)^T, [E, F, k]."""
    found = whitened.new_empty(*whitened.shape[:2], z.shape[1])

    def work(lane: list[slice]) -> None:
        for chunk in lane:
            found[chunk] = whitened[chunk] @ z[group[chunk]].mT

    lanes.map(work)
    return found


def best_split(weights: Tensor, projection: str, parameters_per_expert: int, settings: Settings, **_: Any) -> Form:
    raise NotImplementedError
