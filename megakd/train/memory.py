"""The most memory that a training step holds, found by running it on tensors without data."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from megakd.config.run import RunConfig
from megakd.config.train import StageConfig
from megakd.data.records import Batch, Paired, Rows, Side, TeacherTargets
from megakd.engine.base import MOMENTS
from megakd.models.memory import Fakes, LiveBytes, Peak, fake_model
from megakd.models.offload import offload, offloaded
from megakd.models.routing import scheduled
from megakd.models.shared_core import SharedCoreExperts
from megakd.objectives.build import build
from megakd.system.dist import World
from megakd.train.build import build_engine

WEIGHTS, MOMENTS_OF, TARGETS = "weights of the student", "moments of AdamW", "cached teacher logits"
TEACHER_WEIGHTS = "weights of the teacher"
STUDENT, TEACHER, GRADIENTS = "activations of the student", "activations of the teacher", "gradients"
LOSS, BACKWARD, UPDATE = "loss", "backward pass: logits of a chunk, what is computed again", "update"


def training_peak(
    config: RunConfig,
    stage: StageConfig,
    student: Any,
    teacher: Any | None,
    vocab_size: int,
    teacher_vocab_size: int | None = None,
    gpu: bool = True,
    update: bool = True,
) -> Peak:
    """The most bytes that LocalEngine.step holds in the long run: the real step, with tensors that hold nothing.

    It is the last micro-batch of a later step: moments are there, and gradients if there was one before. It logs norms
    and the teacher's drift, as some steps do, and takes as many experts as the schedule ever does.
    teacher: None where cached logits take its place. gpu: AdamW works on all parameters at once, as it does there,
    which takes their size once more. Kernels, and what autocast leaves in float32, are the CPU's all the same.
    update: False is the most before the update begins, for ranks that divide what the update works on.
    """
    config = config.at(stage)
    config = config.model_copy(
        update={"engine": config.engine.model_copy(update={"kind": "local", "expert_parallel": 1})}
    )
    live = LiveBytes()
    with warnings.catch_warnings(), Fakes(), live:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copy.deepcopy of a parameter
        own = fake_model(student, torch.float32)
        other = None if teacher is None else fake_model(teacher, getattr(torch, config.model.dtype))
        for module in (*own.modules(), *(other.modules() if other else ())):
            if isinstance(module, SharedCoreExperts):
                module.factors = module.grouped  # the loop's sizes depend on values; it keeps the same rows
        if other and config.engine.offload_teacher:
            offload(other, torch.device("cpu"))
        facts = {"tokenizer": {"vocab_size": vocab_size}} if other else stored_facts(config, vocab_size)
        objective = build(config, own, other, facts, teacher_vocab_size)
        objective.sizes_of = "cuda" if gpu else "cpu"  # fakes are on the CPU
        if gpu:
            objective.head.head.buffers_made = Forgetful()
        for name, parameter in objective.named_parameters():
            if not name.startswith("student."):  # as build_objective does
                parameter.data = parameter.data.float()
        objective.to = lambda *_: objective  # type: ignore[assignment]  # fakes cannot be moved, and are there
        engine: Any = build_engine(config, objective, stage, World(0, 1, torch.device("cpu")), announce=False)
        for group in engine.optimizer.param_groups:
            group["foreach"] = gpu
        if "capacity" in objective.memory:
            objective.memory["capacity"] = [1.0]
        objective.at(1.0, 0)
        settings: Any = config.objective
        for router in getattr(objective, "found", []):
            rule = settings.routing, settings.initial_top_k, settings.final_top_k
            router.take(max(scheduled(router, *rule, share) for share in (0.0, 1.0)))
        _name(live, objective, engine, other, config.engine.offload_teacher)
        size, length = config.optim.micro_batch, config.data.sequence_length
        batch = full_batch(size, length, paired=teacher_vocab_size is not None)
        if other is None:
            targets = full_targets(facts, size, length)
            live.label(targets, TARGETS)
            batch = batch._replace(targets=targets)
        for parameter in engine.trained:
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
            live.label(moments.values(), MOMENTS_OF)
            engine.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
            if config.windows_per_step > size:
                parameter.grad = torch.zeros_like(parameter)
                live.label([parameter.grad], GRADIENTS)
        live.forget_peak()
        before: list[Peak] = []
        engine.optimizer.register_step_pre_hook(lambda *_: before.append(live.peak))
        engine.step([batch], 1, 1.0, norms=True)
    return live.peak if update else before[0]


class Forgetful(dict[str, Any]):
    """Keeps nothing: on a GPU no buffer outlives its loss (losses/head.py)."""

    def __setitem__(self, name: str, value: Any) -> None:
        pass


def _name(live: LiveBytes, objective: Any, engine: Any, teacher: Any, offload_teacher: bool) -> None:
    """Have everything called by what it is from now on."""
    live.forget()
    if teacher:
        away = offloaded(teacher) if offload_teacher else ()
        here = [tensor for tensor in (*teacher.parameters(), *teacher.buffers()) if id(tensor) not in away]
        live.label(here, TEACHER_WEIGHTS)
    named = [*objective.named_parameters(), *objective.named_buffers()]
    auxiliary = [tensor for name, tensor in named if not name.startswith("student.")]
    live.label(
        [*auxiliary, *(p for m in getattr(objective, "initial", ()) for p in m.parameters())], "routers and projections"
    )
    live.label([*objective.student.parameters(), *objective.student.buffers()], WEIGHTS)
    for parameter in engine.trained:
        parameter.register_post_accumulate_grad_hook(lambda p: live.label([p.grad], GRADIENTS))

    def then(where: str) -> Callable[..., None]:
        return lambda *_: setattr(live, "where", where)

    for model, where in ((objective.student, STUDENT), *([(teacher, TEACHER)] if teacher else [])):
        model.get_decoder().register_forward_pre_hook(then(where))
        model.get_decoder().register_forward_hook(then(LOSS))
    objective.register_forward_hook(then(BACKWARD))
    engine.optimizer.register_step_pre_hook(then(UPDATE))


def stored_facts(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """What generate-logits will state of its targets, as far as a loss depends on it."""
    logits = config.logits
    head, draws = logits.profile != "sampled", logits.profile != "topk"
    return {
        "vocab_size": vocab_size,
        "top_k": min(logits.top_k, vocab_size) if head else 0,
        "temperatures": list(logits.declared_temperatures),
        "tails": head,
        "draws": logits.draws if draws else 0,
        "draw_temperature": logits.draw_temperature if draws else None,
    }


def full_targets(facts: dict[str, Any], size: int, length: int) -> TeacherTargets:
    """Teacher targets of `size` windows, every place of which is used."""
    ids, logprobs = (torch.zeros(size, length, facts["top_k"], dtype=dtype) for dtype in (torch.int32, torch.float32))
    draws, shares = (torch.zeros(size, length, facts["draws"], dtype=dtype) for dtype in (torch.int32, torch.float32))
    tails = torch.zeros(size, length, len(facts["temperatures"]))
    return TeacherTargets(ids, logprobs, tails, draws, shares, *(torch.zeros(size, length) for _ in range(2)))


def full_batch(size: int, length: int, paired: bool = False) -> Batch:
    """`size` windows that count at every position; paired: for a teacher that makes a quarter more tokens of them."""

    def every(length: int) -> Rows:
        return Rows(torch.arange(size * length), (length,) * size, length)

    def side(length: int) -> Side:
        return Side(*(torch.zeros(size, length, dtype=torch.int64) for _ in range(5)), every(length))

    batch = Batch(*side(length)[:3], counted=every(length))
    if not paired:
        return batch
    own, theirs = Side(*batch[:3], *side(length)[3:]), side(length + length // 4)
    # every token a span of its own: the most there can be
    return batch._replace(paired=Paired(own, theirs, torch.tensor([length]), every(length), every(length)))
