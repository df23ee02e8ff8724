"""Sharded inference: a module too large for one device, divided among ranks by ZeRO-3 or with its experts too."""

from collections.abc import Callable
from typing import Any, Literal

import deepspeed
from torch import nn

from megakd.system.dist import World


def spread(
    build: Callable[[], nn.Module],
    kind: Literal["zero3", "autoep"],
    family: str,
    dtype: str,
    batch_size: int,
    world: World,
) -> Any:
    """A DeepSpeed engine around what `build` loads; called like it, by all ranks at once with inputs of equal shape.

    zero3: every weight is cut into world.size pieces, gathered while its module runs; what transformers loads within
    `build` is cut while it is read. autoep: experts of that transformers `family` are sharded instead, and tokens are
    sent to them; loaded whole on every rank's CPU first.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    keep = None
    if kind == "zero3":
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        keep = HfDeepSpeedConfig(settings)  # while it lives, from_pretrained loads in pieces
    else:
        settings["expert_parallel"] = {"enabled": True, "autoep_size": world.size, "preset_model": family}
    engine, *_ = deepspeed.initialize(model=build().eval().requires_grad_(False), config=settings)
    del keep
    engine.eval()
    return engine
