"""What an objective is and returns: the one thing engines and the loop know about training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megakd.config import ObjectiveConfig


class LossReport(NamedTuple):
    """Sums over the counted tokens of a batch. A NamedTuple: ZeRO-3's hooks look inside tuples and dicts only.

    total: what is differentiated. terms: named detached sums for the log.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """forward(Batch) -> LossReport. `student` and whatever else it registers is trained, by the stage's rules.

    alpha, temperature: what is in force, by `at`.
    """

    def __init__(self, student: Any, config: ObjectiveConfig):
        super().__init__()
        self.student = student
        self.config = config

    @torch.no_grad()
    def restore(self, beside: Mapping[str, Tensor]) -> None:
        """Set what is trained besides the student, by name."""
        parameters = dict(self.named_parameters())
        for name, tensor in beside.items():
            parameters[name].copy_(tensor)

    def at(self, share: float, step: int = 0) -> None:
        """Set alpha and the temperature for this share of the stage, 0 to 1; step: those done in all. Once a step."""
        self.alpha, self.temperature = (
            value[0] + share * (value[1] - value[0]) if isinstance(value, tuple) else value
            for value in (self.config.alpha, self.config.temperature)
        )
