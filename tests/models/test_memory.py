"""Counting live storages: real tensors by hand, and fakes that give the same numbers."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megakd.errors import UserError
from megakd.models.memory import CASTS, Fakes, LiveBytes

KB = 1024


def numbers(count: int) -> Tensor:
    """`count` KB of float32."""
    return torch.zeros(count * KB // 4)


def test_storages_count_once_until_they_are_freed():
    with LiveBytes() as live:
        first = numbers(10)
        assert live.total == 10 * KB
        view = first.view(-1, 2)[3:]
        first.add_(1)
        assert live.total == 10 * KB
        second = first + 1
        del first
        assert live.total == 20 * KB and len(view)  # the view holds what `first` was
        del view
        assert live.total == 10 * KB and live.peak.total == 20 * KB
        live.forget_peak()
        assert live.peak == (10 * KB, {"rest": 10 * KB})
        del second
        assert live.total == 0 and not live.alive


def test_labels_add_up_to_the_peak():
    held = numbers(4)
    with LiveBytes() as live:
        live.label([held], "weights")
        live.where = "loss"
        made = held + 1
        live.label([made], "kept")
        numbers(1)
        live.where = "update"
        again = held * 2
    assert live.peak.parts == {"weights": 4 * KB, "kept": 4 * KB, "loss": 0, "update": 4 * KB}
    assert live.peak.total == sum(live.peak.parts.values()) == 12 * KB and len(made) == len(again)


def test_what_was_forgotten_may_go_without_a_trace():
    with LiveBytes() as live:
        old = numbers(4)
        live.forget()
        del old
        new = numbers(2)
        assert live.total == live.peak.total == 2 * KB and len(new)


class Layers(nn.Module):
    def __init__(self, again: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.again else layer(x))
        return x.float().square().mean()


def peak(again: bool, half: bool) -> tuple[int, dict[str, int]]:
    live = LiveBytes()
    model, x = Layers(again), torch.randn(128, 64)
    live.label(model.parameters(), "weights")
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(x)
        loss.backward()
    gc.collect()
    return live.peak.total, live.peak.parts


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_fakes_take_what_real_tensors_take(again: bool, half: bool):
    with Fakes():
        fake, parts = peak(again, half)
    real, _ = peak(again, half)
    assert fake == real and (parts.get(CASTS, 0) > 0) == half
    assert fake < peak(False, half)[0] or not again


def test_what_depends_on_values_is_answered_by_what_costs_most():
    with Fakes(), LiveBytes():
        x, mask = torch.randn(3, 5, 7), torch.zeros(3, 5, dtype=torch.bool)
        x.requires_grad_()
        assert x[mask].shape == (15, 7) and x[mask].sum().backward() is None
        assert mask.nonzero().shape == (15, 2) and len(torch.where(mask)[1]) == 15
        assert x.masked_select(mask[:, :, None]).shape == (105,)
        assert x[:, mask[0]].shape == (3, 5, 7)
        assert x.sum().item() == 1.0 and bool((x > 0).all()) and not bool(x[0, 0, 0] > 0)
        assert torch.allclose(x, x + 1)
        with pytest.raises(UserError, match="depends on values"):
            x.unique()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_grouped_products_have_places_in_every_type(dtype: torch.dtype):
    with Fakes(), LiveBytes():
        rows = torch.randn(24, 16, dtype=dtype, requires_grad=True)
        matrices = torch.randn(4, 16, 32, dtype=dtype, requires_grad=True)
        ends = torch.zeros(4, dtype=torch.int32)
        out = torch.nn.functional.grouped_mm(rows, matrices, offs=ends)
        assert out.shape == (24, 32) and out.dtype == dtype
        out.sum().backward()
        assert rows.grad is not None and matrices.grad is not None
        assert rows.grad.shape == rows.shape and matrices.grad.shape == matrices.shape
