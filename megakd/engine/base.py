"""Engine: how one optimizer step is executed, on one device or under DeepSpeed; knows nothing of distillation."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class StepReport(NamedTuple):
    """Named loss sums over the tokens of all ranks (`total` among them), and the gradient norm before clipping."""

    sums: dict[str, float]
    grad_norm: float


class Engine(Protocol):
    """What the training loop needs. Every method is called by all ranks together."""

    def step(self, micro_batches: Iterable[Any], tokens: int, factor: float) -> StepReport:
        """One optimizer step on this rank's micro-batches.

        tokens: counted tokens of the step over all ranks and micro-batches: losses are sums, divided by it once.
        factor: multiplies every group's learning rate (the schedule).
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name below the objective, whole tensor) of every parameter and every buffer that is saved.

        On the first rank; nothing on the others. Names and tensors are the same however the ranks share them.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write optimizer and weights state of all ranks below `folder`, for `load`."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from a `save`: bit by bit on the ranks that saved; on others where `elastic` says that it can."""
        ...

    def close(self) -> None:
        """Free what the engine holds; the objective is not used afterwards."""
        ...


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of those that belong to a checkpoint: groups of a basis, a router's correction bias."""
    for place, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{place}.{name}" if place else name, buffer
