"""The student's head, gathered while a loss of it runs, with or without a live teacher's."""

from collections.abc import Callable
from typing import Any

from torch import nn

from megakd.losses.head import FusedHead


class LiveHead(nn.Module):
    """forward(loss, *inputs) = loss(head, *inputs): a loss gets the head, and what it is of, and no objective.

    A module, because ZeRO-3 gathers the weight while it runs.
    """

    def __init__(self, head: FusedHead):
        super().__init__()
        self.head = head

    def forward(self, loss: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        return loss(self.head, *inputs, **settings)
