import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megakd.config import ObjectiveConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch, TeacherTargets
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.models.hub import load_model
from megakd.models.teacher import targets_from_logits
from megakd.objectives.cached import CachedDistillation

VOCABULARY, TEMPERATURES = 400, [1.0, 2.0]
LENGTH = 37  # longer than the run's windows of 32, so that every row ends in padding


@pytest.fixture(scope="module")
def batch(dataset: ShardSet) -> Batch:
    """Five windows, at least one with two documents in it."""
    packed = [i for i in range(len(dataset)) if len(dataset[i].starts) > 1]
    return collate([dataset[i] for i in (packed[0], 1, packed[1], 3, len(dataset) - 1)], LENGTH)


@pytest.fixture(scope="module")
def student(prepared) -> Any:
    """In float64: what remains between it and a reference are mistakes."""
    return load_model(prepared / "student-0", torch.float64).eval()


@pytest.fixture(scope="module")
def teacher_logits(teacher, batch) -> Tensor:
    model = load_model(teacher, torch.float32).eval()  # transformers' experts have no float64
    with torch.no_grad():
        return model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits.double()


def exact(batch: Batch, teacher_logits: Tensor) -> Batch:
    """The batch with targets that were never rounded to be stored."""
    flat = targets_from_logits(teacher_logits.flatten(0, 1), batch.labels.flatten(), 16, (1.0, 2.0))
    ids, *rest = (field.unflatten(0, batch.labels.shape) for field in flat)
    return batch._replace(targets=TeacherTargets(ids.long(), *rest))


def objective(
    student: Any, alpha: float = 0.7, temperature: float = 2.0, tail: str = "ghost", vocabulary: int = VOCABULARY
):
    config = ObjectiveConfig(alpha=alpha, temperature=temperature, tail=tail)
    return CachedDistillation(student, config, vocabulary, TEMPERATURES)


def reference(
    student: Any, teacher_logits: Tensor, batch: Batch, alpha: float, temperature: float, tail: str
) -> dict[str, float]:
    """Position by position in Python floats, from both whole distributions; the stored targets say only which ids."""

    def kl(p_logits: Tensor, q_logits: Tensor, ids: list[int], t: float, tail: str) -> float:
        p, q = torch.softmax(p_logits / t, 0).tolist(), torch.softmax(q_logits / t, 0).tolist()
        mass = sum(p[i] for i in ids)
        if tail == "truncated":
            return sum(p[i] / mass * math.log(p[i] / mass / q[i]) for i in ids)
        rest = (sum(x for i, x in enumerate(v) if i not in ids) for v in (p, q))
        p_rest, q_rest = rest
        return sum(p[i] * math.log(p[i] / q[i]) for i in ids) + p_rest * math.log(p_rest / q_rest)

    with torch.no_grad():
        logits = student(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
    sums = {"ce": 0.0, "kl": 0.0, "kl_t1": 0.0}
    for row, position in (batch.labels != IGNORED).nonzero().tolist():
        mine, theirs = logits[row, position], teacher_logits[row, position]
        ids = batch.targets.ids[row, position].tolist()
        sums["ce"] -= torch.log_softmax(mine, 0)[batch.labels[row, position]].item()
        sums["kl"] += kl(theirs, mine, ids, temperature, tail)
        sums["kl_t1"] += kl(theirs, mine, ids, 1.0, "ghost")
    return sums | {"total": (1 - alpha) * sums["ce"] + alpha * temperature**2 * sums["kl"]}


def values(report: Any) -> dict[str, float]:
    return {"total": report.total.item()} | {name: value.item() for name, value in report.terms.items()}


def gradients(module: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    module.zero_grad()
    module(batch).total.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("tail", ["ghost", "truncated"])
@pytest.mark.parametrize("alpha, temperature", [(0.7, 2.0), (1.0, 1.0), (0.0, 2.0)])
def test_sums_are_those_of_the_reference(student, batch, teacher_logits, alpha, temperature, tail):
    found = values(objective(student, alpha, temperature, tail)(exact(batch, teacher_logits)))
    assert found == pytest.approx(reference(student, teacher_logits, batch, alpha, temperature, tail), rel=1e-9)


def test_stored_targets_are_close_to_the_whole_teacher(student, batch, teacher_logits):
    """What the run stored, rounded to fp16; measured: KL off by 1.1e-4 of itself."""
    found = values(objective(student)(batch))
    assert found == pytest.approx(reference(student, teacher_logits, batch, 0.7, 2.0, "ghost"), rel=5e-4)


def test_batch_has_every_kind_of_position(batch):
    """Borders inside windows, padding after them, and labels: else the next tests would prove nothing."""
    border = (batch.labels[:, :-1] == IGNORED) & (batch.position_ids[:, 1:] == 0)
    assert border[:, :31].any() and (batch.labels[:, 32:] == IGNORED).all() and (batch.labels != IGNORED).sum() > 100


def test_positions_without_a_label_contribute_nothing(student, batch):
    """Neither value nor gradient: whatever their targets say, their logits get none."""
    ignored = batch.labels == IGNORED
    ids, *floats = (field.clone() for field in batch.targets)
    ids[ignored] = 7
    for field in floats:
        field[ignored] = torch.nan
    spoiled = batch._replace(targets=TeacherTargets(ids, *floats))
    module = objective(student)
    assert values(module(spoiled)) == values(module(batch))
    before, after = gradients(module, batch), gradients(module, spoiled)
    assert all(torch.equal(before[name], after[name]) for name in before)
    seen: list[Tensor] = []
    handle = student.lm_head.register_forward_hook(lambda *args: seen.append(args[2]) or args[2].retain_grad())
    module(batch).total.backward()
    handle.remove()
    touched = seen[0].grad.abs().amax(-1) > 0
    assert torch.equal(touched, ~ignored)


def test_padding_and_company_do_not_change_a_window(student, dataset):
    """The sums of a batch are the sums over its windows, each without padding."""
    samples = [dataset[i] for i in range(4)]
    module = objective(student)
    whole = values(module(collate(samples, LENGTH)))
    parts = [values(module(collate([s], len(s.tokens) - 1))) for s in samples]
    assert whole == pytest.approx({name: sum(part[name] for part in parts) for name in whole}, rel=1e-9)


def test_a_batch_without_labels_is_zero_with_a_live_graph(student, batch):
    module = objective(student)
    empty = batch._replace(labels=torch.full_like(batch.labels, IGNORED))
    report = module(empty)
    assert report.total.requires_grad and values(report) == dict.fromkeys(values(module(batch)), 0.0)
    module.zero_grad()
    report.total.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_padding_of_the_vocabulary_has_no_effect(student, batch):
    torch.manual_seed(0)
    padded = copy.deepcopy(student)
    padded.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    with torch.no_grad():
        padded.get_input_embeddings().weight[VOCABULARY:].normal_(std=2.0)
    found = values(objective(padded)(batch))
    assert found == pytest.approx(values(objective(student)(batch)), rel=1e-12)
    wrong = values(objective(padded, vocabulary=VOCABULARY + 9)(batch))
    assert wrong["ce"] > 1.01 * found["ce"]


def test_a_temperature_without_stored_tails_is_refused(student):
    with pytest.raises(
        UserError, match=r"objective\.temperature.*T = 1, 2, not 3.*logits\.temperatures.*objective\.tail=truncated"
    ):
        objective(student, temperature=3.0)


def test_a_temperature_without_stored_tails_works_truncated(student, batch, teacher_logits):
    found = values(objective(student, 0.7, 3.0, "truncated")(exact(batch, teacher_logits)))
    assert found == pytest.approx(reference(student, teacher_logits, batch, 0.7, 3.0, "truncated"), rel=1e-9)


def test_tails_are_taken_by_temperature_not_by_place(student, batch, teacher_logits):
    """Temperatures stored in another order: the column of T = 4 is found, that of T = 1 stays the first."""
    flat = targets_from_logits(teacher_logits.flatten(0, 1), batch.labels.flatten(), 16, (1.0, 4.0, 2.0))
    ids, *rest = (field.unflatten(0, batch.labels.shape) for field in flat)
    config = ObjectiveConfig(alpha=0.7, temperature=2.0)
    module = CachedDistillation(student, config, VOCABULARY, [1.0, 4.0, 2.0])
    found = values(module(batch._replace(targets=TeacherTargets(ids.long(), *rest))))
    assert found == pytest.approx(reference(student, teacher_logits, batch, 0.7, 2.0, "ghost"), rel=1e-9)


def test_alpha_zero_is_the_cross_entropy_of_transformers(student, batch):
    module = objective(student, alpha=0.0)
    count = (batch.labels != IGNORED).sum().item()
    found = gradients(module, batch)
    total = module(batch).total.item()
    module.zero_grad()
    out = student(
        batch.tokens, position_ids=batch.position_ids, labels=batch.labels, shift_labels=batch.labels, use_cache=False
    )
    assert total == pytest.approx(out.loss.item() * count, rel=1e-6)
    (out.loss * count).backward()
    assert all(
        torch.allclose(found[f"student.{name}"], p.grad, rtol=1e-4, atol=1e-4) for name, p in student.named_parameters()
    )


def test_samples_without_targets_are_refused(student, batch):
    with pytest.raises(UserError, match="generate-logits"):
        objective(student)(batch._replace(targets=None))


def test_terms_are_detached_and_total_is_not(student, batch):
    report = objective(student)(batch)
    assert report.total.requires_grad and not any(term.requires_grad for term in report.terms.values())
