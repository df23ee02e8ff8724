import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from megakd.losses.divergence import Divergence, Kind, divergence_slopes, divergence_terms
from megakd.losses.reference import TAIL_FLOOR, kl_to_targets, teacher_buckets
from megakd.losses.signals import Sparse, Stored
from tests.conftest import for_each
from tests.losses.test_reference import example, with_fillers

KINDS: tuple[Kind, ...] = get_args(Kind)
ALL = [Divergence(kind, mix) for kind in KINDS for mix in ((0.1, 0.5, 0.9) if kind in ("jsd", "skew_kl") else (0.5,))]
ON_DATA = [(d, tail) for d in ALL for tail in ("ghost", "truncated") if (d.kind, tail) != ("reverse_kl", "truncated")]


def reference_divergence(divergence: Divergence, p: list[float], q: list[float]) -> float:
    """As the papers write it, in Python floats."""

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    kind, b = divergence
    mixed = [b * x + (1 - b) * y for x, y in zip(p, q, strict=True)]
    if kind == "kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "jsd":
        return b * kl(p, mixed) + (1 - b) * kl(q, mixed)
    if kind == "skew_kl":
        return kl(p, mixed)
    return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2


def reference_token(
    divergence: Divergence, teacher: Tensor, student: Tensor, ids: list[int], temperature: float, tail: str
) -> float:
    """From both whole distributions; truncated: over the whole vocabulary, the teacher 0 outside of `ids`."""
    p, q = (torch.softmax(logits / temperature, 0).tolist() for logits in (teacher, student))
    if tail == "truncated":
        mass = sum(p[i] for i in ids)
        return reference_divergence(divergence, [x / mass if i in ids else 0.0 for i, x in enumerate(p)], q)
    rest = [i for i in range(len(p)) if i not in ids]
    return reference_divergence(divergence, *([x[i] for i in ids] + [sum(x[i] for i in rest)] for x in (p, q)))


def distributions(rows: int, buckets: int, empty: float = 0.0) -> tuple[Tensor, Tensor]:
    """log P and log Q; with `empty` some buckets are P's or Q's alone, or nobody's."""
    generator = torch.Generator().manual_seed(0)
    both = []
    for _ in range(2):
        logits = 3 * torch.randn(rows, buckets, generator=generator, dtype=torch.float64)
        gone = torch.rand(rows, buckets, generator=generator) < empty
        gone[:, 0] = False
        both.append(logits.masked_fill(gone, -torch.inf).log_softmax(-1))
    return both[0], both[1]


@for_each("divergence, tail", ON_DATA)
@for_each("temperature", [1.0, 2.0])
def test_on_targets_it_is_the_reference(divergence, tail, temperature):
    teacher, student, _, targets, stored = example((7, 33, 8), temperature, tail, pmin=0.02)
    expected = []
    for i in range(7):
        kept = targets.logprobs[i] > -torch.inf
        ids = targets.ids[i][kept].tolist()
        expected.append(reference_token(divergence, teacher[i], student[i], ids, temperature, tail))
    found = kl_to_targets(student, Sparse(with_fillers(targets, 3), stored, tail), temperature, divergence)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@for_each("divergence", ALL)
def test_never_negative_and_zero_for_equals(divergence):
    log_p, log_q = distributions(50, 9)
    assert (divergence_terms(divergence, log_p, log_q).sum(-1) > 0).all()
    assert divergence_terms(divergence, log_p, log_p).sum(-1).abs().max() < 1e-14
    slopes = divergence_slopes(divergence, log_p, log_p)
    gradient = slopes - log_p.exp() * slopes.sum(-1, keepdim=True)
    assert gradient.abs().max() < 1e-14


@for_each("divergence", ALL)
def test_merged_buckets_are_a_lower_bound(divergence):
    log_p, log_q = distributions(50, 9)
    merged = [torch.cat([x[:, :4], x[:, 4:].logsumexp(-1, keepdim=True)], 1) for x in (log_p, log_q)]
    whole, coarse = (divergence_terms(divergence, *pair).sum(-1) for pair in ((log_p, log_q), merged))
    assert (coarse <= whole + 1e-14).all() and (coarse < whole - 1e-6).any()


@for_each("divergence", ALL)
@for_each("empty", [0.0, 0.3])
def test_slopes_are_those_of_the_terms(divergence, empty):
    """By autograd, where a bucket is one side's alone or nobody's too; reverse KL is infinite without the teacher."""
    log_p, log_q = distributions(20, 9, empty)
    if divergence.kind == "reverse_kl":
        log_p = log_p.masked_fill((log_p == -torch.inf) & (log_q > -torch.inf), -30.0)
    there = log_q > -torch.inf
    free = torch.where(there, log_q, 0.0).requires_grad_()
    divergence_terms(divergence, log_p, free)[there].sum().backward()
    found = divergence_slopes(divergence, log_p, log_q)
    assert found.isfinite().all() and divergence_terms(divergence, log_p, log_q)[there].isfinite().all()
    assert torch.allclose(found[there], free.grad[there], atol=1e-14)
    # KL is infinite where only the teacher has a bucket; a bucket without a student has no gradient of logits
    both_empty = ~there & (log_p == -torch.inf)
    assert not found[both_empty].any() and not divergence_terms(divergence, log_p, log_q)[both_empty].any()


def test_limits_of_the_mixtures():
    log_p, log_q = distributions(20, 9)

    def value(kind: Kind, mix: float = 0.5) -> Tensor:
        return divergence_terms(Divergence(kind, mix), log_p, log_q).sum(-1)

    assert torch.allclose(value("skew_kl", 1e-9), value("kl"), atol=1e-6)
    assert torch.allclose(value("jsd", 1e-6) / 1e-6, value("kl"), rtol=1e-3)  # GKD, section 3
    assert torch.allclose(value("jsd", 1 - 1e-9) / 1e-9, value("reverse_kl"), rtol=1e-3)
    swapped = divergence_terms(Divergence("jsd", 0.5), log_q, log_p).sum(-1)
    assert torch.allclose(value("jsd"), swapped) and (value("jsd") <= math.log(2)).all()
    assert (value("tvd") <= 1).all() and (value("tvd") <= (value("kl") / 2).sqrt() + 1e-14).all()  # Pinsker


def test_reverse_kl_takes_a_tail_that_was_rounded_away_as_a_small_one():
    """A byte cannot hold a tail below 4e-6; without a floor one such row makes the loss infinite."""
    _, student, _, targets, stored = example((7, 33, 8), 2.0)
    rounded = targets._replace(log_tails=torch.full_like(targets.log_tails, -torch.inf))
    found = kl_to_targets(student, Sparse(rounded, stored, "ghost"), 2.0, Divergence("reverse_kl"))
    assert found.isfinite().all() and (found > 0).all()
    buckets = teacher_buckets(rounded.logprobs, rounded.log_tails[:, 0], 2.0, "ghost", Divergence("reverse_kl"))
    assert torch.allclose(buckets.exp().sum(-1), torch.ones(7, dtype=torch.float64))
    assert torch.allclose(buckets[:, -1].exp(), torch.tensor(TAIL_FLOOR, dtype=torch.float64), rtol=1e-5)
    whole = targets._replace(log_tails=targets.log_tails.clamp(min=math.log(1e-3)))
    same = [teacher_buckets(whole.logprobs, whole.log_tails[:, 0], 1.0, "ghost", Divergence(k)) for k in KINDS[:2]]
    assert torch.equal(*same)


@for_each("divergence", ALL)
def test_all_entries_stored_is_the_dense_divergence(divergence):
    teacher, student, _, targets, _ = example((5, 13, 13), 2.0, pmin=0.0)
    student.requires_grad_()
    found = kl_to_targets(student, Sparse(targets, Stored(True, (1.0, 2.0, 4.0), None), "ghost"), 2.0, divergence)
    both = [(logits.detach() / 2).log_softmax(-1) for logits in (teacher, student)]
    assert torch.allclose(found, divergence_terms(divergence, *both).sum(-1), rtol=1e-4)  # of reverse_kl's floor
    found.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()
