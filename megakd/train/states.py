"""Bytes of a student's weights, gradients, float32 masters and moments on one of DeepSpeed's ranks: model states.

n numbers of a parameter on a rank (of experts under expert parallelism: those of the rank's own), P ranks that keep the
same n, among which ZeRO partitions (all R ranks; R / E for experts that E ranks share), w bytes per number in
model.dtype. The formulas are those of Rajbhandari et al. 2020 (ZeRO), section 3, with K = 12, for DeepSpeed 0.19.8:

| per trained parameter | weights | gradients | masters | moments of AdamW |
|---|---|---|---|---|
| ZeRO 0 | w n | w n | 4 n | 8 n |
| ZeRO 1 | w n | w n | 4 n / P | 8 n / P |
| ZeRO 2 | w n | w n / P | 4 n / P | 8 n / P |
| ZeRO 3 | w n / P, and w n of those below the persistence threshold | w n / P | 4 n / P | 8 n / P |

A frozen parameter has weights alone. Experts that expert parallelism shares are never frozen: their rate is 0.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from megakd.config.train import LrRule
from megakd.engine.optim import assign_rules
from megakd.models.shared_core import PROJECTIONS, SharedCoreExperts

MASTERS, MOMENTS = 4, 8  # bytes per number: one and two in float32
PERSISTENT = 100_000  # DeepSpeed's default of stage3_param_persistence_threshold


class Kept(NamedTuple):
    """One parameter of the student. packed: numbers of the tensor that expert parallelism would pack it into, or 0."""

    numel: int
    trained: bool
    packed: int = 0


class States(NamedTuple):
    """Bytes on one rank, wherever they lie."""

    weights: float
    gradients: float
    masters: float
    moments: float


class Layout(NamedTuple):
    """How a student is divided. width: bytes per number of model.dtype. persistent: as ZeRO-3's threshold."""

    zero: int
    ranks: int
    expert_parallel: int = 1
    width: int = 2
    persistent: int = PERSISTENT


def parameters_of(student: nn.Module, rules: tuple[LrRule, ...]) -> list[Kept]:
    """Every parameter of a student, on any device (meta is enough); rules: of the stage that trains it."""
    packed: dict[int, int] = {}
    for module in student.modules():
        if isinstance(module, SharedCoreExperts):
            for projection in PROJECTIONS:
                factors = [p for name, p in module.named_parameters(recurse=False) if f"_{projection}_" in name]
                packed |= dict.fromkeys(map(id, factors), sum(p.numel() for p in factors))
    assigned = {id(each.parameter): each for each in assign_rules(student, rules)}
    return [Kept(e.parameter.numel(), e.multiplier > 0, packed.get(key, 0)) for key, e in assigned.items()]


def model_states(parameters: Iterable[Kept], layout: Layout) -> States:
    """The sums of the formulas above over all parameters."""
    weights = gradients = masters = moments = 0.0
    for parameter in parameters:
        shared = parameter.packed > 0 and layout.expert_parallel > 1
        n = parameter.numel / layout.expert_parallel if shared else parameter.numel
        partitions = layout.ranks // layout.expert_parallel if shared else layout.ranks
        weights += layout.width * n / (partitions if layout.zero == 3 else 1)
        tensor = parameter.packed / layout.expert_parallel if shared else parameter.numel
        if layout.zero == 3 and tensor <= layout.persistent:
            weights += layout.width * n
        if parameter.trained or shared:
            gradients += layout.width * n / (partitions if layout.zero >= 2 else 1)
            masters += MASTERS * n / (partitions if layout.zero >= 1 else 1)
            moments += MOMENTS * n / (partitions if layout.zero >= 1 else 1)
    return States(weights, gradients, masters, moments)


def layout_of(zero: dict[str, Any], ranks: int, expert_parallel: int, width: int) -> Layout:
    """zero: the section zero_optimization of a DeepSpeed file."""
    threshold = zero.get("stage3_param_persistence_threshold", PERSISTENT)
    return Layout(zero["stage"], ranks, expert_parallel, width, int(threshold))
