import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from megakd.losses.spans import (
    log1mexp,
    span_attention,
    span_feature_loss,
    span_likelihood_loss,
    span_likelihoods,
    span_logprobs,
    span_means,
    span_sizes,
)
from tests.losses.test_hidden import gradients, normal, some, sum_of_its_windows, unmoved_by_what_does_not_count

TEMPERATURES = (0.5, 1.0, 100.0)
EXTREMES = (0.0, -1e-12, -1e-7, -1e-3, -1.0, -50.0, -1e4, -math.inf)
likelihood = partial(span_likelihood_loss, temperature=2.0)


def numbers(windows: int, tokens: int, count: int) -> Tensor:
    """Spans of one to three tokens in order, -1 for some; windows end at different ones, the last has none at all."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for window in range(windows):
        sizes = torch.randint(1, 4, (tokens,), generator=generator)
        row = torch.repeat_interleave(torch.arange(tokens), sizes)[:tokens]
        row[torch.rand(tokens, generator=generator) < 0.2] = -1
        rows.append(torch.where(row < count - window, row, -1))
    if windows > 2:
        rows[-1][:] = -1
    return torch.stack(rows)


def logprobs(seed: int, *shape: int) -> Tensor:
    return -normal(seed, *shape).exp()


@pytest.mark.parametrize("shape", [(1, 5, 2, 4), (3, 11, 6, 5), (2, 7, 7, 1)])  # B, T, S, D
@pytest.mark.parametrize("numbers_are", [torch.int64, torch.int32])
def test_means_and_sums_match_the_reference(shape, numbers_are):
    windows, tokens, count, size = shape
    spans = numbers(windows, tokens, count)
    hidden, each = normal(0, windows, tokens, size), logprobs(1, windows, tokens)
    means, sizes = span_means(hidden, spans.to(numbers_are), count)
    sums, lengths = span_logprobs(each, spans.to(numbers_are), count)
    assert means.shape == (windows, count, size) and sums.shape == sizes.shape == (windows, count)
    assert torch.equal(sizes, lengths) and int(sizes.sum()) == int((spans >= 0).sum())
    for b in range(windows):
        for span in range(count):
            inside = [t for t in range(tokens) if spans[b, t] == span]
            assert sizes[b, span] == len(inside)
            assert sums[b, span].item() == pytest.approx(sum(each[b, t].item() for t in inside))
            expected = [sum(hidden[b, t, d].item() for t in inside) / max(len(inside), 1) for d in range(size)]
            assert means[b, span].tolist() == pytest.approx(expected)


def test_gradients_of_means_and_sums():
    spans = numbers(3, 8, 5)
    assert torch.autograd.gradcheck(lambda x: span_means(x, spans, 5)[0], (normal(0, 3, 8, 2).requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: span_logprobs(x, spans, 5)[0], (logprobs(0, 3, 8).requires_grad_(),))


@pytest.mark.parametrize("function, shape", [(span_means, (3, 8, 2)), (span_logprobs, (3, 8))])
def test_tokens_of_no_span_have_no_say(function, shape):
    spans, values, weights = numbers(3, 8, 5), normal(0, *shape), normal(1, 3, 5, *shape[2:])
    results = []
    for filler in (0.0, 1e4, math.inf, math.nan):
        free = values.clone()
        free[spans < 0] = filler
        free.requires_grad_()
        found = function(free, spans, 5)[0]
        (slope,) = torch.autograd.grad((found * weights).sum(), free)
        results.append((found.detach(), slope))
        assert found.isfinite().all() and not slope[spans < 0].any()
    assert all(torch.equal(x, y) for each in results for x, y in zip(each, results[0], strict=True))
    free = values.clone().requires_grad_()
    nothing = function(free, torch.full_like(spans, -1), 5)[0]
    nothing.sum().backward()
    assert not nothing.any() and free.grad is not None and not free.grad.any()


@pytest.mark.parametrize("shape", [(1, 2, 5, 2), (3, 1, 8, 5), (2, 3, 7, 7)])  # B, H, T, S
def test_attention_between_spans_matches_the_reference(shape):
    windows, heads, tokens, count = shape
    spans = numbers(windows, tokens, count)
    maps = normal(0, windows, heads, tokens, tokens).softmax(-1)
    found = span_attention(maps, spans, count)
    assert found.shape == (windows, heads, count, count) and found.dtype == torch.float64
    for b, h, i, j in itertools.product(*map(range, found.shape)):
        queries, keys = ([t for t in range(tokens) if spans[b, t] == span] for span in (i, j))
        expected = sum(maps[b, h, q, k].item() for q in queries for k in keys) / max(len(queries), 1)
        assert found[b, h, i, j].item() == pytest.approx(expected, abs=1e-12)
    whole = torch.arange(tokens).expand(windows, -1)
    assert torch.allclose(span_attention(maps, whole, tokens), maps)  # a token a span: the map itself
    assert torch.equal(span_sizes(spans, count), span_means(maps[:, 0], spans, count)[1])


def test_gradients_of_attention_between_spans():
    spans = numbers(3, 6, 4)
    maps = normal(0, 3, 2, 6, 6).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: span_attention(x, spans, 4), (maps,))


def test_attention_of_and_to_no_span_has_no_say():
    spans, maps = numbers(3, 6, 4), normal(0, 3, 2, 6, 6).softmax(-1)
    expected = span_attention(maps, spans, 4)
    for filler in (1e4, math.inf, math.nan):
        free = maps.clone()
        free.transpose(1, 2)[spans < 0] = filler
        free.permute(0, 3, 1, 2)[spans < 0] = filler
        free.requires_grad_()
        found = span_attention(free, spans, 4)
        (slope,) = torch.autograd.grad(found.square().sum(), free)
        assert torch.equal(found, expected) and slope.isfinite().all()
        assert not slope.transpose(1, 2)[spans < 0].any() and not slope.permute(0, 3, 1, 2)[spans < 0].any()


def test_the_loss_is_the_sum_over_spans():
    student, teacher, there = (
        logprobs(0, 2, 5),
        logprobs(1, 2, 5),
        torch.tensor([[True] * 5, [True, False] * 2 + [True]]),
    )
    each = span_likelihoods(student, teacher, there, 2.0)
    assert each.shape == (8,) and torch.equal(each.sum(), likelihood(student, teacher, there))


def test_windows_do_not_know_of_each_other():
    spans, hidden = numbers(3, 8, 5), normal(0, 3, 8, 2)
    singles = [span_means(hidden[i : i + 1], spans[i : i + 1], 5) for i in range(3)]
    for found, expected in zip(span_means(hidden, spans, 5), zip(*singles, strict=True), strict=True):
        assert torch.equal(found, torch.cat(expected))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        span_means(hidden, spans.clamp(min=5), 5)  # it would land in the next window


def test_lower_precision_sums_in_float32():
    spans = torch.zeros(1, 3000, dtype=torch.int64)
    means, _ = span_means(torch.ones(1, 3000, 1, dtype=torch.bfloat16), spans, 1)
    sums, _ = span_logprobs(torch.full((1, 3000), -1.0, dtype=torch.bfloat16), spans, 1)
    assert means.dtype == sums.dtype == torch.float32 and means.item() == 1 and sums.item() == -3000


def test_features_of_spans_are_features():
    student, teacher, there = normal(0, 3, 7, 5), 2 * normal(1, 3, 7, 5) + 1, some(3, 7)
    found, slope, _ = gradients(span_feature_loss, student, teacher, there)
    both = [torch.nn.functional.layer_norm(x, (5,), eps=0.0) for x in (student, teacher)]
    assert found.item() == pytest.approx((both[0] - both[1])[there].square().mean(-1).sum().item(), rel=1e-6)
    assert slope[there].any(-1).all()
    assert gradients(span_feature_loss, teacher, teacher, there)[1].abs().max() < 1e-14
    free = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: span_feature_loss(s, t, there), free)


def reference_likelihood(student: Tensor, teacher: Tensor, there: Tensor, temperature: float) -> float:
    total = 0.0
    for b, s in there.nonzero().tolist():
        p, q = (math.exp(x[b, s].item() / temperature) for x in (teacher, student))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_likelihood_matches_the_reference(temperature):
    student, teacher, there = logprobs(0, 3, 7), logprobs(1, 3, 7), some(3, 7)
    found = span_likelihood_loss(student, teacher, there, temperature)
    assert found.item() == pytest.approx(reference_likelihood(student, teacher, there, temperature), rel=1e-4)
    assert found > 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_of_likelihood(temperature):
    student, teacher, there = logprobs(0, 3, 7).requires_grad_(), logprobs(1, 3, 7).requires_grad_(), some(3, 7)
    assert torch.autograd.gradcheck(
        lambda s, t: span_likelihood_loss(s, t, there, temperature), (student, teacher), eps=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_certain_and_impossible_spans_stay_finite(dtype, temperature):
    pairs = torch.cartesian_prod(torch.tensor(EXTREMES), torch.tensor(EXTREMES)).T.to(dtype)
    student, teacher = pairs[:1], pairs[1:]
    value, *slopes = gradients(
        partial(span_likelihood_loss, temperature=temperature), student, teacher, torch.ones_like(student).bool()
    )
    assert value.isfinite() and all(slope.isfinite().all() for slope in slopes)
    # towards the teacher: a student that is too sure of a span, by however little, is still drawn back, and vice versa
    there = torch.ones(1, 1, dtype=torch.bool)
    for low, high in ((-50.0, 0.0), (-1.0, -1e-7), (-1e-3, 0.0)):
        low, high = torch.tensor([[low]]).to(dtype), torch.tensor([[high]]).to(dtype)
        assert gradients(likelihood, high, low, there)[1].item() > 0
        assert gradients(likelihood, low, high, there)[1].item() < 0


def test_a_sure_student_has_a_bounded_slope_at_its_logits():
    """By log q it is up to 1e6, but log q itself hardly moves there: 1 - q a logit."""
    for surplus in (5.0, 12.0, 16.0, 30.0, 200.0):
        logits = torch.tensor([[surplus, 0.0, 0.0]], requires_grad=True)
        loss = span_likelihood_loss(logits.log_softmax(-1)[:, :1], torch.tensor([[-2.0]]), torch.tensor([[True]]), 1.0)
        loss.backward()
        assert loss.isfinite() and logits.grad is not None and logits.grad.abs().max() <= 1


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_give_zero_and_no_gradient(temperature, dtype, tolerance):
    each = torch.tensor([EXTREMES]).to(dtype)
    loss = partial(span_likelihood_loss, temperature=temperature)
    value, *slopes = gradients(loss, each, each, torch.ones_like(each).bool())
    assert value == 0
    assert all(slope.abs().max() <= tolerance for slope in slopes)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_never_negative(temperature):
    student, teacher = 5 * logprobs(0, 1, 400), 5 * logprobs(1, 1, 400)
    for i in range(400):
        one = (x[:, i : i + 1] for x in (student, teacher))
        assert span_likelihood_loss(*one, torch.ones(1, 1, dtype=torch.bool), temperature) >= 0


def test_times_the_temperature_it_has_a_limit():
    """What the docstring says of weights: the strength is held by a factor T, neither by none nor by T^2."""
    student, teacher, there = logprobs(0, 3, 7), logprobs(1, 3, 7), some(3, 7)
    p, q = -teacher[there], -student[there]
    expected = (p * (p / q).log() - p + q).sum().item()
    for temperature, tolerance in ((1e2, 5e-2), (1e4, 1e-3)):
        found = temperature * span_likelihood_loss(student, teacher, there, temperature).item()
        assert found == pytest.approx(expected, rel=tolerance)


def test_log1mexp_is_exact_near_both_ends():
    values = torch.tensor([-1e-9, -1e-3, -0.5, -math.log(2), -1.0, -40.0, -1e4], dtype=torch.float64)
    expected = [math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x)) for x in values.tolist()]
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        assert log1mexp(values.to(dtype)).tolist() == pytest.approx(expected, rel=tolerance, abs=1e-30)


def test_what_is_not_there_has_no_say():
    there = some(3, 7)
    unmoved_by_what_does_not_count(likelihood, logprobs(0, 3, 7), logprobs(1, 3, 7), there)
    unmoved_by_what_does_not_count(span_feature_loss, normal(0, 3, 7, 5), normal(1, 3, 7, 5), there)


def test_a_batch_is_the_sum_of_its_windows():
    there = some(3, 7)
    there[-1, 2:5] = True
    sum_of_its_windows(likelihood, logprobs(0, 3, 7), logprobs(1, 3, 7), there)
    sum_of_its_windows(span_feature_loss, normal(0, 3, 7, 5), normal(1, 3, 7, 5), there)


def test_equal_models_with_unequal_tokens_lose_nothing():
    """One text, cut in 6 tokens by one and in 4 by the other: spans where both end, as in the whole dual mode."""
    student_spans, teacher_spans = torch.tensor([[0, 0, 1, 2, 2, 2]]), torch.tensor([[0, 1, 1, 2]])
    likelihoods = torch.tensor([[-3.0, -0.7, -0.1]], dtype=torch.float64)
    sides = []
    for spans in (student_spans, teacher_spans):
        sizes = torch.bincount(spans[0])
        sides.append(span_logprobs((likelihoods / sizes).gather(1, spans), spans, 3))
    (student, there), (teacher, _) = sides
    assert abs(span_likelihood_loss(student, teacher, there > 0, 1.0).item()) < 1e-15
