from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megakd.models.fit import balance, fit_projection, fit_shared_core, truncated_svd
from megakd.models.shared_core import PROJECTIONS, SharedCoreMoeBlock, dense_weight

SHAPES = {"gate": (5, 9, 14), "up": (3, 11, 11), "down": (4, 15, 8)}  # experts, d_out, d_in


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    tensors, fit = fit_projection(weights, projection, rank, 6, 0)
    assert fit.errors.shape == (len(weights),) and fit.sweeps == 6
    assert torch.allclose(relative_errors(weights, tensors, projection), fit.errors.double(), rtol=1e-4)
    # an error that only a good fit has: the mean alone leaves about 1/sqrt(2)
    assert (fit.errors < svd_errors(weights, rank)).all()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_tensors_are_the_parameters_of_a_block(projection):
    experts, rows, columns = SHAPES[projection]
    hidden, expert_hidden = (rows, columns) if projection == "down" else (columns, rows)
    block = SharedCoreMoeBlock(torch.nn.Identity(), experts, hidden, expert_hidden, 3, "silu")
    tensors, _ = fit_projection(randn(*SHAPES[projection]).bfloat16(), projection, 3, 2, 0)
    expected = {
        name: p.shape for name, p in block.named_parameters() if f"_{projection}_" in name or f".{projection}_" in name
    }
    assert {name: t.shape for name, t in tensors.items()} == expected
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("shape", [(5, 9, 14), (3, 16, 7), (2, 6, 6)])
def test_error_never_grows_with_sweeps(shape):
    weights = randn(*shape) + 2 * randn(*shape[1:], seed=1)
    norms = weights.flatten(1).norm(dim=1)
    totals = [(fit_shared_core(weights, 2, sweeps, 0).errors * norms).square().sum().item() for sweeps in range(12)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(totals)), totals
    assert totals[11] < 0.95 * totals[0]


@pytest.mark.parametrize("shape", [(5, 9, 14), (3, 16, 7)])
def test_no_sweep_is_the_mean_and_the_best_correction(shape):
    weights = randn(*shape)
    fit = fit_shared_core(weights, 2, 0, 0)
    assert torch.allclose(fit.errors, svd_errors(weights, 2), rtol=1e-4)
    assert torch.equal(fit.core, weights.mean(0)) and fit.sweeps == 0
    assert not fit.u.any() and not fit.s.any()


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("experts, rows, columns, rank", [(4, 9, 13, 1), (6, 15, 23, 2)])
def test_recovers_experts_that_are_of_the_model(experts, rows, columns, rank, projection):
    """Measured after 200 sweeps: 1e-5 and 0.0033 at worst; mean and SVD of the same rank leave 0.06 and 0.12."""
    weights = generated(experts, rows, columns, rank, scale=0.2)
    weights = weights.mT.contiguous() if projection == "down" else weights
    tensors, _ = fit_projection(weights, projection, rank, 200, 0)
    errors = relative_errors(weights, tensors, projection)
    assert errors.max() < 1e-2
    assert svd_errors(weights, rank).min() > 0.05


def test_beats_the_svd_where_experts_have_nothing_in_common():
    """Measured: 0.49 of the SVD's error, with twice its factors."""
    weights = randn(6, 13, 19)
    assert fit_shared_core(weights, 3, 20, 1e-4).errors.mean() < 0.6 * svd_errors(weights, 3).mean()


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("rank", [8, 11])
def test_rank_of_the_short_side_and_above_is_exact(rank, projection):
    weights = randn(3, 8, 12)
    tensors, fit = fit_projection(weights, projection, rank, 3, 0)
    assert fit.errors.max() < 1e-5
    assert relative_errors(weights, tensors, projection).max() < 1e-5


def test_equal_experts_need_only_the_core():
    weights = randn(1, 9, 14).expand(4, 9, 14)
    tensors, fit = fit_projection(weights, "gate", 2, 5, 1e-4)
    assert fit.errors.max() < 1e-6
    assert torch.allclose(tensors["shared_core.gate_proj.weight"], weights[0], atol=1e-5)


def test_same_input_same_bytes():
    """Whatever torch's global random state is; and that state is left alone."""
    weights = randn(3, 40, 50)  # large enough for the randomised branch
    torch.manual_seed(1)
    first, _ = fit_projection(weights, "up", 2, 3, 0)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second, _ = fit_projection(weights.clone(), "up", 2, 3, 0)
    assert {n: t.numpy().tobytes() for n, t in first.items()} == {n: t.numpy().tobytes() for n, t in second.items()}
    assert torch.equal(state, torch.random.get_rng_state())


def test_stops_at_the_tolerance_and_tells_each_sweep():
    weights, calls = randn(4, 9, 14), []
    loose = fit_shared_core(weights, 2, 50, 1e-2, lambda: calls.append(1))
    assert 1 <= loose.sweeps == len(calls) < 50
    assert fit_shared_core(weights, 2, 50, 1e-4).sweeps > loose.sweeps


def test_factors_are_balanced():
    tensors, _ = fit_projection(randn(4, 9, 14) + randn(9, 14, seed=1), "gate", 3, 5, 0)
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


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (90, 120), (120, 90)])  # exact twice, randomised twice
def test_truncated_svd_is_the_best_approximation(shape):
    """A spectrum that falls by 0.7 a value; after the power iterations the range finder is exact to 1e-6."""
    rank = 4
    count = min(shape)
    left, _ = torch.linalg.qr(randn(shape[0], count).double())
    right, _ = torch.linalg.qr(randn(shape[1], count, seed=1).double())
    matrix = left * 0.7 ** torch.arange(count) @ right.T
    start = randn(shape[1], rank + 8, seed=2).double()
    assert (start.shape[1] * 3 < count) == (count == 90)  # which branch it is
    u, sigma, vh = torch.linalg.svd(matrix)
    best = u[:, :rank] * sigma[:rank] @ vh[:rank]
    found_left, found_right = truncated_svd(matrix, rank, start)
    assert (found_left.shape, found_right.shape) == ((shape[0], rank), (shape[1], rank))
    assert (found_left @ found_right.T - best).norm() <= 1e-6 * best.norm()


@pytest.mark.parametrize("shape", [(120, 90), (90, 120)])
def test_truncated_svd_of_a_flat_spectrum_is_nearly_the_best(shape):
    """Without any decay the randomised branch loses most; measured: 1.0028 of the best error."""
    matrix = randn(*shape).double()
    left, right = truncated_svd(matrix, 4, randn(shape[1], 12, seed=2).double())
    best = torch.linalg.svdvals(matrix)[4:].norm()
    assert best * (1 - 1e-9) <= (matrix - left @ right.T).norm() <= 1.01 * best


def test_truncated_svd_above_the_full_rank_is_padded_with_zeros():
    matrix = randn(3, 6)
    left, right = truncated_svd(matrix, 5, randn(6, 5))
    assert (left.shape, right.shape) == ((3, 5), (6, 5))
    assert torch.allclose(left @ right.T, matrix, atol=1e-5)
    assert not left[:, 3:].any() and not right[:, 3:].any()
