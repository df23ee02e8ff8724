"""Many parts over spans of text, of a teacher with a tokenizer of its own."""

import math
from typing import Any

import pytest
import torch

from megakd.config.objective import OnlineConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch, Paired, Side
from megakd.data.spans import pair
from megakd.losses.hidden import attention_loss, contrastive_loss, feature_loss
from megakd.losses.spans import span_likelihood_loss
from megakd.models.loading import load_model
from megakd.models.tiny import train_tokenizer
from megakd.objectives.online import OnlineDistillation
from tests.conftest import VOCABULARY
from tests.objectives.sar import dense_student
from tests.objectives.test_online import NONE, PARTS, asked
from tests.objectives.test_student_aware import opinionated

LENGTH = 40


@pytest.fixture(scope="module")
def samples(dataset) -> list[Any]:
    packed = [i for i in range(len(dataset)) if len(dataset[i].starts) > 1]
    return [dataset[i] for i in (packed[0], 1, packed[1])]


@pytest.fixture(scope="module")
def batch(samples, tokenizer, documents) -> Batch:
    other = train_tokenizer([text.upper() + text for text in documents[:20]], VOCABULARY)
    paired = pair(samples, tokenizer, other, LENGTH, LENGTH + LENGTH // 4)
    return Batch(*paired.student[:3], paired=paired)


@pytest.fixture
def made(teacher):
    def make(alpha: float = 0.7, **online: Any) -> OnlineDistillation:
        fields = OnlineConfig(alpha=alpha, temperature=2.0, **online)
        return OnlineDistillation(dense_student(), load_model(teacher, torch.float32), fields, VOCABULARY, VOCABULARY)

    return make


def test_a_token_a_span_is_position_by_position(made, samples):
    """With the student's own tokenizer in both places, every part but the KL is what it is without spans."""
    plain = collate(samples, LENGTH, whole=True)._replace(targets=None)
    document = plain.position_ids.eq(0).cumsum(1)
    real = torch.stack([document[b] < document[b, -1] + (plain.labels[b, -1] != IGNORED) for b in range(3)])
    counted = plain.labels != IGNORED
    number = torch.arange(LENGTH).expand(3, -1)
    spans = torch.where(real, number, -1)
    side = Side(*plain[:3], spans, torch.where(counted, number + 1, -1))
    paired = plain._replace(paired=Paired(side, side, torch.full((3,), LENGTH + 1)))
    objective = made()
    report, expected = objective(paired), objective(plain._replace(labels=torch.where(real, 1, IGNORED)))
    for name in PARTS[1:]:
        assert report.terms[name].item() == pytest.approx(expected.terms[name].item(), rel=1e-5), name
    assert report.terms["ce"].item() == pytest.approx(objective(plain).terms["ce"].item(), rel=1e-5)
    # a span's tokens take the experts that the states before it expect
    learned = made(routing="learned")
    opinionated(learned.heads)
    hidden = torch.randn(3, LENGTH, 24, generator=torch.Generator().manual_seed(0))
    by_span, by_position = (
        learned._counts(learned._expect(hidden, each), each).tokens_N.view(3, LENGTH) for each in (paired, plain)
    )
    assert torch.equal(by_span[counted], by_position[counted]) and len(by_position[counted].unique()) == 4
    assert (by_span[~counted] == 1).all()


def mean(states: torch.Tensor, side: Side, spans: list[int]) -> torch.Tensor:
    return torch.stack([states[0][side.spans[0] == s].double().mean(0) for s in spans])[None].float()


def between(maps: torch.Tensor, side: Side, spans: list[int]) -> torch.Tensor:
    inside = [(side.spans[0] == s).nonzero()[:, 0] for s in spans]
    rows = [torch.stack([maps[0][:, i][:, :, j].sum(-1).mean(-1) for j in inside], -1) for i in inside]
    return torch.stack(rows, 1)[None]


def reference(objective: OnlineDistillation, paired: Paired) -> dict[str, float]:
    """Every part span by span, window by window, from what the models give when all is asked for."""
    models = objective.student, objective.held[0]
    for model in models:
        model.set_attn_implementation("eager")
    found = dict.fromkeys(
        ("ce", "teacher_ce", "span_kl", "span_kl_t1", "feature", "contrastive", "layers", "attention"), 0.0
    )
    for b in range(len(paired.span_count)):
        sides = [Side(*(field[b : b + 1] for field in side[:5])) for side in paired[:2]]
        with torch.no_grad():
            outs = [asked(model, Batch(*side[:3])) for model, side in zip(models, sides, strict=True)]
        spans = [s for s in range(paired.span_count[b]) if all((side.spans == s).any() for side in sides)]

        scores, sums = [], []
        for out, side in zip(outs, sides, strict=True):
            logprobs = out.logits[0].double().log_softmax(-1)
            each = {t: logprobs[t, label].item() for t, label in enumerate(side.labels[0].tolist()) if label != IGNORED}
            sums.append(sum(each.values()) / len(each))
            tokens = len(each) if side is sides[0] else tokens  # noqa: F821 (of the first side)
            inside = side.label_spans[0].tolist()
            scored = sorted({s for s in inside if s >= 0})
            scores.append({s: sum(each[t] for t in each if inside[t] == s) for s in scored})
        assert scores[0].keys() == scores[1].keys()
        student, teacher = (torch.tensor([list(side.values())]).double() for side in scores)
        there = torch.ones_like(student, dtype=torch.bool)
        counted = torch.ones(1, len(spans), dtype=torch.bool)
        last, taught = (mean(out.hidden_states[-1], side, spans) for out, side in zip(outs, sides, strict=True))
        found["ce"] -= sums[0] * tokens
        found["teacher_ce"] -= sums[1] * tokens
        found["span_kl"] += span_likelihood_loss(student, teacher, there, 2.0).item()
        found["span_kl_t1"] += span_likelihood_loss(student, teacher, there, 1.0).item()
        found["feature"] += feature_loss(objective.projector(last), taught, counted).item()
        found["contrastive"] += contrastive_loss(objective.projector(last), taught, counted, 0.1).item()
        layers = [(i, objective.layer_of[i]) for i in range(len(outs[0].attentions))]
        for i, j in layers:
            own, theirs = (
                mean(outs[0].hidden_states[i + 1], sides[0], spans),
                mean(outs[1].hidden_states[j + 1], sides[1], spans),
            )
            found["layers"] += feature_loss(objective.layer_projector(own), theirs, counted).item() / len(layers)
            maps = between(outs[0].attentions[i], sides[0], spans), between(outs[1].attentions[j], sides[1], spans)
            found["attention"] += attention_loss(*maps, counted).item() / len(layers)
    return found


def test_the_whole_is_the_weighted_sum_of_its_parts(made, batch):
    objective = made()
    with torch.no_grad():
        report, parts = objective(batch), reference(objective, batch.paired)
    assert report.terms.keys() == parts.keys()
    for name, value in parts.items():
        assert report.terms[name].item() == pytest.approx(value, rel=2e-4), name
    weights = {"span_kl": 0.7 * 2, "feature": 0.1, "attention": 0.1, "layers": 0.05, "contrastive": 0.05}
    total = 0.3 * parts["ce"] + 0.7 * sum(weight * parts[name] for name, weight in weights.items())
    assert report.total.item() == pytest.approx(total, rel=2e-4)


def test_every_part_reaches_the_student_and_can_be_switched_off(made, batch):
    for part in PARTS:
        objective = made(alpha=1.0, **NONE | {part: 1.0})
        report = objective(batch)
        report.total.backward()
        own = {"kl": "span_kl"}.get(part, part)
        assert {own} == report.terms.keys() - {"ce", "teacher_ce", "span_kl", "span_kl_t1"} | {own}
        assert any(p.grad is not None and p.grad.any() for p in objective.student.parameters()), part
        assert all(p.grad is None for p in objective.held[0].parameters())


def test_padding_has_no_say_and_windows_count_alone(made, batch):
    objective, paired = made(gap=1.0, importance=0.5), batch.paired
    learned = made(gap=1.0, importance=0.5, routing="learned")
    opinionated(learned.heads)
    sides = [side._replace(tokens=torch.where(side.spans < 0, 7, side.tokens)) for side in paired[:2]]
    changed = Batch(*sides[0][:3], paired=Paired(*sides, paired.span_count))
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(sides, paired[:2], strict=True))
    alone, learned_alone = [], []
    for b in range(3):
        rows = [Side(*(field[b : b + 1] for field in side[:5])) for side in paired[:2]]
        window = Batch(*rows[0][:3], paired=Paired(*rows, paired.span_count[b : b + 1]))
        alone.append(objective(window))
        learned_alone.append(learned(window))
    objective.gap_sums = None
    whole = objective(batch)
    gaps = objective.gap_sums.clone()
    objective.gap_sums = None
    other = objective(changed)
    assert torch.allclose(objective.gap_sums, gaps, rtol=1e-5)
    gradient, learned.heads.gradient = learned.heads.gradient, None
    for report, same, parts in ((whole, other, alone), (learned(batch), learned(changed), learned_alone)):
        for name, value in report.terms.items():
            assert same.terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
            assert sum(p.terms[name].item() for p in parts) == pytest.approx(value.item(), rel=1e-4), name
    torch.testing.assert_close(learned.heads.gradient, 2 * gradient, rtol=1e-3, atol=2e-3)


def test_spans_count_by_their_gap_and_experts_by_their_share_of_it(made, batch):
    plain, weighted, counting = made(), made(gap=2.0), made(importance=1.0)
    with torch.no_grad():
        reports = [objective(batch) for objective in (plain, weighted, counting)]
    assert reports[1].terms["span_kl"] > reports[0].terms["span_kl"]
    assert reports[1].terms["span_kl_t1"] == reports[0].terms["span_kl_t1"]
    gap = reports[2].terms["span_kl_t1"].item()
    # every router shares the whole gap out among its experts
    assert counting.gap_sums.view(2, 4).sum(1).tolist() == pytest.approx([gap, gap], rel=1e-4)
    tokens = int((batch.labels != IGNORED).sum())
    counting.observe({name: value.item() for name, value in reports[2].terms.items()}, tokens)
    assert torch.tensor(counting.memory["importance"]).std() > 0
    follower = made(routing="capacity", initial_top_k=1, final_top_k=4)
    follower.observe({"span_kl_t1": gap}, tokens)
    assert follower.memory["capacity"][0] == pytest.approx(0.1 * math.exp(-gap / tokens))
