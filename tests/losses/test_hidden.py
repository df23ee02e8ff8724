import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megakd.losses.hidden import attention_loss, contrastive_loss, feature_loss, gap_weights, layer_map

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
contrastive = partial(contrastive_loss, temperature=0.3)
FEATURES = [(1, 2, 3), (3, 7, 5), (2, 1, 9)]  # B, T, D
HEADS = [(1, 1), (2, 2), (4, 2), (2, 6), (3, 2), (4, 6)]  # of the student, of the teacher


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(*shape: int) -> Tensor:
    """A mask with holes and different counts; in three windows or more the last counts nothing."""
    counted = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.7
    counted[0, 0] = True
    if shape[0] > 2:
        counted[-1] = False
    return counted


def attentions(seed: int, *shape: int) -> Tensor:
    """Logits [B, heads, T, T], -inf for keys after the query: exact zeros after softmax."""
    later = torch.ones(shape[-2:], dtype=torch.bool).triu(1)
    return (2 * normal(seed, *shape)).masked_fill(later, -torch.inf)


def gradients(loss: Loss, student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients of both sides."""
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    value = loss(student, teacher, mask)
    value.backward()
    assert value.shape == () and student.grad is not None and teacher.grad is not None
    return value.detach(), student.grad, teacher.grad


def unmoved_by_what_does_not_count(loss: Loss, student: Tensor, teacher: Tensor, mask: Tensor, rows=lambda x: x):
    """Exactly the same value and gradients, 0 where nothing counts. rows: [B, T, ..] as a view of an input."""
    expected = gradients(loss, student, teacher, mask)
    assert all(each.isfinite().all() for each in expected)
    for filler in (0.0, 1e4, math.inf, math.nan):
        student, teacher = student.clone(), teacher.clone()
        rows(student)[~mask] = filler
        rows(teacher)[~mask] = filler
        found = gradients(loss, student, teacher, mask)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True)), filler
        assert not any(rows(side)[~mask].any() for side in found[1:])
    nothing = gradients(loss, student, teacher, torch.zeros_like(mask))  # of NaN
    assert not any(each.any() for each in nothing)


def sum_of_its_windows(loss: Loss, student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    """Value and gradients of a batch are those of its windows, whatever lies next to them."""
    value, *both = gradients(loss, student, teacher, mask)
    singles = [gradients(loss, *(x[i : i + 1] for x in (student, teacher, mask))) for i in range(len(mask))]
    assert value.item() == pytest.approx(sum(single[0].item() for single in singles), rel=1e-12)
    for side, found in enumerate(both, 1):
        assert torch.allclose(found, torch.cat([single[side] for single in singles]), atol=1e-14)


def positions(mask: Tensor) -> list[tuple[int, int]]:
    return [(b, t) for b, t in mask.nonzero().tolist()]


def test_layers_are_evenly_spread_and_end_with_the_last():
    assert layer_map(2, 4) == [1, 3] and layer_map(3, 12) == [3, 7, 11]  # every second, every fourth: TinyBERT
    assert layer_map(3, 4) == [1, 2, 3] and layer_map(4, 2) == [0, 0, 1, 1] and layer_map(1, 7) == [6]
    for student in range(1, 20):
        assert layer_map(student, student) == list(range(student))
        for teacher in range(1, 40):
            found = layer_map(student, teacher)
            steps = {after - before for before, after in zip([-1, *found], found, strict=False)}
            assert len(found) == student and found[-1] == teacher - 1 and min(found) >= 0
            assert steps <= {teacher // student, -(-teacher // student)}, (student, teacher)


@pytest.mark.parametrize("shape", FEATURES)
def test_features_match_the_reference(shape):
    student, teacher, mask = normal(0, *shape), 3 * normal(1, *shape) + 5, some(*shape[:2])

    def norm(x: list[float]) -> list[float]:
        mean = sum(x) / len(x)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x))
        return [(v - mean) / deviation for v in x]

    expected = 0.0
    for b, t in positions(mask):
        pairs = zip(norm(student[b, t].tolist()), norm(teacher[b, t].tolist()), strict=True)
        expected += sum((s - p) ** 2 for s, p in pairs) / shape[2]
    assert feature_loss(student, teacher, mask).item() == pytest.approx(expected, rel=1e-6)


def test_neither_scale_nor_shift_makes_features_alike():
    student, teacher, mask = normal(0, 3, 7, 5), normal(1, 3, 7, 5), some(3, 7)
    expected = feature_loss(student, teacher, mask).item()
    for moved in (100 * student, 0.01 * student, student + 30, 0.1 * student - 7):
        assert feature_loss(moved, teacher, mask).item() == pytest.approx(expected, rel=1e-3)
    assert feature_loss(-teacher, teacher, mask).item() == pytest.approx(4 * int(mask.sum()), rel=1e-6)
    constant = gradients(feature_loss, torch.zeros_like(student), teacher, mask)  # collapsed: as bad as unrelated
    assert constant[0].item() == pytest.approx(int(mask.sum()), rel=1e-6)
    assert all(each.isfinite().all() for each in constant) and constant[1].any()


def reference_attention(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    """Heads of which each is the mean of neighbours; the student's zeros 1e-20."""
    heads = math.gcd(student.shape[1], teacher.shape[1])

    def row(side: Tensor, b: int, head: int, t: int) -> list[float]:
        wide = side.shape[1] // heads
        group = [side[b, h, t].tolist() for h in range(head * wide, (head + 1) * wide)]
        return [sum(column) / wide for column in zip(*group, strict=True)]

    total = 0.0
    for b, t in positions(mask):
        for head in range(heads):
            both = zip(row(teacher, b, head, t), row(student, b, head, t), strict=True)
            total += sum(p * math.log(p / max(q, 1e-20)) for p, q in both if p > 0) / heads
    return total


@pytest.mark.parametrize("heads, guides", HEADS)
@pytest.mark.parametrize("windows, length", [(1, 3), (3, 5)])
def test_attention_matches_the_reference(heads, guides, windows, length):
    student, teacher = (
        attentions(seed, windows, count, length, length).softmax(-1) for seed, count in ((0, heads), (1, guides))
    )
    mask = some(windows, length)
    found = attention_loss(student, teacher, mask)
    assert found.item() == pytest.approx(reference_attention(student, teacher, mask), rel=1e-10, abs=1e-12)
    assert found >= 0


def test_a_key_that_only_the_teacher_sees_costs_a_finite_price():
    teacher = attentions(1, 1, 2, 4, 4).softmax(-1)
    student = attentions(0, 1, 2, 4, 4).masked_fill(torch.eye(4, dtype=torch.bool).roll(1, 0), -torch.inf)
    student[..., 0, 0] = 0.0  # so that every row sees something
    student.requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = attention_loss(student.softmax(-1), teacher, mask)
    assert loss.item() == pytest.approx(reference_attention(student.detach().softmax(-1), teacher, mask), rel=1e-10)
    loss.backward()
    assert loss > 10 and student.grad is not None and student.grad.isfinite().all()


def test_one_head_count_that_divides_the_other_compares_groups():
    """A teacher of four heads is for a student of two what it is with its neighbours averaged before."""
    student, teacher = (attentions(seed, 2, count, 4, 4).softmax(-1) for seed, count in ((0, 2), (1, 4)))
    pairs = torch.stack([teacher[:, :2].mean(1), teacher[:, 2:].mean(1)], 1)
    mask = some(2, 4)
    assert torch.allclose(attention_loss(student, teacher, mask), attention_loss(student, pairs, mask))
    both = [x.mean(1, keepdim=True) for x in (student[:, :1], teacher[:, :3])]
    assert torch.allclose(attention_loss(student[:, :1], teacher[:, :3], mask), attention_loss(*both, mask))


@pytest.mark.parametrize("shape", FEATURES)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrast_matches_the_reference(shape, temperature):
    student, teacher, mask = normal(0, *shape), normal(1, *shape), some(*shape[:2])

    def similarity(b: int, i: int, j: int) -> float:
        x, y = student[b, i].tolist(), teacher[b, j].tolist()
        product = sum(v * w for v, w in zip(x, y, strict=True))
        return math.exp(product / math.hypot(*x) / math.hypot(*y) / temperature)

    expected = 0.0
    for b, i in positions(mask):
        others = [j for c, j in positions(mask) if c == b]
        expected -= math.log(similarity(b, i, i) / sum(similarity(b, i, j) for j in others))
    found = contrastive_loss(student, teacher, mask, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_a_window_of_one_position_has_no_contrast():
    mask = torch.tensor([[False, True, False], [False, False, False]])
    found = gradients(contrastive, normal(0, 2, 3, 5), normal(1, 2, 3, 5), mask)
    assert not any(each.any() for each in found)


def test_contrast_is_small_for_equals_and_large_for_strangers():
    teacher, mask = normal(1, 2, 6, 40), torch.ones(2, 6, dtype=torch.bool)
    equal, strange = (
        contrastive_loss(student, teacher, mask, 0.05).item() for student in (teacher, normal(0, 2, 6, 40))
    )
    assert equal < 1e-2 < 12 * math.log(6) / 2 < strange


@pytest.mark.parametrize("loss", [feature_loss, contrastive])
def test_gradients_of_features(loss):
    student, teacher, mask = normal(0, 3, 4, 5).requires_grad_(), normal(1, 3, 4, 5).requires_grad_(), some(3, 4)
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, mask), (student, teacher))


@pytest.mark.parametrize("heads, guides", HEADS)
def test_gradients_of_attention(heads, guides):
    student, teacher = (
        normal(s, 2, count, 3, 3).softmax(-1).requires_grad_() for s, count in ((0, heads), (1, guides))
    )
    mask = some(2, 3)
    assert torch.autograd.gradcheck(lambda s, t: attention_loss(s, t, mask), (student, teacher))


def test_gradients_of_attention_with_zeros():
    """Towards the logits, as a causal mask makes them; the slopes of masked ones are exactly 0."""
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    mask = some(2, 4)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return attention_loss(*(x.masked_fill(later, -torch.inf).softmax(-1) for x in (student, teacher)), mask)

    student, teacher = normal(0, 2, 4, 4, 4).requires_grad_(), normal(1, 2, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(loss, (student, teacher))


def test_equals_give_zero_and_no_gradient():
    hidden, mask = normal(0, 3, 7, 5), some(3, 7)
    assert not any(each.abs().max() > 1e-14 for each in gradients(feature_loss, hidden, hidden, mask))

    def attention(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return attention_loss(student.softmax(-1), teacher.softmax(-1), mask)

    for logits in (attentions(0, 3, 2, 7, 7), 40 * attentions(0, 3, 2, 7, 7)):
        assert not any(each.abs().max() > 1e-14 for each in gradients(attention, logits, logits, mask))


def test_what_does_not_count_has_no_say():
    mask = some(3, 7)
    for loss in (feature_loss, contrastive):
        unmoved_by_what_does_not_count(loss, normal(0, 3, 7, 5), normal(1, 3, 7, 5), mask)
    student, teacher = (attentions(seed, 3, heads, 7, 7).softmax(-1) for seed, heads in ((0, 2), (1, 4)))
    unmoved_by_what_does_not_count(attention_loss, student, teacher, mask, lambda x: x.transpose(1, 2))


def test_a_batch_is_the_sum_of_its_windows():
    mask = some(3, 7)
    mask[-1, 2:5] = True
    for loss in (feature_loss, contrastive):
        sum_of_its_windows(loss, normal(0, 3, 7, 5), normal(1, 3, 7, 5), mask)
    student, teacher = (attentions(seed, 3, heads, 7, 7).softmax(-1) for seed, heads in ((0, 3), (1, 2)))
    sum_of_its_windows(attention_loss, student, teacher, mask)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_close(dtype, tolerance):
    hidden, mask = [normal(seed, 3, 7, 33).to(dtype) for seed in (0, 1)], some(3, 7)
    rows = [attentions(seed, 3, 4, 7, 7).softmax(-1).to(dtype) for seed in (0, 1)]
    for loss, both in ((feature_loss, hidden), (contrastive, hidden), (attention_loss, rows)):
        found, *slopes = gradients(loss, both[0], both[1], mask)
        exact, *expected = gradients(loss, both[0].double(), both[1].double(), mask)
        assert found.dtype == torch.float32 and slopes[0].dtype == dtype
        assert found.item() == pytest.approx(exact.item(), rel=1e-5)  # reductions are float32 whatever the inputs are
        for mine, theirs in zip(slopes, expected, strict=True):
            assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_gap_weights_match_the_reference(strength):
    gap, mask = normal(0, 4, 7).exp().requires_grad_(), some(4, 7)
    found = gap_weights(gap, mask, strength)
    assert not found.requires_grad and found.dtype == torch.float64
    for b in range(4):
        counted = [t for c, t in positions(mask) if c == b]
        powers = {t: (gap[b, t].item() + 1e-6) ** strength for t in counted}
        expected = [powers[t] * len(counted) / sum(powers.values()) if t in powers else 0.0 for t in range(7)]
        assert found[b].tolist() == pytest.approx(expected, rel=1e-10)


def test_gap_weights_at_the_ends():
    mask = some(3, 49)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(gap_weights(normal(0, 3, 49).to(dtype), mask, 0.0), mask.to(dtype))  # exactly 1 each
        assert torch.equal(gap_weights(torch.zeros(3, 49, dtype=dtype), mask, 2.0), mask.to(dtype))
    # sampled divergences may be below 0, and a high power alone leaves float32
    gap = torch.tensor([[1e-3, 50.0, 20.0, -0.3]])
    found = gap_weights(gap, torch.ones(1, 4, dtype=torch.bool), 40.0)
    assert found.tolist() == [pytest.approx([0.0, 4.0, 0.0, 0.0], abs=1e-5)]


def test_gap_weights_know_their_window_alone_and_only_what_counts():
    gap, mask = normal(0, 3, 7).exp(), some(3, 7)
    found = gap_weights(gap, mask, 1.5)
    assert torch.equal(found, torch.cat([gap_weights(gap[i : i + 1], mask[i : i + 1], 1.5) for i in range(3)]))
    for filler in (math.nan, math.inf, -1.0, 1e9):
        assert torch.equal(gap_weights(gap.masked_fill(~mask, filler), mask, 1.5), found)
    assert not found[-1].any()  # of a window that counts nothing
