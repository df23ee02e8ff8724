"""Mixtures of bases against a slow objective in float64, planted ones, and bases in groups."""

import pytest
import torch
from torch import Tensor

from megakd.compress.fit import Settings, fit_projection
from megakd.compress.metric import Metric
from megakd.compress.mixture import Mixture, fit_mixture, mixed
from megakd.compress.predict import measure
from megakd.compress.threads import threads_over
from megakd.errors import UserError
from megakd.models.shared_core import PROJECTIONS, Form, dense_weight, free_and_core_rank, make_form, stored_parameters
from tests.tools.examples import tool

proxies = tool("bench.planner").proxies


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(noise: float = 0.01) -> Tensor:
    """12 experts [10, 40] of mixtures of two bases of 4."""

    def draw(*shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()

    bases, mix = draw(2, 4, 40, seed=1), draw(12, 2, seed=2)
    return draw(12, 10, 4, seed=3) @ mixed(mix, bases) + noise * draw(12, 10, 40, seed=4)


def fitted(weights: Tensor, size: int, count: int, sweeps: int, p: Tensor | None = None) -> tuple[Mixture, float]:
    metric = Metric(torch.ones(len(weights), dtype=torch.float64) if p is None else p, None, None)
    with threads_over(weights) as threads:
        found, _, lost = fit_mixture(weights, metric, size, count, threads, sweeps=sweeps, tolerance=0)
    return found, lost


def objective(weights: Tensor, found: Mixture, p: Tensor) -> float:
    """sum_e p_e ||W_e - A_e sum_g m_eg Z_g||^2, one expert and one base at a time."""
    total = 0.0
    for e, weight in enumerate(weights):
        base = torch.zeros_like(found.z[0])
        for g in range(len(found.z)):
            base += found.mix[e, g] * found.z[g]
        total += float(p[e] * (weight - found.a[e] @ base).square().sum())
    return total


def test_what_it_lost_is_the_objective():
    weights, p = randn(6, 7, 9), torch.linspace(0.5, 2, 6, dtype=torch.float64)
    found, lost = fitted(weights, 2, 3, 5, p)
    assert lost == pytest.approx(objective(weights, found, p), rel=1e-6)


def test_more_sweeps_lose_no_more():
    weights = randn(8, 7, 12)
    lost = [fitted(weights, 3, 2, sweeps)[1] for sweeps in (0, 1, 2, 4, 8, 16, 32)]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.97 * lost[0]


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_planted_mixtures_are_found(projection):
    weights = planted()
    given = weights.mT.contiguous() if projection == "down" else weights
    settings = Settings(sweeps=100, tolerance=0)
    tensors, fit = fit_projection(given, projection, make_form("mixture", projection, 0, 4, 2), settings)
    assert fit.errors.mean() < 0.01
    for e, weight in enumerate(given):
        rest = weight - dense_weight(tensors, projection, e)
        assert float(rest.norm() / weight.norm()) == pytest.approx(float(fit.errors[e]), rel=1e-4)
    _, groups = fit_projection(given, projection, make_form("basis", projection, 0, 4, 2), settings)
    assert groups.errors.mean() > 0.2


def test_no_worse_than_bases_in_as_many_groups():
    weights = proxies(8, 16, 48)["copies 4"].double()
    _, groups = fit_projection(weights, "gate", make_form("basis", "gate", 0, 6, 4), Settings())
    grouped = float(groups.errors.double().square() @ weights.square().sum((1, 2)))
    assert fitted(weights, 6, 4, 30)[1] <= 1.001 * grouped


def test_bases_are_of_like_norms_and_coefficients_of_norm_one():
    tensors, _ = fit_projection(1e-3 * planted(), "gate", make_form("mixture", "gate", 0, 4, 2), Settings(sweeps=5))
    norms = tensors["shared_core.gate_proj.weight"].unflatten(0, (2, 4)).norm(dim=(1, 2))
    assert torch.allclose(norms, norms.mean().expand(2), rtol=0.05)
    assert torch.allclose(tensors["experts.output_wrapper_gate_mix"].norm(dim=1), torch.ones(12, 1).double())


def test_adam_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"need compress.solver=als"):
        fit_projection(randn(4, 6, 5), "up", make_form("mixture", "up", 0, 2, 2), Settings(solver="adam"))


@pytest.mark.parametrize("name", ["copies 8", "directions", "native"])
def test_the_prediction_is_near_the_fit(name):
    """Measured on these: at most 1.7 %."""
    weights = proxies(16, 24, 64)[name].float()
    norms = weights.square().sum((1, 2))
    for count, size in ((2, 10), (4, 16), (4, 5)):
        form = make_form("mixture", "gate", 0, size, count)
        around = [make_form("mixture", "gate", 0, k, count) for k in range(2, 25)]
        predicted = next(c.error for c in measure(weights, "gate", 2, forms=around) if c.form == form)
        _, fit = fit_projection(weights, "gate", form, Settings())
        reached = float(fit.errors.double().square() @ norms.double() / norms.sum())
        assert predicted**0.5 == pytest.approx(reached**0.5, rel=0.03), (count, size)


def test_numbers_are_bases_factors_and_coefficients():
    form = Form("mixture", 0, 5, 3)
    assert free_and_core_rank(form, "gate") == (0, 5)
    assert stored_parameters(form, "gate", 16, 64, 24) == 3 * 5 * 64 + 16 * 5 * 24 + 16 * 3
