"""What trains, from a run's configuration and folders: models, objective, engine."""

from pathlib import Path
from typing import Any

import torch

from megakd.config.run import RunConfig
from megakd.config.train import StageConfig
from megakd.engine.base import Engine
from megakd.engine.ds_json import deepspeed_config
from megakd.engine.optim import RULE_HEADERS, assign_rules, build_optimizer, rule_rows
from megakd.errors import UserError
from megakd.models.checks import LiveTeacher, check_objective
from megakd.models.isolation import check_config, check_model
from megakd.models.loading import Place, fill, hollow_model, keep_exact, load_model, placed_in_pieces, placed_on
from megakd.models.offload import offload
from megakd.models.sources import Sources
from megakd.objectives.base import Objective
from megakd.objectives.build import build
from megakd.system.dist import World
from megakd.system.logging import say
from megakd.system.text import table

ALONE = World(0, 1, torch.device("cpu"))


def build_objective(
    config: RunConfig,
    folder: Path,
    facts: dict[str, Any],
    teacher: LiveTeacher | None = None,
    world: World = ALONE,
) -> Objective:
    """The student of `folder` inside the objective of a stage (`RunConfig.at`), with a live teacher on the device.

    facts: those of the training data's manifest. teacher: None where the objective reads cached logits. Under ZeRO-3
    and expert parallelism each rank reads the parts of the student that it keeps (models/loading.py).
    """
    assert config.objective.live == (teacher is not None)
    half, device = getattr(torch, config.model.dtype), world.device
    # without DeepSpeed's fp32 masters the weights themselves stay float32, and the forward runs under autocast
    dtype = half if config.engine.kind == "deepspeed" else torch.float32
    student, sources = _student(config, folder, dtype)
    live, live_sources = None, None
    if teacher is not None:
        check_objective(config.objective, teacher)
        if config.engine.teacher_parallel == "zero3":
            live, live_sources = hollow_model(teacher.folder, half)
        else:
            live = load_model(teacher.folder, half)
            if config.engine.offload_teacher:
                offload(live, device)
            else:
                live.to(device)
    objective: Any = build(config, student, live, facts, teacher.other_vocab_size if teacher else None)
    # after `build`, which chooses how they attend
    _check_packing(student, sources, str(folder), config)
    if live is not None:
        _check_packing(live, live_sources, config.model.teacher, config)
    for name, parameter in objective.named_parameters():
        if not name.startswith("student."):  # not the buffers: a router's correction bias stays as exact as it is
            parameter.data = parameter.data.to(device, dtype)
    if sources is not None:
        fill(student, sources, _place(config, world), objective)
        for buffer in objective.buffers():
            buffer.data = buffer.data.to(device)
    if live is not None and live_sources is not None:
        from megakd.models.sharded import divide

        divide(live, live_sources, half, *objective.held, around=live.get_decoder())
    return objective


def divided(config: RunConfig) -> bool:
    """Whether each rank holds a part of the student's weights, and reads no more than that."""
    engine = config.engine
    return engine.kind == "deepspeed" and (_stage(config) == 3 or engine.expert_parallel > 1)


def _stage(config: RunConfig) -> int:
    return (config.engine.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)


def _place(config: RunConfig, world: World) -> Place:
    """Where the student's parameters go: into ZeRO-3's pieces, or whole on the device."""
    if _stage(config) < 3:
        return placed_on(world.device)
    from megakd.system.deepspeed_internals import Partitions

    settings = deepspeed_config(config, world.size, config.windows_per_step)
    # one type, as DeepSpeed makes it of whole students too: it joins the pieces in flat tensors
    return placed_in_pieces(Partitions(settings), getattr(torch, config.model.dtype))


def _check_packing(model: Any, sources: Sources | None, place: str, config: RunConfig) -> None:
    """UserError when packed documents change each other; of a model in parts, a small one of its config is asked."""
    if sources is None:
        check_model(model, place, config.data.packing)
    elif not check_config(model.config, place, config.data.packing):
        raise UserError(
            f"{place}: a small {model.config.model_type} cannot be made from its config to see whether packed "
            "documents are separated; set data.packing=documents in a new run, or use engine.config=zero2"
        )


def _student(config: RunConfig, folder: Path, dtype: torch.dtype) -> tuple[Any, Sources | None]:
    """The student, whole, or without weights and where to read them."""
    spread = config.engine.expert_parallel
    if not divided(config):
        student, sources = load_model(folder, dtype), None
    else:
        student, sources = hollow_model(folder, dtype)
    keep_exact(student, folder)
    if spread > 1:
        from megakd.models.expert_parallel import spread_experts
        from megakd.system.deepspeed_internals import join_groups

        spread_experts(student, spread, join_groups(spread))
    return student, sources


def build_engine(
    config: RunConfig,
    objective: Objective,
    stage: StageConfig,
    world: World,
    updates: dict[str, int] | None = None,
    announce: bool = True,
) -> Engine:
    """The engine of a stage: the stage's frozen parameters, groups and rates.

    config: that of the stage (`RunConfig.at`). updates: how often parameters were updated before it (`CarryOver`).
    announce: print the groups.
    """
    zero = (config.engine.deepspeed or {}).get("zero_optimization", {}) if config.engine.kind == "deepspeed" else {}
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    optimizer = build_optimizer(objective, stage.lr_multipliers, config.optim, updates, fused=offloaded)
    if world.first and announce:
        rows = rule_rows(assign_rules(objective, stage.lr_multipliers), stage.lr_multipliers, config.optim)
        say(f"train: stage {stage.name}: parameter groups\n{table(RULE_HEADERS, rows)}")
    if stage.quantize is not None:
        objective.quantize(stage.quantize, f"stage {stage.name}: quantize")
    if config.engine.activation_checkpointing:
        objective.checkpoint_activations()
    elif config.engine.offload_teacher:
        objective.checkpoint_teacher()  # else autograd would keep the copies of its layers
    if not objective.student.get_input_embeddings().weight.requires_grad:
        # ZeRO-3's backward needs an input that requires gradients when all that comes first is frozen
        objective.student.enable_input_require_grads()
    if config.engine.kind == "local":
        from megakd.engine.local import LocalEngine

        return LocalEngine(objective, optimizer, config.optim.clip_norm, config.model.dtype, world.device)
    from megakd.engine.deepspeed import DeepSpeedEngine

    if world.first and any(group["lr"] == 0 for group in optimizer.param_groups):
        say(f"train: stage {stage.name}: sharded experts that a rule freezes are kept by a learning rate of 0")
    settings = deepspeed_config(config, world.size, config.windows_per_step)
    return DeepSpeedEngine(objective, optimizer, settings, world, config.engine.expert_parallel)
