"""Groups of experts against all partitions, planted groups, and what a fit makes of them."""

import itertools

import pytest
import torch
from torch import Tensor

from megakd.compress.fit import Settings, fit_projection
from megakd.compress.groups import SKETCH, find_groups, sketch
from megakd.compress.metric import Statistics
from megakd.compress.predict import measure
from megakd.compress.threads import threads_over
from megakd.models.shared_core import Form, make_form
from tests.conftest import for_each


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grouped(weights: Tensor, groups: int, importance: Tensor | None = None) -> Tensor:
    importance = torch.ones(len(weights)) if importance is None else importance
    with threads_over(weights) as threads:
        return find_groups(sketch(weights, importance, threads), groups)


def same_partition(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one[:, None] == one, other[:, None] == other)


def lost(weights: Tensor, group: Tensor, size: int) -> float:
    """The squared error with the best basis of `size` in every group."""
    parts = [weights[group == g].flatten(0, 1) for g in group.unique()]
    return sum(torch.linalg.svdvals(part)[size:].square().sum().item() for part in parts)


@for_each("seed", range(4))
def test_groups_are_nearly_the_best_of_all_partitions(seed):
    """Experts without planted groups, seen whole: within 1 % of the best objective among all partitions in two."""
    experts, rows, columns = 9, 3, 8
    weights = randn(experts, rows, columns, seed=seed) * torch.logspace(0, -1, columns)

    def objective(group: Tensor) -> float:
        """Over the k at which bases and factors store fewer numbers than the experts."""
        one = torch.zeros(experts)
        most = round(columns * experts * rows / (experts * rows + 2 * columns))
        return sum(lost(weights, group, k) / lost(weights, one, k) for k in range(1, most + 1))

    partitions = (torch.tensor([0, *rest]) for rest in itertools.product((0, 1), repeat=experts - 1) if any(rest))
    best = min(objective(group) for group in partitions)
    assert best - 1e-9 <= objective(grouped(weights, 2)) <= 1.01 * best


@for_each("clusters", [2, 4, 8])
@for_each("equal", [True, False])
def test_planted_groups_are_found(clusters, equal):
    """More columns than the sketch has, groups of equal and of unequal size, experts in any order."""
    sizes = [24 // clusters] * clusters if equal else [2] * (clusters - 1) + [26 - 2 * clusters]
    planted = torch.repeat_interleave(torch.arange(clusters), torch.tensor(sizes))
    planted = planted[torch.randperm(24, generator=torch.Generator().manual_seed(1))]
    columns = 3 * SKETCH
    weights = randn(24, 16, 12, seed=2) @ randn(clusters, 12, columns, seed=3)[planted]
    weights = weights + 0.8 * randn(24, 16, columns, seed=4)
    assert same_partition(grouped(weights, clusters), planted)


def test_no_group_is_empty_and_exempt_experts_take_no_part():
    equal = randn(1, 8, 12).expand(6, 8, 12)
    assert set(grouped(equal, 4).tolist()) == {0, 1, 2, 3}
    importance = torch.tensor([0.0, 1, 1, 0, 1, 1])
    group = grouped(randn(6, 8, 12), 4, importance)
    assert set(group[importance > 0].tolist()) == {0, 1, 2, 3}
    assert grouped(torch.zeros(3, 4, 5).double(), 2).tolist() == [0, 0, 0]


def heavy_tailed(experts: int, rows: int, columns: int) -> Tensor:
    """Norms that differ by a factor of ten, each expert with inputs of its own: k-subspaces lost 12 % more here."""
    scale = torch.exp(0.7 * randn(experts, seed=5))
    return scale[:, None, None] * randn(experts, rows, 6) @ randn(experts, 6, columns, seed=1)


def from_a_pool(experts: int, rows: int, columns: int) -> Tensor:
    """Every expert reads its own 12 of 48 common directions: k-subspaces lost 17 % more here."""
    pool = torch.linalg.qr(randn(columns, 48, seed=2))[0].T
    draw = torch.Generator().manual_seed(3)
    own = torch.stack([pool[torch.randperm(48, generator=draw)[:12]] for _ in range(experts)])
    return randn(experts, rows, 12, seed=4) @ own + 0.02 * randn(experts, rows, columns, seed=5)


def clusters_of_copies(experts: int, rows: int, columns: int) -> Tensor:
    """Eight matrices, copied with noise of 0.4 of their norm."""
    return randn(8, rows, columns)[torch.arange(experts) % 7] + 0.4 * randn(experts, rows, columns, seed=1)


@for_each("make", [heavy_tailed, from_a_pool, clusters_of_copies])
@for_each("projection", ["up", "down"])
@for_each("calibrated", [False, True])
def test_predictions_of_bases_are_the_fit(make, projection, calibrated):
    """The same groups in both, also in the metric of measured inputs, where the damped objective is compared."""
    experts, f, d = 16, 24, 72
    weights = make(experts, f, d)
    weights = weights.mT.contiguous() if projection == "down" else weights
    statistics = None
    if calibrated:
        side = (experts, f) if projection == "down" else (d,)
        x = randn(*side, 300, seed=7) * torch.logspace(0, -1, side[-1])[:, None]
        moments, share = x @ x.mT / 300, torch.linspace(1, 4, experts).double()
        rows = None if projection == "down" else torch.linspace(0.1, 3, f).double().expand(experts, f)
        counts = torch.full((experts,), 1e12)
        statistics = Statistics(share / share.sum(), moments, moments, counts, rows)
    forms = [make_form("basis", projection, 0, k, groups) for k, groups in ((12, 2), (5, 8))]
    found = measure(weights, projection, 8, forms=forms, statistics=statistics, damping=0.0)
    for form, predicted in zip(forms, found, strict=True):
        _, fit = fit_projection(weights, projection, form, Settings(damping=(0.0,)), statistics)
        if statistics is None:
            norms = weights.square().sum((1, 2))
            exact = (fit.errors.square() * norms).sum() / norms.sum()
        else:
            exact = lost_energy(weights, projection, fit.weighted_errors, statistics)
        assert predicted.error == pytest.approx(float(exact), rel=0.02 if calibrated else 1e-6), form


def lost_energy(weights: Tensor, projection: str, errors: Tensor | None, statistics: Statistics) -> Tensor:
    """The share of the energy in the metric, from the errors of experts relative to theirs."""
    assert errors is not None
    frame = weights.mT if projection == "down" else weights
    if projection == "down":
        energy = (statistics.covariance @ frame * frame).sum((1, 2))
    else:
        assert statistics.rows is not None
        energy = ((frame @ statistics.covariance * frame).sum(2) * statistics.rows).sum(1)
    energy = statistics.share * energy
    return (errors.square() * energy).sum() / energy.sum()


def test_groups_of_copies_are_worth_their_bases():
    """Experts dealt in turn would lose more with seven bases than with one of as many numbers."""
    weights = clusters_of_copies(28, 24, 72)
    one, seven = measure(weights, "up", 8, forms=[Form("basis", 0, 22), Form("basis", 0, 14, 7)])
    assert seven.parameters < 1.01 * one.parameters and seven.error < 0.8 * one.error
