"""One process, one device: the plain form of a step, and the reference for every other engine."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megakd.engine.base import MOMENTS, Carried, StepReport, saved_buffers
from megakd.engine.optim import canonical_name, set_learning_rate


class LocalEngine:
    """float32 weights; with `bfloat16` the forward runs under autocast, so the weights are their own masters."""

    def __init__(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, dtype: str, device: torch.device
    ):
        self.objective = objective.to(device)
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, micro_batches: Iterable[Any], tokens: int, factor: float) -> StepReport:
        self.objective.train()
        sums: dict[str, float] = {}
        for batch in micro_batches:
            with self.autocast:
                report = self.objective(batch)
            (report.total / tokens).backward()
            for name, value in {"total": report.total, **report.terms}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        grad_norm = nn.utils.clip_grad_norm_(self.trained, self.clip_norm).item()
        set_learning_rate(self.optimizer, factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(sums, grad_norm)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in self.objective.named_parameters())
        yield from saved_buffers(self.objective)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        state = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "local.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "local.pt", map_location="cpu", weights_only=True)
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])

    def hand_over(self) -> Carried:
        updates, tensors = {}, {}
        for name, parameter in self.objective.named_parameters():
            if state := self.optimizer.state.get(parameter):
                updates[canonical_name(name)] = int(state["step"])
                whole = {"fp32": parameter.detach(), **{moment: state[moment] for moment in MOMENTS}}
                tensors[name] = {what: tensor.cpu() for what, tensor in whole.items()}
        return Carried(updates, tensors)

    def take_over(self, carried: Carried) -> None:
        for name, parameter in self.objective.named_parameters():
            count = carried.count(name, parameter)
            if parameter.requires_grad and count:
                tensors = carried.tensors[name]
                parameter.data.copy_(tensors["fp32"])
                moments = {moment: tensors[moment].to(parameter.device) for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(count)), **moments}

    def close(self) -> None:
        self.trained = []
