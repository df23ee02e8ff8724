"""What trains, from a run's configuration and folders: models, objective, engine."""

from pathlib import Path
from typing import Any

import torch

from megakd.config.run import RunConfig
from megakd.config.train import StageConfig
from megakd.engine.base import Engine
from megakd.engine.ds_json import deepspeed_config
from megakd.engine.optim import RULE_HEADERS, assign_rules, build_optimizer, rule_rows
from megakd.models.checks import LiveTeacher, check_objective
from megakd.models.hub import load_model
from megakd.models.isolation import check_model
from megakd.models.offload import offload
from megakd.objectives.base import Objective
from megakd.objectives.build import build
from megakd.system.dist import World
from megakd.system.logging import say
from megakd.system.text import table

CPU = torch.device("cpu")


def build_objective(
    config: RunConfig,
    folder: Path,
    facts: dict[str, Any],
    teacher: LiveTeacher | None = None,
    device: torch.device = CPU,
) -> Objective:
    """The student of `folder` inside the objective of a stage (`RunConfig.at`), with a live teacher on the device.

    facts: those of the training data's manifest. teacher: None where the objective reads cached logits.
    """
    assert config.objective.live == (teacher is not None)
    half = getattr(torch, config.model.dtype)
    # without DeepSpeed's fp32 masters the weights themselves stay float32, and the forward runs under autocast
    dtype = half if config.engine.kind == "deepspeed" else torch.float32
    student, live = load_model(folder, dtype), None
    if teacher is not None:
        check_objective(config.objective, teacher)
        live = load_model(teacher.folder, half)
        if config.engine.offload_teacher:
            offload(live, device)
        else:
            live.to(device)
    objective = build(config, student, live, facts, teacher.other_vocab_size if teacher else None)
    # after `build`, which chooses how they attend
    check_model(student, str(folder), config.data.packing)
    if live is not None:
        check_model(live, config.model.teacher, config.data.packing)
    for name, parameter in objective.named_parameters():
        if not name.startswith("student."):  # not the buffers: a router's correction bias stays as exact as it is
            parameter.data = parameter.data.to(device, dtype)
    return objective


def build_engine(
    config: RunConfig,
    objective: Objective,
    stage: StageConfig,
    world: World,
    updates: dict[str, int] | None = None,
    announce: bool = True,
) -> Engine:
    """The engine of a stage: experts on their ranks, the stage's frozen parameters, groups and rates.

    config: that of the stage (`RunConfig.at`). updates: how often parameters were updated before it (`CarryOver`).
    announce: print the groups.
    """
    spread = config.engine.expert_parallel
    if spread > 1:
        from megakd.models.expert_parallel import spread_experts
        from megakd.system.deepspeed_internals import join_groups

        spread_experts(objective.student, spread, join_groups(spread))
    zero = (config.engine.deepspeed or {}).get("zero_optimization", {}) if config.engine.kind == "deepspeed" else {}
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    optimizer = build_optimizer(objective, stage.lr_multipliers, config.optim, updates, fused=offloaded)
    if world.first and announce:
        rows = rule_rows(assign_rules(objective, stage.lr_multipliers), stage.lr_multipliers, config.optim)
        say(f"train: stage {stage.name}: parameter groups\n{table(RULE_HEADERS, rows)}")
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
    return DeepSpeedEngine(objective, optimizer, settings, world, spread)
