"""Tasks that make a stock model of fewer experts: a plan for each layer, then the model's folder."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakd.compress.choose import Plan, best_experts, clusters, merged, put_in_order
from megakd.compress.job import Job
from megakd.compress.measuring import drop_inputs
from megakd.models.cut import Cut, groups_of
from megakd.models.hub import cast, exact_names, model_of, write_config, write_weights
from megakd.models.shared_core import PROJECTIONS
from megakd.models.sources import as_stored
from megakd.system.files import publishing

SHARD_BYTES = 2**30  # a file of the model, held in memory while it is written


def plan_layer(job: Job, layer: int, output: Path) -> None:
    """Choose what becomes of a layer's experts, from what calibration measured on its training tokens."""
    settings, count, groups = job.settings, cut_of(job).spec.experts, groups_of(job.config)
    with safe_open(job.part(layer, "inputs"), "pt") as file:
        counts = file.get_tensor("counts") - file.get_tensor("counts_held")
        scores = file.get_tensor("saliency") if settings.criterion == "reap" else counts
        likeness = file.get_tensor("likeness") if settings.method == "merge" else None
    if likeness is None:
        plan = best_experts(scores, count, groups)
    else:
        plan = clusters(likeness, counts, count, groups)
        if settings.align == "auto":
            plan = put_in_order(plan, *(job.sources.experts(job.spec, layer, p) for p in PROJECTIONS))
    with publishing(output) as temporary:
        save_file({**plan._asdict(), "scores": scores.float(), "counts": counts}, temporary)
    drop_inputs(job, layer)


def read_plan(job: Job, layer: int) -> Plan:
    tensors = load_file(job.part(layer, "plan"))
    return Plan(**{name: tensors[name] for name in Plan._fields})


def cut_of(job: Job) -> Cut:
    assert job.cut is not None, job.folder
    return job.cut


def write_pruned(job: Job, output: Path) -> None:
    """Write the model of fewer experts: as the student is stored, or, where a student is made of it, as the teacher."""
    cut, keeps = cut_of(job), job.settings.method == "shared_core"
    with publishing(output) as temporary:
        write_weights(temporary, _tensors(job, None if keeps else job.dtype), SHARD_BYTES)
        if not keeps:
            cut.config.dtype = job.dtype
        write_config(temporary, cut.config)


def _tensors(job: Job, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(name as hubs store it, tensor), no more than a stack of a layer's experts in memory at a time."""
    model, spec = model_of(cut_of(job).config, str(job.folder)), cut_of(job).spec
    exact = exact_names(model)
    plans = {layer: read_plan(job, layer) for layer in spec.layers}

    def stored(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        typed = {
            name: tensor if dtype is None else cast(name, tensor, dtype, exact) for name, tensor in tensors.items()
        }
        yield from as_stored(model, typed).items()

    parts: dict[str, list[str]] = {}
    for name in job.sources.made_by:
        if not job.spec.is_expert(name):
            parts.setdefault(".".join(name.split(".")[:3]), []).append(name)
    for names in parts.values():  # a layer's together: hubs may store some of them in one tensor
        yield from stored({name: _shared(job, name, plans) for name in names})
    for layer, plan in plans.items():
        names = spec.fused(layer)
        gate, up = (merged(job.sources.experts(job.spec, layer, p), plan, 0) for p in ("gate", "up"))
        both = torch.cat([gate, up], 1)
        del gate, up
        yield from stored({names["gate_up_proj"]: both})
        del both
        yield from stored({names["down_proj"]: merged(job.sources.experts(job.spec, layer, "down"), plan, 1)})


def _shared(job: Job, name: str, plans: dict[int, Plan]) -> Tensor:
    """A tensor besides the experts; a router's has the rows of those that are left.

    Of a cluster, the row of its leading expert: the mean of rows with different directions is a router that prefers
    none of them.
    """
    tensor, axis = job.sources.raw(name), cut_of(job).axes.get(name)
    if axis is None:
        return tensor
    plan = next(plan for layer, plan in plans.items() if name.startswith(f"model.layers.{layer}."))
    return tensor.index_select(axis, plan.leading)
