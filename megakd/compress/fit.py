"""Fit one projection's experts in the form a student stores: a shared core and low-rank wrappers, or shared bases.

In the frame of the fit every projection is E matrices W_e [F, D] (F expert hidden, D hidden; down is transposed):
    wrappers  W_e ~ L_e C + Q_e V_e^T,  L_e = I + U_e S_e^T;  U, S [F, core rank], Q [F, free rank], V [D, free rank]
    basis     W_e ~ A_e Z_g(e),  A_e [F, k], Z [G, k, D]
    mixture   W_e ~ A_e sum_g m_eg Z_g
and the objective is J = sum_e p_e ||M_e (W_e - fit_e) N||^2 (metric.py). Solvers see
whitened matrices M_e W_e N alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megakd.compress.adam import fit_seed_form, fused
from megakd.compress.als import Wrappers, fit_wrappers
from megakd.compress.basis import Basis, balance_basis, fit_basis, projected
from megakd.compress.metric import Metric, Statistics, make_metric, unwhiten_left, unwhiten_right, whiten
from megakd.compress.mixture import Mixture, balance_mixture, fit_mixture
from megakd.compress.threads import Threads, threads_over
from megakd.errors import UserError
from megakd.models.shared_core import Form, free_and_core_rank, make_form, mix_name

SPLIT_SWEEPS = 10  # to tell a better split of ranks from a worse one; core ranks take more of them than free ones


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
    candidates = (0.0,) if statistics is None else settings.damping
    with threads_over(frame) as threads:
        task = _Task(frame, projection, form, settings, statistics, exempt, threads, progress)
        found = _attempt(task, candidates[0])
        for damping in candidates[1:]:
            # the better of two at once: factors of all candidates would not fit
            found = min(found, _attempt(task, damping), key=lambda attempt: attempt.total)
    if not isinstance(found.factors, Wrappers):
        return _basis_tensors(found.factors, projection, form), found.fit
    return _wrapper_tensors(found.factors, projection), found.fit


def best_split(
    weights: Tensor,
    projection: str,
    parameters_per_expert: int,
    settings: Settings,
    statistics: Statistics | None = None,
    exempt: tuple[int, ...] = (),
) -> Form:
    """The ranks of wrappers with the least error among those of at most so many stored numbers per expert.

    A unit of the free rank stores F + D numbers, one of the core's 2F. Equal ranks and five shares of the core's
    wrapper are tried with a few sweeps of ALS, then the neighbours of the best, closer each time. weights:
    [E, d_out, d_in] of a sample of experts (`statistics`, `exempt` of the same); the fewer, the better the core looks.
    """
    frame = weights.mT if projection == "down" else weights
    rows, columns = frame.shape[1:]
    brief = settings._replace(solver="als", sweeps=SPLIT_SWEEPS, tolerance=0.0)

    free_cost, core_cost = rows + columns, 2 * rows  # numbers of one rank

    def ranks(share: float) -> tuple[int, int]:
        core = min(round(share * parameters_per_expert / core_cost), parameters_per_expert // core_cost, rows)
        return min((parameters_per_expert - core * core_cost) // free_cost, rows, columns), core

    def make(free: int, core: int) -> Form:
        return make_form("wrappers" if core else "additive", projection, free, core)

    equal = min(parameters_per_expert // (free_cost + core_cost), rows, columns)
    totals: dict[tuple[int, int], float] = {}
    with threads_over(frame) as threads:

        def total(pair: tuple[int, int]) -> float:
            if pair not in totals:
                task = _Task(frame, projection, make(*pair), brief, statistics, exempt, threads, lambda: None)
                totals[pair] = _attempt(task, brief.damping[0] if statistics else 0.0).total
            return totals[pair]

        # equal ranks come first: min keeps the first of equals
        best = min((equal, equal), *(ranks(at) for at in (0, 0.25, 0.5, 0.75, 1)), key=total)
        for step in (0.125, 0.0625):
            share = best[1] * core_cost / max(1, parameters_per_expert)
            best = min(best, *(ranks(at) for at in (share - step, share + step) if 0 <= at <= 1), key=total)
    return make(*best)


class _Task(NamedTuple):
    """frame: [E, F, D]; the rest as `fit_projection` takes it."""

    frame: Tensor
    projection: str
    form: Form
    settings: Settings
    statistics: Statistics | None
    exempt: tuple[int, ...]
    threads: Threads
    progress: Callable[[], None]


class _Attempt(NamedTuple):
    """total: squared error in the held-out metric by share, without statistics the squared error of all."""

    total: float
    factors: Wrappers | Basis | Mixture
    fit: Fit


def _attempt(task: _Task, damping: float) -> _Attempt:
    """Whiten, fit, go back, measure."""
    frame, threads = task.frame, task.threads
    metric = make_metric(task.statistics, task.projection, damping, task.exempt, frame, threads)
    whitened = whiten(frame, metric, threads)
    fits = {"basis": _fit_basis, "mixture": _fit_mixture}
    factors, sweeps = fits.get(task.form.shape, _fit_wrappers)(task, metric, whitened)
    del whitened, metric
    errors, weighted, total = _errors(task, factors)
    return _Attempt(total, factors, Fit(errors, weighted, sweeps, damping if task.statistics else None))


def _fit_basis(task: _Task, metric: Metric, whitened: Tensor) -> tuple[Basis, int]:
    _check_solver(task)
    threads, size = task.threads, free_and_core_rank(task.form, task.projection)[1]
    z, group = fit_basis(whitened, metric, size, task.form.groups, threads)
    task.progress()
    # the rows of Z are orthonormal where they were found, so that A = W Z^T is a projection: the best for any M
    a = unwhiten_left(projected(whitened, z, group, threads), metric, threads)
    a = a * (metric.importance > 0).to(a)[:, None, None]
    return balance_basis(Basis(unwhiten_right(z, metric), a, group)), 0


def _fit_mixture(task: _Task, metric: Metric, whitened: Tensor) -> tuple[Mixture, int]:
    _check_solver(task)
    settings, size = task.settings, free_and_core_rank(task.form, task.projection)[1]
    found, sweeps, _ = fit_mixture(
        whitened,
        metric,
        size,
        task.form.groups,
        task.threads,
        sweeps=settings.sweeps,
        tolerance=settings.tolerance,
        progress=task.progress,
    )
    a = unwhiten_left(found.a, metric, task.threads)
    return balance_mixture(Mixture(unwhiten_right(found.z, metric), a, found.mix)), sweeps


def _check_solver(task: _Task) -> None:
    if task.settings.solver == "adam":
        raise UserError("compress.solver=adam fits wrappers alone; shared bases need compress.solver=als")


def _fit_wrappers(task: _Task, metric: Metric, whitened: Tensor) -> tuple[Wrappers, int]:
    free, inner = free_and_core_rank(task.form, task.projection)
    if task.settings.solver == "adam":
        fitted, sweeps = _by_adam(task, metric, whitened, free, inner)
    else:
        fitted, sweeps = _by_als(task, metric, whitened, free, inner)
    core, v = unwhiten_right(fitted.core, metric), unwhiten_right(fitted.v.mT, metric).mT
    alive = (metric.importance > 0).to(core)[:, None, None]
    pairs = *balance(fitted.u * alive, fitted.s * alive), *balance(fitted.q * alive, v * alive)
    ranks = inner, inner, free, free  # zeros beyond the matrix's own
    padded = [functional.pad(x, (0, rank - x.shape[2])) for x, rank in zip(pairs, ranks, strict=True)]
    return Wrappers(core, *padded), sweeps


def _by_als(task: _Task, metric: Metric, whitened: Tensor, free: int, inner: int) -> tuple[Wrappers, int]:
    """Wrappers by ALS, and its sweeps; only C and V are still whitened."""
    settings, threads = task.settings, task.threads
    fitted, sweeps, _ = fit_wrappers(
        whitened,
        metric,
        free,
        inner,
        threads,
        sweeps=settings.sweeps,
        tolerance=settings.tolerance,
        progress=task.progress,
    )
    # ALS knows M U and M Q alone; Adam's factors are U and Q already
    u, q = unwhiten_left(fitted.u, metric, threads), unwhiten_left(fitted.q, metric, threads)
    return fitted._replace(u=u, q=q), sweeps


def _by_adam(task: _Task, metric: Metric, whitened: Tensor, free: int, inner: int) -> tuple[Wrappers, int]:
    """The same by Adam, and its steps."""
    if free == 0 or inner == 0:
        raise UserError("compress.solver=adam fits wrappers on both sides; other shapes need compress.solver=als")
    settings = task.settings
    seed = fit_seed_form(
        whitened, metric, free, inner, task.threads, steps=settings.steps, lr=settings.lr, progress=task.progress
    )
    return Wrappers(*fused(*seed)), settings.steps


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
            left, right = pair
            tensors[f"experts.{name}_wrapper_{projection}_left"] = left.mT.contiguous()
            tensors[f"experts.{name}_wrapper_{projection}_right"] = right.contiguous()
    return tensors


def _basis_tensors(factors: Basis | Mixture, projection: str, form: Form) -> dict[str, Tensor]:
    stacked = factors.z.flatten(0, 1)
    if projection == "down":
        core, name, own = stacked.T, "input_wrapper_down_right", factors.a
    else:
        core, name, own = stacked, f"output_wrapper_{projection}_left", factors.a.mT
    tensors = {f"shared_core.{projection}_proj.weight": core.contiguous(), f"experts.{name}": own.contiguous()}
    if isinstance(factors, Mixture):
        tensors[f"experts.{mix_name(projection)}"] = factors.mix[:, :, None].contiguous()
    elif form.groups > 1:
        tensors[f"experts.basis_group_{projection}"] = factors.group
    return tensors


def _errors(task: _Task, factors: Wrappers | Basis | Mixture) -> tuple[Tensor, Tensor | None, float]:
    """(relative errors, relative errors in the held-out metric, total of the latter by share) of expanded matrices."""
    dtype, statistics, frame = factors[0].dtype, task.statistics, task.frame

    def squares(matrices: Tensor, chunk: slice) -> Tensor:
        """tr(X^T X), and that with the held-out inputs' second moment and the costs of units between, [2, B]."""
        plain = matrices.square().sum((1, 2))
        if statistics is None:
            return torch.stack([plain, plain])
        if task.projection == "down":
            turned = statistics.held_out[chunk].to(matrices) @ matrices
        else:
            turned = matrices @ statistics.held_out.to(matrices)
        of_units = (turned * matrices).sum(2)
        if statistics.rows is not None:
            of_units = of_units * statistics.rows[chunk].to(of_units)
        return torch.stack([plain, of_units.sum(1)])

    def work(chunks: list[slice]) -> Tensor:
        found = []
        for chunk in chunks:
            exact = frame[chunk].to(dtype)
            found.append(torch.stack([squares(exact, chunk), squares(exact - factors.expand(chunk), chunk)]))
        return torch.cat(found, 2)

    # [weights or residual, plain or held out, E]
    found = torch.cat(task.threads.map(work), 2).double()
    found[:, :, list(task.exempt)] = 0
    # an expert of zeros has error 0
    relative = torch.where(found[0] > 0, found[1] / found[0], 0.0).sqrt().to(dtype)
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
