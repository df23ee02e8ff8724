"""A model too large for one device that only answers: in pieces over all ranks by ZeRO-3, gathered layer by layer."""

from typing import Any

import deepspeed
import torch
from torch import nn

from megakd.models.loading import fill, placed_in_pieces
from megakd.models.sources import Sources
from megakd.system.deepspeed_internals import Partitions


def divide(model: Any, sources: Sources, dtype: torch.dtype, *others: nn.Module, around: nn.Module) -> Any:
    """Read each parameter of a hollow model into this rank's piece; a DeepSpeed engine around one module of it.

    around: what gathers its pieces when it is called, by all ranks together, with inputs of equal shape. What lies
    outside, such as an output head, is gathered by its caller (`gathered`). others: modules that share parameters.
    """
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    partitions = Partitions(settings)
    fill(model.requires_grad_(False).eval(), sources, placed_in_pieces(partitions), *others)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(partitions.device)
    engine, *_ = deepspeed.initialize(model=around, config=settings)
    engine.eval()
    return engine
