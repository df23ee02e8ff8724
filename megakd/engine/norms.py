"""Norms of gradients and updates by optimizer group, as sums of squares that ranks can add."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megakd.system.dist import sum_tensor_over_ranks


class Sums:
    """Named sums of numbers on a device, in float64; the host waits for them once, when it reads them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        wide = value.detach().double()
        self.sums[name] = self.sums[name] + wide if name in self.sums else wide

    def add_report(self, report: Any) -> None:
        """The sums of a `LossReport`, its total under that name."""
        for name, value in {"total": report.total, **report.terms}.items():
            self.add(name, value)

    def read(self, over_ranks: bool = False) -> dict[str, float]:
        """The sums, those of all ranks added where it is asked for; one transfer."""
        if not self.sums:
            return {}
        values = torch.stack(list(self.sums.values()))
        return dict(zip(self.sums, sum_tensor_over_ranks(values) if over_ranks else values.tolist(), strict=True))


def named(kind: str, sums: dict[str, float]) -> dict[str, float]:
    """The sums as they are logged: grad_norm/x0.1."""
    return {f"{kind}/{label}": value for label, value in sums.items()}


def grad_squares(gradients: Iterable[tuple[str, Tensor | None]]) -> dict[str, float]:
    """{label: sum of squares} of (group label, gradient)."""
    labels, sums = {}, Sums()
    for label, gradient in gradients:
        labels[label] = 0.0
        if gradient is not None:
            sums.add(label, gradient.float().square().sum())
    return labels | sums.read()


@torch.no_grad()
def update_squares(
    optimizer: torch.optim.Optimizer, members: Iterable[tuple[dict[str, Any], Tensor]]
) -> dict[str, float]:
    """{label: sum of squares} of the update that AdamW has just made of (its group, weight), from the weight's state.

    w' = (1 - r d) w - a with a = r (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps): w' - w = -(a + r d w') / (1 - r d).
    r learning rate, d decay, m and v moments, n updates (Loshchilov and Hutter 2019, algorithm 2).
    """
    members, sums = list(members), Sums()
    trained = [(group, weight, optimizer.state[weight]) for group, weight in members if optimizer.state.get(weight)]
    counts = torch.stack([state["step"] for _, _, state in trained]).tolist() if trained else []
    for (group, weight, state), count in zip(trained, counts, strict=True):
        rate, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        second = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        change = (state["exp_avg"] / second).mul_(rate / (1 - beta1**count))
        change.add_(weight, alpha=rate * decay).div_(1 - rate * decay)
        sums.add(group["label"], change.square_().sum())
    return {group["label"]: 0.0 for group, _ in members} | sums.read()
