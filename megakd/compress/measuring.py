"""Tasks that measure the teacher's experts: super experts, copies in another order, the inputs of each layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megakd.compress.calibrate import HELD_OUT, LayerRunner, find_super_experts
from megakd.compress.job import Job
from megakd.compress.metric import Statistics
from megakd.compress.permute import alignment
from megakd.data.batches import collate
from megakd.data.shards import ShardSet
from megakd.models.isolation import check_packing
from megakd.models.shared_core import PROJECTIONS, DenseExperts, Form, SharedCoreExperts
from megakd.models.sources import Sources
from megakd.models.spec import MoESpec
from megakd.system.files import publishing, read_json, write_json
from megakd.system.logging import say

SCAN_TOKENS = 8192  # that super experts are looked for in


def find_supers(job: Job, output: Path) -> None:
    """Run the teacher over some tokens and look for experts with massive outputs."""
    runner = _runner(job, min(SCAN_TOKENS, job.settings.calibration_tokens))
    hidden, peaks = runner.embed(), {}
    for layer in range(job.layers[-1] + 1):
        hidden, measured = runner.layer(layer, hidden, measure=layer in job.layers)
        if measured is not None:
            peaks[layer] = measured.peaks
    found = find_super_experts(peaks)
    for layer, experts in found.items():
        say(f"compress: layer {layer} keeps expert {', '.join(map(str, experts))} dense (massive activations)")
    write_json(output, {str(layer): list(experts) for layer, experts in found.items()})


def find_order(job: Job, layer: int, output: Path) -> None:
    """Permutations of hidden units that make experts alike, [E, F]; empty where there are none."""
    gate, up, down = (job.sources.experts(job.spec, layer, p) for p in PROJECTIONS)
    found = alignment(gate, up, down)
    if found is not None:
        say(f"compress: the experts of layer {layer} are copies of each other; their hidden units are put in order")
    with publishing(output) as temporary:
        save_file({"order": torch.empty(0, dtype=torch.int64) if found is None else found.contiguous()}, temporary)


def measure_inputs(job: Job, layer: int, output: Path) -> None:
    """Measure the inputs of a layer's experts, behind the layer with experts before it."""
    settings, index = job.settings, job.layers.index(layer)
    previous = job.layers[index - 1] if index else None
    runner, replaced = _runner(job, settings.calibration_tokens), None
    if previous is None:
        hidden, first = runner.embed(), 0
    else:
        with safe_open(job.part(previous, "inputs"), "pt") as file:
            hidden, first = file.get_tensor("tokens").to(job.device), previous
        if job.sequential:
            replaced = compressed(job, previous)
        else:
            first += 1
    for index in range(first, layer):
        hidden, _ = runner.layer(index, hidden, experts=replaced if index == previous else None)
    after, measured = runner.layer(layer, hidden, measure=True, compare=settings.method == "merge")
    assert measured is not None, layer
    if job.teacher is None:
        with publishing(job.answers(layer)) as temporary:
            windows = hidden[::HELD_OUT]
            save_file({"hidden": windows.cpu().clone(), "answers": measured.answers.cpu()}, temporary)
    # with `sequential` the next layer begins again before this one, which is compressed by then
    tensors = {**measured._asdict(), "tokens": hidden if job.sequential else after}
    del tensors["answers"]
    with publishing(output) as temporary:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary)
    if previous is not None:
        drop_inputs(job, previous)


def drop_inputs(job: Job, layer: int) -> None:
    """Empty a layer's measurements once nobody wants them: at Qwen3-30B-A3B's sizes they are 0.9 GB a layer."""
    index = job.layers.index(layer) + 1
    after = [job.part(following, "inputs") for following in job.layers[index : index + 1]]
    if all(path.exists() for path in (*after, *job.results(layer))):
        with publishing(job.part(layer, "inputs")) as temporary:
            save_file({}, temporary)


def compressed(job: Job, layer: int) -> Callable[..., Tensor]:
    """The experts of a layer that is fitted already, to be run in the place of the teacher's."""
    hidden, expert_hidden = job.spec.sizes
    tensors, forms = {}, {}
    for projection in PROJECTIONS:
        part = job.part(layer, projection)
        tensors |= load_file(part)
        forms[projection] = Form(**read_json(part.with_suffix(".json"))["form"])
    act_fn = job.spec.activation
    core = nn.ModuleDict()
    for projection in PROJECTIONS:
        weight = tensors[f"shared_core.{projection}_proj.weight"].float()
        core[f"{projection}_proj"] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        core[f"{projection}_proj"].weight = nn.Parameter(weight)  # type: ignore[assignment]
    exempt = None
    if ids := job.exempt(layer):
        exempt = DenseExperts(ids, hidden, expert_hidden, act_fn)
        exempt.load_state_dict(job.dense_experts(layer, ids))
    experts = SharedCoreExperts(job.experts, hidden, expert_hidden, forms, act_fn, core, exempt)
    prefix = "experts."
    experts.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    for module in (core, exempt, experts):
        if module is not None:
            module.to(job.device).requires_grad_(False)
    return experts


def _runner(job: Job, tokens: int) -> LayerRunner:
    """Over windows spread evenly through the run's training tokens."""
    return runner_over(job, job.sources, job.spec, job.config, tokens)


def runner_over(
    job: Job, sources: Sources, spec: MoESpec, config: Any, tokens: int | None = None, held_out: bool = False
) -> LayerRunner:
    """A model over the same windows; held_out: over those of calibration that are held out."""
    tokens = tokens or job.settings.calibration_tokens
    length = job.run.config.data.sequence_length
    shards = ShardSet(job.tokens)
    packing = job.run.config.data.packing
    check_packing(shards.facts, packing, shards.folder)
    # sequences of one document, or of whole conversations, are shorter than `length`
    short = packing == "documents" or shards.masked
    count = min(-(-tokens // (max(shards.tokens // len(shards), 1) if short else length)), len(shards))
    samples = [shards[len(shards) * i // count] for i in range(count)]
    samples = samples[::HELD_OUT] if held_out else samples
    batch = collate(samples, length)
    shards.close()
    lengths = torch.tensor([len(sample.tokens) - 1 for sample in samples])
    return LayerRunner(
        sources,
        spec,
        config,
        batch.tokens,
        batch.position_ids,
        device=job.device,
        lengths=lengths,
    )


def in_order(job: Job, layer: int, projection: str) -> tuple[Tensor, Tensor]:
    """A projection's matrices, hidden units in the order that makes experts alike, and that order, [E, F] or empty."""
    weights = job.sources.experts(job.spec, layer, projection)
    if job.settings.align == "off":
        return weights, torch.empty(0)
    order = load_file(job.part(layer, "order"))["order"]
    axis = 1 if projection == "down" else 0
    for expert, units in enumerate(order):
        weights[expert] = weights[expert].index_select(axis, units)
    return weights, order


def statistics_of(job: Job, layer: int, projection: str, order: Tensor) -> Statistics:
    """What calibration measured about the inputs of a projection, in the order that its hidden units have now."""
    kind = "hidden" if projection == "down" else "inputs"
    with safe_open(job.part(layer, "inputs"), "pt") as file:  # only what is wanted: hidden moments are 600 MB
        share, counts = file.get_tensor("share"), file.get_tensor("counts")
        seen, held = file.get_tensor(kind), file.get_tensor(f"{kind}_held")
        rows = None if projection == "down" else file.get_tensor(f"{projection}_rows")
    if rows is not None:
        return Statistics(share, seen, held, counts, rows.gather(1, order) if len(order) else rows)
    for expert, units in enumerate(order):
        for moments in (seen, held):
            moments[expert] = moments[expert][units][:, units]
    return Statistics(share, seen, held, counts)
