"""Mixtures of bases: planted ones are found, and those of one coefficient each are no worse than groups."""

import torch

from megakd.compress.fit import Settings, fit_projection
from megakd.models.shared_core import make_form
from tests.tools.examples import tool

bench = tool("bench.mixture")


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_planted_mixtures_are_found():
    bases, mix = randn(2, 4, 40, seed=1), randn(12, 2, seed=2)
    weights = randn(12, 10, 4, seed=3) @ torch.einsum("ej,jkd->ekd", mix, bases) + 0.01 * randn(12, 10, 40, seed=4)
    assert bench.fit_mixture(weights, 2, 4, 100) < 0.02
    _, groups = fit_projection(weights, "gate", make_form("basis", "gate", 0, 4, 2), Settings())
    assert groups.errors.mean() > 0.2


def test_a_mixture_is_at_least_as_good_as_groups():
    weights = bench.proxies(8, 16, 48)["copies 4"]
    _, groups = fit_projection(weights, "gate", make_form("basis", "gate", 0, 6, 4), Settings())
    norms = weights.square().sum((1, 2))
    grouped = float((groups.errors.square() * norms).sum() / norms.sum()) ** 0.5
    assert bench.fit_mixture(weights, 4, 6, 30) <= 1.001 * grouped


def test_rows_compare_shapes_at_equal_numbers():
    rows = bench.compare("native", bench.proxies(8, 16, 48)["native"], (2,), 5)
    assert {row.metric for row in rows} == {"wrappers", "additive", "basis", "mixture of 2"}
    assert all(0 < row.value < 1 for row in rows)
