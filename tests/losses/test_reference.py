import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from megakd.capture.targets import draw, targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.data.records import TeacherTargets
from megakd.losses.reference import distill_loss, head_and_tail, kl_to_targets, sampled_kl, topk_kl
from megakd.losses.signals import Sparse, Stored, Tail
from tests.conftest import for_each

TAILS: tuple[Tail, ...] = get_args(Tail)
SHAPES = [(1, 5, 2), (7, 33, 8), (3, 11, 10)]  # N, V, K
TEMPERATURES = (1.0, 2.0, 4.0)


def reference_kl(p: list[float], q: list[float]) -> float:
    return sum(p[i] * (math.log(p[i]) - math.log(q[i])) for i in range(len(p)) if p[i] > 0)


def reference_token(teacher: Tensor, student: Tensor, row: TeacherTargets, temperature: float, tail: str) -> float:
    """One token from both whole distributions, in Python floats; the cached logits say only which ids were kept."""
    p, q = (torch.softmax(logits / temperature, 0).tolist() for logits in (teacher, student))
    ids = [i for i, x in zip(row.ids.tolist(), row.logprobs.tolist(), strict=True) if x > -math.inf]
    rest = [i for i in range(len(p)) if i not in ids]
    if tail == "truncated":
        mass = sum(p[i] for i in ids)
        return reference_kl([p[i] / mass for i in ids], [q[i] for i in ids])
    if tail == "ghost":
        both = ([x[i] for i in ids] + [sum(x[i] for i in rest)] for x in (p, q))
        return reference_kl(*both)
    weights = {i: p[i] for i in ids}  # none of a sampled data set
    for i, share in zip(row.draw_ids.tolist(), row.draw_shares.tolist(), strict=True):
        weights[i] = weights.get(i, 0.0) + share * sum(p[i] for i in rest)
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    return -sum(w * math.log(q[i]) for i, w in weights.items()) - entropy


def example(
    shape: tuple[int, int, int], temperature: float, tail: Tail = "ghost", pmin: float = 0.02, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, TeacherTargets, Stored]:
    """Teacher, student (float64 logits), labels, targets that were never rounded, and what they are."""
    tokens, vocabulary, entries = shape
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    student = 2 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    profile = "topk" if tail in ("ghost", "truncated") else tail
    config = LogitsConfig(
        profile=profile, top_k=entries, pmin=pmin, draws=7, draw_temperature=temperature, temperatures=TEMPERATURES
    )
    offsets = torch.rand(tokens, generator=generator, dtype=torch.float64)
    targets = targets_from_logits(teacher, labels, config, offsets)
    stored = Stored(profile != "sampled", TEMPERATURES, None if profile == "topk" else temperature)
    return teacher, student, labels, targets, stored


def reference(teacher: Tensor, student: Tensor, targets: TeacherTargets, temperature: float, tail: str) -> list[float]:
    rows = [TeacherTargets(*(field[i] for field in targets)) for i in range(len(student))]
    return [reference_token(t, s, row, temperature, tail) for t, s, row in zip(teacher, student, rows, strict=True)]


@for_each("tail", TAILS)
@for_each("temperature", TEMPERATURES)
@for_each("pmin", [0.0, 0.02, 0.5])
@for_each("shape", SHAPES)
def test_kl_matches_the_reference(shape, pmin, temperature, tail):
    teacher, student, _, targets, stored = example(shape, temperature, tail, pmin)
    found = kl_to_targets(student, Sparse(targets, stored, tail), temperature)
    # shares of draws are float32: a seventh is 1e-8 off
    tolerance = 1e-10 if tail in ("ghost", "truncated") else 1e-6
    assert found.tolist() == pytest.approx(reference(teacher, student, targets, temperature, tail), abs=tolerance)
    assert found.dtype == torch.float64 and (tail in ("sampled", "hybrid") or (found >= -1e-12).all())


@for_each("temperature", [1.0, 2.0])
@for_each("shape", [(40, 300, 16), (40, 300, 1)])
def test_ghost_is_the_dense_coarsening(shape, temperature):
    """Log-probabilities of the student's bucket from scatter-added probabilities, the same for all rows."""
    teacher, student, _, targets, stored = example(shape, temperature, pmin=0.0)
    inside = torch.zeros(shape[:2], dtype=torch.bool).scatter(1, targets.ids.long(), True)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    bucket_p, bucket_q = (torch.where(inside, 0.0, x).sum(-1) for x in (p, q))
    expected = torch.where(inside, p * (p / q).log(), 0.0).sum(-1) + bucket_p * (bucket_p / bucket_q).log()
    found = kl_to_targets(student, Sparse(targets, stored, "ghost"), temperature)
    assert torch.allclose(found, expected, atol=1e-10)
    single = TeacherTargets(*(field.float() if field.is_floating_point() else field for field in targets))
    assert torch.allclose(
        kl_to_targets(student.float(), Sparse(single, stored, "ghost"), temperature).double(), expected, atol=1e-5
    )
    dense = (p * (p / q).log()).sum(-1)
    assert (found <= dense + 1e-12).all()  # coarser: a lower bound


@for_each("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_ghost_is_never_negative(dtype, tolerance):
    """Many kinds of teacher and student, equal ones and logits of thousands; relative to the size of the logits."""
    generator = torch.Generator().manual_seed(0)
    for case in range(300):
        scale_p, scale_q = (10 ** (5 * torch.rand(1, generator=generator).item() - 1) for _ in range(2))
        teacher = (scale_p * torch.randn(16, 40, generator=generator, dtype=torch.float64)).to(dtype)
        student = teacher.clone() if case % 5 == 0 else (scale_q * torch.randn(16, 40, generator=generator)).to(dtype)
        if case % 3 == 0:
            student += 0.01 * torch.randn(16, 40, generator=generator).to(dtype)
        config = LogitsConfig(top_k=1 + case % 40, pmin=(0.0, 1e-4, 0.1)[case % 3], temperatures=TEMPERATURES)
        targets = targets_from_logits(teacher, torch.zeros(16, dtype=torch.int64), config, torch.zeros(16))
        for temperature in TEMPERATURES:
            found = kl_to_targets(student, Sparse(targets, Stored(True, TEMPERATURES, None), "ghost"), temperature)
            size = 1 + max(teacher.abs().max(), student.abs().max()).item()
            assert found.isfinite().all() and (found >= -tolerance * size).all(), (case, temperature, found.min())


def with_fillers(targets: TeacherTargets, more: int) -> TeacherTargets:
    """More entries that are none: they repeat ids of their row, in any place, with log-probability -inf or share 0."""

    def extended(ids: Tensor, values: Tensor, nothing: float) -> tuple[Tensor, Tensor]:
        if not ids.shape[1]:
            return ids, values
        picks = torch.randint(ids.shape[1], (len(ids), more), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([ids.gather(1, picks), ids], 1)
        return ids, torch.cat([torch.full((len(ids), more), nothing, dtype=values.dtype), values], 1)

    ids, logprobs = extended(targets.ids, targets.logprobs, -math.inf)
    draw_ids, shares = extended(targets.draw_ids, targets.draw_shares, 0.0)
    return targets._replace(ids=ids, logprobs=logprobs, draw_ids=draw_ids, draw_shares=shares)


@for_each("tail", TAILS)
@for_each("temperature", [1.0, 2.0])
def test_fillers_change_neither_value_nor_gradient(tail, temperature):
    _, student, _, targets, stored = example((7, 33, 8), temperature, tail)
    results = []
    for each in (targets, with_fillers(targets, 5)):
        logits = student.clone().requires_grad_()
        kl = kl_to_targets(logits, Sparse(each, stored, tail), temperature)
        kl.sum().backward()
        assert logits.grad is not None and logits.grad.isfinite().all()
        results.append((kl.detach(), logits.grad))
    (one, one_grad), (two, two_grad) = results
    assert torch.allclose(one, two, atol=1e-14) and torch.allclose(one_grad, two_grad, atol=1e-14)


@for_each("tail", ["ghost", "truncated"])
def test_dropped_entries_are_as_if_they_had_not_been_among_the_first(tail):
    """A row with 3 of 8 entries above pmin is the row of a head of 3."""
    teacher, student, labels, targets, stored = example((1, 33, 8), 2.0, tail, pmin=0.05, seed=3)
    kept = int((targets.logprobs > -torch.inf).sum())
    assert 1 < kept < 8
    config = LogitsConfig(top_k=kept, pmin=0.0, temperatures=TEMPERATURES)
    few = targets_from_logits(teacher, labels, config, torch.zeros(1))
    found = kl_to_targets(student, Sparse(targets, stored, tail), 2.0)
    assert torch.allclose(found, kl_to_targets(student, Sparse(few, stored, tail), 2.0), atol=1e-12)


@for_each("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@for_each("tail", TAILS)
def test_lower_precision_stays_close(dtype, tolerance, tail):
    _, student, labels, targets, stored = example((7, 33, 8), 2.0, tail)
    exact = distill_loss(student.to(dtype).double(), labels, Sparse(targets, stored, tail), 0.5, 2.0).total
    found = distill_loss(student.to(dtype), labels, Sparse(targets, stored, tail), 0.5, 2.0).total
    assert found.dtype == torch.float32  # reductions are float32 whatever the logits are
    assert abs(found - exact) <= tolerance * abs(exact)


@for_each("tail", TAILS)
@for_each("alpha, temperature", [(0.0, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 4.0)])
def test_gradient_is_that_of_the_returned_loss(alpha, temperature, tail):
    """Finite differences: T^2 must be inside what is differentiated, not only in what is reported."""
    _, student, labels, targets, stored = example((3, 9, 4), temperature, tail)

    def loss(logits: Tensor) -> Tensor:
        return distill_loss(logits, labels, Sparse(targets, stored, tail), alpha, temperature).total

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),), atol=1e-6)


@for_each("tail", TAILS)
def test_total_is_the_documented_formula(tail):
    teacher, student, labels, targets, stored = example((7, 33, 8), 2.0, tail)
    terms = distill_loss(student.requires_grad_(), labels, Sparse(targets, stored, tail), 0.3, 2.0)
    ce = sum(-torch.log_softmax(s, 0)[label].item() for s, label in zip(student, labels, strict=True))
    kl = sum(reference(teacher, student, targets, 2.0, tail))
    assert terms.total.item() == pytest.approx(0.7 * ce + 0.3 * 4 * kl, abs=1e-5)
    assert (terms.ce.item(), terms.kl.item()) == pytest.approx((ce, kl), abs=1e-5)
    assert terms.total.requires_grad and not terms.ce.requires_grad and not terms.kl.requires_grad
    if tail == "sampled":
        assert terms.kl_t1 is None
    else:
        assert terms.kl_t1 is not None and not terms.kl_t1.requires_grad
        assert terms.kl_t1.item() == pytest.approx(sum(reference(teacher, student, targets, 1.0, "ghost")), abs=1e-9)


def test_kl_at_one_is_absent_only_where_it_cannot_be_known():
    def kl_t1(tail: Tail, temperature: float, **changes: object) -> float | None:
        _, student, labels, targets, stored = example((7, 33, 8), temperature, tail)
        found = distill_loss(student, labels, Sparse(targets, stored._replace(**changes), tail), 0.5, temperature)
        return None if found.kl_t1 is None else found.kl_t1.item() / (found.kl.item() or 1)

    assert kl_t1("ghost", 1.0) == kl_t1("hybrid", 1.0) == kl_t1("sampled", 1.0) == 1  # it is the KL itself
    assert kl_t1("sampled", 2.0) is None and kl_t1("hybrid", 2.0) not in (None, 1)
    assert kl_t1("truncated", 1.0) not in (None, 1)  # measured with a bucket
    assert kl_t1("truncated", 4.0, temperatures=(4.0,)) is None and kl_t1("ghost", 4.0, temperatures=(4.0,)) is None


@for_each("tail", ["ghost", "hybrid"])
def test_tails_are_taken_by_temperature_not_by_place(tail):
    _, student, _, targets, stored = example((7, 33, 8), 2.0, tail)
    expected = kl_to_targets(student, Sparse(targets, stored, tail), 2.0)
    other = stored._replace(temperatures=(4.0, 1.0, 2.0))
    moved = targets._replace(log_tails=targets.log_tails[:, [2, 0, 1]])
    assert torch.equal(kl_to_targets(student, Sparse(moved, other, tail), 2.0), expected)


def test_student_equal_to_teacher_gives_zero_and_no_gradient():
    teacher, _, _, targets, stored = example((7, 33, 8), 2.0)
    student = teacher.clone().requires_grad_()
    loss = kl_to_targets(student, Sparse(targets, stored, "ghost"), 2.0).sum()
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad is not None and student.grad.abs().max() < 1e-12


@for_each("tail", ["ghost", "truncated", "hybrid"])
def test_all_entries_stored_is_the_dense_kl(tail):
    """Draws from nothing have no weight, so hybrid too."""
    teacher, student, _, targets, stored = example((5, 13, 13), 2.0, tail, pmin=0.0)
    dense = torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    student.requires_grad_()
    found = kl_to_targets(student, Sparse(targets, stored, tail), 2.0)
    assert torch.allclose(found, dense, atol=1e-12)
    found.sum().backward()
    assert torch.isfinite(student.grad).all()


def test_stored_mass_that_rounds_to_one_gives_finite_gradients():
    """log(1 - sum of probabilities) would be NaN here; the complement's logsumexp is not."""
    student = torch.tensor([[40.0, 0.0, -1.0, -2.0]], requires_grad=True)
    ids, logprobs = torch.tensor([[0]]), torch.tensor([[-1e-9]])
    loss = topk_kl(student, ids, logprobs, torch.tensor([math.log(1e-9)]), 1.0, "ghost").sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@for_each("tail", TAILS)
def test_extreme_students_give_finite_values_and_gradients(tail):
    _, student, labels, targets, stored = example((7, 33, 8), 2.0, tail)
    for scale in (1e-3, 30.0, 3e4):
        logits = (scale * student).float().detach().requires_grad_()
        terms = distill_loss(logits, labels, Sparse(targets, stored, tail), 0.5, 2.0)
        terms.total.backward()
        assert terms.total.isfinite() and logits.grad is not None and logits.grad.isfinite().all(), scale


@for_each("tail", ["ghost", "sampled", "hybrid"])
def test_tokens_outside_the_stored_ones_get_gradient(tail):
    _, student, _, targets, stored = example((4, 20, 3), 1.0, tail)
    student.requires_grad_()
    kl_to_targets(student, Sparse(targets, stored, tail), 1.0).sum().backward()
    named = torch.cat([targets.ids, targets.draw_ids], 1).long()
    outside = torch.ones_like(student, dtype=torch.bool).scatter(1, named, False)
    assert (student.grad[outside].abs() > 0).all()


def test_weights_of_draws_are_not_renormalised():
    """Half of the weights is half of the cross entropy; and ids may repeat."""
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, entropy = torch.tensor([[1, 1, 4]] * 3), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.25, 0.5]] * 3, dtype=torch.float64)
    log_q = logits.log_softmax(-1)
    whole = sampled_kl(logits, ids, weights, entropy, 1.0)
    assert torch.allclose(whole, -(log_q[:, 1] + log_q[:, 4]) / 2 - entropy, atol=1e-12)
    assert torch.allclose(sampled_kl(logits, ids, weights / 2, entropy, 1.0) + entropy, (whole + entropy) / 2)


@for_each("temperature", [1.0, 2.0, 0.5])
def test_head_and_tail_are_the_tempered_probabilities(temperature):
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=torch.float64)
    powers = p ** (1 / temperature)
    logprobs = torch.cat([p[:, :2].log(), torch.tensor([[-torch.inf]])], 1)
    head, tail = head_and_tail(logprobs, powers[:, 2:].sum(-1).log(), temperature)
    assert torch.allclose(head, torch.cat([powers[:, :2] / powers.sum(), torch.zeros(1, 1)], 1))
    assert torch.allclose(tail, powers[:, 2:].sum(-1) / powers.sum())


SETS, DRAWS, PROBE = 10_000, 12, (5, 60, 16)  # independent captures of 12 draws; positions, vocabulary, hidden size


def drawn(p_NV: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """DRAWS draws of every row, as ids and shares."""
    generator = torch.Generator().manual_seed(1)
    if how == "multinomial":
        ids = torch.multinomial(p_NV, DRAWS, replacement=True, generator=generator)
        return ids, torch.full(ids.shape, 1 / DRAWS)
    return draw(p_NV, DRAWS, torch.rand(len(p_NV), generator=generator, dtype=torch.float64))


@for_each("how", ["multinomial", "systematic"])
@for_each("temperature", [1.0, 2.0])
@for_each("head", [0, 4])
def test_the_mean_over_captures_is_the_dense_loss_and_its_gradient(head, temperature, how):
    """A linear head on random hidden states; 10^4 captures side by side as rows of one call."""
    positions, vocabulary, size = PROBE
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, size, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64)
    weight = (0.3 * torch.randn(vocabulary, size, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.zeros(positions, dtype=torch.int64)
    config = LogitsConfig(profile="hybrid" if head else "sampled", top_k=max(head, 1), pmin=0.0, draws=DRAWS,
                          draw_temperature=temperature, temperatures=(1.0, 2.0))  # fmt: skip
    one = targets_from_logits(teacher, labels, config, torch.zeros(positions))
    rest = (teacher / temperature).scatter(1, one.ids.long(), -torch.inf).softmax(-1)
    many = TeacherTargets(*(field.repeat(SETS, *(1,) * (field.ndim - 1)) for field in one))
    ids, shares = drawn(rest.repeat(SETS, 1), how)
    many = many._replace(draw_ids=ids, draw_shares=shares)
    stored = Stored(head > 0, (1.0, 2.0), temperature)
    logits = (hidden @ weight.T).repeat(SETS, 1)
    kl = kl_to_targets(logits, Sparse(many, stored, "hybrid" if head else "sampled"), temperature)
    (found,) = torch.autograd.grad(kl.sum() / SETS, weight)
    log_p, log_q = (teacher / temperature).log_softmax(-1), (hidden @ weight.T / temperature).log_softmax(-1)
    dense = (log_p.exp() * (log_p - log_q)).sum(-1)
    (expected,) = torch.autograd.grad(dense.sum(), weight)
    cosine = (found * expected).sum() / found.norm() / expected.norm()
    assert math.degrees(math.acos(min(cosine.item(), 1.0))) < 1
    assert found.norm().item() == pytest.approx(expected.norm().item(), rel=0.01)
    captures = kl.detach().unflatten(0, (SETS, positions))
    error = captures.std(0) / SETS**0.5
    assert ((captures.mean(0) - dense.detach()).abs() < 5 * error + 1e-6).all()
    assert (error < 0.02).all()
