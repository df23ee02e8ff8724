"""A teacher over all ranks together: each reads its share from the files, and no rank ever holds the whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from megakd.models.loading import hollow_model
from megakd.models.sharded import divide
from megakd.models.stock_experts import spread_stock_experts
from megakd.system.deepspeed_internals import join_groups
from megakd.system.dist import World


def load_shared(
    folder: Path, wrap: Callable[[Any], nn.Module], kind: Literal["zero3", "autoep"], dtype: torch.dtype, world: World
) -> Any:
    """A DeepSpeed engine around wrap(the causal LM of a folder), called by all ranks at once.

    Their inputs have equal shapes. zero3: every weight is cut into world.size pieces, gathered while its module runs.
    autoep: each rank keeps its share of every layer's experts whole instead, and tokens are sent to them.
    """
    model, sources = hollow_model(folder, dtype)
    if kind == "autoep":
        spread_stock_experts(model, world.size, join_groups(world.size))
    wrapped = wrap(model)
    return divide(model, sources, dtype, wrapped, around=wrapped)
