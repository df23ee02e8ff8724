"""The learned router: what its heads are fitted to, what they set, and that no gradient leads from it or to it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megakd.config.objective import OnlineConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch, Rows, rows_of
from megakd.models.loading import load_model
from megakd.models.routing import Routed, scheduled
from megakd.objectives import online as online_module
from megakd.objectives.online import OnlineDistillation
from megakd.objectives.student_aware import TRUNK, StudentAwareRouter, gap_shares
from tests.conftest import VOCABULARY
from tests.objectives.sar import dense_student

LEARNED: dict[str, Any] = {"routing": "learned", "gap": 1.0, "importance": 1.0}


@pytest.fixture(scope="module")
def batch(dataset) -> Batch:
    packed = [i for i in range(len(dataset)) if len(dataset[i].starts) > 1]
    return collate([dataset[i] for i in (packed[0], 1, packed[1])], 37, whole=True)._replace(targets=None)


@pytest.fixture
def made(teacher):
    def make(**online: Any) -> OnlineDistillation:
        config = OnlineConfig(alpha=0.7, temperature=2.0, **{**LEARNED, **online})
        return OnlineDistillation(dense_student(), load_model(teacher, torch.float32), config, VOCABULARY)

    return make


def opinionated(heads: StudentAwareRouter) -> StudentAwareRouter:
    """With outputs that differ from place to place."""
    heads.weights.add_(torch.randn(heads.weights.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    heads.weights[TRUNK * heads.shapes[0][1] + TRUNK] += 5  # the bias of the capacity
    return heads


def reference(
    heads: StudentAwareRouter, weights: Tensor, hidden: Tensor, rows: Rows, gap: Tensor, shares: list[Tensor]
) -> dict[str, Tensor]:
    """The losses position by position and expert by expert, of float64 weights."""
    width = hidden.shape[-1]
    trunk, outputs = weights[: TRUNK * (width + 1)].view(TRUNK, -1), weights[TRUNK * (width + 1) :].view(-1, TRUNK + 1)

    def z(vector: Tensor) -> Tensor:
        x = (vector - vector.mean()) / (vector.var(correction=0) + 1e-5).sqrt()
        inside = trunk[:, :-1] @ x + trunk[:, -1]
        return inside / (1 + (-inside).exp())

    def out(index: int, inside: Tensor) -> Tensor:
        return outputs[index, :-1] @ inside + outputs[index, -1]

    found = dict.fromkeys(("capacity_loss", "gap_loss", "importance_loss"), torch.zeros((), dtype=torch.float64))
    places = rows.flat.split(rows.sizes)
    for b, flat in enumerate(places):
        inside = [z(hidden[b, place % rows.length]) for place in flat.tolist()]
        for place, each in zip(flat.tolist(), inside, strict=True):
            kl = gap[b, place % rows.length]
            c, target = 1 / (1 + (-out(0, each)).exp()), (-kl).exp()
            found["capacity_loss"] = found["capacity_loss"] - target * c.log() - (1 - target) * (1 - c).log()
            error = ((1 + out(1, each).exp()).log() - (1 + kl).log()).abs()
            found["gap_loss"] = found["gap_loss"] + (error**2 / 2 if error < 1 else error - 0.5)
        first, mean = 2, sum(inside) / max(len(inside), 1)
        for size, share in zip(heads.experts, shares, strict=True):
            scores = torch.stack([out(first + e, mean) for e in range(size)]) if inside else torch.zeros(size)
            log_q = scores - scores.exp().sum().log()
            p = [(share[b, e] + heads.balance / size) / (1 + heads.balance) for e in range(size)]
            value = sum(p[e] * (p[e].log() - log_q[e]) for e in range(size))
            found["importance_loss"] = found["importance_loss"] + len(inside) * value / len(shares)
            first += size
    return found


def test_losses_gradients_and_updates_are_those_of_the_reference():
    generator = torch.Generator().manual_seed(3)
    heads = opinionated(StudentAwareRouter(6, [3, 4], lr=0.01, balance=0.1))
    rows = rows_of(torch.tensor([[True, True, False, True], [False] * 4, [True, False, False, False]]))
    own = heads.weights.double().requires_grad_()
    adam = torch.optim.Adam([own], lr=0.01)
    for _ in range(3):
        hidden = torch.randn(3, 4, 6, generator=generator)
        gap = torch.rand(3, 4, generator=generator) * 4
        shares = [torch.rand(3, size, generator=generator).softmax(-1) for size in heads.experts]
        named = heads.fit(heads.estimate(hidden, rows), rows, gap, shares)
        losses = reference(heads, own, hidden.double(), rows, gap.double(), [s.double() for s in shares])
        for name, value in losses.items():
            assert named[name].item() == pytest.approx(value.item(), rel=1e-5), name
        (sum(losses.values()) / 4).backward()
        assert heads.gradient is not None and own.grad is not None
        torch.testing.assert_close(heads.gradient.double(), 4 * own.grad, rtol=1e-4, atol=1e-5)
        heads.learn(4)
        adam.step()
        adam.zero_grad()
        assert heads.gradient is None
        torch.testing.assert_close(heads.weights.double(), own.detach(), rtol=1e-4, atol=1e-4)
    before = heads.weights.clone()
    heads.gradient = torch.full_like(before, math.nan)
    heads.learn(4)
    assert torch.equal(heads.weights, before) and heads.updates == 3


def test_shares_of_the_gap_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    weights, gap = torch.rand(8, 2, generator=generator), torch.rand(2, 4, generator=generator)
    experts = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]] * 2)
    counted = torch.tensor([[True, False, True, True], [False] * 4])
    (found,) = gap_shares([Routed(weights * 9, experts, weights)], counted, gap, [3])
    sums = [0.0, 0.0, 0.0]
    for t in (0, 2, 3):
        for weight, expert in zip(weights[t].tolist(), experts[t].tolist(), strict=True):
            sums[expert] += gap[0, t].item() * weight / weights[t].sum().item()
    assert found[0].tolist() == pytest.approx([value / sum(sums) for value in sums], rel=1e-5)
    assert not found[1].any()


def test_before_it_has_learned_the_teacher_answers_as_at_the_start(made, batch):
    objective, plain = made(), made(routing="top_m", gap=0.0, importance=0.0, final_top_k=1)
    report, expected = objective(batch), plain(batch)
    assert report.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    tokens = (batch.labels != IGNORED).sum().item()
    assert report.terms["capacity"].item() / tokens == pytest.approx(math.exp(-5), rel=1e-4)
    assert report.terms["experts"].item() == tokens
    assert report.terms["importance_entropy"].item() == pytest.approx(tokens, rel=1e-6)


def test_experts_and_positions_count_as_the_heads_expect(made, batch, monkeypatch):
    objective, seen = made(), []
    opinionated(objective.heads)
    weighed = online_module.weighed
    monkeypatch.setattr(online_module, "weighed", lambda *args: seen.append((args, weighed(*args))) or seen[-1][1])
    with torch.no_grad():
        report = objective(batch)
        own = objective._ask(objective.student, batch)
    ((routers, factors, counts), _) = seen[0]
    expected, counted = objective._expect(own.last_hidden_state, batch), batch.labels != IGNORED
    capacity = expected.capacity().flatten().tolist()
    assert counts.tokens_N.tolist() == [scheduled(routers[0], "learned", 1, 4, share) for share in capacity]
    assert len(set(counts.tokens_N.tolist())) == 4
    assert report.terms["experts"] == counts.tokens_N[counted.flatten()].sum()
    for factor, log_share in zip(factors, expected.log_shares, strict=True):
        torch.testing.assert_close(factor, 4 * log_share.exp())
    with torch.no_grad(), weighed(routers, factors, counts):
        theirs = objective._ask(objective.held[0], batch)
    s, t = (
        model.lm_head(out.last_hidden_state)[counted]
        for model, out in ((objective.student, own), (objective.held[0], theirs))
    )
    kl = ((t / 2).softmax(-1) * ((t / 2).log_softmax(-1) - (s / 2).log_softmax(-1))).sum(-1)
    window, guess = torch.arange(3)[:, None].expand_as(counted)[counted], expected.gap()[counted] + 1e-6
    mean = torch.stack([guess[window == b].mean() for b in range(3)])
    assert report.terms["kl"].item() == pytest.approx((guess / mean[window] * kl).sum().item(), rel=1e-4)


def test_no_gradient_crosses_between_student_and_heads(made, batch, monkeypatch):
    """By the loss of the student the heads would make the teacher easy; by theirs the student would be easy to read."""
    objective, alone, seen = made(), made(), []
    for each in (objective, alone):
        opinionated(each.heads)
    estimate = objective.heads.estimate
    monkeypatch.setattr(objective.heads, "estimate", lambda *args: seen.append(estimate(*args)) or seen[-1])
    report = objective(batch)
    assert objective.heads.gradient is not None and objective.heads.gradient.any()
    assert all(p.grad is None for model in (objective, objective.held[0]) for p in model.parameters())
    assert torch.autograd.grad(report.total, [seen[0].weights], allow_unused=True, retain_graph=True) == (None,)
    monkeypatch.setattr(alone.heads, "fit", lambda *_: {})
    report.total.backward()
    alone(batch).total.backward()
    for (name, mine), theirs in zip(objective.named_parameters(), alone.parameters(), strict=True):
        assert mine.grad is not None and torch.equal(mine.grad, theirs.grad), name
    assert not any("heads" in name for name, _ in objective.named_parameters())


def test_windows_count_alone_and_padding_has_no_say(made, batch):
    objective = made()
    opinionated(objective.heads)

    def asked(*batches: Batch) -> tuple[dict[str, float], Tensor]:
        objective.forget_step()
        reports = [objective(each) for each in batches]
        assert objective.heads.gradient is not None
        sums = {name: sum(report.terms[name].item() for report in reports) for name in reports[0].terms}
        return sums, objective.heads.gradient

    last = (batch.labels != IGNORED).int().cumsum(1).argmax(1)
    padded = torch.arange(37) > last[:, None] + 1
    changed = batch._replace(tokens=torch.where(padded, 7, batch.tokens))
    sums, gradient = asked(batch)
    parts = [Batch(*(field[i : i + 1] for field in batch[:3])) for i in range(3)]
    for others, other in (asked(changed), asked(*parts)):
        assert others == pytest.approx(sums, rel=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-3)
    empty = objective(batch._replace(labels=torch.full_like(batch.labels, IGNORED)))
    assert empty.total.item() == 0 and all(value.item() == 0 for value in empty.terms.values())


def test_heads_learn_what_is_measured(made, batch):
    objective, tokens = made(router_lr=0.01, gap=0.0, importance=0.0, final_top_k=1), (batch.labels != IGNORED).sum()
    rows = []
    for _ in range(40):
        with torch.no_grad():
            terms = {name: value.item() for name, value in objective(batch).terms.items()}
        objective.observe(terms, int(tokens))
        rows.append(terms)
    assert all(rows[-1][name] < 0.6 * rows[0][name] for name in ("gap_loss", "importance_loss"))
    assert rows[-1]["capacity_loss"] < rows[0]["capacity_loss"]
    assert all(row["kl_t1"] == rows[0]["kl_t1"] for row in rows)
