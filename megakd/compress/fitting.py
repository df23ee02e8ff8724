"""Tasks that choose a form for every projection and fit it."""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakd.compress.fit import Settings, best_split, fit_projection
from megakd.compress.forms import Candidate
from megakd.compress.job import Job
from megakd.compress.measuring import drop_inputs, in_order, statistics_of
from megakd.compress.metric import Statistics
from megakd.compress.planner import allocate
from megakd.compress.predict import measure, reach
from megakd.models.shared_core import PROJECTIONS, Form, factor_shapes
from megakd.models.spec import active_experts
from megakd.system.files import publishing, read_json, write_json

SAMPLE = 8  # experts that a split of ranks is tried on


def predict_errors(job: Job, layer: int, output: Path) -> None:
    """What each form would cost one layer, and lose: of the weights, or where it was measured of the residual stream.

    Layers normalise the stream they read: an error counts by what it is of the squared norm behind the layer.
    """
    settings, active, exempt = job.settings, active_experts(job.config), job.exempt(layer)
    found: dict[str, Any] = {}
    for projection in PROJECTIONS:
        weights, order = in_order(job, layer, projection)
        statistics = statistics_of(job, layer, projection, order) if settings.calibration_tokens else None
        damping = settings.damping[0]
        found[projection] = measure(
            weights, projection, active, shapes=settings.shapes, statistics=statistics, damping=damping, exempt=exempt
        )
        scale = 1.0
        if statistics is not None:
            with safe_open(job.part(layer, "inputs"), "pt") as file:
                scale = float(file.get_tensor("power") / file.get_tensor("stream"))
            scale *= reach(weights, projection, statistics, exempt)
        found[projection] = [c._replace(error=c.error * scale)._asdict() for c in found[projection]]
    write_json(output, found)


def choose_forms(job: Job, tables: list[Path], output: Path) -> None:
    """Spend the budget over all layers."""
    settings, active, found = job.settings, active_experts(job.config), {}
    for layer, path in zip(job.layers, tables, strict=True):
        for projection, rows in read_json(path).items():
            found[layer, projection] = [Candidate(**{**row, "form": Form(*row["form"])}) for row in rows]
    elements = len(job.layers) * sum(rows * columns for rows, columns in job.spec.shapes.values())
    assert settings.budget is not None
    chosen = allocate(found, elements * job.root.experts, settings.budget, 2 * elements * active, settings.flops)
    write_json(output, {f"{layer}.{projection}": form._asdict() for (layer, projection), form in chosen.items()})


def fit_part(job: Job, layer: int, projection: str, output: Path) -> None:
    """Fit one projection of one layer; its report is written first, its tensors say that it is done."""
    settings, started = job.settings, time.perf_counter()
    weights, order = in_order(job, layer, projection)
    statistics = statistics_of(job, layer, projection, order) if settings.calibration_tokens else None
    solver = Settings(
        settings.solver, settings.sweeps, settings.tolerance, settings.damping, settings.steps, settings.lr
    )
    form = _form(job, layer, projection, weights, solver, statistics)
    exempt = job.exempt(layer)
    tensors, fit = fit_projection(weights.to(job.device), projection, form, solver, statistics, exempt)
    dtype = job.dtype
    report = {
        "layer": layer,
        "projection": projection,
        "form": form._asdict(),
        "sweeps": fit.sweeps,
        "errors": [round(e, 6) for e in fit.errors.tolist()],
    }
    if fit.weighted_errors is not None:
        report |= {"damping": fit.damping, "weighted_errors": [round(e, 6) for e in fit.weighted_errors.tolist()]}
    write_json(output.with_suffix(".json"), report)
    with publishing(output) as temporary:
        stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        save_file({name: t.contiguous().cpu() for name, t in stored.items()}, temporary)
    if settings.calibration_tokens:
        drop_inputs(job, layer)
    job.run.record(
        "fit",
        layer=layer,
        projection=projection,
        error=round(fit.errors.mean().item(), 6),
        seconds=round(time.perf_counter() - started, 3),
    )


def _form(
    job: Job, layer: int, projection: str, weights: Tensor, solver: Settings, statistics: Statistics | None
) -> Form:
    """What the run wants: the planner's choice, or wrappers of `rank`, or of as many parameters divided better."""
    settings = job.settings
    if settings.budget is not None:
        return Form(**read_json(job.forms)[f"{layer}.{projection}"])
    form = Form("wrappers", settings.rank, settings.rank)
    if settings.split == "equal":
        return form
    sizes = job.spec.sizes
    stored = sum(n * r for _, n, r in factor_shapes(form, projection, 1, *sizes).values())
    chosen = torch.arange(0, len(weights), max(len(weights) // SAMPLE, 1))[:SAMPLE]
    if statistics is not None:
        shared = ("covariance", "held_out") if projection != "down" else ()
        own: dict[str, Any] = {n: t for n, t in statistics._asdict().items() if t is not None and n not in shared}
        statistics = statistics._replace(**{name: tensor[chosen] for name, tensor in own.items()})
    return best_split(weights[chosen], projection, stored, solver, statistics)
