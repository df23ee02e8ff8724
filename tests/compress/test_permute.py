import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megakd.compress import permute as align
from megakd.compress.permute import alignment, likeness


class Layer(NamedTuple):
    """gate and up [E, F, D], down [E, D, F], and the order [E, F] in which an expert has the units of the original."""

    gate: Tensor
    up: Tensor
    down: Tensor
    order: Tensor


def copies(experts: int, units: int, width: int, noise: float, seed: int = 0, shuffled: bool = True) -> Layer:
    """One MLP with noise (in its weights' deviation), shuffled in every expert but the first."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(*shape: int) -> Tensor:
        base = torch.randn(*shape, generator=generator)
        return base + noise * torch.randn(experts, *shape, generator=generator)

    gate, up, down = noisy(units, width), 0.1 * noisy(units, width), 7 * noisy(width, units)
    orders = [torch.randperm(units, generator=generator) if shuffled else torch.arange(units) for _ in range(experts)]
    order = torch.stack([torch.arange(units), *orders[1:]])
    moved = [(gate[e][p], up[e][p], down[e][:, p]) for e, p in enumerate(order)]
    return Layer(*(torch.stack(parts) for parts in zip(*moved, strict=True)), order)


def natives(experts: int, units: int, width: int, slope: float = 0.0, offset: float = 0.0, seed: int = 0) -> Layer:
    """Independent weights; slope: of a power law over D that all experts share, offset: a direction all units share."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1) ** -slope
    gate, up, down = ((torch.randn(experts, units, width, generator=generator) + offset) * scale for _ in range(3))
    return Layer(gate, up, down.mT, torch.arange(units).repeat(experts, 1))


def expert(layer: Layer, e: int, x: Tensor, p: Tensor | None = None) -> Tensor:
    p = torch.arange(layer.gate.shape[1]) if p is None else p
    h = functional.silu(x @ layer.gate[e][p].T) * (x @ layer.up[e][p].T)
    return h @ layer.down[e][:, p].T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts, units, width", [(2, 24, 16), (6, 25, 17), (5, 64, 48)])
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7])
def test_planted_permutations_are_recovered(experts, units, width, noise, dtype):
    layer = copies(experts, units, width, noise)
    found = alignment(*(w.to(dtype) for w in layer[:3]))
    assert found is not None and found.dtype == torch.int64
    assert torch.equal(found[0], torch.arange(units))  # the first keeps its order
    assert torch.equal(layer.order.gather(1, found), torch.arange(units).repeat(experts, 1))


def test_later_rounds_mend_what_a_noisy_start_got_wrong(monkeypatch):
    """The second expert is matched to the first alone, the noisiest match of all."""
    layer = copies(24, 48, 16, 1.2, seed=1)
    right = []
    for rounds in (1, align.ROUNDS):
        monkeypatch.setattr(align, "ROUNDS", rounds)
        found = alignment(*layer[:3])
        assert found is not None
        right.append((layer.order.gather(1, found) == torch.arange(48)).float().mean().item())
    assert right[0] < 1.0 == right[1]


def test_an_experts_function_does_not_change():
    layer = copies(4, 25, 17, 0.3)
    found = alignment(*layer[:3])
    assert found is not None and found.sort(dim=1).values.eq(torch.arange(25)).all()
    x = torch.randn(9, 17, generator=torch.Generator().manual_seed(1))
    for e in range(4):
        plain, permuted = expert(layer, e, x), expert(layer, e, x, found[e])
        assert (permuted - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_aligned_copies_have_a_mean_worth_a_core():
    """Of the energy of copies with noise 0.3, 1 / 1.09 = 92 % is their mean's; unaligned it is nothing but 1/E."""
    layer = copies(8, 64, 48, 0.3)
    found = alignment(*layer[:3])
    assert found is not None
    aligned = torch.stack([gate[p] for gate, p in zip(layer.gate, found, strict=True)])
    for gate, low, high in ((layer.gate, 0.0, 0.3), (aligned, 0.9, 1.0)):
        assert low <= (gate.mean(0).square().mean() / gate.square().mean()).item() <= high


@pytest.mark.parametrize("units, width", [(24, 16), (64, 48), (96, 192)])
@pytest.mark.parametrize("slope, offset", [(0.0, 0.0), (0.7, 0.0), (0.0, 1.0)])
def test_native_experts_are_left_alone(units, width, slope, offset):
    """Whatever directions they share: chance has them too."""
    for seed in range(3):
        layer = natives(5, units, width, slope, offset, seed)
        found = likeness(*layer[:3])
        assert abs(found.excess) < 0.05 and not found.copies, found
        assert alignment(*layer[:3]) is None


def test_chance_is_that_of_matching_noise():
    """sqrt(2 ln F / 3D) is the mean over rows of the largest of F cosines; an assignment gets less, some of it."""
    found = likeness(*natives(3, 192, 192)[:3])
    largest = math.sqrt(2 * math.log(192) / (3 * 192))
    assert 0.75 * largest < found.cosine < largest and 0.75 * largest < found.chance < largest


@pytest.mark.parametrize("noise, excess", [(0.3, 0.8), (1.0, 0.3)])
def test_copies_are_told_from_natives(noise, excess):
    layer = copies(4, 96, 64, noise)
    found = likeness(*layer[:3])
    assert found.copies and found.excess > excess
    assert found.cosine == pytest.approx(1 / (1 + noise**2), abs=0.02)


def test_half_of_the_units_copied_is_enough():
    """Upcycling that draws some units anew (as Qwen1.5-MoE's)."""
    layer, other = copies(4, 64, 48, 0.1), natives(4, 64, 48, seed=5)
    fresh = torch.arange(64) >= 32
    mixed = []
    for name in ("gate", "up", "down"):
        w, n = getattr(layer, name).clone(), getattr(other, name)
        for e, order in enumerate(layer.order):
            if name == "down":
                w[e][:, fresh[order]] = n[e][:, fresh[order]] * w.std()
            else:
                w[e][fresh[order]] = n[e][fresh[order]] * w.std()
        mixed.append(w)
    found = alignment(*mixed)
    assert found is not None
    assert torch.equal(layer.order.gather(1, found)[:, :32], torch.arange(32).repeat(4, 1))


def test_copies_in_order_need_nothing():
    layer = copies(5, 32, 24, 0.3, shuffled=False)
    assert likeness(*layer[:3]).copies and alignment(*layer[:3]) is None


def test_one_expert_alone_needs_nothing():
    assert alignment(*copies(1, 8, 6, 0.0)[:3]) is None


def test_units_that_are_zero_or_equal_do_no_harm():
    layer = copies(3, 24, 16, 0.0)
    for e, order in enumerate(layer.order):
        for unit in (3, 4):  # dead
            layer.gate[e][order == unit] = layer.up[e][order == unit] = 0.0
            layer.down[e][:, order == unit] = 0.0
    found = alignment(*layer[:3])
    assert found is not None and found.sort(dim=1).values.eq(torch.arange(24)).all()
    alive = torch.tensor([u for u in range(24) if u not in (3, 4)])
    assert torch.equal(layer.order.gather(1, found)[:, alive], alive.repeat(3, 1))


def test_equal_input_gives_equal_permutations():
    layer = copies(6, 48, 16, 1.2)
    first, again = alignment(*layer[:3]), alignment(*layer[:3])
    assert first is not None and again is not None and torch.equal(first, again)
