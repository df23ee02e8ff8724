"""Tails at temperatures that were not declared, and whole rows from what is stored, against dense logits in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megakd.capture.targets import targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.config.tails import DEFAULT, near, points, reaches, reaches_all
from megakd.data import codec
from megakd.data.codebook import build_book
from megakd.data.records import Sample, TeacherTargets, by_probability
from megakd.errors import UserError
from megakd.losses.head import FusedHead
from megakd.losses.reference import distill_loss, topk_kl
from megakd.losses.signals import Sparse, Stored, Tail
from megakd.losses.tails import log_tail_at, log_tail_bounds, reconstruct_logits
from tests.conftest import for_each

TOKENS, VOCABULARY, ENTRIES = 40, 700, 24
BETWEEN = (1.05, 1.1, 1.2, 1.5, 1.75, 2.5, 3.0, 3.7)


def teacher_logits(sharpness: float = 1.0) -> Tensor:
    """Rows like a language model's: a Zipf prior and a context, [N, V] float64."""
    generator = torch.Generator().manual_seed(3)
    prior = -1.3 * torch.log(torch.randperm(VOCABULARY, generator=generator).double() + 3)
    context = torch.randn(TOKENS, 12, generator=generator, dtype=torch.float64)
    directions = torch.randn(12, VOCABULARY, generator=generator, dtype=torch.float64)
    return sharpness * (prior + 0.6 * context @ directions)


def captured(
    logits: Tensor, temperatures: tuple[float, ...] = DEFAULT, pmin: float = 3e-4, top_k: int = ENTRIES
) -> tuple[TeacherTargets, Stored]:
    config = LogitsConfig(top_k=top_k, pmin=pmin, temperatures=temperatures)
    targets = targets_from_logits(logits, logits.argmax(-1), config, torch.zeros(len(logits)))
    return targets, Stored(True, config.declared_temperatures, None, logits.shape[1])


def stored_and_read(targets: TeacherTargets, stored: Stored) -> TeacherTargets:
    """The targets as they come back from a record."""
    arrays = TeacherTargets(*(np.asarray(field) for field in targets))
    book = build_book(arrays.ids[arrays.logprobs > -np.inf], stored.vocab_size)
    layout = codec.Layout(arrays.ids.shape[1], 0, 238, stored.temperatures, 2048, book)
    tokens = np.concatenate([[0], arrays.ids[:, 0]]).astype(np.int32)
    arrays = arrays._replace(logprobs=arrays.logprobs.astype(np.float32), label_nll=arrays.label_nll.astype(np.float32))
    read = codec.decode("a", codec.encode(Sample("a", tokens, np.array([0]), arrays), layout), layout).targets
    assert read is not None
    return TeacherTargets(*map(torch.as_tensor, read))


def reference_buckets(logits: Tensor, targets: TeacherTargets, temperature: float) -> list[list[float]]:
    """The teacher at T over the stored tokens and one bucket for all others, in Python floats."""
    rows = []
    for row, ids, logprobs in zip(logits, targets.ids.tolist(), targets.logprobs.tolist(), strict=True):
        kept = {i for i, value in zip(ids, logprobs, strict=True) if value > -math.inf}
        powers = [math.exp(x / temperature) for x in row.tolist()]
        total = sum(powers)
        rows.append([powers[i] / total for i in sorted(kept)] + [1 - sum(powers[i] for i in kept) / total])
    return rows


def reference_log_tail(logits: Tensor, targets: TeacherTargets, temperature: float) -> list[float]:
    """log of the sum over tokens outside the head of p^(1/T), token by token."""
    found = []
    for row, ids in zip(logits.log_softmax(-1).tolist(), targets.ids.tolist(), strict=True):
        found.append(math.log(sum(math.exp(x / temperature) for i, x in enumerate(row) if i not in set(ids))))
    return found


def tail_kl(exact_log_tail: Tensor, log_tail: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
    """KL over (head, tail) between the two shares of the tail, [N]."""
    head = (logprobs.double() / temperature).logsumexp(-1)
    p, q = ((x.double() - head).sigmoid() for x in (exact_log_tail, log_tail))
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


@for_each("temperature", DEFAULT)
def test_declared_temperatures_are_read_as_they_are_stored(temperature):
    targets, stored = captured(teacher_logits())
    found = log_tail_at(targets, stored, temperature)
    assert torch.equal(found, targets.log_tails[:, stored.column(temperature)])
    assert found.tolist() == pytest.approx(reference_log_tail(teacher_logits(), targets, temperature), rel=1e-9)


@for_each("temperature", BETWEEN)
@for_each("sharpness", [0.7, 1.0, 1.5])
def test_interpolated_tail_is_near_the_exact_one(sharpness, temperature):
    logits = teacher_logits(sharpness)
    targets, stored = captured(logits)
    exact = torch.tensor(reference_log_tail(logits, targets, temperature), dtype=torch.float64)
    assert tail_kl(exact, log_tail_at(targets, stored, temperature), targets.logprobs, temperature).mean() < 5e-5
    read = stored_and_read(targets, stored)
    assert tail_kl(exact, log_tail_at(read, stored, temperature), targets.logprobs, temperature).mean() < 1e-4


@for_each("temperature", (*BETWEEN, *DEFAULT))
def test_exact_tail_lies_within_the_bounds_of_convexity(temperature):
    logits = teacher_logits()
    targets, stored = captured(logits)
    exact = torch.tensor(reference_log_tail(logits, targets, temperature), dtype=torch.float64)
    lower, upper = log_tail_bounds(targets, stored, temperature)
    assert (lower <= exact + 1e-9).all() and (exact <= upper + 1e-9).all()
    found = log_tail_at(targets, stored, temperature)
    assert (lower <= found + 1e-9).all() and (found <= upper + 1e-9).all()


def test_a_head_of_the_whole_vocabulary_has_no_tail():
    logits = teacher_logits()[:, :ENTRIES]
    targets, stored = captured(logits, pmin=0.0)
    assert (log_tail_at(targets, stored, 1.5) == -math.inf).all()
    expected = (logits / 1.5).log_softmax(-1)
    assert torch.allclose(reconstruct_logits(targets, ENTRIES, 1.5, DEFAULT).double(), expected, atol=1e-6)


def test_a_tail_too_small_to_store_stays_finite_between_the_declared_temperatures():
    """A confident teacher: at T = 1 nothing of the tail is left, at T = 4 there is."""
    logits = torch.full((3, 50), -150.0, dtype=torch.float64)
    logits[:, 0] = 0.0
    targets, stored = captured(logits, top_k=2)
    read = stored_and_read(targets, stored)
    for temperature in BETWEEN:
        found = log_tail_at(read, stored, temperature)
        assert found.isfinite().all() and (found < 0).all()


@for_each("tail", ["ghost", "hybrid"])
@for_each("temperature", [1.2, 3.0])
def test_loss_and_gradient_at_an_interpolated_temperature(temperature, tail: Tail):
    """The fused head against autograd over dense logits, both with the interpolated tail; the exact tail is near."""
    logits = teacher_logits()
    profile = "topk" if tail == "ghost" else "hybrid"
    config = LogitsConfig(top_k=ENTRIES, profile=profile, temperatures=DEFAULT, draws=9)
    config = config.model_copy(update={"draw_temperature": temperature})
    targets = targets_from_logits(logits, logits.argmax(-1), config, torch.full((TOKENS,), 0.3))
    stored = Stored(True, DEFAULT, None if tail == "ghost" else temperature, VOCABULARY)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    teacher = Sparse(targets, stored, tail)
    found, expected = [], []
    for out in (found, expected):
        h, w = hidden.clone().requires_grad_(), nn.Parameter(weight.clone())
        if out is found:
            terms = FusedHead(w, VOCABULARY)(h, labels, teacher, 0.7, temperature)
        else:
            terms = distill_loss(h @ w.T, labels, teacher, 0.7, temperature)
        terms.total.backward()
        assert h.grad is not None and w.grad is not None and terms.kl_t1 is not None
        out += [terms.total.detach(), terms.kl, terms.kl_t1, h.grad, w.grad]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-7 * theirs.abs().max()
    if tail == "ghost":
        exact = torch.tensor(reference_log_tail(logits, targets, temperature), dtype=torch.float64)
        near_to = topk_kl(hidden @ weight.T, targets.ids, targets.logprobs, exact, temperature, "ghost").sum()
        assert found[1].item() == pytest.approx(near_to.item(), rel=3e-3)


def test_weights_reproduce_cubics_and_sum_to_one():
    for temperature in (1.1, 1.7, 3.3):
        places, weights, _ = near(DEFAULT, temperature)
        xs = [points(DEFAULT)[i] for i in places]
        assert sum(weights) == pytest.approx(1)
        assert sum(w * x**3 for w, x in zip(weights, xs, strict=True)) == pytest.approx(temperature**-3)


def test_reach_of_declared_temperatures():
    assert reaches_all(DEFAULT, 1, 4) and reaches_all(DEFAULT, 4, 1)
    assert reaches_all((1.0, 1.25, 1.75, 2.5, 4.0), 1, 4)
    assert not reaches(DEFAULT, 0.9) and not reaches(DEFAULT, 4.1) and not reaches((), 1.0)
    assert reaches((1.0, 2.0), 2.0) and not reaches((1.0, 2.0), 1.5) and not reaches((1.0, 2.0), 3.0)
    assert reaches((1.0, 2.0, 4.0), 3.0) and not reaches_all((1.0, 2.0, 4.0), 4, 1)


@for_each("temperature", [1.0, 1.5, 2.0])
def test_reconstructed_rows_against_dense(temperature):
    logits = teacher_logits()
    targets, _ = captured(logits)
    found = reconstruct_logits(targets, VOCABULARY, temperature, DEFAULT).double()
    assert torch.allclose(found.exp().sum(-1), torch.ones(TOKENS, dtype=torch.float64), atol=1e-5)
    exact = (logits / temperature).log_softmax(-1)
    # KL to equal shares over the tail is what spreading costs, and no more
    for row in range(TOKENS):
        ids = targets.ids[row, targets.logprobs[row] > -math.inf].long()
        head = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True)
        assert torch.allclose(found[row, head], exact[row, head], atol=1e-5 if temperature in DEFAULT else 2e-2)
        assert (found[row, ~head] - found[row, ~head][0]).abs().max() < 1e-6
    # given the teacher's own tail as shares, the rows are the teacher's
    whole = reconstruct_logits(targets, VOCABULARY, temperature, DEFAULT, rest=exact.exp()).double()
    assert (exact.exp() * (exact - whole)).sum(-1).max() < (1e-6 if temperature in DEFAULT else 5e-4)


def test_reconstruction_reads_samples_and_batches_alike():
    targets, _ = captured(teacher_logits())
    arrays = TeacherTargets(*(np.asarray(field) for field in targets))
    batch = TeacherTargets(*(field.unflatten(0, (4, 10)) for field in targets))
    one = reconstruct_logits(arrays, VOCABULARY, 1.5, DEFAULT)
    assert torch.equal(reconstruct_logits(batch, VOCABULARY, 1.5, DEFAULT).flatten(0, 1), one)
    with pytest.raises(UserError, match="draws alone"):
        reconstruct_logits(targets._replace(ids=targets.ids[:, :0]), VOCABULARY, 1.0, DEFAULT)
    with pytest.raises(UserError, match="carry tails for"):
        reconstruct_logits(targets, VOCABULARY, 9.0, DEFAULT)


def test_rows_by_probability():
    targets, stored = captured(teacher_logits(), pmin=5e-3)
    read = stored_and_read(targets, stored)
    found = by_probability(TeacherTargets(*(np.asarray(field) for field in read)))
    assert (found.logprobs[:, :-1] >= found.logprobs[:, 1:]).all()
    for before, after in zip(read.ids.tolist(), found.ids.tolist(), strict=True):
        assert sorted(before) == sorted(after)
