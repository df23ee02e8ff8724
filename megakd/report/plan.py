"""What a run will take, as rows of a table: sizes, steps, bytes, memory."""

from pathlib import Path
from typing import Any

import torch

from megakd.compress.forms import dense_flops, form_flops
from megakd.compress.job import kept_experts
from megakd.config.checks import check_evaluation
from megakd.config.data import LogitsConfig
from megakd.config.model import CompressConfig
from megakd.config.precisions import NAMES
from megakd.config.run import RunConfig
from megakd.data.shards import ShardSet, read_manifest
from megakd.data.tokenizers import bos_of, bos_words, load_tokenizer
from megakd.errors import UserError
from megakd.models.checks import check_isolation, model_folders
from megakd.models.cut import cut_to
from megakd.models.hub import empty_model, load_config
from megakd.models.quantizing import stored_as
from megakd.models.shared_core import PROJECTIONS, Form, stored_parameters
from megakd.models.spec import active_experts, spec_for
from megakd.names import resolve
from megakd.report.memory import predictable
from megakd.run import Run
from megakd.system.text import short
from megakd.train.data import padding_share

# Measured (docs/experiments/2026-11-22-expert-fit.md): a sweep over one matrix at rank 64, its time taken as
# proportional to size and rank; a process's memory with Qwen3-30B-A3B's 128 matrices a projection, and with the demo's,
# which hardly count.
SWEEP_SECONDS, MATRIX, RANK = 0.05, 768 * 2048, 64
PADDED = 0.1  # of the positions: more is worth a word
LEAST_BYTES, PROJECTION_BYTES, EXPERTS = 0.5e9, 2.5e9, 128


def sizes(run: Run) -> list[list[str]]:
    """Parameters and bytes of teacher and student, experts apart."""
    folder = resolve(run.config.model.teacher, run.config.model.revision, weights=False)
    if run.config.model.student:
        return given_sizes(run.config, folder)
    config = load_config(folder)
    dense, compact, kept = expert_parameters(config, run.config.compress, str(folder))
    teachers, students = expert_flops(config, run.config.compress, str(folder))
    planned = run.config.compress.method == "shared_core" and run.config.compress.budget is not None
    bound = "at most " if planned else ""
    answer = "what the planner chooses" if students is None else f"{bound}{short(students)} ({students / teachers:.1%})"
    rest = sum(p.numel() for p in empty_model(folder).parameters()) - dense
    width = getattr(torch, run.config.model.dtype).itemsize
    student = compact + rest
    return [
        ["teacher", f"{short(dense + rest)} parameters, {short(dense)} in experts"],
        [
            "student",
            f"{short(student)} parameters, {short(compact)} in experts ({compact / dense:.1%} of the teacher's){kept}",
        ],
        ["experts' FLOPs", f"{short(teachers)} a token and layer in the teacher, {answer} in the student"],
        ["student weights", f"{short(student * width)}B in {run.config.model.dtype}"],
        *few_bits(empty_model(folder), str(folder), dense, compact),
        [
            "training state",
            f"{short(student * 16)}B over all ranks (fp32 master, two Adam moments, gradient), before activations",
        ],
    ]


def few_bits(teacher: Any, place: str, dense: int, compact: int) -> list[list[str]]:
    """Bytes of teacher and student in bfloat16 and in fewer bits, all matrices but embeddings.

    teacher: without weights. dense, compact: parameters in the teacher's experts, and in the student's.
    """
    try:
        whole = {name: stored_as(teacher, name, place).bytes for name in NAMES}
        inside = {name: whole[name] - stored_as(teacher, {"linear": name}, place).bytes for name in NAMES}
    except UserError as error:
        return [["in few bits", f"unknown: {error}"]]
    teachers = {"bfloat16": 2 * sum(p.numel() for p in teacher.parameters()), **whole}
    inside = {name: 2 * dense + saved for name, saved in inside.items()} | {"bfloat16": 2 * dense}
    students = {name: size - inside[name] * (1 - compact / dense) for name, size in teachers.items()}

    def listed(sizes: dict[str, Any]) -> str:
        return ", ".join(f"{short(size)}B {name}" for name, size in sizes.items())

    rows = [["teacher in few bits", listed(teachers)], ["student in few bits", f"about {listed(students)}"]]
    if students["bfloat16"] > teachers["int4"]:
        rows.append(
            ["", "the teacher in int4 is smaller than this student in bfloat16: store the student in few bits too"]
        )
        rows.append(
            ["", "(stages[].quantize), or quantise alone; which is better: docs/experiments/2026-12-01-size.md"]
        )
    return rows


def tasks(run: Run) -> list[list[str]]:
    """The tasks of lm-eval, opened as `evaluate` will; UserError for an unknown one, or one whose data is missing."""
    config = run.config.eval
    check_evaluation(config)
    if not config.tasks:
        return []
    from megakd.evals.tasks import Harness

    counts = Harness(config.tasks, config).questions()
    return [["eval.tasks", ", ".join(f"{name}: {count:,} questions" for name, count in counts.items())]]


def given_sizes(config: RunConfig, teacher: Path) -> list[list[str]]:
    """The same where the student is a model of its own; what training takes is predicted in full by `memory`."""
    assert config.model.student is not None
    student = resolve(config.model.student, config.model.student_revision, weights=False)
    counts = [sum(p.numel() for p in empty_model(folder).parameters()) for folder in (teacher, student)]
    rows = [[name, f"{short(count)} parameters"] for name, count in zip(("teacher", "student"), counts, strict=True)]
    if predictable(config):
        return rows
    state = f"{short(counts[1] * 16)}B over all ranks (fp32 master, two Adam moments, gradient), before activations"
    return [*rows, ["training state", state]]


def expert_parameters(config: Any, settings: CompressConfig, place: str) -> tuple[int, int, str]:
    """Parameters in the teacher's experts, and in the student's; how many experts are kept, in words.

    UserError where the student cannot have so few.
    """
    spec = spec_for(config, place)
    layers, count = len(spec.layers), kept_experts(settings, config, spec, place)
    dense = layers * spec.experts * sum(rows * columns for rows, columns in spec.shapes.values())
    words = "" if count is None else f", {count} of {spec.experts} experts in each layer"
    if count is not None:
        cut_to(config, spec, count, place)
    if settings.method != "shared_core":
        assert count is not None
        return dense, dense * count // spec.experts, words
    if settings.budget is not None:
        return dense, int(dense * settings.budget), words
    form, experts = Form("wrappers", settings.rank, settings.rank), count or spec.experts
    compact = layers * sum(stored_parameters(form, p, experts, *spec.sizes) for p in PROJECTIONS)
    return dense, compact, words


def expert_flops(config: Any, settings: CompressConfig, place: str) -> tuple[float, float | None]:
    """FLOPs per token of one layer's experts, teacher's and student's; with a budget the student's bound, or None."""
    active, (hidden, inner) = active_experts(config), spec_for(config, place).sizes
    dense = len(PROJECTIONS) * dense_flops(active, hidden, inner)
    if settings.method != "shared_core":
        return dense, dense
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
    layers, experts = len(spec.layers), spec.experts
    tokens = settings.calibration_tokens
    calibration = f"{tokens:,} tokens of calibration" if tokens else "no calibration"
    count = kept_experts(settings, config, spec, str(folder)) or experts
    seconds, memory = fit_costs(settings, layers, count, *spec.sizes)
    fits = layers * len(PROJECTIONS)
    tasks = f"{compress_tasks(settings, layers)} tasks"
    if settings.method != "shared_core":
        takes = (
            f"about {short(memory)}B per process (an estimate), and the time of calibration, which depends on the CPU"
        )
        return [
            ["compress", f"{settings.method}: {tasks} for any number of processes, {calibration}"],
            ["compress takes", takes],
        ]
    lasts = "unknown time with solver=adam" if seconds is None else f"up to {seconds / 3600:.2g} core-hours of fits"
    return [
        ["compress", f"{tasks} ({fits} fits) for any number of processes, {calibration}"],
        [
            "compress takes",
            f"about {short(memory)}B a process, {lasts} (an estimate); calibration and planning add to it",
        ],
    ]


def compress_tasks(settings: CompressConfig, layers: int) -> int:
    """As many as compress.tasks makes."""
    pruning = 2 * layers + 1  # inputs and the choice of each layer, and the model
    if settings.method != "shared_core":
        return pruning + layers + 1
    # a layer's inputs, and the error of its output
    each = len(PROJECTIONS) + (settings.align == "auto") + 2 * (settings.calibration_tokens > 0)
    each += settings.budget is not None
    return (
        (settings.experts is not None) * pruning
        + layers * each
        + (settings.super_experts == "auto")
        + (settings.budget is not None)
        + 1
    )


def fit_costs(
    settings: CompressConfig, layers: int, experts: int, hidden: int, expert_hidden: int
) -> tuple[float | None, float]:
    """(core-seconds of all fits if every one takes all of its sweeps, None where not measured; bytes a process)."""
    size, rank = hidden * expert_hidden, float(settings.rank)
    if settings.budget is not None:  # of wrappers of as many numbers per expert
        rank = settings.budget * size / (hidden + 3 * expert_hidden)
    dampings = len(settings.damping) if settings.calibration_tokens else 1
    sweeps = settings.sweeps * dampings * layers * len(PROJECTIONS) * experts
    memory = LEAST_BYTES + PROJECTION_BYTES * size * experts / (MATRIX * EXPERTS)
    if settings.solver != "als":
        return None, memory
    return sweeps * SWEEP_SECONDS * size * rank / (MATRIX * RANK), memory


def packing(run: Run) -> list[list[str]]:
    """How sequences are made, whether that is right for teacher and student, and how much of training is padding."""
    config, rows = run.config, []
    apart = config.data.packing == "documents"
    if not apart:
        try:
            check_isolation(model_folders(config.model), config.data.packing)
        except UserError as error:
            return [["packing", f"refused: {error}"]]
        rows.append(["packing", "packed: teacher and student separate the documents of a sequence"])
        if not config.data.has_chats:
            return rows
    words = "once they are tokenized, plan says how much is padding"
    if tokenized(run) is not None:
        dataset = ShardSet(run.path("data", "tokens", "train"))
        share = max(padding_share(config, stage, dataset) for stage in config.stages)
        remedy = "; optim.micro_batch and stream.group_by_length reduce it" if apart and share > PADDED else ""
        words = f"{share:.1%} of the positions that are computed is padding{remedy}"
    return [*rows, ["packing", f"one document per sequence; {words}"] if apart else ["padding", words]]


def beginnings(run: Run) -> list[list[str]]:
    """What documents begin with, by `data.bos`, as they are tokenized and as a live teacher reads them."""
    config, rule = run.config, run.config.data.bos
    if config.data.has_chats:
        return [["conversations begin", "as the chat template says"]]
    folders = [("documents begin", resolve(config.model.teacher, config.model.revision, weights=False))]
    if config.objective.live and config.model.student:
        folders = [("documents begin", run.student_folder), ("  for the teacher", folders[0][1])]
    tokenizers = [(name, load_tokenizer(folder)) for name, folder in folders]
    return [[name, f"{bos_words(own, bos_of(own, rule))} (data.bos={rule})"] for name, own in tokenizers]


def tokenized(run: Run) -> dict[str, Any] | None:
    """The manifest of the training tokens, once they are made."""
    folder = run.path("data", "tokens", "train")
    return read_manifest(folder) if (folder / "manifest.json").exists() else None


def cached_bytes(logits: LogitsConfig) -> float:
    """At most so many bytes per token: about 12 bits per entry of the head, 16 per distinct draw (measured,
    docs/data-format.md)."""
    return 4 + (logits.profile != "sampled") * 1.7 * logits.top_k + (logits.profile != "topk") * 1.2 * logits.draws


def lengths(run: Run) -> list[list[str]]:
    """Tokens, bytes and steps of the passes."""
    config, made = run.config, tokenized(run)
    windows = sum(shard["samples"] for shard in made["shards"]) if made else None
    data, logits = config.data, config.logits
    tokens = windows * data.sequence_length if windows else data.tokens
    shards = len(made["shards"]) if made else -(-data.tokens // data.shard_tokens)
    # of conversations, labels that do not count store their token alone
    counted = made["text_tokens"] if made and data.has_chats else tokens
    stored = counted + data.holdout_tokens
    upper = cached_bytes(logits)
    cached = not config.objective.live
    trained = f"{short(tokens)} in {shards} shards of {short(data.shard_tokens)}"
    rows = [["tokens to cache" if cached else "tokens", f"{trained}, and {short(data.holdout_tokens)} to validate"]]
    if data.has_chats:
        known = f"{short(counted)} tokens that the assistant speaks" if made else "tokenize counts them"
        rows.append(["labels that count", known])
    if cached:
        rows.append(["cache on disk", f"at most about {short(stored * upper)}B ({upper:.0f} bytes per token)"])
    for stage in config.stages:
        steps, batch = config.steps_of(stage, windows), config.at(stage).optim.batch_tokens
        passes = steps * batch / tokens
        rows.append(
            [
                f"stage {stage.name}",
                f"{steps} steps of {short(batch)} tokens, {passes:.2f} passes over {'the cache' if cached else 'them'}",
            ]
        )
    return rows
