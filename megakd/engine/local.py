"""One process, one device: the plain form of a step, and the reference for every other engine."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megakd.engine.base import MOMENTS, Accept, CarryOver, StepReport, always, saved_buffers
from megakd.engine.guard import GRADIENT, REJECTED, SCALE
from megakd.engine.norms import Sums, grad_squares, named, update_squares
from megakd.engine.optim import canonical_name, set_learning_rate

GRAD_NORM = "grad norm"  # next to the objective's terms, whose names have no blanks


class LocalEngine:
    """float32 weights; in 16 bits the forward runs under autocast, so the weights are their own masters.

    float16 has a loss scaler, which skips updates whose gradient overflows and halves its scale.
    """

    def __init__(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, dtype: str, device: torch.device
    ):
        self.objective = objective.to(device)
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        half = torch.float16 if dtype == "float16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, half, enabled=dtype != "float32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step(
        self, micro_batches: Iterable[Any], tokens: int, factor: float, accept: Accept = always, norms: bool = False
    ) -> StepReport:
        self.objective.train()
        found = Sums()
        for batch in micro_batches:
            with self.autocast:
                report = self.objective(batch)
            self.scaler.scale(report.total / tokens).backward()
            found.add_report(report)
        self.scaler.unscale_(self.optimizer)
        squares: dict[str, float] = {}
        if norms:
            labelled = ((group["label"], p.grad) for group in self.optimizer.param_groups for p in group["params"])
            squares = named("grad_norm", grad_squares(labelled))
        found.add(GRAD_NORM, nn.utils.clip_grad_norm_(self.trained, self.clip_norm))
        sums = found.read()
        grad_norm = sums.pop(GRAD_NORM)
        set_learning_rate(self.optimizer, factor)
        left_out = ""
        if not accept(sums):
            left_out = REJECTED
        elif not math.isfinite(grad_norm):
            left_out = SCALE if self.scaler.is_enabled() else GRADIENT
        else:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if norms and not left_out:
            members = ((group, p) for group in self.optimizer.param_groups for p in group["params"])
            squares |= named("update_norm", update_squares(self.optimizer, members))
        return StepReport(sums, grad_norm, left_out, {name: value**0.5 for name, value in squares.items()})

    @torch.no_grad()
    def measure(self, batches: Iterable[Any]) -> dict[str, float]:
        self.objective.eval()
        found = Sums()
        for batch in batches:
            with self.autocast:
                found.add_report(self.objective(batch, held_out=True))
        return found.read()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in self.objective.named_parameters())
        yield from saved_buffers(self.objective)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        state = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["scaler"] = self.scaler.state_dict()
        torch.save(state, folder / "local.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "local.pt", map_location="cpu", weights_only=True)
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler", {}))

    def export_state(self) -> CarryOver:
        updates, tensors = {}, {}
        for name, parameter in self.objective.named_parameters():
            if state := self.optimizer.state.get(parameter):
                updates[canonical_name(name)] = int(state["step"])
                whole = {"fp32": parameter.detach(), **{moment: state[moment] for moment in MOMENTS}}
                tensors[name] = {what: tensor.cpu() for what, tensor in whole.items()}
        return CarryOver(updates, tensors)

    def import_state(self, carried: CarryOver) -> None:
        for name, parameter in self.objective.named_parameters():
            count = carried.updates_of(name, parameter)
            if parameter.requires_grad and count:
                tensors = carried.tensors[name]
                parameter.data.copy_(tensors["fp32"])
                moments = {moment: tensors[moment].to(parameter.device) for moment in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(count)), **moments}

    def close(self) -> None:
        self.trained = []
