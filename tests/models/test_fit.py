from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megakd.models.fit import Fit, Settings, balance, fit_projection
from megakd.models.shared_core import PROJECTIONS, core_shape, dense_weight, factor_shapes, make_form

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
    [("wrappers", 3, 2, 1), ("wrappers", 0, 2, 1), ("additive", 3, 0, 1), ("basis", 0, 4, 1)],
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
        assert torch.allclose(left.norm(dim=1), right.norm(dim=1), rtol=1e-4)


def test_balance_keeps_products_and_equalises_column_norms():
    left, right = randn(3, 7, 4) * 100, randn(3, 5, 4, seed=1) * 1e-3
    left[0, :, 1], right[1, :, 2] = 0, 0  # a column of zeros on either side
    found_left, found_right = balance(left, right)
    assert torch.allclose(found_left @ found_right.mT, left @ right.mT, rtol=1e-5, atol=1e-6)
    alive = (left.norm(dim=1) > 0) & (right.norm(dim=1) > 0)
    assert torch.allclose(found_left.norm(dim=1)[alive], found_right.norm(dim=1)[alive], rtol=1e-5)
    assert found_left.isfinite().all() and found_right.isfinite().all()
