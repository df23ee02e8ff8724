"""A teacher too large for one device, spread over all ranks by DeepSpeed: ZeRO-3, or ZeRO-3 with its experts apart."""

from pathlib import Path
from typing import Any

import deepspeed
import torch

from megakd.config import LogitsConfig
from megakd.dist import World
from megakd.models.hub import load_config, load_model
from megakd.models.teacher import Teacher


def spread_teacher(folder: Path, config: LogitsConfig, vocab_size: int, world: World) -> Any:
    """A DeepSpeed engine around a Teacher; called like it, by all ranks at the same time with equal shapes.

    zero3: every weight is cut into world.size pieces, gathered while its module runs; loaded in pieces, never whole.
    autoep: experts are spread instead and tokens travel to them; loaded whole on every rank's CPU first.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": config.dtype == "bfloat16"},
    }
    keep = None
    if config.parallel == "zero3":
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        keep = HfDeepSpeedConfig(settings)  # while it lives, from_pretrained loads in pieces
    else:
        family = load_config(folder).model_type
        settings["expert_parallel"] = {"enabled": True, "autoep_size": world.size, "preset_model": family}
    model = load_model(folder, getattr(torch, config.dtype)).eval().requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=Teacher(model, config, vocab_size), config=settings)
    del keep
    return engine.eval()
