"""Engine: how one optimizer step is executed, on one device or under DeepSpeed; knows nothing of distillation."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from megakd.engine.optim import canonical_names


class StepReport(NamedTuple):
    """Named loss sums over the tokens of all ranks (`total` among them), and the gradient norm before clipping.

    left_out: why the update was not made (guard.py), or "". norms: of gradient and update, by optimizer group, where
    they were asked for.
    """

    sums: dict[str, float]
    grad_norm: float
    left_out: str = ""
    norms: Mapping[str, float] = MappingProxyType({})


Accept = Callable[[dict[str, float]], bool]  # whether to make an update, from the loss sums of its step


def always(sums: dict[str, float]) -> bool:
    return True


MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, next to the master itself (`fp32`)


class CarryOver(NamedTuple):
    """What a stage transition carries over: updates of each parameter; fp32 masters and Adam's moments, whole.

    updates, by canonical name, is the same on all ranks. tensors {name in the objective: {fp32, exp_avg, exp_avg_sq}},
    on the CPU, are divided among them.
    """

    updates: dict[str, int]
    tensors: dict[str, dict[str, Tensor]]

    def updates_of(self, name: str, parameter: nn.Parameter) -> int:
        """Updates of the parameter of that name, 0 for one that was not trained."""
        return self.updates.get(canonical_names(name, parameter)[0], 0)


class Engine(Protocol):
    """What the training loop needs. Every method is called by all ranks together."""

    def step(
        self, micro_batches: Iterable[Any], tokens: int, factor: float, accept: Accept = always, norms: bool = False
    ) -> StepReport:
        """One optimizer step on this rank's micro-batches.

        accept: an update that it refuses, or whose gradient is not finite, is skipped.
        norms: also measure the norms of gradient and update of each group.

        tokens: counted tokens of the step over all ranks and micro-batches: losses are sums, divided by it once.
        factor: multiplies every group's learning rate (the schedule).
        """
        ...

    def measure(self, batches: Iterable[Any]) -> dict[str, float]:
        """Named sums over the batches of all ranks of what the objective reports of held-out text (`held_out=True`).

        The weights as they are, in evaluation mode, without gradients. Every rank has as many batches.
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

    def export_state(self) -> CarryOver:
        """Masters and Adam's moments of everything that this stage trains."""
        ...

    def import_state(self, carried: CarryOver) -> None:
        """Begin with what another stage's engine passed on, where this stage trains it too.

        The optimizer's groups must not mix parameters that were updated different numbers of times (`build_optimizer`).
        """
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
