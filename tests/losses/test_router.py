import math

import pytest
import torch
from torch import Tensor

from megakd.losses.router import anchor, load_balance, routing_entropy
from tests.losses.test_hidden import normal, some


def chosen(logits_BTE: Tensor, active: int) -> Tensor:
    return logits_BTE.topk(active).indices


def test_anchor_is_the_mean_of_relative_squares():
    initial = [normal(0, 4, 3), 100 * normal(1, 8, 3)]
    moved = [initial[0] + normal(2, 4, 3), initial[1] - normal(3, 8, 3)]
    expected = 0.0
    for now, then in zip(moved, initial, strict=True):
        squares = sum((x - y) ** 2 for x, y in zip(now.flatten().tolist(), then.flatten().tolist(), strict=True))
        expected += squares / sum(y**2 for y in then.flatten().tolist()) / 2
    assert anchor(moved, initial).item() == pytest.approx(expected, rel=1e-6)
    assert anchor([2 * w for w in initial], initial).item() == pytest.approx(1)
    assert anchor([7 * w for w in moved], [7 * w for w in initial]).item() == pytest.approx(expected, rel=1e-6)


def test_absolute_anchor_is_the_sum_of_squares():
    initial = [normal(0, 4, 3), 100 * normal(1, 8, 3)]
    moved = [initial[0] + normal(2, 4, 3), initial[1] - normal(3, 8, 3)]
    expected = 0.0
    for now, then in zip(moved, initial, strict=True):
        expected += sum((x - y) ** 2 for x, y in zip(now.flatten().tolist(), then.flatten().tolist(), strict=True))
    assert anchor(moved, initial, "absolute").item() == pytest.approx(expected, rel=1e-6)
    far = anchor([7 * w for w in moved], [7 * w for w in initial], "absolute")
    assert far.item() == pytest.approx(49 * expected, rel=1e-6)


@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_anchor_is_zero_without_a_gradient_where_they_began(form):
    weights = [normal(seed, 4, 3).requires_grad_() for seed in (0, 1)]
    loss = anchor(weights, [w.detach().clone() for w in weights], form)
    assert loss == 0 and not any(slope.any() for slope in torch.autograd.grad(loss, weights))


@pytest.mark.parametrize("experts", [2, 5])
def test_entropy_matches_the_reference(experts):
    logits = 3 * normal(0, 7, experts)
    expected = []
    for row in logits.softmax(-1).tolist():
        expected.append(-sum(p * math.log(p) for p in row) / math.log(experts))
    assert routing_entropy(logits).tolist() == pytest.approx(expected, rel=1e-6)


def test_entropy_is_zero_for_certainty_and_one_for_none():
    assert routing_entropy(torch.full((3, 5), 7.0)).tolist() == pytest.approx([1, 1, 1])
    certain = 1e4 * torch.eye(5, requires_grad=True)
    found = routing_entropy(certain)
    assert found.tolist() == [0, 0, 0, 0, 0]
    both = torch.tensor([[50.0, 50.0, -50.0, -50.0]])
    assert routing_entropy(both).item() == pytest.approx(0.5)  # log 2 of log 4
    assert routing_entropy(torch.zeros(0, 5)).shape == (0,)


def reference_balance(logits: Tensor, experts: Tensor, mask: Tensor) -> list[float]:
    found = []
    for b in range(len(mask)):
        counted = [t for t in range(mask.shape[1]) if mask[b, t]]
        count, active, value = max(len(counted), 1), experts.shape[-1], 0.0
        for e in range(logits.shape[-1]):
            share = sum(e in experts[b, t].tolist() for t in counted) / (count * active)
            value += share * sum(logits[b, t].softmax(-1)[e].item() for t in counted) / count
        found.append(logits.shape[-1] * value)
    return found


@pytest.mark.parametrize("shape, active", [((1, 3, 2), 1), ((3, 9, 5), 2), ((2, 7, 4), 4)])
def test_balance_matches_the_reference(shape, active):
    logits, mask = 2 * normal(0, *shape), some(*shape[:2])
    experts = chosen(logits, active)
    assert load_balance(logits, experts, mask).tolist() == pytest.approx(
        reference_balance(logits, experts, mask), rel=1e-6
    )


def test_balance_is_one_for_equal_use():
    mask = torch.ones(1, 8, dtype=torch.bool)
    turns = torch.arange(8).remainder(4).view(1, 8, 1)
    assert load_balance(torch.zeros(1, 8, 4), turns, mask).item() == pytest.approx(1)
    assert load_balance(100 * torch.eye(4).repeat(2, 1)[None], turns, mask).item() == pytest.approx(1)
    two = torch.cat([turns, (turns + 1) % 4], -1)
    assert load_balance(torch.zeros(1, 8, 4), two, mask).item() == pytest.approx(1)


@pytest.mark.parametrize("active", [1, 2])
def test_balance_is_the_number_of_experts_over_those_a_token_takes_where_one_takes_all(active):
    logits = torch.zeros(1, 8, 4)
    logits[..., 2] = 100
    logits[..., 1] = 10
    found = load_balance(logits, chosen(logits, active), torch.ones(1, 8, dtype=torch.bool))
    assert found.item() == pytest.approx(4 / active)


def test_balance_grows_with_what_the_busy_expert_gets():
    """Its gradient lowers the logit of the expert that is used most and raises the others."""
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    experts = torch.tensor([0, 0, 0, 1]).view(1, 4, 1)
    load_balance(logits, experts, torch.ones(1, 4, dtype=torch.bool)).sum().backward()
    assert logits.grad is not None and (logits.grad[..., 0] > 0).all() and (logits.grad[..., 2] < 0).all()


def test_padding_has_no_say_in_balance():
    mask, logits = some(3, 9), 2 * normal(0, 3, 9, 5)
    results = []
    for filler in (0.0, -3.0, 1e4, math.nan):
        free = logits.clone()
        free[~mask] = filler
        if not math.isnan(filler):
            free[..., 0][~mask] += 5
        free.requires_grad_()
        experts = chosen(logits, 2)
        experts[~mask] = torch.tensor([0, 1])
        found = load_balance(free, experts, mask)
        (slope,) = torch.autograd.grad(found.sum(), free)
        results.append((found.detach(), slope))
        assert found.isfinite().all() and not slope[~mask].any(), filler
    assert all(torch.equal(x, y) for each in results for x, y in zip(each, results[0], strict=True))


def test_a_window_without_counted_positions_is_zero_with_a_live_graph():
    logits = normal(0, 2, 9, 5).requires_grad_()
    found = load_balance(logits, chosen(logits, 2), torch.zeros(2, 9, dtype=torch.bool))
    found.sum().backward()
    assert found.tolist() == [0, 0] and logits.grad is not None and not logits.grad.any()


def test_balance_of_a_window_does_not_know_of_others():
    logits, mask = 2 * normal(0, 3, 9, 5), some(3, 9)
    experts = chosen(logits, 2)
    singles = [load_balance(logits[i : i + 1], experts[i : i + 1], mask[i : i + 1]) for i in range(3)]
    assert torch.allclose(load_balance(logits, experts, mask), torch.cat(singles), atol=1e-14)


def test_gradients():
    """In float64, which stays float64."""
    initial = [normal(0, 4, 3), normal(1, 2, 3)]
    moved = [normal(2, 4, 3).requires_grad_(), normal(3, 2, 3).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *weights: anchor(weights, initial), moved)
    assert torch.autograd.gradcheck(lambda *weights: anchor(weights, initial, "absolute"), moved)
    assert torch.autograd.gradcheck(routing_entropy, (normal(0, 7, 5).requires_grad_(),))
    logits, mask = normal(0, 3, 6, 4).requires_grad_(), some(3, 6)
    experts = chosen(logits, 2)
    assert torch.autograd.gradcheck(lambda x: load_balance(x, experts, mask), (logits,))


def test_lower_precision_stays_close():
    logits, mask = (2 * normal(0, 3, 9, 5)).bfloat16(), some(3, 9)
    experts = chosen(logits, 2)
    for found, exact in (
        (load_balance(logits, experts, mask), load_balance(logits.double(), experts, mask)),
        (routing_entropy(logits), routing_entropy(logits.double())),
        (anchor([logits], [logits + 1]), anchor([logits.double()], [(logits + 1).double()])),
    ):
        assert found.dtype == torch.float32 and torch.allclose(found.double(), exact.double(), rtol=1e-5)
