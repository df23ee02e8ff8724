"""The student's head, gathered while a loss of it runs, with or without a live teacher's."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

from megakd.losses.head import FusedHead


class LiveHead(nn.Module):
    """forward(loss, *inputs) = loss(head, *inputs): a loss gets the head, and what it is of, and no objective.

    A module, because ZeRO-3 gathers the weight while it runs. theirs: a live teacher's head, gathered meanwhile too
    where ZeRO-3 has cut it.
    """

    def __init__(self, head: FusedHead, theirs: FusedHead | None = None):
        super().__init__()
        self.head = head
        self.theirs = (theirs,)  # in a tuple: held, but no child

    def forward(self, loss: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        with self._whole():
            return loss(self.head, *inputs, **settings)

    def _whole(self) -> Any:
        theirs = self.theirs[0]
        if theirs is None or not hasattr(theirs.weight, "ds_id"):
            return nullcontext()
        from megakd.system.deepspeed_internals import gathered

        return gathered([theirs.weight])
