"""Norms of gradients and updates by optimizer group, as sums of squares that ranks can add."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def named(kind: str, sums: dict[str, float]) -> dict[str, float]:
    """The sums as they are logged: grad_norm/x0.1."""
    return {f"{kind}/{label}": value for label, value in sums.items()}


def grad_squares(gradients: Iterable[tuple[str, Tensor | None]]) -> dict[str, float]:
    """{label: sum of squares} of (group label, gradient)."""
    sums: dict[str, float] = {}
    for label, gradient in gradients:
        sums[label] = sums.get(label, 0.0) + (0.0 if gradient is None else gradient.float().square().sum().item())
    return sums


@torch.no_grad()
def update_squares(
    optimizer: torch.optim.Optimizer, members: Iterable[tuple[dict[str, Any], Tensor]]
) -> dict[str, float]:
    """{label: sum of squares} of the update that AdamW has just made of (its group, weight), from the weight's state.

    w' = (1 - r d) w - a with a = r (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps): w' - w = -(a + r d w') / (1 - r d).
    r learning rate, d decay, m and v moments, n updates (Loshchilov and Hutter 2019, algorithm 2).
    """
    sums: dict[str, float] = {}
    for group, weight in members:
        sums.setdefault(group["label"], 0.0)
        if state := optimizer.state.get(weight):
            rate, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
            count = float(state["step"])
            second = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
            change = (state["exp_avg"] / second).mul_(rate / (1 - beta1**count))
            change.add_(weight, alpha=rate * decay).div_(1 - rate * decay)
            sums[group["label"]] += change.square_().sum().item()
    return sums
