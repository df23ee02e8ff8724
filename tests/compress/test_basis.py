"""Shared bases against principal components and planted groups."""

import pytest
import torch
from torch import Tensor

from megakd.compress.fit import Settings, fit_projection
from megakd.compress.metric import Statistics
from megakd.errors import UserError
from megakd.models.shared_core import PROJECTIONS, dense_weight, make_form


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared_error(weights: Tensor, tensors: dict[str, Tensor], projection: str) -> float:
    return sum((w - dense_weight(tensors, projection, e)).square().sum().item() for e, w in enumerate(weights))


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_one_group_is_the_pca_optimum(projection, size):
    weights = randn(5, 7, 9)
    tensors, fit = fit_projection(
        weights.mT.contiguous() if projection == "down" else weights,
        projection,
        make_form("basis", projection, 0, size),
        Settings(),
    )
    best = torch.linalg.svdvals(weights.flatten(0, 1))[size:].square().sum().item()
    given = weights.mT if projection == "down" else weights
    assert squared_error(given, tensors, projection) == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert fit.sweeps == 0 and f"experts.basis_group_{projection}" not in tensors


@pytest.mark.parametrize("projection", ["up", "down"])
def test_one_group_is_the_optimum_in_the_metric(projection):
    """sum p_e ||M_e (W_e - A_e Z) N||^2 is least for the principal components of the whitened rows."""
    experts, f, d, size = 5, 7, 9, 3
    weights = randn(experts, f, d)
    half = randn(experts, f, 4000, seed=1) if projection == "down" else randn(d, 4000, seed=1)
    half = half * torch.logspace(0, -1, half.shape[-2], dtype=half.dtype)[:, None]
    moment = half @ half.mT / 4000
    share = torch.linspace(1, 3, experts, dtype=torch.float64)
    share = share / share.sum()
    statistics = Statistics(share, moment, moment, torch.full((experts,), 1e12))
    given = weights.mT.contiguous() if projection == "down" else weights
    tensors, _ = fit_projection(
        given, projection, make_form("basis", projection, 0, size), Settings(damping=(0.0,)), statistics
    )
    total, whitened = 0.0, []
    for e in range(experts):
        rest = weights[e] - (
            dense_weight(tensors, projection, e).T if projection == "down" else dense_weight(tensors, projection, e)
        )
        root = torch.linalg.cholesky(moment[e] if projection == "down" else moment)
        turn = (lambda x, root=root: root.T @ x) if projection == "down" else (lambda x, root=root: x @ root)
        total += share[e].item() * turn(rest).square().sum().item()
        whitened.append(share[e].sqrt() * turn(weights[e]))
    best = torch.linalg.svdvals(torch.cat(whitened))[size:].square().sum().item()
    assert total == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("groups, size", [(2, 3), (3, 4)])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_planted_groups_are_found(projection, groups, size):
    experts, f, d = 12, 10, 24
    planted = torch.randperm(experts, generator=torch.Generator().manual_seed(1)) % groups
    bases = randn(groups, size, d, seed=2)
    weights = randn(experts, f, size, seed=3) @ bases[planted] + 0.01 * randn(experts, f, d, seed=4)
    given = weights.mT.contiguous() if projection == "down" else weights
    tensors, fit = fit_projection(given, projection, make_form("basis", projection, 0, size, groups), Settings())
    found = tensors[f"experts.basis_group_{projection}"]
    assert found.dtype == torch.int64
    assert torch.equal(found[:, None] == found, planted[:, None] == planted)
    assert fit.errors.max() < 0.02


def test_more_groups_than_kinds_of_experts_are_all_used():
    weights = randn(1, 8, 12).expand(6, 8, 12) + 0.1 * randn(6, 8, 12, seed=1)
    tensors, _ = fit_projection(weights, "gate", make_form("basis", "gate", 0, 3, 4), Settings())
    assert set(tensors["experts.basis_group_gate"].tolist()) == {0, 1, 2, 3}


def test_a_basis_above_the_inputs_is_padded_with_zeros():
    weights = randn(3, 6, 5)
    tensors, fit = fit_projection(weights, "up", make_form("basis", "up", 0, 7), Settings())
    assert tensors["shared_core.up_proj.weight"].shape == (7, 5) and fit.errors.max() < 1e-9


def test_entries_of_basis_and_factors_are_of_one_size():
    tensors, _ = fit_projection(1e-3 * randn(4, 8, 20), "gate", make_form("basis", "gate", 0, 3), Settings())
    z, a = tensors["shared_core.gate_proj.weight"], tensors["experts.output_wrapper_gate_left"]
    assert torch.allclose(z.square().mean(1), a.square().mean((0, 2)))


def test_adam_refuses_a_basis_in_one_line():
    with pytest.raises(UserError, match=r"need compress.solver=als"):
        fit_projection(randn(3, 6, 5), "up", make_form("basis", "up", 0, 2), Settings(solver="adam"))
