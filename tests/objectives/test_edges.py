"""Windows without labels, one label, one window, one step, numbers that are not finite: every kind of objective."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megakd.config.objective import CachedConfig, OnlineConfig, SarConfig
from megakd.config.train import OptimConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch, Paired, Sample, Side
from megakd.data.spans import pair
from megakd.engine.guard import GRADIENT
from megakd.engine.local import LocalEngine
from megakd.engine.optim import build_optimizer, schedule
from megakd.models.loading import load_model
from megakd.models.tiny import train_tokenizer
from megakd.objectives.base import Objective
from megakd.objectives.cached import CachedDistillation
from megakd.objectives.online import OnlineDistillation
from megakd.objectives.sar import SarDistillation
from megakd.train.data import without_blanks
from tests.conftest import VOCABULARY
from tests.objectives.sar import dense_student

LENGTH = 40
KINDS = ("cached", "sar", "online", "sar over spans", "online over spans")
Make = Callable[[], tuple[Objective, Batch]]


@pytest.fixture(scope="module")
def batches(dataset, tokenizer, documents) -> dict[str, Batch]:
    """Two windows as each kind reads them; under "blank" and a kind what stands for damaged ones, without labels."""
    found = read([dataset[0], dataset[1]], tokenizer, documents)
    return found | {f"blank {k}": b for k, b in read([dataset.blank()] * 2, tokenizer, documents).items()}


def read(samples: list[Sample], tokenizer: Any, documents: list[str]) -> dict[str, Batch]:
    plain = collate(samples, LENGTH)
    other = train_tokenizer([text.upper() + text for text in documents[:20]], VOCABULARY)
    paired = without_blanks(pair(samples, tokenizer, other, LENGTH, LENGTH + LENGTH // 4), samples)
    spans = Batch(*paired.student[:3], paired=paired)
    live = plain._replace(targets=None)
    return {"cached": plain, "sar": live, "online": live, "sar over spans": spans, "online over spans": spans}


@pytest.fixture(params=KINDS)
def made(request, batches, teacher, dataset) -> tuple[Objective, Batch]:
    kind, batch = request.param.split()[0], batches[request.param]
    if kind == "cached":
        return CachedDistillation(dense_student(), CachedConfig(alpha=0.7), dataset.facts), batch
    frozen, other = load_model(teacher, torch.float32), None if batch.paired is None else VOCABULARY
    if kind == "sar":
        sar = SarConfig(alpha=0.7, entropy=0.1, balance=0.1, drift_steps=1)
        return SarDistillation(dense_student(), frozen, sar, VOCABULARY, other), batch
    online = OnlineConfig(alpha=0.7, gap=1.0, importance=1.0, routing="capacity", initial_top_k=2)
    return OnlineDistillation(dense_student(), frozen, online, VOCABULARY, other), batch


def with_labels(batch: Batch, keep: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with the labels for which `keep` of the student's (then the teacher's) labels holds."""

    def side(each: Side) -> Side:
        kept = keep(each.labels)
        return each._replace(
            labels=torch.where(kept, each.labels, IGNORED), label_spans=torch.where(kept, each.label_spans, -1)
        )

    paired = batch.paired and Paired(side(batch.paired.student), side(batch.paired.teacher), batch.paired.span_count)
    return batch._replace(labels=torch.where(keep(batch.labels), batch.labels, IGNORED), paired=paired)


def one_window(batch: Batch) -> Batch:
    def first(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*map(first, value))
        return value if value is None else value[:1]

    return first(batch)


def gradients(objective: Objective, total: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def engine_of(objective: Objective) -> LocalEngine:
    optimizer = build_optimizer(objective, (), OptimConfig(lr=1e-3))
    return LocalEngine(objective, optimizer, 1.0, "float32", torch.device("cpu"))


def memory_is_finite(objective: Objective) -> bool:
    return all(math.isfinite(value) for values in objective.memory.values() for value in values)


def test_windows_without_labels_are_zero_with_a_live_graph(made, batches, request):
    objective, _ = made
    objective.at(0.0)
    report = objective(batches[f"blank {request.node.callspec.params['made']}"])
    assert report.total.item() == 0 and report.total.requires_grad
    assert all(value.item() == 0 for value in report.terms.values()), report.terms
    assert all(not slope.any() for slope in gradients(objective, report.total).values())


@pytest.mark.parametrize("case", ["one label", "one window", "one window without labels beside"])
def test_little_to_learn_from_is_finite(made, case):
    objective, batch = made
    if case == "one label":
        batch = with_labels(batch, lambda labels: (labels != IGNORED) & ((labels != IGNORED).cumsum(1) == 5))
        batch = with_labels(batch, lambda labels: torch.arange(2)[:, None].expand_as(labels) == 0)
    elif case == "one window":
        batch = one_window(batch)
    else:
        batch = with_labels(batch, lambda labels: torch.arange(2)[:, None].expand_as(labels) == 0)
    objective.at(0.0)
    report = objective(batch)
    assert all(math.isfinite(value.item()) for value in (report.total, *report.terms.values())), report.terms
    assert report.terms["ce"] > 0
    assert all(slope.isfinite().all() for slope in gradients(objective, report.total).values())
    tokens = int((batch.labels != IGNORED).sum())
    objective.observe({name: value.item() for name, value in report.terms.items()}, tokens)
    assert memory_is_finite(objective)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_move_nothing_and_leave_no_trace(made, value):
    objective, batch = made
    engine, norm = engine_of(objective), objective.student.get_decoder().norm.weight
    good = norm.detach().clone()
    norm.data[0] = value
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    objective.at(0.0, 0)
    report = engine.step([batch], 60, 1.0, norms=True)
    assert report.left_out == GRADIENT and not math.isfinite(report.sums["total"])
    objective.forget_step()
    for name, parameter in objective.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name
    norm.data.copy_(good)
    objective.at(0.5, 1)
    report = engine.step([batch], 60, 1.0)
    assert not report.left_out and math.isfinite(report.sums["total"])
    objective.observe(report.sums, 60)
    assert memory_is_finite(objective)


def test_a_stage_of_one_step_trains(made):
    objective, batch = made
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    objective.at(0 / max(1 - 1, 1), 0)
    report = engine_of(objective).step([batch], 60, schedule(OptimConfig(), 0, 1))
    assert not report.left_out and schedule(OptimConfig(), 0, 1) == 1
    objective.observe(report.sums, 60)
    objective.at(1.0, 1)  # which looks at the first step's gradients
    assert any(not torch.equal(p, before[name]) for name, p in objective.named_parameters())
    assert memory_is_finite(objective)
