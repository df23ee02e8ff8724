from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megakd.compress.fit import Fit, Settings, balance, best_split, fit_projection
from megakd.compress.metric import Statistics
from megakd.models.shared_core import (
    PROJECTIONS,
    Form,
    core_shape,
    dense_weight,
    factor_shapes,
    free_and_core_rank,
    make_form,
)

SHAPES = {"gate": (5, 9, 14), "up": (3, 11, 11), "down": (4, 15, 8)}  # experts, d_out, d_in


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(
    weights: Tensor, projection: str, ranks: int | tuple[int, int], sweeps: int, tolerance: float = 0, **arguments
) -> tuple[dict[str, Tensor], Fit]:
    """Wrappers of these (free, core) ranks."""
    free, core = (ranks, ranks) if isinstance(ranks, int) else ranks
    form = make_form("wrappers", projection, free, core)
    return fit_projection(weights, projection, form, Settings(sweeps=sweeps, tolerance=tolerance), **arguments)


def generated(experts: int, rows: int, columns: int, rank: int, scale: float, seed: int = 1) -> Tensor:
    """Experts of the model itself: (I + U S^T) C + Q V^T, with a core whose singular values lie between 1 and 2."""
    core = torch.linalg.qr(randn(columns, rows, seed=seed))[0].T * torch.linspace(1, 2, rows)[:, None]
    u, s, q, v = (scale * randn(experts, d, rank, seed=seed + i) for i, d in enumerate((rows, rows, rows, columns), 1))
    return core + u @ (s.mT @ core) + q @ v.mT


def relative_errors(weights: Tensor, tensors: dict[str, Tensor], projection: str) -> Tensor:
    """||W_e - fit_e|| / ||W_e|| from whole matrices in float64, [E]."""
    exact = {name: t.double() for name, t in tensors.items()}
    fits = torch.stack([dense_weight(exact, projection, e) for e in range(len(weights))]).double()
    return (weights.double() - fits).flatten(1).norm(dim=1) / weights.double().flatten(1).norm(dim=1)


def svd_errors(weights: Tensor, rank: int) -> Tensor:
    """Relative errors of mean + best rank-R correction, [E]."""
    sigma = torch.linalg.svdvals(weights - weights.mean(0))
    return sigma[:, rank:].norm(dim=1) / weights.flatten(1).norm(dim=1)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("flip", [False, True], ids=["wide", "tall"])
def test_reported_errors_are_those_of_the_expanded_matrices(flip, projection, rank):
    weights = randn(*SHAPES[projection]) + randn(*SHAPES[projection][1:], seed=1)
    weights = weights.mT.contiguous() if flip else weights
    tensors, fit = fitted(weights, projection, rank, 6)
    assert fit.errors.shape == (len(weights),) and fit.sweeps == 6
    assert torch.allclose(relative_errors(weights, tensors, projection), fit.errors.double(), rtol=1e-4)
    # an error that only a good fit has: the mean alone leaves about 1/sqrt(2)
    assert (fit.errors < svd_errors(weights, rank)).all()


@pytest.mark.parametrize(
    "shape, free, core, groups",
    [("wrappers", 3, 2, 1), ("wrappers", 0, 2, 1), ("additive", 3, 0, 1), ("basis", 0, 4, 1), ("mixture", 0, 3, 2)],
)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_tensors_are_the_parameters_of_the_form(projection, shape, free, core, groups):
    experts, rows, columns = SHAPES[projection]
    hidden, expert_hidden = (rows, columns) if projection == "down" else (columns, rows)
    form = make_form(shape, projection, free, core, groups)
    tensors, _ = fit_projection(randn(*SHAPES[projection]).bfloat16(), projection, form, Settings(sweeps=2))
    expected: dict[str, tuple[int, ...]] = {}
    expected[f"shared_core.{projection}_proj.weight"] = core_shape(form, projection, hidden, expert_hidden)
    for name, size in factor_shapes(form, projection, experts, hidden, expert_hidden).items():
        expected[f"experts.{name}"] = size
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("shape", [(5, 9, 14), (3, 16, 7), (2, 6, 6)])
def test_error_never_grows_with_sweeps(shape):
    weights = randn(*shape) + 2 * randn(*shape[1:], seed=1)
    norms = weights.flatten(1).norm(dim=1)
    totals = [(fitted(weights, "gate", 2, sweeps, 0)[1].errors * norms).square().sum().item() for sweeps in range(12)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(totals)), totals
    assert totals[11] < 0.95 * totals[0]


@pytest.mark.parametrize("shape", [(5, 9, 14), (3, 16, 7)])
def test_no_sweep_is_the_mean_and_the_best_correction(shape):
    weights = randn(*shape)
    tensors, fit = fitted(weights, "gate", 2, 0)
    assert torch.allclose(fit.errors, svd_errors(weights, 2), rtol=1e-4)
    assert torch.allclose(tensors["shared_core.gate_proj.weight"], weights.mean(0), atol=1e-6) and fit.sweeps == 0
    assert not any(tensors[f"experts.output_wrapper_gate_{side}"].any() for side in ("left", "right"))


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("experts, rows, columns, rank", [(4, 9, 13, 1), (6, 15, 23, 2)])
def test_recovers_experts_that_are_of_the_model(experts, rows, columns, rank, projection):
    """Measured after 200 sweeps: 1e-5 and 0.0033 at worst; mean and SVD of the same rank leave 0.06 and 0.12."""
    weights = generated(experts, rows, columns, rank, scale=0.2)
    weights = weights.mT.contiguous() if projection == "down" else weights
    tensors, _ = fitted(weights, projection, rank, 200)
    errors = relative_errors(weights, tensors, projection)
    assert errors.max() < 1e-2
    assert svd_errors(weights, rank).min() > 0.05


def test_beats_the_svd_where_experts_have_nothing_in_common():
    """Measured: 0.49 of the SVD's error, with twice its factors."""
    weights = randn(6, 13, 19)
    assert fitted(weights, "gate", 3, 20, 1e-4)[1].errors.mean() < 0.6 * svd_errors(weights, 3).mean()


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("rank", [8, 11])
def test_rank_of_the_short_side_and_above_is_exact(rank, projection):
    weights = randn(3, 8, 12)
    tensors, fit = fitted(weights, projection, rank, 3)
    assert fit.errors.max() < 1e-5
    assert relative_errors(weights, tensors, projection).max() < 1e-5


def test_equal_experts_need_only_the_core():
    weights = randn(1, 9, 14).expand(4, 9, 14)
    tensors, fit = fitted(weights, "gate", 2, 5, 1e-4)
    assert fit.errors.max() < 1e-6
    assert torch.allclose(tensors["shared_core.gate_proj.weight"], weights[0], atol=1e-5)


def test_same_input_same_bytes():
    """Whatever torch's global random state is; and that state is left alone."""
    weights = randn(3, 40, 50)  # large enough for the randomised branch
    torch.manual_seed(1)
    first, _ = fitted(weights, "up", 2, 3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second, _ = fitted(weights.clone(), "up", 2, 3)
    assert {n: t.numpy().tobytes() for n, t in first.items()} == {n: t.numpy().tobytes() for n, t in second.items()}
    assert torch.equal(state, torch.random.get_rng_state())


def test_stops_at_the_tolerance_and_tells_each_sweep():
    weights, calls = randn(4, 9, 14), []
    loose = fitted(weights, "gate", 2, 50, 1e-2, progress=lambda: calls.append(1))[1]
    assert 1 <= loose.sweeps == len(calls) < 50
    assert fitted(weights, "gate", 2, 50, 1e-4)[1].sweeps > loose.sweeps


def test_factors_are_balanced():
    tensors, _ = fitted(randn(4, 9, 14) + randn(9, 14, seed=1), "gate", 3, 5)
    for wrapper in ("input", "output"):
        left, right = (tensors[f"experts.{wrapper}_wrapper_gate_{side}"] for side in ("left", "right"))
        assert torch.allclose(left.norm(dim=2), right.norm(dim=1), rtol=1e-4)


def test_balance_keeps_products_and_equalises_column_norms():
    left, right = randn(3, 7, 4) * 100, randn(3, 5, 4, seed=1) * 1e-3
    left[0, :, 1], right[1, :, 2] = 0, 0  # a column of zeros on either side
    found_left, found_right = balance(left, right)
    assert torch.allclose(found_left @ found_right.mT, left @ right.mT, rtol=1e-5, atol=1e-6)
    alive = (left.norm(dim=1) > 0) & (right.norm(dim=1) > 0)
    assert torch.allclose(found_left.norm(dim=1)[alive], found_right.norm(dim=1)[alive], rtol=1e-5)
    assert found_left.isfinite().all() and found_right.isfinite().all()


def measured(weights: Tensor, projection: str, tokens: int = 400, decay: float = 1.5, seed: int = 3) -> Statistics:
    """Second moments of inputs whose spectrum falls over `decay` decades along random axes, shares that differ."""
    experts, d_in = len(weights), weights.shape[2]
    share = torch.linspace(1, 2, experts)

    def moment(seed: int, count: int) -> Tensor:
        axes = torch.linalg.qr(randn(count, d_in, d_in, seed=7))[0]
        x = randn(count, tokens, d_in, seed=seed) * torch.logspace(0, -decay, d_in) @ axes
        return x.mT @ x / tokens

    count = experts if projection == "down" else 1
    moments = [moment(at, count) if count > 1 else moment(at, 1)[0] for at in (seed, seed + 1)]
    return Statistics(share / share.sum(), *moments, torch.full((experts,), float(tokens)))


def weighted_errors(weights: Tensor, tensors: dict[str, Tensor], projection: str, moment: Tensor) -> Tensor:
    """sqrt(tr(X H X^T)) of residuals over that of weights in float64, [E]."""
    exact = {name: t.double() for name, t in tensors.items()}
    found = []
    for e, weight in enumerate(weights.double()):
        h = (moment[e] if moment.dim() == 3 else moment).double()
        rest = weight - dense_weight(exact, projection, e).double()
        found.append(((rest @ h * rest).sum() / (weight @ h * weight).sum()).sqrt())
    return torch.stack(found)


@pytest.mark.parametrize(
    "shape, free, core", [("wrappers", 3, 2), ("additive", 2, 0), ("basis", 0, 6), ("mixture", 0, 5)]
)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_measured_inputs_lower_the_error_in_their_metric(projection, shape, free, core):
    weights = randn(*SHAPES[projection]) + randn(*SHAPES[projection][1:], seed=1)
    statistics = measured(weights, projection)
    form = make_form(shape, projection, free, core, 2 if shape == "mixture" else 1)
    settings = Settings(sweeps=10, tolerance=0, damping=(0.02,))
    plain, _ = fit_projection(weights, projection, form, settings)
    tensors, fit = fit_projection(weights, projection, form, settings, statistics)
    assert fit.weighted_errors is not None and fit.damping == 0.02
    found = weighted_errors(weights, tensors, projection, statistics.held_out)
    assert torch.allclose(found, fit.weighted_errors.double(), rtol=1e-4)
    assert torch.allclose(relative_errors(weights, tensors, projection), fit.errors.double(), rtol=1e-4)
    assert found.mean() < 0.9 * weighted_errors(weights, plain, projection, statistics.held_out).mean()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_of_several_dampings_the_best_on_held_out_inputs_is_kept(projection):
    """Few tokens: nearly no damping follows their noise, a damping of 1 knows nothing of them."""
    weights = randn(*SHAPES[projection])
    statistics, form = measured(weights, projection, tokens=12), make_form("wrappers", projection, 2, 2)
    candidates, totals = (1e-3, 0.2, 1.0), {}
    for damping in candidates:
        tensors, _ = fit_projection(weights, projection, form, Settings(damping=(damping,)), statistics)
        moments = statistics.held_out.double().expand(len(weights), -1, -1)
        rests = [weights[e].double() - dense_weight(tensors, projection, e) for e in range(len(weights))]
        each = torch.stack([(rest @ h * rest).sum() for rest, h in zip(rests, moments, strict=True)])
        totals[damping] = float((statistics.share * each).sum())
    best = min(candidates, key=lambda damping: totals[damping])
    for order in (candidates, candidates[::-1]):
        tensors, fit = fit_projection(weights, projection, form, Settings(damping=order), statistics)
        assert fit.damping == best, totals
    alone, _ = fit_projection(weights, projection, form, Settings(damping=(best,)), statistics)
    assert all(torch.equal(alone[name], tensors[name]) for name in alone)


@pytest.mark.parametrize(
    "shape, free, core", [("wrappers", 2, 2), ("additive", 2, 0), ("basis", 0, 4), ("mixture", 0, 3)]
)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_exempt_experts_have_no_part_and_no_factors(projection, shape, free, core):
    form = make_form(shape, projection, free, core, 2 if shape == "mixture" else 1)
    weights = randn(*SHAPES[projection])
    other = weights.clone()
    other[1] *= 1000
    first, fit = fit_projection(weights, projection, form, Settings(sweeps=3), exempt=(1,))
    second, _ = fit_projection(other, projection, form, Settings(sweeps=3), exempt=(1,))
    taking_part, _ = fit_projection(other, projection, form, Settings(sweeps=3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    core_name = f"shared_core.{projection}_proj.weight"
    assert not torch.allclose(taking_part[core_name], first[core_name])
    assert fit.errors[1] == 0 and (fit.errors[[0, 2]] > 0).all()
    assert not any(t[1].any() for name, t in first.items() if name != core_name)


@pytest.mark.parametrize(
    "solver, shape, free, core",
    [("als", "wrappers", 2, 2), ("als", "basis", 0, 4), ("als", "mixture", 0, 3), ("adam", "wrappers", 2, 2)],
)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_experts_of_zeros_and_without_tokens_stay_finite(projection, solver, shape, free, core):
    weights = randn(*SHAPES[projection])
    weights[1] = 0
    statistics = measured(weights, projection)
    share, counts, covariance = statistics.share.clone(), statistics.counts.clone(), statistics.covariance.clone()
    share[2], counts[2] = 0, 0
    if projection == "down":
        covariance[2] = 0
    starved = statistics._replace(share=share, counts=counts, covariance=covariance)
    settings = Settings(solver=solver, sweeps=3, steps=5)
    for given in (None, starved):
        form = make_form(shape, projection, free, core, 2 if shape == "mixture" else 1)
        tensors, fit = fit_projection(weights, projection, form, settings, given)
        assert all(t.isfinite().all() for t in tensors.values())
        assert fit.errors.isfinite().all() and (fit.errors[[0, 2]] < 1.2).all()
        assert fit.errors[1] == 0
    nothing, fit = fit_projection(torch.zeros_like(weights), projection, form, settings)
    assert all(t.isfinite().all() for t in nothing.values()) and not fit.errors.any()


@pytest.mark.parametrize("shape, free, core", [("wrappers", 5, 3), ("basis", 0, 12), ("mixture", 0, 6)])
@pytest.mark.parametrize("projection", ["gate", "down"])
def test_bytes_do_not_depend_on_the_number_of_threads(projection, shape, free, core):
    weights = randn(19, *((96, 130) if projection == "gate" else (130, 96))).bfloat16()
    form = make_form(shape, projection, free, core, 1 if shape == "wrappers" else 2)
    given, before = measured(weights.float(), projection), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(fit_projection(weights, projection, form, Settings(sweeps=3), given)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], found[0][name]) for one in found[1:] for name in one)


def stored(form: Form, projection: str, hidden: int, expert_hidden: int) -> int:
    """Numbers of one expert's factors."""
    return sum(n * r for _, n, r in factor_shapes(form, projection, 1, hidden, expert_hidden).values())


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("planted", ["free", "core"])
def test_best_split_finds_where_the_rank_is(planted, projection):
    """Differences of high rank that are free, or that act on the core: equal ranks waste half of their numbers."""
    experts, f, d = 6, 24, 40
    core = torch.linalg.qr(randn(d, f))[0].T * torch.linspace(1, 2, f)[:, None]
    if planted == "free":
        weights = core + 0.5 * randn(experts, f, 6, seed=1) @ randn(experts, 6, d, seed=2) / 6
        numbers = 6 * (f + d)
    else:
        weights = core + randn(experts, f, 8, seed=1) @ (randn(experts, 8, f, seed=2) / 40 @ core)
        numbers = 8 * 2 * f
    weights = weights.mT.contiguous() if projection == "down" else weights
    form = best_split(weights, projection, numbers, Settings())
    assert stored(form, projection, d, f) <= numbers
    assert form == best_split(weights.clone(), projection, numbers, Settings())
    free, inner = free_and_core_rank(form, projection)
    assert (free >= 5 and inner == 0 and form.shape == "additive") if planted == "free" else inner >= 6, form
    equal = numbers // (3 * f + d)
    errors = [
        fit_projection(weights, projection, each, Settings())[1].errors.mean()
        for each in (form, make_form("wrappers", projection, equal, equal))
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("numbers", [0, 47, 10**6])
def test_best_split_of_a_budget_at_the_ends(numbers):
    """Nothing, less than one unit, and more than the matrices hold."""
    form = best_split(randn(3, 24, 40), "gate", numbers, Settings())
    assert stored(form, "gate", 40, 24) <= numbers
    assert max(form.input_rank, form.output_rank) <= 24
    _, fit = fit_projection(randn(3, 24, 40), "gate", form, Settings(sweeps=1))
    assert fit.errors.isfinite().all()
