"""What a run will take, from its configuration and the teacher's config.json alone; starts nothing.

examples:
  megakd plan runs/a
"""

import argparse
from typing import Any

from megakd.config import CompressConfig
from megakd.log import short, table
from megakd.models.hub import empty_model, load_config, resolve
from megakd.models.predict import dense_flops, form_flops
from megakd.models.shared_core import PROJECTIONS, Form, stored_parameters
from megakd.models.spec import spec_for
from megakd.run import Run

# Measured (docs/benchmarks.md): a sweep over one matrix at rank 64, its time taken as proportional to size and rank;
# a process's memory with Qwen3-30B-A3B's 128 matrices a projection, and with the demo's, which hardly count.
SWEEP_SECONDS, MATRIX, RANK = 0.05, 768 * 2048, 64
LEAST_BYTES, PROJECTION_BYTES, EXPERTS = 0.5e9, 2.5e9, 128


def main(run: Run, args: argparse.Namespace) -> None:
    print(table(["plan", ""], [*sizes(run), *compression(run), *lengths(run)], left=True))


def sizes(run: Run) -> list[list[str]]:
    """Parameters and bytes of teacher and student, experts apart."""
    folder = resolve(run.config.model.teacher, run.config.model.revision, weights=False)
    config = load_config(folder)
    dense, compact = expert_parameters(config, run.config.compress.rank, str(folder))
    teachers, students = expert_flops(config, run.config.compress, str(folder))
    bound = "at most " if run.config.compress.budget is not None else ""
    answer = "what the planner chooses" if students is None else f"{bound}{short(students)} ({students / teachers:.1%})"
    if run.config.compress.budget is not None:
        compact = int(dense * run.config.compress.budget)
    rest = sum(p.numel() for p in empty_model(folder).parameters()) - dense
    width = 2 if run.config.model.dtype == "bfloat16" else 4
    student = compact + rest
    return [
        ["teacher", f"{short(dense + rest)} parameters, {short(dense)} in experts"],
        [
            "student",
            f"{short(student)} parameters, {short(compact)} in experts ({compact / dense:.1%} of the teacher's)",
        ],
        ["experts' FLOPs", f"{short(teachers)} a token and layer in the teacher, {answer} in the student"],
        ["student weights", f"{short(student * width)}B in {run.config.model.dtype}"],
        [
            "training state",
            f"{short(student * 16)}B over all ranks (fp32 master, two Adam moments, gradient), before activations",
        ],
    ]


def expert_parameters(config: Any, rank: int, place: str) -> tuple[int, int]:
    """Parameters in the teacher's experts, and in the student's with wrappers of `rank`."""
    spec = spec_for(config, place)
    layers, experts = len(spec.moe_layers(config)), spec.num_experts(config)
    dense = compact = 0
    for projection, (rows, columns) in spec.shapes(config).items():
        dense += layers * experts * rows * columns
        compact += layers * stored_parameters(Form("wrappers", rank, rank), projection, experts, *spec.sizes(config))
    return dense, compact


def expert_flops(config: Any, settings: CompressConfig, place: str) -> tuple[float, float | None]:
    """FLOPs a token of one layer's experts, teacher's and student's; with a budget the student's bound, or None."""
    active, (hidden, inner) = config.num_experts_per_tok, spec_for(config, place).sizes(config)
    dense = len(PROJECTIONS) * dense_flops(active, hidden, inner)
    if settings.budget is not None:
        return dense, None if settings.flops is None else settings.flops * dense
    form = Form("wrappers", settings.rank, settings.rank)
    return dense, sum(form_flops(form, p, active, hidden, inner) for p in PROJECTIONS)


def compression(run: Run) -> list[list[str]]:
    """What `compress` has to do, and about how long and in how much memory; nothing where the student is given."""
    if run.config.model.student:
        return []
    folder = resolve(run.config.model.teacher, run.config.model.revision, weights=False)
    config, settings = load_config(folder), run.config.compress
    spec = spec_for(config, str(folder))
    layers, experts = len(spec.moe_layers(config)), spec.num_experts(config)
    tokens = settings.calibration_tokens
    calibration = f"{tokens:,} tokens of calibration" if tokens else "no calibration"
    seconds, memory = fit_costs(settings, layers, experts, *spec.sizes(config))
    lasts = "unknown time with solver=adam" if seconds is None else f"up to {seconds / 3600:.2g} core-hours of fits"
    return [
        ["compress", f"{compress_tasks(settings, layers)} tasks for any number of processes, {calibration}"],
        [
            "compress takes",
            f"about {short(memory)}B a process, {lasts} (an estimate); calibration and planning add to it",
        ],
    ]


def compress_tasks(settings: CompressConfig, layers: int) -> int:
    """As many as compress.tasks makes."""
    each = len(PROJECTIONS) + (settings.align == "auto") + (settings.calibration_tokens > 0)
    each += settings.budget is not None
    return layers * each + (settings.super_experts == "auto") + (settings.budget is not None) + 1


def fit_costs(
    settings: CompressConfig, layers: int, experts: int, hidden: int, expert_hidden: int
) -> tuple[float | None, float]:
    """(core-seconds of all fits if every one takes all of its sweeps, None where not measured; bytes a process)."""
    size, rank = hidden * expert_hidden, float(settings.rank)
    if settings.budget is not None:  # of wrappers of as many numbers an expert
        rank = settings.budget * size / (hidden + 3 * expert_hidden)
    dampings = len(settings.damping) if settings.calibration_tokens else 1
    sweeps = settings.sweeps * dampings * layers * len(PROJECTIONS) * experts
    memory = LEAST_BYTES + PROJECTION_BYTES * size * experts / (MATRIX * EXPERTS)
    if settings.solver != "als":
        return None, memory
    return sweeps * SWEEP_SECONDS * size * rank / (MATRIX * RANK), memory


def lengths(run: Run) -> list[list[str]]:
    """Tokens, bytes and steps of the passes."""
    config = run.config
    data, stored = config.data, config.data.tokens + config.data.holdout_tokens
    logits = config.logits
    # measured, docs/data-format.md: about 12 bits an entry of the head, 16 a distinct draw
    upper = 4 + (logits.profile != "sampled") * 1.7 * logits.top_k + (logits.profile != "topk") * 1.2 * logits.draws
    rows = [
        [
            "tokens to cache",
            f"{short(stored)} in {-(-data.tokens // data.shard_tokens)} shards of {short(data.shard_tokens)}",
        ],
        ["cache on disk", f"at most about {short(stored * upper)}B ({upper:.0f} bytes a token)"],
    ]
    for stage in config.stages:
        steps, batch = config.steps_of(stage), config.at(stage).optim.batch_tokens
        passes = steps * batch / data.tokens
        rows.append(
            [f"stage {stage.name}", f"{steps} steps of {short(batch)} tokens, {passes:.2f} passes over the cache"]
        )
    return rows
