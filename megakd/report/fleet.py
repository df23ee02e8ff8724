"""`megakd plan --gpus`: memory per rank, bytes on disk and time per verb on many GPUs, as text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megakd.config.run import RunConfig
from megakd.measured import NAME, read_rates
from megakd.models.hub import load_config, model_of
from megakd.models.shared_core import PROJECTIONS
from megakd.models.spec import spec_for
from megakd.names import resolve
from megakd.report import duration, layouts
from megakd.report.layouts import Fleet, Step
from megakd.report.memory import GIB
from megakd.report.plan import cached_bytes, fit_costs
from megakd.run import Run
from megakd.system.logging import say
from megakd.system.text import short, table

TOKEN_BYTES = 4  # int32 in shards of tokens
OPTIMIZER_BYTES = 12  # per trained number in a checkpoint: float32 weights and two moments


def fleet_text(run: Run, fleet: Fleet, measured: Path | None, utilization: float) -> str:
    """measured: a file of rates; without it RUN/measured.json, if that exists. utilization: assumed share of FLOP/s."""
    rates = read_rates(measured) if measured else []
    if measured is None and run.path(NAME).exists():
        rates = read_rates(run.path(NAME))
    pair, note = layouts.pair_of(run)
    say("plan: running a training step on tensors without data; this takes a minute for a large student")
    step = layouts.open_step(run, pair, run.config.engine.activation_checkpointing)
    asked = step.config.optim.micro_batch
    size = next(each for each in layouts.micro_batches(step.config, fleet) if each <= asked)
    step = step._replace(config=layouts.with_micro_batch(step.config, size))
    found = layouts.divisions(step, fleet)
    chosen, needs = layouts.choose(found), ""
    if chosen is None and not run.config.engine.activation_checkpointing:
        needs = "; nothing fits without activation checkpointing, so it is on"
        step = layouts.open_step(run, pair, checkpointing=True)
        step = step._replace(config=layouts.with_micro_batch(step.config, size))
        found = layouts.divisions(step, fleet)
        chosen = layouts.choose(found)
    teacher = load_config(resolve(run.config.model.teacher, run.config.model.revision, weights=False))
    works = list(duration.works(step.config, pair.student, teacher, fleet))
    gpu, own = (
        fleet.gpu,
        "" if size == asked else f" (optim.micro_batch={asked} does not divide a GPU's share of a step)",
    )
    parts = [
        f"memory per GPU in GiB, predicted, {fleet.gpus} x {gpu.name} ({gpu.memory / GIB:.0f} GB, of which tensors may "
        f"take {layouts.room(gpu) / GIB:.1f}), micro-batch {size}{own}{needs}",
        table(layouts.HEADERS, list(layouts.rows(found, fleet))),
        f"take: {layouts.advice(chosen, found, step, fleet)}",
        *([f"student: {note}"] if note else []),
        *notes(run.config, fleet, teacher),
        "",
        table(["on disk, estimate", "bytes", ""], list(disk(run, step)), left=True),
        "",
        table(duration.HEADERS, list(duration.rows(works, fleet, rates, utilization)), left=True),
        *other_times(run.config, teacher, rates),
    ]
    return "\n".join(parts)


def notes(config: RunConfig, fleet: Fleet, teacher: Any) -> Iterator[str]:
    """What the tables do not show: the teacher of the capture, and arithmetic that the GPU lacks."""
    width = getattr(torch, config.logits.dtype).itemsize
    size = width * sum(parameter.numel() for parameter in model_of(teacher, "the teacher").parameters())
    if size <= layouts.room(fleet.gpu):
        how = "fits one GPU, activations apart"
    else:
        how = f"needs logits.parallel=zero3 on {-(-size // int(layouts.room(fleet.gpu)))} GPUs or more"
    yield f"capture: the teacher's weights take {size / GIB:.1f} GiB in {config.logits.dtype}: {how}"
    if config.model.dtype == "bfloat16" and not fleet.gpu.bfloat16:
        yield f"{fleet.gpu.name} has no matrix units for bfloat16; set model.dtype=float16 in a new run"


def disk(run: Run, step: Step) -> Iterator[list[str]]:
    """Bytes of tokens, logits, student and checkpoints."""
    config = run.config
    stored = config.data.tokens + config.data.holdout_tokens
    yield ["tokens", f"{short(stored * TOKEN_BYTES)}B", f"{TOKEN_BYTES} bytes per token"]
    if not config.objective.live:
        each = cached_bytes(config.logits)
        yield ["cached teacher logits", f"{short(stored * each)}B", f"at most about {each:.0f} bytes per token"]
    width = getattr(torch, config.model.dtype).itemsize
    count = sum(each.numel for each in step.parameters)
    trained = sum(each.numel for each in step.parameters if each.trained)
    yield ["student", f"{short(count * width)}B", f"{short(count)} parameters in {config.model.dtype}"]
    one = 2 * width * count + OPTIMIZER_BYTES * trained
    yield ["one checkpoint", f"{short(one)}B", "weights twice (weights/ and state/), float32 weights and moments"]
    made = sum(-(-config.steps_of(stage) // config.checkpoint.every_steps) for stage in config.stages)
    kept = min(made, config.checkpoint.keep or made)
    yield ["checkpoints", f"{short((kept + 1) * one)}B", f"{kept} that stay, and one that is being written"]


def other_times(config: RunConfig, teacher: Any, rates: list[dict[str, Any]]) -> Iterator[str]:
    """Verbs that run on CPUs."""
    rate = next((rate for rate in rates if rate["verb"] == "tokenize"), None)
    more = "" if rate else "; tokenize, which depends on CPUs and the source"
    yield f"not in these times: communication, start-up, checkpoints{more}"
    if rate:
        each, workers = rate["tokens_per_second"], max(config.data.workers, 1)
        took = duration.duration(config.data.tokens / each / workers)
        yield f"tokenize: {took} with {workers} workers at {short(each)} tokens/s each, measured on {rate['device']}"
    if config.model.student is None:
        spec = spec_for(teacher, "the teacher")
        layers, experts = len(spec.layers), spec.experts
        seconds, _ = fit_costs(config.compress, layers, experts, *spec.sizes)
        if seconds is not None and config.compress.method == "shared_core":
            fits = layers * len(PROJECTIONS)
            hours = f"{seconds / 3600:.2g} core-hours (estimate)"
            yield f"compress: up to {hours} in {fits} fits, for any number of processes"
