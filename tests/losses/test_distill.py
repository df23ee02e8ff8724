import math

import pytest
import torch
from torch import Tensor

from megakd.losses.distill import distill_loss, topk_kl
from megakd.models.teacher import targets_from_logits

SHAPES = [(1, 5, 2), (7, 33, 8), (3, 11, 11)]  # N, V, K: odd sizes, and K = V


def reference_kl(p: list[float], q: list[float]) -> float:
    return sum(p[i] * (math.log(p[i]) - math.log(q[i])) for i in range(len(p)) if p[i] > 0)


def reference_token(teacher: Tensor, student: Tensor, ids: list[int], temperature: float, tail: str) -> float:
    """The coarse KL of one token from both whole distributions, in Python floats."""
    p = torch.softmax(teacher / temperature, 0).tolist()
    q = torch.softmax(student / temperature, 0).tolist()
    rest = [i for i in range(len(p)) if i not in ids]
    if tail == "truncated":
        mass = sum(p[i] for i in ids)
        return reference_kl([p[i] / mass for i in ids], [q[i] for i in ids])
    return reference_kl(
        [p[i] for i in ids] + [sum(p[i] for i in rest)], [q[i] for i in ids] + [sum(q[i] for i in rest)]
    )


def example(shape: tuple[int, int, int], temperature: float, dtype: torch.dtype = torch.float64, seed: int = 0):
    tokens, vocabulary, entries = shape
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    student = 2 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    targets = targets_from_logits(teacher, labels, entries, (1.0, temperature))
    arguments = (targets.ids.long(), targets.logprobs, targets.log_tails[:, 1], targets.log_tails[:, 0])
    return teacher, student.to(dtype), labels, arguments


@pytest.mark.parametrize("tail", ["ghost", "truncated"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_matches_dense_reference(shape, temperature, tail):
    teacher, student, _, (ids, logprobs, log_tail, _) = example(shape, temperature)
    found = topk_kl(student, ids, logprobs, log_tail, temperature, tail)
    expected = [
        reference_token(t, s, i.tolist(), temperature, tail) for t, s, i in zip(teacher, student, ids, strict=True)
    ]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-10)
    assert (found >= -1e-12).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_stays_close(dtype, tolerance):
    _, student, labels, rest = example((7, 33, 8), 2.0)
    exact = distill_loss(student.to(dtype).double(), labels, *rest, 0.5, 2.0, "ghost").total
    found = distill_loss(student.to(dtype), labels, *rest, 0.5, 2.0, "ghost").total
    assert found.dtype == torch.float32  # reductions are float32 whatever the logits are
    assert abs(found - exact) <= tolerance * abs(exact)


@pytest.mark.parametrize("tail", ["ghost", "truncated"])
@pytest.mark.parametrize("alpha, temperature", [(0.0, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 4.0)])
def test_gradient_is_that_of_the_returned_loss(alpha, temperature, tail):
    """Finite differences: T^2 must be inside what is differentiated, not only in what is reported."""
    _, student, labels, rest = example((3, 9, 4), temperature)

    def loss(logits: Tensor) -> Tensor:
        return distill_loss(logits, labels, *rest, alpha, temperature, tail).total

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),), atol=1e-6)


def test_total_is_the_documented_formula():
    teacher, student, labels, rest = example((7, 33, 8), 2.0)
    terms = distill_loss(student, labels, *rest, 0.3, 2.0, "ghost")
    ce = sum(-torch.log_softmax(s, 0)[label] for s, label in zip(student, labels, strict=True))
    kl = sum(reference_token(t, s, i.tolist(), 2.0, "ghost") for t, s, i in zip(teacher, student, rest[0], strict=True))
    kl_t1 = sum(
        reference_token(t, s, i.tolist(), 1.0, "ghost") for t, s, i in zip(teacher, student, rest[0], strict=True)
    )
    assert terms.total.item() == pytest.approx(float(0.7 * ce + 0.3 * 4 * kl), abs=1e-9)
    assert (terms.ce.item(), terms.kl.item(), terms.kl_t1.item()) == pytest.approx((float(ce), kl, kl_t1), abs=1e-9)


def test_student_equal_to_teacher_gives_zero_and_no_gradient():
    teacher, _, _, (ids, logprobs, log_tail, _) = example((7, 33, 8), 2.0)
    student = teacher.clone().requires_grad_()
    loss = topk_kl(student, ids, logprobs, log_tail, 2.0, "ghost").sum()
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad is not None and student.grad.abs().max() < 1e-12


def test_all_entries_stored_is_the_dense_kl():
    teacher, student, _, (ids, logprobs, log_tail, _) = example((5, 13, 13), 2.0)
    dense = torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    student.requires_grad_()
    found = topk_kl(student, ids, logprobs, log_tail, 2.0, "ghost")
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


def test_tokens_outside_the_stored_ones_get_gradient():
    _, student, _, (ids, logprobs, log_tail, _) = example((4, 20, 3), 1.0)
    student.requires_grad_()
    topk_kl(student, ids, logprobs, log_tail, 1.0, "ghost").sum().backward()
    outside = torch.ones_like(student, dtype=torch.bool).scatter(1, ids, False)
    assert (student.grad[outside].abs() > 0).all()
