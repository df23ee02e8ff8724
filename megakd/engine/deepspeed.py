"""Steps under DeepSpeed: any ZeRO stage, any number of ranks, the same sums as the local engine."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megakd.dist import World, sum_over_ranks
from megakd.engine.base import StepReport
from megakd.engine.optim import set_learning_rate

TAG = "state"


class DeepSpeedEngine:
    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], world: World):
        self.world = world
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
        self.optimizer = optimizer

    def step(self, micro_batches: Iterable[Any], tokens: int, factor: float) -> StepReport:
        self.engine.train()
        set_learning_rate(self.optimizer, factor)
        sums: dict[str, float] = {}
        for batch in micro_batches:
            report = self.engine(batch)
            # DeepSpeed averages gradients over ranks; we want the sum over all tokens divided once
            self.engine.backward(report.total * (self.world.size / tokens), scale_wrt_gas=False)
            self.engine.step()  # counts micro-batches, updates weights at the last one
            for name, value in {"total": report.total, **report.terms}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        grad_norm = self.engine.get_global_grad_norm() or 0.0
        reduced = sum_over_ranks(list(sums.values()), self.world.device)
        return StepReport(dict(zip(sums, reduced, strict=True)), float(grad_norm))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.engine.module.named_parameters():
            # under ZeRO-3 one parameter is whole on the first rank at a time; without it this gathers nothing
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if self.world.first:
                    yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag=TAG)

    def close(self) -> None:
        self.engine.destroy()
