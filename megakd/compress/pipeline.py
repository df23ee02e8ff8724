"""Compress a teacher: tasks that any number of processes share through the run's folder."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from megakd.compress.calibrate import LayerRunner, find_super_experts
from megakd.compress.fit import Settings, Statistics, best_split, fit_projection
from megakd.compress.forms import Candidate
from megakd.compress.permute import alignment
from megakd.compress.planner import allocate
from megakd.compress.predict import measure, reach
from megakd.data.batches import collate
from megakd.data.shards import ShardSet, read_manifest
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer
from megakd.errors import UserError
from megakd.identity import DataIdentity, TeacherIdentity, changed_fingerprint, fingerprint
from megakd.models.checks import check_isolation
from megakd.models.hub import (
    Checkpoint,
    cast,
    check_folder,
    check_unquantized,
    copy_code,
    copy_side_files,
    load_config,
    write_config,
    write_weights,
)
from megakd.models.isolation import check_packing
from megakd.models.shared_core import (
    PROJECTIONS,
    DenseExperts,
    Form,
    SharedCoreExperts,
    factor_shapes,
    stored_parameters,
)
from megakd.models.spec import MoESpec, spec_for
from megakd.models.student import student_config
from megakd.names import resolve
from megakd.run import Run
from megakd.system.dist import read_world, take_device
from megakd.system.files import discard, publishing, read_json, write_json
from megakd.system.logging import say
from megakd.system.tasks import Task
from megakd.system.version import made_with

SAMPLE = 8  # experts that a split of ranks is tried on


SCAN_TOKENS = 8192  # that super experts are looked for in


SHARD_BYTES = 2**30  # a file of the student, held in memory while it is written


class Job(NamedTuple):
    """What every task needs to know; `parts` is where tasks leave what they made."""

    run: Run
    folder: Path
    config: Any
    checkpoint: Checkpoint
    spec: MoESpec
    names: list[str]  # of the teacher's tensors that its model has a place for
    layers: list[int]
    parts: Path
    device: torch.device
    describe: Callable[[Path, dict[str, Any]], None]  # adds a model card and a plot to the finished student's folder

    def part(self, layer: int, kind: str) -> Path:
        return self.parts / f"layer-{layer:03d}-{kind}.safetensors"

    @property
    def experts(self) -> int:
        return self.spec.num_experts(self.config)


def undescribed(folder: Path, report: dict[str, Any]) -> None:
    """No model card and no plot."""


def open_job(run: Run, describe: Callable[[Path, dict[str, Any]], None] = undescribed) -> Job:
    """The teacher and what is to be done with it; UserError when it cannot be."""
    folder = resolve(run.config.model.teacher, run.config.model.revision)
    config, checkpoint = load_config(folder), Checkpoint(folder)
    check_folder(folder, config)
    check_unquantized(folder, config, "compress")
    spec = spec_for(config, str(folder))
    layers = spec.moe_layers(config)
    if not layers:
        raise UserError(f"{folder}: no layer of this {config.model_type} has experts; there is nothing to compress")
    settings, smallest = run.config.compress, min(spec.sizes(config))
    if settings.budget is None and settings.rank > smallest:
        raise UserError(f"{run.folder}: compress.rank={settings.rank} exceeds the experts' smaller side, {smallest}")
    names = checkpoint.names_of(spec, config)
    device = take_device(read_world()).device
    job = Job(run, folder, config, checkpoint, spec, names, layers, run.path("compress"), device, describe)
    if settings.calibration_tokens and not run.path("data", "tokens", "train", "manifest.json").exists():
        raise UserError(
            f"{run.folder}: compress.calibration_tokens={settings.calibration_tokens} needs the run's tokens; "
            f"run: megakd tokenize {run.folder}, or set compress.calibration_tokens=0"
        )
    if settings.calibration_tokens:
        tokens = run.path("data", "tokens", "train")
        made = DataIdentity.of(read_manifest(tokens)["facts"])
        if different := identify_tokenizer(load_tokenizer(folder)).difference(made.tokenizer):
            raise UserError(
                f"{tokens}: tokenized with another tokenizer than {folder} has ({different}); tokenize in a new run"
            )
        check_isolation(run)
    _same_teacher(job)
    return job


def _same_teacher(job: Job) -> str:
    """The fingerprint of the teacher that any process began this work with; UserError when it is another now."""
    known = job.parts / "teacher.json"
    if not known.exists():
        write_json(known, {"weights": fingerprint(job.folder)})
    begun = read_json(known)["weights"]
    if now := changed_fingerprint(begun, job.folder):
        raise UserError(
            f"{job.parts}: begun with a teacher of fingerprint {begun}, {job.folder} has {now} now: its weights or its "
            "config.json were changed; restore them, or delete that folder to begin again"
        )
    return begun


def tasks(job: Job) -> list[Task]:
    """Everything to be done, in the order in which it is best begun."""
    settings, found = job.run.config.compress, []
    supers, forms = job.parts / "super-experts.json", job.parts / "forms.json"
    before: tuple[Path, ...] = ()
    if settings.super_experts == "auto":
        found.append(Task("super experts", supers, (), partial(_scan, job, supers)))
        before = (supers,)
    measuring, tables, fitting = [], [], []
    for index, layer in enumerate(job.layers):
        first, needs = [], before
        if settings.align == "auto":
            order = job.part(layer, "order")
            first.append(Task(f"order of layer {layer}", order, (), partial(_order, job, layer, order)))
            needs += (order,)
        if settings.calibration_tokens:
            inputs, behind = job.part(layer, "inputs"), ()
            if index:
                previous = job.layers[index - 1]
                fitted = tuple(job.part(previous, p) for p in PROJECTIONS) if settings.sequential else ()
                behind = (job.part(previous, "inputs"), *fitted)
            first.append(Task(f"inputs of layer {layer}", inputs, behind, partial(_calibrate, job, layer, inputs)))
            needs += (inputs,)
        if settings.budget is not None:
            table = job.parts / f"layer-{layer:03d}-candidates.json"
            first.append(Task(f"candidates of layer {layer}", table, needs, partial(_candidates, job, layer, table)))
            tables.append(table)
            needs += (forms,)
        measuring.append(first)
        outputs = {p: job.part(layer, p) for p in PROJECTIONS}
        fits = [Task(f"layer {layer} {p}", o, needs, partial(_fit, job, layer, p, o)) for p, o in outputs.items()]
        fitting.append(fits)
    if settings.budget is not None:
        found += chain.from_iterable(measuring)
        found.append(Task("forms", forms, tuple(tables), partial(_choose, job, tables, forms)))
        found += chain.from_iterable(fitting)
    else:  # measurements are serial, so they are a layer ahead of the fits; not more, for they take room on the disk
        for first, fits in zip([*measuring, []], [[], *fitting], strict=True):
            found += first + fits
    finished = job.run.path("student-0", "compress.json")
    found.append(Task("the student", finished, tuple(task.output for task in found), partial(_assemble, job)))
    return found


def _scan(job: Job, output: Path) -> None:
    """Run the teacher over some tokens and look for experts with massive outputs."""
    runner = _runner(job, min(SCAN_TOKENS, job.run.config.compress.calibration_tokens))
    hidden, peaks = runner.embed(), {}
    for layer in range(job.layers[-1] + 1):
        hidden, measured = runner.layer(layer, hidden, measure=layer in job.layers)
        if measured is not None:
            peaks[layer] = measured.peaks
    found = find_super_experts(peaks)
    for layer, experts in found.items():
        say(f"compress: layer {layer} keeps expert {', '.join(map(str, experts))} dense (massive activations)")
    write_json(output, {str(layer): list(experts) for layer, experts in found.items()})


def _candidates(job: Job, layer: int, output: Path) -> None:
    """What each form would cost one layer, and lose: of the weights, or where it was measured of the residual stream.

    Layers normalise the stream they read: an error counts by what it is of the squared norm behind the layer.
    """
    settings, active, exempt = job.run.config.compress, job.config.num_experts_per_tok, _exempt(job, layer)
    found: dict[str, Any] = {}
    for projection in PROJECTIONS:
        weights, order = _in_order(job, layer, projection)
        statistics = _statistics(job, layer, projection, order) if settings.calibration_tokens else None
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


def _choose(job: Job, tables: list[Path], output: Path) -> None:
    """Spend the budget over all layers."""
    settings, active, found = job.run.config.compress, job.config.num_experts_per_tok, {}
    for layer, path in zip(job.layers, tables, strict=True):
        for projection, rows in read_json(path).items():
            found[layer, projection] = [Candidate(**{**row, "form": Form(*row["form"])}) for row in rows]
    elements = len(job.layers) * sum(rows * columns for rows, columns in job.spec.shapes(job.config).values())
    assert settings.budget is not None
    chosen = allocate(found, elements * job.experts, settings.budget, 2 * elements * active, settings.flops)
    write_json(output, {f"{layer}.{projection}": form._asdict() for (layer, projection), form in chosen.items()})


def _order(job: Job, layer: int, output: Path) -> None:
    """Permutations of hidden units that make experts alike, [E, F]; empty where there are none."""
    gate, up, down = (job.checkpoint.experts(job.spec, job.config, layer, p) for p in PROJECTIONS)
    found = alignment(gate, up, down)
    if found is not None:
        say(f"compress: the experts of layer {layer} are copies of each other; their hidden units are put in order")
    with publishing(output) as temporary:
        save_file({"order": torch.empty(0, dtype=torch.int64) if found is None else found.contiguous()}, temporary)


def _calibrate(job: Job, layer: int, output: Path) -> None:
    """Measure the inputs of a layer's experts, behind the layer with experts before it."""
    settings, index = job.run.config.compress, job.layers.index(layer)
    previous = job.layers[index - 1] if index else None
    runner, replaced = _runner(job, settings.calibration_tokens), None
    if previous is None:
        hidden, first = runner.embed(), 0
    else:
        with safe_open(job.part(previous, "inputs"), "pt") as file:
            hidden, first = file.get_tensor("tokens").to(job.device), previous
        if settings.sequential:
            replaced = _compressed(job, previous)
        else:
            first += 1
    for index in range(first, layer):
        hidden, _ = runner.layer(index, hidden, experts=replaced if index == previous else None)
    after, measured = runner.layer(layer, hidden, measure=True)
    assert measured is not None, layer
    # with `sequential` the next layer begins again before this one, which is compressed by then
    tensors = {"tokens": hidden if settings.sequential else after, **measured._asdict()}
    with publishing(output) as temporary:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary)
    if previous is not None:
        _shrink(job, previous)


def _shrink(job: Job, layer: int) -> None:
    """Empty a layer's measurements once nobody wants them: at Qwen3-30B-A3B's sizes they are 0.9 GB a layer."""
    index = job.layers.index(layer) + 1
    after = [job.part(following, "inputs") for following in job.layers[index : index + 1]]
    if all(path.exists() for path in (*after, *(job.part(layer, p) for p in PROJECTIONS))):
        with publishing(job.part(layer, "inputs")) as temporary:
            save_file({}, temporary)


def _compressed(job: Job, layer: int) -> Callable[..., Tensor]:
    """The experts of a layer that is fitted already, to be run in the place of the teacher's."""
    hidden, expert_hidden = job.spec.sizes(job.config)
    tensors, forms = {}, {}
    for projection in PROJECTIONS:
        part = job.part(layer, projection)
        tensors |= load_file(part)
        forms[projection] = Form(**read_json(part.with_suffix(".json"))["form"])
    act_fn = ACT2FN[job.config.hidden_act].forward
    core = nn.ModuleDict()
    for projection in PROJECTIONS:
        weight = tensors[f"shared_core.{projection}_proj.weight"].float()
        core[f"{projection}_proj"] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        core[f"{projection}_proj"].weight = nn.Parameter(weight)  # type: ignore[assignment]
    exempt = None
    if ids := _exempt(job, layer):
        exempt = DenseExperts(ids, hidden, expert_hidden, act_fn)
        exempt.load_state_dict(_kept(job, layer, ids))
    experts = SharedCoreExperts(job.experts, hidden, expert_hidden, forms, act_fn, core, exempt)
    prefix = "experts."
    experts.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    for module in (core, exempt, experts):
        if module is not None:
            module.to(job.device).requires_grad_(False)
    return experts


def _fit(job: Job, layer: int, projection: str, output: Path) -> None:
    """Fit one projection of one layer; its report is written first, its tensors say that it is done."""
    settings, started = job.run.config.compress, time.perf_counter()
    weights, order = _in_order(job, layer, projection)
    statistics = _statistics(job, layer, projection, order) if settings.calibration_tokens else None
    solver = Settings(
        settings.solver, settings.sweeps, settings.tolerance, settings.damping, settings.steps, settings.lr
    )
    form = _form(job, layer, projection, weights, solver, statistics)
    exempt = _exempt(job, layer)
    tensors, fit = fit_projection(weights.to(job.device), projection, form, solver, statistics, exempt)
    dtype = getattr(torch, job.run.config.model.dtype)
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
        _shrink(job, layer)
    job.run.record(
        "fit",
        layer=layer,
        projection=projection,
        error=round(fit.errors.mean().item(), 6),
        seconds=round(time.perf_counter() - started, 3),
    )


def _in_order(job: Job, layer: int, projection: str) -> tuple[Tensor, Tensor]:
    """A projection's matrices, hidden units in the order that makes experts alike, and that order, [E, F] or empty."""
    weights = job.checkpoint.experts(job.spec, job.config, layer, projection)
    if job.run.config.compress.align == "off":
        return weights, torch.empty(0)
    order = load_file(job.part(layer, "order"))["order"]
    axis = 1 if projection == "down" else 0
    for expert, units in enumerate(order):
        weights[expert] = weights[expert].index_select(axis, units)
    return weights, order


def _form(
    job: Job, layer: int, projection: str, weights: Tensor, solver: Settings, statistics: Statistics | None
) -> Form:
    """What the run wants: the planner's choice, or wrappers of `rank`, or of as many parameters divided better."""
    settings = job.run.config.compress
    if settings.budget is not None:
        return Form(**read_json(job.parts / "forms.json")[f"{layer}.{projection}"])
    form = Form("wrappers", settings.rank, settings.rank)
    if settings.split == "equal":
        return form
    sizes = job.spec.sizes(job.config)
    stored = sum(n * r for _, n, r in factor_shapes(form, projection, 1, *sizes).values())
    chosen = torch.arange(0, len(weights), max(len(weights) // SAMPLE, 1))[:SAMPLE]
    if statistics is not None:
        shared = ("covariance", "held_out") if projection != "down" else ()
        own: dict[str, Any] = {n: t for n, t in statistics._asdict().items() if t is not None and n not in shared}
        statistics = statistics._replace(**{name: tensor[chosen] for name, tensor in own.items()})
    return best_split(weights[chosen], projection, stored, solver, statistics)


def _statistics(job: Job, layer: int, projection: str, order: Tensor) -> Statistics:
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


def _exempt(job: Job, layer: int) -> tuple[int, ...]:
    if job.run.config.compress.super_experts == "off":
        return ()
    return tuple(read_json(job.parts / "super-experts.json").get(str(layer), ()))


def _kept(job: Job, layer: int, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """The matrices of experts that stay dense, stacked."""
    gate, up, down = (job.checkpoint.experts(job.spec, job.config, layer, p)[list(ids)] for p in PROJECTIONS)
    return {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}


def _runner(job: Job, tokens: int) -> LayerRunner:
    """Over windows spread evenly through the run's training tokens."""
    length = job.run.config.data.sequence_length
    shards = ShardSet(job.run.path("data", "tokens", "train"))
    packing = job.run.config.data.packing
    check_packing(shards.facts, packing, shards.folder)
    # sequences of one document are shorter than `length`
    count = min(-(-tokens // (length if packing == "packed" else max(shards.tokens // len(shards), 1))), len(shards))
    samples = [shards[len(shards) * i // count] for i in range(count)]
    batch = collate(samples, length)
    shards.close()
    lengths = torch.tensor([len(sample.tokens) - 1 for sample in samples])
    return LayerRunner(job.checkpoint, job.spec, job.config, batch.tokens, batch.position_ids, job.device, lengths)


def _assemble(job: Job) -> None:
    """Write the student from the parts, one at a time; then they are not needed any more."""
    run, dtype = job.run, getattr(torch, job.run.config.model.dtype)
    reports = [read_json(job.part(layer, p).with_suffix(".json")) for layer in job.layers for p in PROJECTIONS]
    forms: dict[int, dict[str, Form]] = {layer: {} for layer in job.layers}
    for part in reports:
        forms[part["layer"]][part["projection"]] = Form(**part["form"])
    exempt = {layer: _exempt(job, layer) for layer in job.layers}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in job.names:
            if not job.spec.is_expert(name):
                yield job.spec.module_name(name), cast(name, job.checkpoint.tensor(name), dtype)
        for layer in job.layers:
            block = job.spec.block.format(i=layer)
            for projection in PROJECTIONS:
                for name, tensor in load_file(job.part(layer, projection)).items():
                    yield f"{block}.{name}", tensor
            if exempt[layer]:
                for name, tensor in _kept(job, layer, exempt[layer]).items():
                    yield f"{block}.dense_experts.{name}", tensor.to(dtype)

    stored = sum(
        stored_parameters(form, p, job.experts, *job.spec.sizes(job.config))
        for layer in job.layers
        for p, form in forms[layer].items()
    )
    settings = run.config.compress
    report = {
        "megakd": made_with(),
        "teacher": TeacherIdentity(run.config.model.teacher, run.config.model.revision, _same_teacher(job)).record(),
        "tokenizer": identify_tokenizer(load_tokenizer(job.folder)).record(),
        "rank": settings.rank if settings.budget is None else None,
        "expert_parameters": stored,
        "calibration_tokens": settings.calibration_tokens,
        "dense_experts": {str(layer): list(ids) for layer, ids in exempt.items() if ids},
        "parts": reports,
    }
    with publishing(run.path("student-0")) as temporary:
        write_weights(temporary, tensors(), SHARD_BYTES)
        student = student_config(job.config, forms, exempt)
        student.dtype = dtype
        copy_code(temporary, student)
        write_config(temporary, student)
        copy_side_files(job.folder, temporary)
        write_json(temporary / "compress.json", report)
        job.describe(temporary, report)
    discard(job.parts)
