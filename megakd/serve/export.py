"""Write a student as a Hugging Face folder: compact, or expanded to the stock architecture."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.config.objective import SarConfig
from megakd.config.precisions import Quantize, label
from megakd.engine.checkpoint import auxiliary_file, published
from megakd.errors import UserError
from megakd.identity import TeacherIdentity, changed_fingerprint, fingerprint
from megakd.models.hub import (
    Checkpoint,
    cast,
    copy_side_files,
    exact_names,
    is_student,
    load_config,
    model_of,
    write_config,
    write_weights,
)
from megakd.models.router_update import UPDATE, TeacherRouters, read_update, write_update
from megakd.models.shared_core import PROJECTIONS, dense_weight
from megakd.models.sources import as_stored, by_layer
from megakd.models.spec import MoESpec, spec_for
from megakd.models.student import stock_config
from megakd.names import expand, model_folder, resolve
from megakd.objectives.sar import SEPARATOR
from megakd.outputs import producing
from megakd.report.model_card import write_card
from megakd.run import Run
from megakd.serve.quantize import Quantizer
from megakd.system.files import read_json, read_json_lines
from megakd.system.logging import say
from megakd.system.text import short
from megakd.system.version import made_with

MARK = "megakd export"


def export(
    run: Run, source: Path, out: Path | None, dense: bool, force: bool, few_bits: Quantize | None = None
) -> None:
    """Write the weights of `source` to `out`, or to RUN/export or RUN/export-dense, with config, tokenizer and card.

    dense: the stock architecture, for a shared-core student alone. force: as `megakd.outputs` says.
    few_bits: the precisions of --quantize, which the folder's name in the run tells.
    """
    own = run.path("-".join(["export", *["dense"] * dense, *([label(few_bits)] if few_bits else [])]))
    target = out or own
    check_inputs(run, source, target)
    config, checkpoint = load_config(source), Checkpoint(source)
    if dense and not is_student(config):
        raise UserError(f"{source}: model type {config.model_type!r} is stock already; export without --dense")
    dtype = getattr(torch, run.config.model.dtype)
    read = torch.float32 if few_bits else dtype
    made = stock_config(config) if dense else config
    model = model_of(made, str(source))
    tensors = dense_tensors(checkpoint, config, read) if dense else own_tensors(checkpoint, model, read)
    quantizer = Quantizer(few_bits, model, checkpoint, dtype) if few_bits else None
    config = made
    with producing(target, MARK, force, own) as temporary:
        tensors = finite(tensors, source)
        write_weights(temporary, finite(quantizer.tensors(tensors), source) if quantizer else tensors)
        config.dtype = dtype
        if quantizer:
            quantizer.mark(config)
        write_config(temporary, config)
        copy_side_files(source, temporary)
        describe(run, source, temporary)
        routers = write_routers(run, source, temporary / UPDATE) if run.config.objective.trains_routers else 0
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    run.record("export", folder=str(target), source=str(source), megakd=made_with())
    say(f"{target}: {(config.architectures or ['?'])[0]}, {short(size)}B, from {source}")
    if quantizer:
        say(f"{target}: {quantizer.summary()}")
    elif rounding := rounding_of(run, source):
        say(f"{target}: not rounded, as these weights learned to be served; for that add --quantize {label(rounding)}")
    if routers:
        say(f"{target / UPDATE}: {routers} routers that learned, for {run.config.model.teacher}")


def rounding_of(run: Run, source: Path) -> Quantize | None:
    """What the stage that made a checkpoint's weights rounded them to."""
    progress = source.parent / "progress.json"
    if source.name != "weights" or not progress.exists():
        return None
    return run.config.stages[read_json(progress)["stage"]].quantize


def last_weights(run: Run) -> Path:
    """The weights folder of the last checkpoint, else the student that training starts from."""
    saved = published(run.path("checkpoints"))
    return saved[-1].weights if saved else run.student_folder


def finite(tensors: Iterable[tuple[str, Tensor]], source: Path) -> Iterator[tuple[str, Tensor]]:
    """The same (name, tensor) pairs; UserError at the first tensor that holds NaN or infinity in its new dtype."""
    for name, tensor in tensors:
        codes = tensor.element_size() == 1  # of finite weights
        # NaN if an entry is; a sum over isfinite takes 50 times as long
        if tensor.is_floating_point() and not codes and not all(map(math.isfinite, torch.aminmax(tensor))):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{source}: {name} holds NaN or infinite values as {kind}; export another checkpoint (--checkpoint), "
                "or try model.dtype=bfloat16 in a new run if they are too large for float16"
            )
        yield name, tensor


def check_inputs(run: Run, source: Path, target: Path) -> None:
    """UserError where an export would replace a model that it, or its run, is made from."""
    student = Path(run.student_folder)
    for used in (source, student, model_folder(run.config.model.teacher)):
        if used is not None and target.resolve() == used.resolve():
            raise UserError(f"{target}: is a model that {run.folder} is made from; name another place")


def describe(run: Run, source: Path, folder: Path) -> None:
    """Write the model card of a finished export."""
    report = run.student_folder / "compress.json"
    measured = weights_name(source)
    write_card(
        folder,
        run.config.name,
        read_json(report) if report.exists() else None,
        read_json_lines(run.path("evals.jsonl"), "model"),
        measured,
        (run.student_folder, model_folder(run.config.model.teacher) or Path(run.config.model.teacher)),
    )


def weights_name(source: Path) -> str:
    """STAGE/step-N of a checkpoint's weights, as evals.jsonl names them; student-0 for every other folder."""
    place = source.resolve()
    return f"{place.parent.parent.name}/{place.parent.name}" if place.name == "weights" else "student-0"


def write_routers(run: Run, source: Path, folder: Path) -> int:
    """Write the routers that learned with the weights of `source` into the export; how many."""
    checkpoint = source.parent
    if source == run.student_folder or not auxiliary_file(checkpoint).exists():
        why = (
            "the student was not trained"
            if source == run.student_folder
            else f"{auxiliary_file(checkpoint)} is not there"
        )
        say(f"export: no router update: {why}")
        return 0
    model, sar = run.config.model, run.config.objective
    assert isinstance(sar, SarConfig), sar  # nothing else trains routers
    source = resolve(model.teacher, model.revision)
    begun = next((event["teacher"] for event in run.events("train") if "teacher" in event), None)
    if begun and (now := changed_fingerprint(begun, source)):
        raise UserError(
            f"{source}: its fingerprint is {now}, the routers learned in a teacher of {begun}; its weights or its "
            "config.json were changed: restore them"
        )
    teacher = TeacherRouters(source, sar.router_patterns)
    counts = ("initial_top_k", "final_top_k") if sar.routing == "top_m" else ()
    facts = {
        # a folder's name alone: where it lies is nobody else's business
        "teacher": TeacherIdentity(
            expand(model.teacher).name if model_folder(model.teacher) else model.teacher,
            model.revision,
            fingerprint(source),
        ).record(),
        **sar.model_dump(mode="json", include={"routing", "router_patterns", *counts}),
        "step": read_json(checkpoint / "progress.json")["step"],
    }
    write_update(folder, router_tensors(read_update(auxiliary_file(checkpoint))), teacher, facts)
    return len(teacher.found)


def router_tensors(auxiliary: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what the objective trains together with the student, the routers' tensors by their names in the teacher."""
    parts = ((name.partition(".")[::2], tensor) for name, tensor in auxiliary.items())
    return {name.replace(SEPARATOR, "."): tensor for (kind, name), tensor in parts if kind == "routers"}


def own_tensors(checkpoint: Checkpoint, model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors as hubs store them. Training names a stock model's as its modules do: experts stacked."""
    exact, known = exact_names(model), model.state_dict()

    def read(name: str) -> Tensor:
        return cast(name, checkpoint.tensor(name), dtype, exact)

    if is_student(model.config) or any(name not in known for name in checkpoint.files):
        yield from ((name, read(name)) for name in checkpoint.files)
        return
    for names in by_layer(checkpoint.files):
        yield from as_stored(model, {name: read(name) for name in names}).items()


def dense_tensors(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The stock model's tensors as hubs store them, experts one by one where those do; a layer is in memory at a time.

    checkpoint, config: of the student.
    """
    stock = stock_config(config)
    spec, model = spec_for(stock, str(checkpoint.folder)), model_of(stock, str(checkpoint.folder))
    exact = exact_names(model)
    blocks = {layer: f"{spec.place(layer)}." for layer in spec.layers if config.forms(layer)}
    inside = ("experts.", "shared_core.", "dense_experts.")
    for names in by_layer(checkpoint.files):
        whole = {}
        for name in names:
            block = next((each for each in blocks.values() if name.startswith(each)), None)
            if block is None or not name.removeprefix(block).startswith(inside):
                whole[name] = cast(name, checkpoint.tensor(name), dtype, exact)
        layer = next((i for i, block in blocks.items() if names[0].startswith(f"model.layers.{i}.")), None)
        if layer is not None:
            block = blocks[layer]
            factors = {n.removeprefix(block): checkpoint.tensor(n) for n in names if n.startswith(block)}
            whole |= _dense_experts(factors, spec, layer, config.dense_experts(layer), dtype)
        yield from as_stored(model, whole).items()


def _dense_experts(
    factors: dict[str, Tensor], spec: MoESpec, layer: int, exempt: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The two stacked tensors of a layer's experts."""

    def matrix(projection: str, expert: int) -> Tensor:
        if expert in exempt:
            return kept_weight(factors, projection, exempt.index(expert)).to(dtype)
        return dense_weight(factors, projection, expert).to(dtype)

    gate, up, down = (torch.stack([matrix(p, e) for e in range(spec.experts)]) for p in PROJECTIONS)
    names = spec.fused(layer)
    return {names["gate_up_proj"]: torch.cat([gate, up], dim=1), names["down_proj"]: down}


def kept_weight(tensors: dict[str, Tensor], projection: str, slot: int) -> Tensor:
    """One matrix of an expert that was kept dense."""
    if projection == "down":
        return tensors["dense_experts.down_proj"][slot]
    return tensors["dense_experts.gate_up_proj"][slot].chunk(2)[projection == "up"]
