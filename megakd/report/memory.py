"""The memory that training will take, as rows of a table: of one process, or of each of DeepSpeed's ranks.

A rank holds its model states (train/states.py) and, of a step of one process with the same micro-batch, activations,
loss and a live teacher (train/memory.py); in addition what ZeRO-3 gathers, DeepSpeed's buckets, and the rows that
expert parallelism exchanges. Where the update takes more than the backward pass, that is the peak.
"""

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from megakd.config.run import RunConfig
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer
from megakd.engine.ds_json import deepspeed_config
from megakd.errors import UserError
from megakd.models.hub import empty_model, load_config, model_of
from megakd.models.memory import CASTS, Peak
from megakd.models.offload import offloaded
from megakd.models.shared_core import PROJECTIONS, SharedCoreExperts, free_and_core_rank
from megakd.names import resolve
from megakd.run import Run
from megakd.train.memory import GRADIENTS, MOMENTS_OF, TEACHER_WEIGHTS, UPDATE, WEIGHTS, training_peak
from megakd.train.states import MOMENTS, Kept, Layout, States, layout_of, model_states, parameters_of

# Of memory in GiB, and the share that tensors may take: the driver, cuBLAS and holes between blocks want theirs.
CARDS, SHARE, GIB = (8, 12, 16), 0.9, 2**30
MASTERS_OF = "float32 weights for AdamW"
GATHERED, BUCKETS = "weights that ZeRO-3 gathers, at most", "DeepSpeed's buckets"
EXCHANGE = "rows that expert parallelism exchanges"
LIVE, BUCKET = 1e9, 5e8  # DeepSpeed's defaults of stage3_max_live_parameters and of the buckets' numbers


def memory(run: Run) -> list[list[str]]:
    """The most that training holds at once, what of, and the card that it fits; with DeepSpeed what each rank holds."""
    config = run.config
    if not (run.student_folder / "config.json").exists() and not config.model.student:
        return [["training memory", f"known when there is a student; run: megakd compress {run.folder}"]]
    pair = models_of(run)
    try:
        peaks = {stage.name: training_peak(config, stage, *pair, update=predictable(config)) for stage in config.stages}
    except UserError as error:
        return [["training memory", str(error)]]
    if not predictable(config):
        return per_rank(config, peaks, pair.student)
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


def per_rank(config: RunConfig, peaks: dict[str, Peak], student: Any) -> list[list[str]]:
    """What one of DeepSpeed's ranks holds on its GPU in its largest stage; student: its config."""
    shares, model = {}, model_of(student, "the student")
    for stage in config.stages:
        rank = Rank(config.at(stage), model, parameters_of(model, stage.lr_multipliers))
        shares[stage.name] = shares_of_rank(rank, peaks[stage.name])
    stage = max(shares, key=lambda name: sum(shares[name].values()))
    engine, zero = config.engine, zero_of(config.at(next(s for s in config.stages if s.name == stage)))["stage"]
    where = f" (stage {stage})" if len(shares) > 1 else ""
    spread = f", {engine.expert_parallel} of which share the experts" if engine.expert_parallel > 1 else ""
    total = gib(sum(shares[stage].values()))
    title = f"about {total} per GPU with ZeRO {zero} on {engine.ranks} ranks{spread}{where}; of it:"
    return [["training memory", title], *([f"  {name}", gib(size)] for name, size in shares[stage].items() if size)]


class Rank(NamedTuple):
    """One of DeepSpeed's ranks. config: of a stage; model: the student without weights; parameters: of it."""

    config: RunConfig
    model: Any
    parameters: list[Kept]

    @property
    def width(self) -> int:
        return getattr(torch, self.config.model.dtype).itemsize

    def layout(self) -> Layout:
        engine = self.config.engine
        return layout_of(zero_of(self.config), engine.ranks, engine.expert_parallel, self.width)


def zero_of(config: RunConfig) -> dict[str, Any]:
    return deepspeed_config(config, 1, 1)["zero_optimization"]


def shares_of_rank(rank: Rank, peak: Peak) -> dict[str, float]:
    """Bytes on the GPU of one rank, by part; peak: of one process. What lies in CPU memory is 0 (`host_bytes`)."""
    zero, states = zero_of(rank.config), states_of_rank(rank, peak)
    weights, optimizer = (not away(zero, part) for part in ("param", "optimizer"))
    held = {
        WEIGHTS: weights * states.weights,
        GRADIENTS: optimizer * states.gradients,
        MASTERS_OF: optimizer * states.masters,
        MOMENTS_OF: optimizer * states.moments,
    }
    single = (WEIGHTS, MOMENTS_OF, GRADIENTS, UPDATE, CASTS)  # of one process that holds everything in float32
    working = {n: float(size) for n, size in sorted(peak.parts.items(), key=lambda p: -p[1]) if n not in single}
    working |= {
        GATHERED: gathered(rank) + divide_teacher(rank, working),
        BUCKETS: buckets(zero, rank.width),
        EXCHANGE: exchanged(rank),
    }
    # gradients in float32, and what AdamW computes of all masters at once
    update = optimizer * 2 * states.masters
    return held | (working if sum(working.values()) >= update else {UPDATE: update})


def divide_teacher(rank: Rank, working: dict[str, float]) -> float:
    """With engine.teacher_parallel=zero3: leave this rank's piece of a live teacher; what it gathers at most."""
    whole, engine = working.get(TEACHER_WEIGHTS, 0.0), rank.config.engine
    if engine.teacher_parallel != "zero3":
        return 0.0
    working[TEACHER_WEIGHTS] = whole / engine.ranks
    return min(whole, float(LIVE * rank.width))


def states_of_rank(rank: Rank, peak: Peak) -> States:
    """Model states of the student, and of what an objective trains with it, which `peak` counted."""
    trained = peak.parts.get(MOMENTS_OF, 0) // MOMENTS - sum(each.numel for each in rank.parameters if each.trained)
    return model_states([*rank.parameters, Kept(max(trained, 0), True)], rank.layout())


def host_bytes(rank: Rank, peak: Peak) -> float:
    """Bytes that one rank keeps in CPU memory, by offload_optimizer and offload_param."""
    zero, states = zero_of(rank.config), states_of_rank(rank, peak)
    return away(zero, "param") * states.weights + away(zero, "optimizer") * sum(states[1:])


def away(zero: dict[str, Any], part: str) -> bool:
    return zero.get(f"offload_{part}", {}).get("device", "none") != "none"


def gathered(rank: Rank) -> float:
    """The most weights that ZeRO-3 gathers at once: all of the rank's, or as many as stage3_max_live_parameters."""
    zero, spread = zero_of(rank.config), rank.config.engine.expert_parallel
    if zero["stage"] < 3 or rank.config.engine.ranks == 1:
        return 0.0
    own = sum(each.numel / (spread if each.packed else 1) for each in rank.parameters)
    largest = max(each.numel / (spread if each.packed else 1) for each in rank.parameters)
    return rank.width * max(min(own, float(zero.get("stage3_max_live_parameters", LIVE))), largest)


def buckets(zero: dict[str, Any], width: int) -> float:
    """Gradients on their way to other ranks, a second bucket with overlap_comm, and ZeRO-2's bucket of weights."""
    if zero["stage"] < 2:
        return 0.0
    numbers = float(zero.get("reduce_bucket_size", BUCKET)) * (2 if zero.get("overlap_comm") else 1)
    return width * (numbers + (float(zero.get("allgather_bucket_size", BUCKET)) if zero["stage"] == 2 else 0.0))


def exchanged(rank: Rank) -> float:
    """Rows that expert parallelism sends, receives and gets back for a micro-batch; autograd keeps those of all layers,
    with activation checkpointing those of one. For experts that tokens choose evenly (docs/scaling.md)."""
    config, spread = rank.config, rank.config.engine.expert_parallel
    if spread == 1:
        return 0.0
    tokens = config.optim.micro_batch * config.data.sequence_length
    layers = [
        2 * rows_per_token(module.num_experts, rank.model.config.num_experts_per_tok, spread) * sum(row_widths(module))
        for module in rank.model.modules()
        if isinstance(module, SharedCoreExperts)
    ]
    numbers = max(layers) if config.engine.activation_checkpointing else sum(layers)
    return tokens * numbers * rank.width


def rows_per_token(experts: int, active: int, spread: int) -> float:
    """Of `spread` ranks, how many keep some of a token's experts, if every choice of experts is as likely."""
    kept = experts // spread
    return spread * (1 - math.comb(experts - kept, active) / math.comb(experts, active))


def row_widths(experts: SharedCoreExperts) -> tuple[int, int]:
    """Numbers of a row that is sent to a rank, and of the one that comes back (models/expert_parallel.py)."""
    core: dict[str, Any] = {projection: experts.held[0][f"{projection}_proj"] for projection in PROJECTIONS}
    free = {p: not form.based and free_and_core_rank(form, p)[0] > 0 for p, form in experts.forms.items()}
    hidden = core["gate"].in_features
    sent = hidden * (free["gate"] or free["up"]) + core["gate"].out_features + core["up"].out_features
    return sent, core["down"].in_features + hidden * free["down"]


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
