"""Mixtures of bases, W_e ~ A_e sum_j a_ej B_j, against the other shapes.

This is the linear form of MoBE (Chen et al. 2025, arXiv 2508.05257): A_e [F, k] for each expert, m bases B_j [k, D]
shared by all, and coefficients a_e [m]. A basis in m groups is the special case in which one coefficient is 1 and all
others 0. Stored are E F k + m k D + E m numbers.
"""

import torch
from safetensors import safe_open
from torch import Tensor

from bench.fit import DEMO
from bench.planner import ACTIVE, proxies
from bench.rows import Row
from megakd.compress import mixture
from megakd.compress.forms import USUAL
from megakd.compress.metric import Metric
from megakd.compress.predict import measure
from megakd.compress.threads import threads_over

SHARE = 0.344


def bench_mixture(quick: bool) -> list[Row]:
    """The best of every shape at 0.344 of the numbers, as predicted, and fitted mixtures of 4, 8 and 16 bases."""
    rows = []
    names = ("native", "copies 8", "copies 16", "spaces 8", "spaces 16", "subsets", "directions")
    for seed in range(1 if quick else 3):
        made = proxies(seed=seed)
        for name in names[:1] if quick else names:
            rows += compare(f"{name}, seed {seed}", made[name], (4,) if quick else (4, 8, 16), 8 if quick else 60)
    for layer, projection in () if quick else ((1, "gate"), (2, "up"), (2, "down")):
        weights = trained(layer, projection)
        rows += compare(f"demo's teacher, layer {layer} {projection}", weights, (2, 4), 150)
    return rows


def trained(layer: int, projection: str) -> Tensor:
    """Experts of the demo's teacher in the frame of the fit, [E, F, D]."""
    with safe_open(DEMO, "pt") as file:
        name = f"model.layers.{layer}.mlp.experts.{{}}.{projection}_proj.weight"
        weights = torch.stack([file.get_tensor(name.format(expert)).float() for expert in range(8)])
    return weights.mT.contiguous() if projection == "down" else weights


def compare(case: str, weights: Tensor, counts: tuple[int, ...], sweeps: int) -> list[Row]:
    experts, rows, columns = weights.shape
    numbers = SHARE * weights.numel()
    table = [c for c in measure(weights, "gate", min(ACTIVE, experts // 4)) if c.parameters <= numbers]
    found = []
    for shape in USUAL:
        error = min(c.error for c in table if c.form.shape == shape) ** 0.5
        found.append(Row("mixture", case, shape, error, ""))
    for count in counts:
        size = int((numbers - experts * count) / (experts * rows + count * columns))
        found.append(Row("mixture", case, f"mixture of {count}", fit_mixture(weights, count, size, sweeps), ""))
    return found


def fit_mixture(weights: Tensor, count: int, size: int, sweeps: int) -> float:
    """The relative error of a fitted mixture of `count` bases."""
    even = Metric(torch.ones(len(weights), dtype=torch.float64), None, None)
    with threads_over(weights) as threads:
        *_, lost = mixture.fit_mixture(weights, even, size, count, threads, sweeps=sweeps, tolerance=0)
    return (lost / float(weights.square().sum())) ** 0.5
