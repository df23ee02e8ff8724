"""Engine: how one optimizer step is executed, on one device or under DeepSpeed; knows nothing of distillation."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor


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
        """(name, whole tensor) of every parameter of the objective, on the first rank; nothing on the others."""
        ...

    def save(self, folder: Path) -> None:
        """Write optimizer and weights state of all ranks below `folder`, for `load` on the same ranks."""
        ...

    def load(self, folder: Path) -> None: ...

    def close(self) -> None:
        """Free what the engine holds; the objective is not used afterwards."""
        ...
