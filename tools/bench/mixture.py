"""A shape that the student does not have, against those it has: mixtures of bases, W_e ~ A_e sum_j a_ej B_j.

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
from megakd.compress.groups import find_groups, sketch
from megakd.compress.predict import measure
from megakd.compress.threads import threads_over
from megakd.models.shared_core import SHAPES

SHARE = 0.344
RIDGE = 1e-6  # of the mean of a Gram matrix's diagonal


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
    for shape in SHAPES:
        error = min(c.error for c in table if c.form.shape == shape) ** 0.5
        found.append(Row("mixture", case, shape, error, ""))
    for count in counts:
        size = int((numbers - experts * count) / (experts * rows + count * columns))
        found.append(Row("mixture", case, f"mixture of {count}", fit_mixture(weights, count, size, sweeps), ""))
    return found


def fit_mixture(weights: Tensor, count: int, size: int, sweeps: int) -> float:
    """The relative error of a mixture of `count` bases by alternating least squares, all of A, B and a in turn.

    The start is that of a basis in as many groups, with noise in the coefficients.
    """
    experts = len(weights)
    with threads_over(weights) as threads:
        group = find_groups(sketch(weights, torch.ones(experts), threads), count)
    draw = torch.Generator().manual_seed(0)
    mix = torch.nn.functional.one_hot(group, count) + 0.1 * torch.randn(experts, count, generator=draw)
    moments = weights.mT @ weights
    leading = [torch.linalg.eigh(moments[group == g].sum(0))[1][:, -size:].T for g in range(count)]
    bases = torch.stack(leading)
    total, lost = float(weights.square().sum()), 1.0
    for _ in range(sweeps):
        turned = torch.einsum("ej,jkd->ekd", mix, bases)
        own = _solve(turned @ turned.mT, turned @ weights.mT).mT  # A_e, [E, F, k]
        squares = own.mT @ own
        gram = torch.einsum("ei,ej,ekl->ikjl", mix, mix, squares).reshape(count * size, count * size)
        target = torch.einsum("ej,ekd->jkd", mix, own.mT @ weights).flatten(0, 1)
        bases = _solve(gram, target).view(count, size, -1)
        target = torch.einsum("ekd,jkd->ej", own.mT @ weights, bases)
        gram = torch.einsum("ekl,jikl->eji", squares, torch.einsum("jkd,ild->jikl", bases, bases))
        mix = _solve(gram, target[:, :, None])[:, :, 0]
        lost = total - 2 * (mix * target).sum() + torch.einsum("ej,eji,ei->", mix, gram, mix)
    return (float(lost) / total) ** 0.5


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    exact = gram.double()
    ridge = RIDGE * exact.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(exact.shape[-1], dtype=exact.dtype)
    return torch.linalg.solve(exact + ridge * eye, target.double()).to(target)
