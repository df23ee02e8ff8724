"""Solvers of the compression: ALS against Adam in the same shape, forms at equal numbers stored, time at real size."""

import resource
import time
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from bench.rows import Row
from megakd.compress.fit import Settings, best_split, fit_projection
from megakd.models.shared_core import Form, make_form
from megakd.names import shipped

EXPERTS, ROWS, COLUMNS, RANK = 32, 192, 512, 16
HALF = 35  # the rank at which the seeds' form stores half of what the experts had
RATES = (3e-3, 1e-2, 3e-2)
DEMO = shipped("assets", "demo-teacher") / "model.safetensors"


def proxies(experts: int = EXPERTS) -> dict[str, Tensor]:
    """Stand-ins for real experts, [E, 192, 512], and a layer that was trained: the demo's teacher, 8 of 192 x 192.

    flat: independent Gaussian entries, nothing in common, no decay: the worst case of any compression.
    native: independent too, singular values fall as i^-0.5 between random bases, as natively trained experts' do.
    upcycled: one such matrix, and for each expert a difference of rank 24 (0.4 of its norm) and noise (0.1).
    planted: the model itself, rank 16 on both sides, and noise of 0.2 of its norm.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def decaying(count: int) -> Tensor:
        left = torch.linalg.qr(randn(count, ROWS, ROWS))[0]
        right = torch.linalg.qr(randn(count, COLUMNS, ROWS))[0]
        return left * torch.arange(1, ROWS + 1) ** -0.5 @ right.mT

    def unit(matrices: Tensor) -> Tensor:
        return matrices / matrices.flatten(1).norm(dim=1)[:, None, None]

    difference = randn(experts, ROWS, 24) @ randn(experts, 24, COLUMNS)
    core = unit(decaying(1))
    u, s = (0.3 * randn(experts, ROWS, RANK) for _ in range(2))
    q, v = randn(experts, ROWS, RANK), randn(experts, COLUMNS, RANK)
    planted = core + u @ (s.mT @ core) / RANK
    planted = unit(planted) + 0.7 * unit(q @ v.mT)
    noise = unit(randn(experts, ROWS, COLUMNS))
    with safe_open(DEMO, "pt") as file:
        names = [f"model.layers.2.mlp.experts.{e}.gate_proj.weight" for e in range(8)]
        trained = torch.stack([file.get_tensor(name).float() for name in names])
    return {
        "flat": randn(experts, ROWS, COLUMNS),
        "native": decaying(experts),
        "upcycled": core + 0.4 * unit(difference) + 0.1 * noise,
        "planted": unit(planted) + 0.2 * noise,
        "demo teacher": trained,
    }


def bench_fit(quick: bool) -> list[Row]:
    """Error and CPU seconds by solver; error of the stored forms at equal numbers stored; a sweep at real size."""
    rows = []
    steps = (100,) if quick else (600, 2500)
    for name, weights in proxies(8 if quick else EXPERTS).items():
        if quick and name == "demo teacher":
            continue
        rows += solvers(name, weights, steps)
        for rank in (RANK,) if quick else (RANK, HALF):
            rows += forms(name, weights, rank)
    return rows + real_size(2 if quick else 16, 2 if quick else 5)


class Run(NamedTuple):
    error: float
    seconds: float


def run(weights: Tensor, form: Form, settings: Settings) -> Run:
    """Root of the mean squared relative error over experts, and CPU seconds of the whole fit."""
    start = time.process_time()
    _, fit = fit_projection(weights, "gate", form, settings)
    return Run(fit.errors.square().mean().sqrt().item(), time.process_time() - start)


def solvers(name: str, weights: Tensor, steps: tuple[int, ...]) -> list[Row]:
    """ALS as configured by default, against Adam at the best of three rates, found with the fewest steps.

    Adam's seconds are those of one run, not of the search for its rate.
    """
    form = make_form("wrappers", "gate", RANK, RANK)
    als = run(weights, form, Settings())
    rows = [*of_run(f"{name}, als", als)]
    rates = RATES
    for count in steps:
        tried = {rate: run(weights, form, Settings(solver="adam", steps=count, lr=rate)) for rate in rates}
        best = min(tried, key=lambda rate: tried[rate].error)
        adam, rates = tried[best], (best,)
        case = f"{name}, adam {count}"
        rows += of_run(case, adam)
        rows.append(Row("fit", case, "error_of_als", als.error / adam.error, "x"))
        rows.append(Row("fit", case, "cpu_over_als", adam.seconds / als.seconds, "x"))
    return rows


def forms(name: str, weights: Tensor, rank: int) -> list[Row]:
    """The original proposal's form, U_out, S_out [F, R] and U_in, V_in [D, R], at the same number of values stored."""
    _, rows, columns = weights.shape
    numbers = 2 * rank * (rows + columns)
    form = best_split(weights, "gate", numbers, Settings())
    seed = run(weights, make_form("wrappers", "gate", rank, rank), Settings())
    split = run(weights, form, Settings())
    share = numbers / (rows * columns)
    case = f"{name}, {share:.2f} of the numbers, ranks {form.input_rank} and {form.output_rank}"
    return [
        Row("fit", case, "relative_error", split.error, ""),
        Row("fit", case, "error_of_seed_form", seed.error, ""),
        Row("fit", case, "below_seed_form", 1 - split.error / seed.error, ""),
    ]


def real_size(experts: int, sweeps: int) -> list[Row]:
    """Qwen3-30B-A3B's matrices at rank 64: CPU seconds of a sweep and matrix, and the process's largest memory."""
    weights = torch.randn(experts, 768, 2048, generator=torch.Generator().manual_seed(0))
    form = make_form("wrappers", "gate", 64, 64)
    stamps: list[float] = []
    settings = Settings(sweeps=1 + sweeps, tolerance=0.0)
    fit_projection(weights, "gate", form, settings, progress=lambda: stamps.append(time.process_time()))
    # the first sweep starts its range finders from nothing
    each = (stamps[-1] - stamps[0]) / sweeps / experts
    case = f"768 x 2048, rank 64, {experts} experts"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [
        Row("fit", case, "cpu_seconds", each, "s a sweep and matrix"),
        Row("fit", case, "peak_bytes", peak, "bytes"),
    ]


def of_run(case: str, found: Run) -> list[Row]:
    return [
        Row("fit", case, "relative_error", found.error, ""),
        Row("fit", case, "cpu_seconds", found.seconds, "s"),
    ]
