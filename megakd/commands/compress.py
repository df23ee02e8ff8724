"""Fit the teacher's experts: one shared core a layer and projection, low-rank wrappers an expert.

Any number of workers (ranks or array tasks) share the (layer, projection) pairs; each pair is written when it is done
and not fitted again after a kill. The worker that finds all of them finished writes RUN/student-0, a Hugging Face
folder, with compress.json: the error of every matrix. The teacher is read one projection at a time, never whole.

examples:
  megakd compress runs/a
  RANK=0 WORLD_SIZE=2 megakd compress runs/a & RANK=1 WORLD_SIZE=2 megakd compress runs/a
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megakd.data.tokens import load_tokenizer, tokenizer_facts
from megakd.dist import read_world
from megakd.errors import UserError
from megakd.files import locked, publishing, read_json, remove, write_json
from megakd.log import Progress, say, table
from megakd.models.fit import fit_projection
from megakd.models.hub import (
    Checkpoint,
    copy_side_files,
    load_config,
    resolve,
    weights_fingerprint,
    write_config,
    write_weights,
)
from megakd.models.shared_core import PROJECTIONS
from megakd.models.spec import spec_for
from megakd.models.student import student_config
from megakd.run import Run


def main(run: Run, args: argparse.Namespace) -> None:
    target = run.path("student-0")
    if run.config.model.student:
        raise UserError(f"{run.folder}: model.student names {run.config.model.student}; there is nothing to compress")
    if (target / "compress.json").exists():
        say(f"{target}: finished")
        return
    world = read_world()
    folder = resolve(run.config.model.teacher, run.config.model.revision)
    config, checkpoint = load_config(folder), Checkpoint(folder)
    spec = spec_for(config, str(folder))
    _check_rank(run, spec.shapes(config))
    tasks = [(layer, projection) for layer in spec.moe_layers(config) for projection in PROJECTIONS]
    parts = run.path("compress")
    progress = Progress("compress", len(tasks[world.rank :: world.size]), "projections")
    for layer, projection in tasks[world.rank :: world.size]:
        if not _part(parts, layer, projection).exists():
            started = time.perf_counter()
            weights = checkpoint.experts(spec, config, layer, projection)
            if not torch.isfinite(weights).all():
                raise UserError(f"{folder}: layer {layer} {projection}_proj holds NaN or infinite weights")
            error = _fit_part(run, parts, layer, projection, weights)
            run.record(
                "compress",
                layer=layer,
                projection=projection,
                error=error,
                seconds=round(time.perf_counter() - started, 3),
            )
        progress.update(1)
    progress.close()
    if all(_part(parts, *task).exists() for task in tasks):
        with locked(run.path("compress.lock")):
            if not (target / "compress.json").exists():
                _assemble(run, folder, config, checkpoint, parts, tasks)
                remove(parts)
        remove(run.path("compress.lock"))
        say(error_table(read_json(target / "compress.json")))
    else:
        say("compress: this worker's share is done; the student is written when the other workers' are")


def error_table(report: dict[str, Any]) -> str:
    """Relative Frobenius error of each layer and projection, mean over experts."""
    errors = {(p["layer"], p["projection"]): p["errors"] for p in report["parts"]}
    rows = []
    for layer in sorted({layer for layer, _ in errors}):
        rows.append([f"layer {layer}", *(f"{sum(e) / len(e):.4f}" for e in (errors[layer, p] for p in PROJECTIONS))])
    return table(["relative error", *PROJECTIONS], rows)


def _check_rank(run: Run, shapes: dict[str, tuple[int, int]]) -> None:
    smallest = min(min(shape) for shape in shapes.values())
    if run.config.compress.rank > smallest:
        raise UserError(
            f"{run.folder}: compress.rank={run.config.compress.rank} exceeds the experts' smaller side, {smallest}"
        )


def _part(parts: Path, layer: int, projection: str) -> Path:
    return parts / f"layer-{layer:03d}-{projection}.safetensors"


def _fit_part(run: Run, parts: Path, layer: int, projection: str, weights: torch.Tensor) -> float:
    settings = run.config.compress
    tensors, fit = fit_projection(weights, projection, settings.rank, settings.sweeps, settings.tolerance)
    dtype = getattr(torch, run.config.model.dtype)
    path = _part(parts, layer, projection)
    report = {
        "layer": layer,
        "projection": projection,
        "sweeps": fit.sweeps,
        "errors": [round(e, 6) for e in fit.errors.tolist()],
    }
    write_json(path.with_suffix(".json"), report)
    with publishing(path) as temporary:
        save_file({name: t.to(dtype).contiguous() for name, t in tensors.items()}, temporary)
    return round(fit.errors.mean().item(), 6)


def _assemble(
    run: Run, folder: Path, config: Any, checkpoint: Checkpoint, parts: Path, tasks: list[tuple[int, str]]
) -> None:
    spec = spec_for(config, str(folder))
    dtype = getattr(torch, run.config.model.dtype)
    tokenizer = tokenizer_facts(load_tokenizer(folder))

    def tensors():
        for name in checkpoint.files:
            if not spec.is_expert(name):
                yield name, checkpoint.tensor(name).to(dtype)
        for layer, projection in tasks:
            for name, tensor in load_file(_part(parts, layer, projection)).items():
                yield f"{spec.block.format(i=layer)}.{name}", tensor

    with publishing(run.path("student-0")) as temporary:
        write_weights(temporary, tensors())
        student = student_config(config, run.config.compress.rank)
        student.dtype = dtype
        write_config(temporary, student)
        copy_side_files(folder, temporary)
        report = {
            "teacher": {
                "id": run.config.model.teacher,
                "revision": run.config.model.revision,
                "weights": weights_fingerprint(folder),
            },
            "tokenizer": tokenizer,
            "rank": run.config.compress.rank,
            "parts": [read_json(_part(parts, *task).with_suffix(".json")) for task in tasks],
        }
        write_json(temporary / "compress.json", report)
