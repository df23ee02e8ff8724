from typing import Any

import pytest
import torch
from torch.nn import functional

from megakd.config.objective import OnlineConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch
from megakd.errors import UserError
from megakd.losses.divergence import Divergence, divergence_terms
from megakd.losses.hidden import attention_loss, contrastive_loss, feature_loss
from megakd.models.loading import load_model
from megakd.objectives.online import OnlineDistillation
from tests.conftest import VOCABULARY
from tests.objectives.sar import dense_student

LENGTH = 37  # longer than the windows, so that every row ends in padding
PARTS = ("kl", "feature", "attention", "layers", "contrastive")
NONE = dict.fromkeys(PARTS, 0.0)


@pytest.fixture(scope="module")
def batch(dataset) -> Batch:
    packed = [i for i in range(len(dataset)) if len(dataset[i].starts) > 1]
    return collate([dataset[i] for i in (packed[0], 1, packed[1])], LENGTH, whole=True)._replace(targets=None)


@pytest.fixture
def made(teacher):
    def make(
        alpha: float = 0.7, depth: int = 2, config: dict[str, Any] | None = None, **online: Any
    ) -> OnlineDistillation:
        fields = OnlineConfig(alpha=alpha, temperature=2.0, **(config or {}), **online)
        student = dense_student(num_hidden_layers=depth)
        return OnlineDistillation(student, load_model(teacher, torch.float32), fields, VOCABULARY)

    return make


def asked(model: Any, batch: Batch) -> Any:
    return model(
        batch.tokens, position_ids=batch.position_ids, use_cache=False, output_hidden_states=True,
        output_attentions=True,
    )  # fmt: skip


def reference(objective: OnlineDistillation, batch: Batch) -> dict[str, Any]:
    """Every part by its formula, from what the models give when all is asked for."""
    student, teacher = objective.student, objective.held[0]
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = asked(teacher, batch)
    own, counted = asked(student, batch), batch.labels != IGNORED
    labels = batch.labels[counted]
    s, t = (out.logits[counted].double() for out in (own, theirs))
    p, q = (x.div(2.0).log_softmax(-1) for x in (t, s))
    last, taught = own.hidden_states[-1], theirs.hidden_states[-1]
    found = {"ce": functional.cross_entropy(s, labels, reduction="sum"), "kl": (p.exp() * (p - q)).sum()}
    if hasattr(objective, "projector"):
        found["feature"] = feature_loss(objective.projector(last), taught, counted)
        found["contrastive"] = contrastive_loss(objective.projector(last), taught, counted, 0.1)
    layers = [(i, objective.layer_of[i]) for i in range(len(own.attentions))]
    if hasattr(objective, "layer_projector"):
        errors = [
            feature_loss(objective.layer_projector(own.hidden_states[i + 1]), theirs.hidden_states[j + 1], counted)
            for i, j in layers
        ]
        found["layers"] = torch.stack(errors).mean()
    maps = [attention_loss(own.attentions[i], theirs.attentions[j], counted) for i, j in layers]
    found["attention"] = torch.stack(maps).mean()
    return found


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_whole_is_the_weighted_sum_of_its_parts(made, batch, depth):
    objective = made(depth=depth)
    report, parts = objective(batch), reference(objective, batch)
    weights = {"kl": 0.7 * 4, "feature": 0.1, "attention": 0.1, "layers": 0.05, "contrastive": 0.05}
    for name, value in parts.items():
        assert report.terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    expected = 0.3 * parts["ce"] + 0.7 * sum(weight * parts[name] for name, weight in weights.items())
    assert report.total.item() == pytest.approx(expected.item(), rel=1e-5)
    named = dict(objective.named_parameters())
    assert {"projector.weight", "layer_projector.weight"} < named.keys()
    found, wanted = (torch.autograd.grad(value, list(named.values())) for value in (report.total, expected))
    for name, mine, theirs in zip(named, found, wanted, strict=True):
        assert mine.any(), name
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_switched_off_and_then_costs_nothing(made, batch, part):
    objective = made(**NONE | {part: 1.0})
    report, parts = objective(batch), reference(objective, batch)
    weight = 4.0 if part == "kl" else 1.0
    assert report.total.item() == pytest.approx((0.3 * parts["ce"] + 0.7 * weight * parts[part]).item(), rel=1e-5)
    assert report.terms.keys() == {"ce", "kl", "kl_t1", "teacher_ce", part}
    extra = {name.split(".")[0] for name, _ in objective.named_parameters()} - {"student"}
    assert extra == {"feature": {"projector"}, "contrastive": {"projector"}, "layers": {"layer_projector"}}.get(
        part, set()
    )


def test_attention_maps_are_made_only_when_asked_for(made, batch):
    without, with_maps = made(attention=0.0), made()
    assert without.student.config._attn_implementation != "eager" == with_maps.student.config._attn_implementation
    assert without._ask(without.student, batch).attentions is None
    maps = with_maps._ask(with_maps.student, batch).attentions[0]
    other = batch.position_ids.eq(0).cumsum(1)
    across = other[:, :, None] != other[:, None, :]
    assert across.any() and not maps[across[:, None].expand_as(maps)].any()  # no document attends to another


def test_padding_has_no_say_and_windows_count_alone(made, batch):
    objective = made(gap=1.0)
    last = (batch.labels != IGNORED).int().cumsum(1).argmax(1)
    padded = torch.arange(LENGTH) > last[:, None] + 1
    changed = batch._replace(tokens=torch.where(padded, 7, batch.tokens))
    whole, other = objective(batch), objective(changed)
    parts = [objective(Batch(*(field[i : i + 1] for field in batch[:3]))) for i in range(3)]
    for name in whole.terms:
        assert other.terms[name].item() == pytest.approx(whole.terms[name].item(), rel=1e-5), name
        assert sum(p.terms[name].item() for p in parts) == pytest.approx(whole.terms[name].item(), rel=1e-5), name
    assert other.total.item() == pytest.approx(whole.total.item(), rel=1e-6)
    empty = objective(batch._replace(labels=torch.full_like(batch.labels, IGNORED)))
    assert empty.total.item() == 0 and empty.total.requires_grad


def test_positions_count_by_their_gap(made, batch):
    """What is far counts more, and the weights' mean over a window is 1."""
    plain, weighted = (made(**NONE | {"kl": 1.0}, gap=gap) for gap in (0.0, 2.0))
    counted = batch.labels != IGNORED
    with torch.no_grad():
        s, t = (
            model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits[counted]
            for model in (plain.student, plain.held[0])
        )
    at_1, at_2 = (
        ((t / T).softmax(-1) * ((t / T).log_softmax(-1) - (s / T).log_softmax(-1))).sum(-1) for T in (1.0, 2.0)
    )
    window = torch.arange(3)[:, None].expand_as(counted)[counted]
    mean = torch.stack([(at_1[window == b] ** 2).mean() for b in range(3)])
    expected = (at_1**2 / mean[window] * at_2).sum().item()
    report, other = weighted(batch), plain(batch)
    assert report.terms["kl"].item() == pytest.approx(expected, rel=1e-4) and expected > other.terms["kl"].item()
    assert report.terms["kl_t1"] == other.terms["kl_t1"]


def test_nothing_of_the_teacher_is_trained(made, batch):
    objective = made(importance=1.0, gap=1.0)
    objective(batch).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.held[0].parameters())


def test_experts_count_by_their_share_of_the_gap(made, batch):
    objective = made(importance=1.0)
    assert objective.memory == {"importance": [1.0] * 8}
    plain = made()(batch)
    report = objective(batch)
    assert report.total.item() == pytest.approx(plain.total.item(), rel=1e-6)  # alike, experts count as they did
    tokens = int((batch.labels != IGNORED).sum())
    objective.observe({name: value.item() for name, value in report.terms.items()}, tokens)
    found = torch.tensor(objective.memory["importance"]).view(2, 4)
    assert torch.allclose(found.mean(1), torch.ones(2)) and found.std() > 0
    assert objective.gap_sums is None
    assert objective(batch).terms["teacher_ce"] != report.terms["teacher_ce"]


def test_top_k_follows_the_capacity(made, batch):
    objective = made(routing="capacity", initial_top_k=1, final_top_k=4)
    assert {router.taken for router in objective.found} == {1}
    for _ in range(60):
        objective.observe({"kl_t1": 0.2}, 1)
    assert objective.memory["capacity"][0] == pytest.approx(0.8187, abs=2e-3)
    objective.at(0.0, 60)
    assert {router.taken for router in objective.found} == {4}
    counted = (batch.labels != IGNORED).sum().item()
    terms = objective(batch).terms
    assert terms["capacity"].item() / counted == pytest.approx(objective.memory["capacity"][0])
    assert terms["experts"] == 4 * counted


def test_layers_join_from_the_lowest_in_equal_parts_of_a_stage(made, batch):
    objective = made(**NONE | {"layers": 1.0}, progressive_layers=True, depth=3)
    parts = []
    for share, count in ((0.0, 1), (0.33, 1), (0.34, 2), (0.66, 2), (0.67, 3), (1.0, 3)):
        objective.at(share)
        own, theirs = asked(objective.student, batch), asked(objective.held[0], batch)
        each = [
            feature_loss(
                objective.layer_projector(own.hidden_states[i + 1]), theirs.hidden_states[j + 1],
                batch.labels != IGNORED,
            ).item()
            for i, j in ((0, 0), (1, 1), (2, 1))
        ]  # fmt: skip
        terms = objective(batch).terms
        assert terms["layers"].item() == pytest.approx(sum(each[:count]) / count, rel=1e-5), share
        assert terms["layers_compared"] == count * (batch.labels != IGNORED).sum()
        parts.append(terms["layers"].item())
    assert len({round(value, 3) for value in parts}) == 3


@pytest.mark.parametrize("kind, mix", [("reverse_kl", 0.5), ("jsd", 0.3), ("skew_kl", 0.1), ("tvd", 0.5)])
def test_the_divergence_that_is_asked_for_is_trained(made, batch, kind, mix):
    """It was accepted, and the KL trained instead."""
    objective = made(config={"divergence": kind, "mix": mix}, **NONE | {"kl": 0.5})
    counted = batch.labels != IGNORED
    log_p, log_q = (
        asked(model, batch).logits[counted].double().div(2.0).log_softmax(-1)
        for model in (objective.held[0], objective.student)
    )
    expected = divergence_terms(Divergence(kind, mix), log_p, log_q).sum().item()
    report, plain = objective(batch), made(**NONE | {"kl": 0.5})(batch)
    assert report.terms["kl"].item() == pytest.approx(expected, rel=1e-5)
    total = 0.3 * report.terms["ce"].item() + 0.7 * 0.5 * 4 * expected
    assert report.total.item() == pytest.approx(total, rel=1e-5) != plain.total.item()
    assert report.terms["kl_t1"] == plain.terms["kl_t1"]


def test_a_divergence_across_tokenizers_is_refused_by_name(teacher):
    config = OnlineConfig(divergence="tvd")
    with pytest.raises(UserError, match=r"^objective.divergence: tvd compares .* set objective.divergence=kl"):
        OnlineDistillation(dense_student(), load_model(teacher, torch.float32), config, VOCABULARY, 61)
