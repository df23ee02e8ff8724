"""How often a step waits for the device: as often for many parameters and micro-batches as for one."""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakd.config.objective import CachedConfig, OnlineConfig, SarConfig
from megakd.config.train import OptimConfig
from megakd.data.batches import collate, to_device
from megakd.engine.local import LocalEngine
from megakd.engine.norms import grad_squares, update_squares
from megakd.engine.optim import build_optimizer
from megakd.models.loading import load_model
from megakd.objectives.base import LossReport
from megakd.objectives.cached import CachedDistillation
from megakd.objectives.online import OnlineDistillation
from megakd.objectives.sar import SarDistillation
from tests.conftest import ROOT, VOCABULARY
from tests.objectives.sar import dense_student

WAITING = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")
CPU = torch.device("cpu")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Calls from megakd's own code that make the host wait for a tensor, by file and line."""
    found: Counter = Counter()
    for name in WAITING:
        original = getattr(Tensor, name)

        def counted(self: Tensor, *more: Any, original: Any = original) -> Any:
            caller = sys._getframe(1)
            if caller.f_code.co_filename.startswith(str(ROOT / "megakd")):
                found[caller.f_code.co_filename, caller.f_lineno] += 1
            return original(self, *more)

        monkeypatch.setattr(Tensor, name, counted)
    yield found


class Many(nn.Module):
    """A sum of squares over many small weights."""

    def __init__(self, count: int):
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(2, 2) for _ in range(count))

    def forward(self, batch: float) -> LossReport:
        total = batch * torch.stack([weight.square().sum() for weight in self.weights]).sum()
        return LossReport(total, {"a": total.detach() / 3, "b": total.detach() / 7})


def engine_of(objective: nn.Module) -> LocalEngine:
    return LocalEngine(objective, build_optimizer(objective, (), OptimConfig(lr=1e-3)), 1.0, "float32", CPU)


@pytest.mark.parametrize("norms, most", [(False, 1), (True, 4)])
def test_a_step_waits_once_however_many_parameters_and_micro_batches(waits, norms, most):
    """A transfer a term and micro-batch, and one a parameter for norms, were thousands in a step of a MoE."""
    for count, micro in ((2, 1), (30, 7)):
        engine = engine_of(Many(count))
        waits.clear()
        report = engine.step([1.0] * micro, 5, 1.0, norms=norms)
        assert sum(waits.values()) == most, waits
        assert report.sums["total"] == pytest.approx(micro * count * 4) and report.grad_norm > 0


def test_sums_are_those_of_plain_numbers():
    """Bit by bit: float64, in order."""
    gradients = [("a" if i % 3 else "b", torch.randn(5, generator=torch.Generator().manual_seed(i))) for i in range(40)]
    expected: dict[str, float] = {}
    for label, gradient in gradients:
        expected[label] = expected.get(label, 0.0) + gradient.square().sum().item()
    assert grad_squares([*gradients, ("none", None)]) == expected | {"none": 0.0}
    assert update_squares(torch.optim.AdamW([nn.Parameter(torch.ones(1))]), []) == {}


@pytest.mark.parametrize("kind", ["cached", "sar", "online", "learned"])
def test_a_micro_batch_waits_for_nothing(waits, kind, teacher, dataset):
    """What a kind asks the device for in a step does not grow with the micro-batches."""
    batch = collate([dataset[i] for i in range(2)], 32)
    if kind == "cached":
        objective: Any = CachedDistillation(dense_student(), CachedConfig(), dataset.facts)
    else:
        batch, frozen = batch._replace(targets=None), load_model(teacher, torch.float32)
        if kind == "sar":
            objective = SarDistillation(dense_student(), frozen, SarConfig(drift_steps=0), VOCABULARY)
        else:
            routing: Any = "learned" if kind == "learned" else "capacity"
            online = OnlineConfig(gap=1.0, importance=0.5, routing=routing, initial_top_k=2)
            objective = OnlineDistillation(dense_student(), frozen, online, VOCABULARY)
    batch = to_device(batch, CPU)  # as the loop gives it: which positions count is known
    engine, found = engine_of(objective), []
    for step, micro in enumerate((1, 3, 1)):
        objective.at(0.5, step)
        waits.clear()
        report = engine.step([batch] * micro, 64 * micro, 1.0)
        objective.observe(report.sums, 64 * micro)
        # the fused loss asks about numbers of the CPU alone
        found.append(sum(count for (file, _), count in waits.items() if "losses/head" not in file))
    assert found[1] == found[2] <= 4, waits
