"""Ways to divide a student over GPUs: memory per rank of each, the largest micro-batch, and which to take."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from megakd.compress.job import kept_experts
from megakd.config.run import RunConfig
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer
from megakd.errors import UserError
from megakd.models.cut import cut_to
from megakd.models.hub import load_config, model_of
from megakd.models.memory import Peak
from megakd.models.shared_core import PROJECTIONS, Form, SharedCoreExperts
from megakd.models.spec import spec_for
from megakd.models.student import student_config
from megakd.names import resolve, shipped
from megakd.report import memory
from megakd.report.gpus import Gpu
from megakd.report.memory import GIB, SHARE, Pair, Rank, shares_of_rank
from megakd.run import Run
from megakd.system.files import read_json
from megakd.train.memory import GRADIENTS, MOMENTS_OF, TARGETS, UPDATE, WEIGHTS, training_peak
from megakd.train.states import Kept, parameters_of

FILES = ("zero2", "zero3", "zero3_offload")  # of ds_configs, the least communication first
HEADERS = [
    "file", "EP", "weights", "gradients", "masters", "moments", "activations", "targets", "gathered", "buckets",
    "EP rows", "total", "in CPU", "fits", "micro-batch",
]  # fmt: skip


class Fleet(NamedTuple):
    """GPUs of one kind: `gpus` in all, `per_node` on a host."""

    gpu: Gpu
    gpus: int
    per_node: int


class Division(NamedTuple):
    """A file of ds_configs with a size of expert parallelism. shares: bytes per GPU by part, at the run's micro-batch.

    host: bytes per rank in CPU memory. largest: micro-batch that fits and that a step can be divided into, or 0.
    """

    file: str
    expert_parallel: int
    shares: dict[str, float]
    host: float
    largest: int

    @property
    def total(self) -> float:
        return sum(self.shares.values())


class Step(NamedTuple):
    """What every division shares: the configuration of the stage that trains most; the student without weights and its
    parameters in that stage; the peaks of one process with micro-batches of 1 and 2 sequences."""

    config: RunConfig
    model: Any
    parameters: list[Kept]
    one: Peak
    two: Peak

    def peak(self, micro_batch: int) -> Peak:
        """Every part grows by the same with each further sequence, or not at all."""
        more = micro_batch - 1
        names = self.one.parts.keys() | self.two.parts.keys()
        first, second = ({name: peak.parts.get(name, 0) for name in names} for peak in (self.one, self.two))
        parts = {name: max(0, first[name] + more * (second[name] - first[name])) for name in names}
        return Peak(sum(parts.values()), parts)


def open_step(run: Run, pair: Pair, checkpointing: bool) -> Step:
    """Runs the step of one process on tensors without data, twice; a minute for a large student."""
    config, model = run.config, model_of(pair.student, "the student")
    parameters = {stage.name: parameters_of(model, stage.lr_multipliers) for stage in config.stages}
    trained = {name: sum(each.numel for each in found if each.trained) for name, found in parameters.items()}
    stage = max(config.stages, key=lambda each: trained[each.name])
    engine = config.engine.model_copy(update={"activation_checkpointing": checkpointing})
    config = config.model_copy(update={"engine": engine})
    one, two = (training_peak(with_micro_batch(config, size), stage, *pair, update=False) for size in (1, 2))
    return Step(config.at(stage), model, parameters[stage.name], one, two)


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    return config.model_copy(update={"optim": config.optim.model_copy(update={"micro_batch": size})})


def pair_of(run: Run) -> tuple[Pair, str]:
    """The configurations of the run's models; for a student that compress has not made, that of the planned one.

    The text says what is not known of it yet.
    """
    model, settings = run.config.model, run.config.compress
    if model.student or (run.student_folder / "config.json").exists():
        return memory.models_of(run), ""
    folder = resolve(model.teacher, model.revision, weights=False)
    teacher = load_config(folder)
    spec = spec_for(teacher, str(folder))
    student, kept, note = teacher, spec, ""
    count = kept_experts(settings, teacher, spec, run.folder)
    if count is not None:
        student, kept, _ = cut_to(teacher, spec, count, str(folder))
    if settings.method == "shared_core":
        rank = settings.rank
        if settings.budget is not None:
            hidden, inner = spec.sizes
            numbers = settings.budget * hidden * inner * spec.experts / kept.experts
            rank = max(1, round(numbers / (hidden + 3 * inner)))
            note = f"the planner has not chosen shapes yet; taken as wrappers of rank {rank} with as many parameters"
        forms = {str(projection): Form("wrappers", rank, rank) for projection in PROJECTIONS}
        student = student_config(student, dict.fromkeys(kept.layers, forms))
    vocab_size = identify_tokenizer(load_tokenizer(folder)).vocab_size
    return Pair(student, teacher if run.config.objective.live else None, vocab_size), note


def divisions(step: Step, fleet: Fleet) -> list[Division]:
    """Every file with every size of expert parallelism: powers of two up to a host's GPUs, that divide all."""
    return [division(step, fleet, file, size) for file in FILES for size in expert_sizes(step.model, fleet)]


def expert_sizes(model: Any, fleet: Fleet) -> list[int]:
    counts = [module.num_experts for module in model.modules() if isinstance(module, SharedCoreExperts)]
    sizes = [2**power for power in range(fleet.per_node.bit_length()) if 2**power <= fleet.per_node]
    return [n for n in sizes if n == 1 or (counts and not fleet.gpus % n and not any(c % n for c in counts))]


def division(step: Step, fleet: Fleet, file: str, expert_parallel: int) -> Division:
    def at(micro_batch: int) -> tuple[Rank, Peak]:
        return rank_of(step, fleet, file, expert_parallel, micro_batch), step.peak(micro_batch)

    fits = (
        size for size in micro_batches(step.config, fleet) if sum(shares_of_rank(*at(size)).values()) <= room(fleet.gpu)
    )
    own = at(step.config.optim.micro_batch)
    return Division(file, expert_parallel, shares_of_rank(*own), memory.host_bytes(*own), next(fits, 0))


def rank_of(step: Step, fleet: Fleet, file: str, expert_parallel: int, micro_batch: int) -> Rank:
    engine = step.config.engine.model_copy(
        update={
            "kind": "deepspeed",
            "config": file,
            "deepspeed": read_json(shipped("ds_configs", f"{file}.json")),
            "ranks": fleet.gpus,
            "expert_parallel": expert_parallel,
        }
    )
    config = with_micro_batch(step.config.model_copy(update={"engine": engine}), micro_batch)
    return Rank(config, step.model, step.parameters)


def micro_batches(config: RunConfig, fleet: Fleet) -> list[int]:
    """Sizes that divide one optimizer step on all GPUs, the largest first; UserError where none does."""
    sequences = config.windows_per_step
    if sequences % fleet.gpus:
        raise UserError(
            f"--gpus {fleet.gpus}: optim.batch_tokens={config.optim.batch_tokens} is {sequences} sequences of "
            f"{config.data.sequence_length} tokens per step, which do not divide into {fleet.gpus} equal shares; take "
            "another number of GPUs, or another batch in a new run"
        )
    each = sequences // fleet.gpus
    return [size for size in range(each, 0, -1) if each % size == 0]


def room(gpu: Gpu) -> float:
    """Bytes that tensors may take of a GPU."""
    return SHARE * gpu.memory


def rows(found: list[Division], fleet: Fleet) -> Iterator[list[str]]:
    """The table under HEADERS, in GiB."""
    named = (WEIGHTS, GRADIENTS, memory.MASTERS_OF, MOMENTS_OF)
    other = (TARGETS, memory.GATHERED, memory.BUCKETS, memory.EXCHANGE)
    for each in found:
        activations = sum(size for name, size in each.shares.items() if name not in (*named, *other))
        numbers = [each.shares.get(name, 0.0) for name in named]
        numbers += [activations, *(each.shares.get(name, 0.0) for name in other), each.total, each.host]
        cells = [f"{number / GIB:.2f}" if number else "-" for number in numbers]
        peak = " (update)" if UPDATE in each.shares else ""
        fits = f"{each.total / fleet.gpu.memory:.0%}{peak}" if each.total <= room(fleet.gpu) else "no"
        yield [each.file, str(each.expert_parallel), *cells, fits, str(each.largest or "none")]


def choose(found: list[Division]) -> Division | None:
    """The first that fits: less communication before less memory, no expert parallelism first."""
    return next((each for each in found if each.largest), None)


def advice(chosen: Division | None, found: list[Division], step: Step, fleet: Fleet) -> str:
    """Which file to take and why, in words."""
    if chosen is None:
        least = min(found, key=lambda each: each.total)
        return (
            f"none fits: the least is {least.total / GIB:.1f} GiB with {least.file} and expert_parallel "
            f"{least.expert_parallel}; take more or larger GPUs, shorter sequences, or a smaller student"
        )
    checkpointing = " engine.activation_checkpointing=true" if step.config.engine.activation_checkpointing else ""
    settings = f"engine.config={chosen.file} engine.ranks={fleet.gpus} optim.micro_batch={chosen.largest}"
    if chosen.expert_parallel > 1:
        settings += f" engine.expert_parallel={chosen.expert_parallel}"
    return f"{settings}{checkpointing}: {reason(chosen, found, fleet)}"


def reason(chosen: Division, found: list[Division], fleet: Fleet) -> str:
    why = {
        "zero2": "every rank can keep all weights, so that they are not sent in each micro-batch",
        "zero3": "the weights have to be divided too; each micro-batch gathers them",
        "zero3_offload": "the optimizer's state fits CPU memory alone; the update and all copies take time there",
    }[chosen.file]
    earlier = found[: found.index(chosen)]
    if earlier:
        least = min(earlier, key=lambda each: each.total)
        why += f"; {least.file} takes at least {least.total / GIB:.1f} of {room(fleet.gpu) / GIB:.1f} GiB"
    return why
