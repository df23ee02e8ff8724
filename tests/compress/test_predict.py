"""The costs of hidden units in the metric of gate and up: a diagonal M_e, [E, F, 1]."""

import pytest
import torch
from torch import Tensor

from megakd.compress.als import fit_wrappers
from megakd.compress.fit import Settings, fit_projection
from megakd.compress.metric import Statistics, make_metric, times, unwhiten_left, whiten
from megakd.compress.threads import threads_over
from megakd.models.shared_core import Form, dense_weight
from tests.compress.test_fit import randn


def measured_gate(experts: int, f: int, d: int, seed: int = 3) -> Statistics:
    """Inputs of a gate with a steep spectrum, units of very unequal cost."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4 * d, d, generator=generator).double() * 0.7 ** torch.arange(d)
    moments = x.mT @ x / (4 * d)
    share = torch.rand(experts, generator=generator).double() + 0.2
    costs = torch.randn(experts, f, generator=generator).double().exp() ** 2
    counts = torch.full((experts,), 4 * d)
    return Statistics(share / share.sum(), moments[0], moments[1], counts, costs)


def cost_of(weights: Tensor, tensors: dict[str, Tensor], statistics: Statistics, moments: Tensor) -> Tensor:
    """sum_j rows_ej E ((w_ej - fit_ej) x)^2 of every expert, one unit at a time."""
    assert statistics.rows is not None
    found = torch.zeros(len(weights)).double()
    for e, weight in enumerate(weights.double()):
        rest = weight - dense_weight({n: t.double() for n, t in tensors.items()}, "gate", e)
        for j, row in enumerate(rest):
            found[e] += statistics.rows[e, j] * (row @ moments @ row)
    return found


@pytest.mark.parametrize("form", [Form("wrappers", 3, 2), Form("additive", 4, 0), Form("basis", 0, 6)], ids=str)
def test_units_that_cost_more_are_fitted_better(form):
    """The weighted objective falls, the plain one rises; the reported errors are those of a slow reference."""
    weights, statistics = randn(5, 9, 14).double() + randn(9, 14, seed=1).double(), measured_gate(5, 9, 14)
    settings = Settings(sweeps=40, tolerance=0, damping=(1e-3,))
    found, fit = fit_projection(weights, "gate", form, settings, statistics)
    blind, other = fit_projection(weights, "gate", form, settings, statistics._replace(rows=None))
    share = statistics.share
    costs = [(share * cost_of(weights, t, statistics, statistics.covariance)).sum() for t in (found, blind)]
    assert costs[0] < 0.97 * costs[1]
    zeros = {name: torch.zeros_like(t) for name, t in found.items()}
    whole = cost_of(weights, zeros, statistics, statistics.held_out)
    expected = (cost_of(weights, found, statistics, statistics.held_out) / whole).sqrt()
    assert fit.weighted_errors is not None and torch.allclose(fit.weighted_errors.double(), expected, rtol=1e-4)
    assert not torch.allclose(fit.weighted_errors, other.weighted_errors)


def test_a_column_of_costs_is_a_diagonal_metric():
    """[E, F, 1] and the same as matrices [E, F, F] give the same fit."""
    weights, statistics = randn(4, 9, 14).double(), measured_gate(4, 9, 14)
    with threads_over(weights) as threads:
        column = make_metric(statistics, "gate", 0.1, (), weights, threads)
        assert column.left is not None and column.left.shape == (4, 9, 1)
        square = column._replace(left=torch.diag_embed(column.left[:, :, 0]))
        fits = [
            fit_wrappers(whiten(weights, metric, threads), metric, 3, 2, threads, sweeps=10, tolerance=0.0)[0]
            for metric in (column, square)
        ]
        expanded = [
            times(m.left, f.core) + f.u @ (f.s.mT @ f.core) + f.q @ f.v.mT
            for m, f in zip((column, square), fits, strict=True)
        ]
        assert torch.allclose(*expanded, rtol=1e-6, atol=1e-9)
        plain = [unwhiten_left(f.q, m, threads) for m, f in zip((column, square), fits, strict=True)]
        assert torch.allclose(plain[0].abs(), plain[1].abs(), rtol=1e-5, atol=1e-7)
