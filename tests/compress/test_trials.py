"""Errors of wrappers that are predicted from trial fits, against fits of all experts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megakd.compress import trials
from megakd.compress.forms import Sizes, candidates
from megakd.compress.predict import measure
from megakd.compress.trials import Trials, WrapperErrors, fit_points, sample
from megakd.models.shared_core import Form, free_and_core_rank, make_form
from tests.compress.test_groups import clusters_of_copies, from_a_pool
from tests.compress.test_planner import related, whole_fit
from tests.conftest import for_each


def unequal(experts: int, rows: int, columns: int) -> Tensor:
    """Norms that differ by a factor of ten."""
    scale = torch.exp(0.7 * torch.randn(experts, generator=torch.Generator().manual_seed(0)))
    return scale[:, None, None] * related(experts, rows, columns)


def planted(experts: int, rows: int, columns: int) -> Tensor:
    """Wrappers of rank 4 and 4 themselves, with noise of 0.15: the error has a kink at these ranks."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    core = randn(rows, columns) * torch.logspace(0, -1, columns)
    turned = core + randn(experts, rows, 4) @ randn(experts, 4, rows) @ core / rows
    added = randn(experts, rows, 4) @ randn(experts, 4, columns) / 6
    return turned + added + 0.15 * core.std() * randn(experts, rows, columns)


@for_each(
    "make, projection",
    [(related, "up"), (unequal, "gate"), (from_a_pool, "down"), (clusters_of_copies, "up"), (planted, "gate")],
)
def test_the_choice_loses_at_most_one_percent_more_than_the_best(make, projection):
    """At a third of the numbers: every shape's best by prediction is within 4 % of its fit (tiny ranks)."""
    experts, f, d = 16, 24, 72
    weights = make(experts, f, d).float()
    weights = weights.mT.contiguous() if projection == "down" else weights
    fitting = [c for c in measure(weights, projection, 8) if c.parameters <= 0.34 * weights.numel()]
    kinds = {(c.form.shape, c.form.groups) for c in fitting}
    best = [min((c for c in fitting if (c.form.shape, c.form.groups) == kind), key=lambda c: c.error) for kind in kinds]
    fits = {c: whole_fit(weights, projection, c.form) for c in best}
    for c, exact in fits.items():
        assert c.error**0.5 == pytest.approx(exact, rel=0.04), c.form
    assert fits[min(fits, key=lambda c: c.error)] <= 1.01 * min(fits.values())


@for_each("experts", [24, 80])
def test_predictions_from_a_sample_are_those_of_whole_fits(experts, monkeypatch):
    """8 of the experts are fitted with few sweeps: their core flatters by a tenth or more, which is predicted."""
    monkeypatch.setattr(trials, "ALL", 1000)
    monkeypatch.setattr(trials, "SAMPLED", 8 * 40 * 100)
    weights = related(experts, 40, 100)
    forms = [Form("additive", 12, 0), Form("wrappers", 8, 8), Form("wrappers", 12, 12)]
    for found in measure(weights, "up", 2, forms=forms):
        assert found.error**0.5 == pytest.approx(whole_fit(weights, "up", found.form), rel=0.07), found.form
    sampled = Trials(weights, weights.square().sum((1, 2)).double(), None)
    sampled.compare(fit_points(40, 100, experts, True, False))
    assert len(sampled.chosen) == 8 and max(sampled.factors.values()) > 1.1


def test_a_trial_of_all_experts_is_the_fit():
    weights, form = related(6, 12, 18), Form("wrappers", 3, 2)
    found = Trials(weights, weights.square().sum((1, 2)).double(), None).lost(*free_and_core_rank(form, "gate"))
    assert found**0.5 == pytest.approx(whole_fit(weights, "gate", form), rel=5e-3)


def test_errors_meet_their_fits_and_are_smooth_between():
    """A made-up error in which a core rank is worth 0.7 - 0.2 c / (r + c) free ranks."""
    curve = np.linspace(1, 0.1, 41) ** 2

    def truth(free: int, core: int) -> float:
        rank = free + (0.7 - 0.2 * core / max(free + core, 1)) * core
        return float(0.9 * np.interp(rank, np.arange(41), curve))

    errors = WrapperErrors(curve)
    points = [(5, 0), (12, 0), (28, 0), (3, 2), (2, 4), (10, 4), (7, 10), (24, 4), (20, 13)]
    for point in points:
        errors.learn(*point, truth(*point))
    for point in points:
        assert errors.error(*point) == pytest.approx(truth(*point), rel=1e-3)
    for point in ((4, 3), (15, 6), (9, 9), (22, 10)):
        assert errors.error(*point) == pytest.approx(truth(*point), rel=0.02)


def test_samples_have_experts_of_all_norms():
    norms = torch.tensor([0.0, 5, 1, 4, 0, 2, 3, 6, 7, 8]).double()
    assert sample(norms, 4) == [8, 1, 6, 2]
    assert sorted(sample(norms, 99)) == [1, 2, 3, 5, 6, 7, 8, 9]
    assert sample(torch.zeros(3), 2) == []


def test_fits_are_few_and_within_the_ranks():
    for f, d, experts in ((768, 2048, 128), (192, 192, 8), (24, 32, 4), (2, 3, 2), (14336, 4096, 8)):
        points = fit_points(f, d, experts, True)
        assert len(points) <= 10 and all(0 < free <= min(f, d) and core <= f for free, core in points)
        assert {core for _, core in fit_points(f, d, experts, False)} == {0}
        forms = candidates("gate", Sizes(experts, 2, d, f), ("wrappers",))
        if f > 100:
            most = max(free_and_core_rank(form, "gate")[1] for form in forms)
            assert max(core for _, core in points) >= 0.7 * most
        assert make_form("wrappers", "gate", *points[-1]).shape == "wrappers"
