"""The fused loss to a live teacher against the textbook's form, token by token, and finite differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakd.losses import head as fused
from megakd.losses.divergence import Divergence
from megakd.losses.head import FusedHead
from megakd.losses.head_chunk import Chunk
from megakd.losses.per_token import kl_rows
from megakd.losses.reference import KL, DistillTerms
from megakd.losses.signals import Dense
from tests.losses.test_hidden import normal

TOKENS, VOCABULARY, PADDING, SIZE, WIDTH = 11, 13, 3, 6, 4  # D of the student, G of the teacher
FORMS = [(0.0, 1.0), (0.3, 1.0), (0.3, 2.0), (1.0, 1.0), (1.0, 4.0)]  # alpha, temperature
LABELS = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))
ROW = 4 * VOCABULARY  # bytes of one token's logits


def plain(dtype: torch.dtype = torch.float64) -> FusedHead:
    """A head whose logits are the hidden states."""
    return FusedHead(nn.Parameter(torch.eye(VOCABULARY, dtype=dtype)), VOCABULARY)


def of_logits(student: Tensor, teacher: Tensor, *form: Any) -> DistillTerms:
    """The loss of logits that exist already."""
    return plain(student.dtype)(student, LABELS, Dense(plain(teacher.dtype), teacher), *form)


class Inputs:
    """Hidden states of both models and their heads, leaves in float64."""

    def __init__(self) -> None:
        self.student = nn.Parameter(normal(0, TOKENS, SIZE))
        self.teacher = nn.Parameter(2 * normal(1, TOKENS, WIDTH))
        self.student_head = nn.Parameter(normal(2, VOCABULARY + PADDING, SIZE))
        self.teacher_head = nn.Parameter(normal(3, VOCABULARY + PADDING, WIDTH))

    def loss(
        self,
        alpha: float,
        temperature: float,
        weights: Tensor | None = None,
        tokens: int = TOKENS,
        divergence: Divergence = KL,
    ) -> DistillTerms:
        teacher = Dense(FusedHead(self.teacher_head, VOCABULARY), self.teacher[:tokens], weights)
        student = FusedHead(self.student_head, VOCABULARY)
        return student(self.student[:tokens], LABELS[:tokens], teacher, alpha, temperature, divergence)

    def gradients(self, total: Tensor) -> list[Tensor]:
        leaves = (self.student, self.teacher, self.student_head, self.teacher_head)
        return [torch.zeros_like(x) if g is None else g for x, g in
                zip(leaves, torch.autograd.grad(total, leaves, allow_unused=True), strict=True)]  # fmt: skip


# of probabilities p of the teacher and q of the student, with b = mix
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "kl": lambda p, q, b: (p * (p / q).log()).sum(),
    "reverse_kl": lambda p, q, b: (q * (q / p).log()).sum(),
    "jsd": lambda p, q, b: (
        b * (p * (p / (b * p + (1 - b) * q)).log()).sum() + (1 - b) * (q * (q / (b * p + (1 - b) * q)).log()).sum()
    ),
    "skew_kl": lambda p, q, b: (p * (p / (b * p + (1 - b) * q)).log()).sum(),
    "tvd": lambda p, q, b: (p - q).abs().sum() / 2,
}


def dense(
    inputs: Inputs, alpha: float, temperature: float, weights: Tensor | None = None, divergence: Divergence = KL
) -> DistillTerms:
    """With probabilities and their logarithms as the textbook has them, token by token."""
    zero = torch.zeros((), dtype=torch.float64)
    ce, kl, kl_t1, teacher_ce = zero, zero, zero, zero
    for n in range(TOKENS):
        s = (inputs.student_head @ inputs.student[n])[:VOCABULARY]
        t = (inputs.teacher_head @ inputs.teacher[n])[:VOCABULARY]
        label = int(LABELS[n])
        ce = ce - s.softmax(0)[label].log()
        teacher_ce = teacher_ce - t.softmax(0)[label].log()
        p, q = (t / temperature).softmax(0), (s / temperature).softmax(0)
        each = DIVERGENCES[divergence.kind](p, q, divergence.mix)
        kl = kl + (1 if weights is None else weights[n]) * each
        p, q = t.softmax(0), s.softmax(0)
        kl_t1 = kl_t1 + (p * (p / q).log()).sum()
    return DistillTerms((1 - alpha) * ce + alpha * temperature**2 * kl, ce, kl, kl_t1, teacher_ce)


def alike(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> bool:
    return all((f.double() - e.double()).norm() <= tolerance * (1 + e.norm()) for f, e in
               zip(found, expected, strict=True))  # fmt: skip


@pytest.mark.parametrize("alpha, temperature", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_dense_form(alpha, temperature, weighted):
    inputs = Inputs()
    weights = normal(4, TOKENS).exp() if weighted else None
    found, expected = inputs.loss(alpha, temperature, weights), dense(inputs, alpha, temperature, weights)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in expected], rel=1e-12)
    assert found.total.dtype == torch.float64
    assert found.total.requires_grad and not any(term.requires_grad for term in found[1:])
    assert alike(inputs.gradients(found.total), inputs.gradients(expected.total))


@pytest.mark.parametrize("alpha, temperature", FORMS)
def test_gradient_is_that_of_the_returned_loss(alpha, temperature):
    """Finite differences towards both hidden states and both heads: T^2 and the teacher's entropy are inside."""
    inputs = Inputs()
    weights = normal(4, TOKENS).exp()

    def loss(student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor) -> Tensor:
        own, other = (FusedHead(nn.Parameter(head), VOCABULARY) for head in (student_head, teacher_head))
        return own(student, LABELS, Dense(other, teacher, weights), alpha, temperature).total

    leaves = [leaf.detach() for leaf in (inputs.student, inputs.teacher, inputs.student_head, inputs.teacher_head)]
    slopes = inputs.gradients(inputs.loss(alpha, temperature, weights).total)
    for index, (leaf, slope) in enumerate(zip(leaves, slopes, strict=True)):
        for seed in range(5):
            step = 1e-5 * normal(10 + seed, *leaf.shape)
            ends = [loss(*leaves[:index], leaf + sign * step, *leaves[index + 1 :]).item() for sign in (1, -1)]
            assert (ends[0] - ends[1]) / 2 == pytest.approx((slope * step).sum().item(), rel=1e-6, abs=1e-13)


MIXES = [("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("skew_kl", 0.1), ("skew_kl", 0.7), ("tvd", 0.5)]
OTHERS = [Divergence(kind, mix) for kind, mix in MIXES]  # type: ignore[arg-type]


@pytest.mark.parametrize("divergence", OTHERS)
@pytest.mark.parametrize("alpha, temperature", [(0.3, 1.0), (1.0, 2.0)])
def test_every_divergence_reaches_both_sides(divergence, alpha, temperature):
    """Value and gradients of the textbook's form, and finite differences of the returned loss."""
    inputs, weights = Inputs(), normal(4, TOKENS).exp()
    found = inputs.loss(alpha, temperature, weights, divergence=divergence)
    expected = dense(inputs, alpha, temperature, weights, divergence)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in expected], rel=1e-12)
    slopes = inputs.gradients(found.total)
    assert all(slope.abs().max() > 1e-3 for slope in slopes)
    assert alike(slopes, inputs.gradients(expected.total))
    for leaf, slope in zip((inputs.student, inputs.teacher), slopes[:2], strict=True):
        step, ends = 1e-5 * normal(10, *leaf.shape), []
        for factor in (1, -2):  # to one end, then to the other
            leaf.data += factor * step
            ends.append(inputs.loss(alpha, temperature, weights, divergence=divergence).total.item())
        leaf.data += step
        assert (ends[0] - ends[1]) / 2 == pytest.approx((slope * step).sum().item(), rel=1e-5)


@pytest.mark.parametrize("divergence", OTHERS)
def test_a_divergence_of_equals_is_zero_and_far_logits_stay_finite(divergence):
    logits = normal(0, TOKENS, VOCABULARY)
    sides = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = of_logits(*sides, 1.0, 2.0, divergence)
    assert abs(found.kl.item()) < 1e-14
    assert all(slope.abs().max() < 1e-14 for slope in torch.autograd.grad(found.total, sides))
    far = [(3e3 * normal(seed, TOKENS, VOCABULARY)).float().requires_grad_() for seed in (0, 1)]
    found = of_logits(*far, 0.5, 2.0, divergence)
    assert all(x.isfinite().all() for x in (*found, *torch.autograd.grad(found.total, far)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_teachers_gradient_needs_its_entropy(temperature):
    """Soft cross entropy has the same gradient for the student and another for the teacher: towards certainty."""
    inputs = Inputs()
    found = inputs.gradients(inputs.loss(1.0, temperature).total)
    log_p, log_q = (
        (hidden @ head.T)[:, :VOCABULARY].div(temperature).log_softmax(-1)
        for hidden, head in ((inputs.teacher, inputs.teacher_head), (inputs.student, inputs.student_head))
    )
    soft = inputs.gradients(-(log_p.exp() * log_q).sum() * temperature**2)
    assert alike([found[0], found[2]], [soft[0], soft[2]])
    for mine, other in ((found[1], soft[1]), (found[3], soft[3])):
        assert (mine - other).norm() > 0.1 * mine.norm()
    # where the student is the teacher nothing is left to learn, but soft cross entropy sharpens the teacher
    logits = normal(5, 3, 7).requires_grad_()
    (none,) = torch.autograd.grad(kl_rows(logits, logits.detach()).sum(), logits)
    assert none.abs().max() < 1e-14
    (some,) = torch.autograd.grad(-(logits.softmax(-1) * logits.detach().log_softmax(-1)).sum(), logits)
    assert some.norm() > 0.1 and (some.gather(1, logits.argmax(-1, keepdim=True)) < 0).all()


@pytest.mark.parametrize("scale, softcap", [(0.5, None), (1.0, 3.0), (2.0, 0.7)])
def test_heads_with_a_scale_and_a_soft_cap(scale, softcap):
    """Gemma's, Cohere's and Granite's logits, on either side."""
    inputs = Inputs()
    heads = [
        FusedHead(inputs.student_head, VOCABULARY, scale, softcap),
        FusedHead(inputs.teacher_head, VOCABULARY, 1.5, 2.0),
    ]
    found = heads[0](inputs.student, LABELS, Dense(heads[1], inputs.teacher), 0.3, 2.0)
    s, t = heads[0].logits(inputs.student), heads[1].logits(inputs.teacher)
    kl = kl_rows(t / 2, s / 2).sum()
    expected = 0.7 * nn.functional.cross_entropy(s, LABELS, reduction="sum") + 0.3 * 4 * kl
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert alike(inputs.gradients(found.total), inputs.gradients(expected))


@pytest.mark.parametrize("block", [1, 2, 100])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 11, 12])
@pytest.mark.parametrize("divergence", [KL, Divergence("jsd", 0.3)])
def test_chunks_and_blocks_change_nothing(rows, block, divergence, monkeypatch):
    inputs, weights = Inputs(), normal(4, TOKENS).exp()
    whole = inputs.loss(0.3, 2.0, weights, divergence=divergence)
    expected = inputs.gradients(whole.total)
    monkeypatch.setitem(fused.DENSE_CHUNK_BYTES, "cpu", rows * ROW + ROW - 1)
    monkeypatch.setitem(fused.DENSE_BLOCK_BYTES, "cpu", block * 2 * ROW)  # of float64
    sizes = []
    original = fused.dense_sums
    monkeypatch.setattr(fused, "dense_sums", lambda *job: sizes.append(len(job[1].x_cV)) or original(*job))
    found = inputs.loss(0.3, 2.0, weights, divergence=divergence)
    assert max(sizes) == min(rows, TOKENS) and sum(sizes) == TOKENS
    assert [x.item() for x in found] == pytest.approx([x.item() for x in whole], rel=1e-13)
    assert alike(inputs.gradients(found.total), expected, 1e-13)


def test_a_chunk_is_at_least_one_token(monkeypatch):
    monkeypatch.setitem(fused.DENSE_CHUNK_BYTES, "cpu", 1)
    inputs = Inputs()
    assert inputs.loss(0.3, 2.0).total.item() == pytest.approx(dense(inputs, 0.3, 2.0).total.item(), rel=1e-12)


def test_no_logits_are_kept_and_the_gradients_go_once(monkeypatch):
    """Nothing of the size of a chunk's logits lives until the backward pass."""
    monkeypatch.setitem(fused.DENSE_CHUNK_BYTES, "cpu", 2 * ROW)
    inputs, made = Inputs(), []
    original = fused.dense_sums

    def watched(chunk: slice, *parts: Chunk) -> Any:
        made.extend(part.raw_cV.untyped_storage()._weak_ref() for part in parts)
        return original(chunk, *parts)

    monkeypatch.setattr(fused, "dense_sums", watched)
    head, other = (FusedHead(weight, VOCABULARY) for weight in (inputs.student_head, inputs.teacher_head))
    total = head(inputs.student, LABELS, Dense(other, inputs.teacher), 0.3, 2.0).total
    assert len(made) == 2 * 6 and len(set(made)) == 2  # one buffer of each model, for all chunks
    assert all(torch.UntypedStorage._expired(ref) for ref in made) and not head.buffers_made and not other.buffers_made
    inputs.gradients(total * 2)
    with pytest.raises(RuntimeError, match="passed on by an earlier backward"):
        inputs.gradients(total * 2)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_tokens_give_zero_with_a_live_graph(weighted):
    inputs = Inputs()
    found = inputs.loss(0.3, 2.0, torch.ones(0) if weighted else None, tokens=0)
    assert [x.item() for x in found] == [0, 0, 0, 0, 0] and found.total.requires_grad
    leaves = (inputs.student, inputs.teacher, inputs.student_head, inputs.teacher_head)
    for gradient in torch.autograd.grad(found.total, leaves):  # each takes part: nobody waits for it in vain
        assert not gradient.any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_student_equal_to_teacher_gives_zero_kl_and_no_gradient(temperature):
    logits = normal(0, TOKENS, VOCABULARY)
    student, teacher = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = of_logits(student, teacher, 1.0, temperature)
    assert found.kl == 0 and found.kl_t1 == 0 and found.ce == found.teacher_ce
    assert all(x.abs().max() < 1e-14 for x in torch.autograd.grad(found.total, (student, teacher)))


def test_weights_count_in_what_is_trained_and_nowhere_else():
    """Weights of 1 are none; 0 takes a token's KL away, not its cross entropy; the same factor is a factor."""
    inputs = Inputs()
    plain = inputs.loss(0.3, 2.0)
    assert inputs.loss(0.3, 2.0, torch.ones(TOKENS)).total.item() == pytest.approx(plain.total.item(), rel=1e-14)
    assert inputs.loss(0.3, 2.0, torch.full((TOKENS,), 2.0)).kl.item() == pytest.approx(2 * plain.kl.item(), rel=1e-14)
    first = torch.zeros(TOKENS)
    first[0] = 1
    found = inputs.loss(0.3, 2.0, first)
    assert found.kl.item() == pytest.approx(inputs.loss(0.3, 2.0, tokens=1).kl.item(), rel=1e-12)
    assert (found.ce, found.kl_t1, found.teacher_ce) == (plain.ce, plain.kl_t1, plain.teacher_ce)
    assert not inputs.gradients(found.total)[1][1:].any()


def test_entries_after_the_vocabulary_have_no_say():
    inputs = Inputs()
    expected = inputs.loss(0.3, 2.0)
    slopes = inputs.gradients(expected.total)
    assert not slopes[2][VOCABULARY:].any() and not slopes[3][VOCABULARY:].any()
    with torch.no_grad():
        inputs.student_head[VOCABULARY:] = 1e6
        inputs.teacher_head[VOCABULARY:] = torch.nan
    found = inputs.loss(0.3, 2.0)
    assert [x.item() for x in found] == [x.item() for x in expected]
    assert torch.equal(inputs.gradients(found.total)[0], slopes[0])


def test_a_teacher_that_is_frozen_gets_nothing():
    inputs = Inputs()
    expected = inputs.gradients(inputs.loss(0.3, 2.0).total)[0]
    inputs.teacher.requires_grad_(False)
    inputs.teacher_head.requires_grad_(False)
    (found,) = torch.autograd.grad(inputs.loss(0.3, 2.0).total, inputs.student)
    assert torch.equal(found, expected)


def test_without_gradients_the_values_are_the_same():
    inputs = Inputs()
    expected = inputs.loss(0.3, 2.0)
    with torch.no_grad():
        found = inputs.loss(0.3, 2.0)
    assert not found.total.requires_grad and [x.item() for x in found] == [x.item() for x in expected]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_logits_of_lower_precision_are_reduced_in_float32(dtype, tolerance):
    """Logits as the heads give them: what follows is float32, so the terms are those of the same logits in float64."""

    def run(student: Tensor, teacher: Tensor) -> tuple[DistillTerms, tuple[Tensor, ...]]:
        student, teacher = student.requires_grad_(), teacher.requires_grad_()
        found = of_logits(student, teacher, 0.3, 2.0)
        return found, torch.autograd.grad(found.total, (student, teacher))

    logits = [(3 * normal(seed, TOKENS, VOCABULARY)).to(dtype) for seed in (0, 1)]
    found, slopes = run(*logits)
    exact, expected = run(*(x.detach().double() for x in logits))
    assert [x.item() for x in found] == pytest.approx([x.item() for x in exact], rel=1e-6)
    assert all(x.dtype == torch.float32 for x in found)
    for mine, theirs in zip(slopes, expected, strict=True):
        assert mine.dtype == dtype and (mine.double() - theirs).norm() <= tolerance * theirs.norm()


def test_gradients_of_16_bit_heads_add_up_in_float32(monkeypatch):
    """In one chunk or in many: what is rounded is each chunk's product and the sum, not every sum on the way."""
    sums, original = [], fused.add_product
    monkeypatch.setattr(
        fused, "add_product", lambda total, *more, **new: sums.append(total.dtype) or original(total, *more, **new)
    )
    half = Inputs()
    for parameter in (half.student, half.teacher, half.student_head, half.teacher_head):
        parameter.data = parameter.data.bfloat16()
    whole = half.gradients(half.loss(0.3, 2.0).total)
    monkeypatch.setitem(fused.DENSE_CHUNK_BYTES, "cpu", ROW)
    many = half.gradients(half.loss(0.3, 2.0).total)
    assert sums == [torch.float32] * 2 * (1 + TOKENS)
    for one, other in zip(whole, many, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16
        assert (one.double() - other.double()).norm() < 6e-3 * one.double().norm()


def test_logits_of_thousands_stay_finite():
    student, teacher = ((3e3 * normal(seed, TOKENS, VOCABULARY)).float().requires_grad_() for seed in (0, 1))
    found = of_logits(student, teacher, 0.5, 2.0)
    slopes = torch.autograd.grad(found.total, (student, teacher))
    assert all(x.isfinite().all() for x in (*found, *slopes))
