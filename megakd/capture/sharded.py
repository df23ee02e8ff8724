"""Sharded inference: a module too large for one device, divided among ranks by ZeRO-3 or with its experts too."""

from collections.abc import Callable
from typing import Any, Literal

import deepspeed
from torch import nn

from megakd.models.stock_experts import spread_stock_experts
from megakd.system.deepspeed_internals import join_groups
from megakd.system.dist import World


def spread(
    build: Callable[[], nn.Module],
    kind: Literal["zero3", "autoep"],
    dtype: str,
    batch_size: int,
    world: World,
) -> Any:
    """A DeepSpeed engine around what `build` loads; called like it, by all ranks at once with inputs of equal shape.

    zero3: every weight is cut into world.size pieces, gathered while its module runs; what transformers loads within
    `build` is cut while it is read. autoep: each rank keeps its share of every layer's experts whole, and tokens are
    sent to them; the model is loaded whole on every rank's CPU first.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    if kind == "zero3":
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        keep = HfDeepSpeedConfig(settings)  # while it lives, from_pretrained loads in pieces
        model = build()
        del keep
    else:
        model = build()
        spread_stock_experts(model, world.size, join_groups(world.size))
    engine, *_ = deepspeed.initialize(model=model.eval().requires_grad_(False), config=settings)
    engine.eval()
    return engine
