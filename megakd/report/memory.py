"""The memory that training will take, as rows of a table: of one process, or of each of DeepSpeed's ranks."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from megakd.config.run import RunConfig
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer
from megakd.engine.ds_json import deepspeed_config
from megakd.errors import UserError
from megakd.models.hub import empty_model, load_config
from megakd.models.memory import CASTS, Peak
from megakd.models.offload import offloaded
from megakd.names import resolve
from megakd.run import Run
from megakd.train.memory import GRADIENTS, MOMENTS_OF, UPDATE, WEIGHTS, training_peak

# Of memory in GiB, and the share that tensors may take: the driver, cuBLAS and holes between blocks want theirs.
CARDS, SHARE, GIB = (8, 12, 16), 0.9, 2**30


def memory(run: Run) -> list[list[str]]:
    """The most that training holds at once, what of, and the card that it fits; with DeepSpeed what each rank holds."""
    config = run.config
    if config.engine.expert_parallel > 1:
        return [["training memory", "not predicted with engine.expert_parallel"]]
    if not (run.student_folder / "config.json").exists() and not config.model.student:
        return [["training memory", f"known when there is a student; run: megakd compress {run.folder}"]]
    pair = models_of(run)
    try:
        peaks = {stage.name: training_peak(config, stage, *pair) for stage in config.stages}
    except UserError as error:
        return [["training memory", str(error)]]
    if not predictable(config):
        return per_rank(config, peaks)
    away = config.engine.offload_teacher
    stage = max(peaks, key=lambda name: peaks[name].total)
    total, parts = peaks[stage]
    where = f" (stage {stage})" if len(peaks) > 1 else ""
    largest = [(name, size) for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size >= total / 200]
    return [
        ["training memory", f"{gib(total)} at most{where}, predicted for windows without padding; then it is:"],
        *([f"  {name}", gib(size)] for name, size in largest),
        *([["  besides, in CPU memory", f"{gib(away_bytes(run))}: the teacher's layers"]] if away else []),
        ["fits", fits(total) or f"no card of {', '.join(map(str, CARDS))} GB; {advice(config, stage, pair)}"],
    ]


def away_bytes(run: Run) -> int:
    """Of the teacher's layers, which `engine.offload_teacher` keeps in CPU memory."""
    teacher = empty_model(resolve(run.config.model.teacher, run.config.model.revision, weights=False))
    away, size = offloaded(teacher), getattr(torch, run.config.model.dtype).itemsize
    return size * sum(tensor.numel() for tensor in teacher.parameters() if id(tensor) in away)


def predictable(config: RunConfig) -> bool:
    """Whether training_peak is right: one process that holds everything."""
    return config.engine.kind == "local"


def per_rank(config: RunConfig, peaks: dict[str, Peak]) -> list[list[str]]:
    """What one of DeepSpeed's ranks holds in its largest stage: an estimate without DeepSpeed's own buffers.

    ZeRO divides the optimizer state (from stage 1 on), gradients (2) and weights (3) among the ranks. Activations, loss
    and a live teacher are those of a step of one process with the same micro-batch.
    """
    shares = {stage.name: shares_of_rank(config.at(stage), peaks[stage.name]) for stage in config.stages}
    stage = max(shares, key=lambda name: sum(shares[name].values()))
    ranks, zero = config.engine.ranks, zero_of(config.at(next(s for s in config.stages if s.name == stage)))["stage"]
    where = f" (stage {stage})" if len(shares) > 1 else ""
    total = gib(sum(shares[stage].values()))
    title = f"about {total} per GPU with ZeRO {zero} on {ranks} ranks{where}, besides DeepSpeed's buffers; of it:"
    return [["training memory", title], *([f"  {name}", gib(size)] for name, size in shares[stage].items() if size)]


def zero_of(config: RunConfig) -> dict[str, Any]:
    return deepspeed_config(config, 1, 1)["zero_optimization"]


def shares_of_rank(config: RunConfig, peak: Peak) -> dict[str, float]:
    """Bytes of one rank, by part; config: of a stage. What lies in CPU memory is 0."""
    zero, ranks, width = zero_of(config), config.engine.ranks, getattr(torch, config.model.dtype).itemsize
    over = {
        part: ranks if zero["stage"] >= least else 1
        for part, least in (("optimizer", 1), ("gradient", 2), ("param", 3))
    }
    here = {part: zero.get(f"offload_{part}", {}).get("device", "none") == "none" for part in ("optimizer", "param")}
    parameters, trained = peak.parts[WEIGHTS] / 4, peak.parts[MOMENTS_OF] / 8  # one process holds them in float32
    state = (WEIGHTS, MOMENTS_OF, GRADIENTS, UPDATE, CASTS)
    return {
        WEIGHTS: here["param"] * parameters * width / over["param"],
        GRADIENTS: trained * width / over["gradient"],
        "optimizer: float32 weights and moments of AdamW": here["optimizer"] * trained * 12 / over["optimizer"],
        **{name: size for name, size in sorted(peak.parts.items(), key=lambda part: -part[1]) if name not in state},
    }


def gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"


def fits(total: float) -> str:
    """The smallest of the cards, or nothing."""
    card = next((card for card in CARDS if total <= SHARE * card * GIB), None)
    return "" if card is None else f"a card of {card:g} GB ({total / card / GIB:.0%} of it)"


class Pair(NamedTuple):
    """Configs of student and live teacher, and the entries of their tokenizers.

    teacher: None with cached logits. teacher_vocab_size: of another tokenizer than the student's.
    """

    student: Any
    teacher: Any | None
    vocab_size: int
    teacher_vocab_size: int | None = None


def models_of(run: Run) -> Pair:
    """What a run's folders say; configurations and tokenizers alone are read."""
    model = run.config.model
    student = run.student_folder
    if model.student:
        student = resolve(model.student, model.student_revision, weights=False)
    mine = identify_tokenizer(load_tokenizer(student))
    if not run.config.objective.live:
        return Pair(load_config(student), None, mine.vocab_size)
    teacher = resolve(model.teacher, model.revision, weights=False)
    theirs = identify_tokenizer(load_tokenizer(teacher))
    other = theirs.vocab_size if mine.difference(theirs) else None
    return Pair(load_config(student), load_config(teacher), mine.vocab_size, other)


def advice(config: RunConfig, stage: str, pair: Pair) -> str:
    """What to change first, one after the other, until the largest card is enough."""
    changed, total = [], 0
    named = next(each for each in config.stages if each.name == stage)
    for section, key, value in smaller(config):
        part = getattr(config, section).model_copy(update={key: value})
        config = config.model_copy(update={section: part})
        changed = [item for item in changed if not item.startswith(f"{section}.{key}=")]
        changed.append(f"{section}.{key}={json.dumps(value)}")
        total = training_peak(config, named, *pair).total
        if fits(total):
            return f"set {' and '.join(changed)}: {gib(total)} fit {fits(total)}"
    tried = f"even {' and '.join(changed)} leave {gib(total)}; " if changed else ""
    return f"{tried}take a smaller student or teacher, or engine.kind=deepspeed on more ranks"


def smaller(config: RunConfig) -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of what takes less memory, what costs least first: shorter windows want new data."""
    if config.optim.micro_batch > 1:
        yield "optim", "micro_batch", 1
    if not config.engine.activation_checkpointing:
        yield "engine", "activation_checkpointing", True
    if config.objective.live and not config.engine.offload_teacher:
        yield "engine", "offload_teacher", True
    for share in (2, 4):
        if (length := config.data.sequence_length // share) >= 128:
            yield "data", "sequence_length", length
