"""The seeds' method: its conversion is exact, and it does what its objective says."""

import pytest
import torch
from torch import Tensor

from megakd.compress.adam import fit_seed_form, fused, seed_form
from megakd.compress.fit import Settings, fit_projection
from megakd.compress.metric import Metric
from megakd.compress.threads import threads_over
from megakd.errors import UserError
from megakd.models.shared_core import PROJECTIONS, dense_weight, make_form
from tests.compress.test_fit import measured, relative_errors, weighted_errors


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_fused_form_has_the_same_products():
    seed = [randn(*shape, seed=i) for i, shape in enumerate([(5, 8), (3, 5, 2), (3, 5, 2), (3, 8, 4), (3, 8, 4)])]
    core, u, s, q, v = fused(*seed)
    assert q.shape == (3, 5, 4)
    assert torch.allclose(core + u @ s.mT @ core + q @ v.mT, seed_form(*seed), rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_first_step_is_adams_along_the_gradient_of_the_objective(weighted):
    """One step moves every entry by lr against the sign of the gradient of sum p ||W - M fit||^2."""
    whitened, lr = randn(4, 5, 7), 1e-3
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    left = torch.linalg.cholesky(torch.eye(5, dtype=torch.float64) + 0.1).expand(4, -1, -1) if weighted else None
    with threads_over(whitened, 2) as threads:
        before, after = (fit_seed_form(whitened, Metric(p, left, None), 2, 2, threads, steps=n, lr=lr) for n in (0, 1))
    scale = (p * whitened.square().mean((1, 2))).sum().sqrt()
    before[0], after[0] = before[0] / scale, after[0] / scale
    assert torch.allclose(before[0], (p[:, None, None] * whitened).sum(0) / scale)
    leaves = [x.clone().requires_grad_() for x in before]
    fit = seed_form(*leaves)
    fit = fit if left is None else left.mT @ fit
    loss = (p * (whitened / scale - fit).square().sum((1, 2))).sum()
    for x, y, gradient in zip(before, after, torch.autograd.grad(loss, leaves), strict=True):
        sure = gradient.abs() > 1e-4
        assert torch.allclose((y - x)[sure], -lr * gradient.sign()[sure], rtol=1e-3)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_adam_reaches_what_als_reaches_where_it_is_easy(projection):
    weights = (torch.eye(8, 12) + 0.02 * randn(3, 8, 12).float()).contiguous()
    weights = weights.mT.contiguous() if projection == "down" else weights
    form, steps = make_form("wrappers", projection, 2, 2), []
    settings = Settings(solver="adam", steps=300, lr=1e-2)
    tensors, fit = fit_projection(weights, projection, form, settings, progress=lambda: steps.append(1))
    als = fit_projection(weights, projection, form, Settings(sweeps=200, tolerance=0))[1]
    assert fit.sweeps == len(steps) == 300
    assert torch.allclose(relative_errors(weights, tensors, projection), fit.errors.double(), rtol=1e-4)
    assert als.errors.mean() * 0.99 < fit.errors.mean() < 2.5 * als.errors.mean()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_adam_heeds_statistics_and_exempt_experts(projection):
    weights = torch.randn(4, 10, 10, generator=torch.Generator().manual_seed(0))
    statistics, form = measured(weights, projection), make_form("wrappers", projection, 2, 2)
    settings = Settings(solver="adam", steps=200, lr=2e-2, damping=(0.02,))
    plain, _ = fit_projection(weights, projection, form, settings)
    tensors, fit = fit_projection(weights, projection, form, settings, statistics, (3,))
    found, reference = (weighted_errors(weights, t, projection, statistics.held_out)[:3] for t in (tensors, plain))
    assert fit.weighted_errors is not None and torch.allclose(fit.weighted_errors[:3].double(), found, rtol=1e-3)
    assert found.mean() < 0.9 * reference.mean()
    core = tensors[f"shared_core.{projection}_proj.weight"]
    assert torch.allclose(dense_weight(tensors, projection, 3), core) and fit.errors[3] == 0


def test_adam_refuses_one_sided_wrappers_in_one_line():
    with pytest.raises(UserError, match=r"need compress.solver=als"):
        fit_projection(torch.zeros(3, 6, 5), "up", make_form("additive", "up", 2, 0), Settings(solver="adam"))
