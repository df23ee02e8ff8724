"""A frozen model whose layers come to the device one at a time: the same function, and never two layers there."""

import weakref
from typing import Any

import pytest
import torch

from megakd.models import offload as module
from megakd.models.offload import offload, offloaded
from tests.models.students import make_model

CPU = torch.device("cpu")
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3"]


def frozen(family: str) -> Any:
    model = make_model(family)
    model.requires_grad_(False).eval()
    return model


def copies_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every tensor that takes a layer's place from now on."""
    made: list[weakref.ref[Any]] = []
    original = module._there

    def watched(layer: Any, device: torch.device) -> Any:
        with original(layer, device):
            made.extend(weakref.ref(tensor) for tensor in (*layer.parameters(), *layer.buffers()))
            yield

    monkeypatch.setattr(module, "_there", module.contextmanager(watched))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_the_same_and_nothing_stays(family, monkeypatch):
    model, tokens = frozen(family), torch.arange(24).view(2, 12)
    before = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    expected = model(tokens).logits
    made, alive = copies_of(model, monkeypatch), []
    offload(model, CPU)
    layers = model.get_decoder().layers
    for layer in layers:
        layer.register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in made)))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)
    sizes = [len([*layer.parameters(), *layer.buffers()]) for layer in layers]
    assert len(made) == sum(sizes) and max(alive) <= max(sizes)
    assert not any(ref() is not None for ref in made)
    after = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())
    assert offloaded(model) == {id(t) for layer in layers for t in (*layer.parameters(), *layer.buffers())}


@pytest.mark.parametrize("again", [False, True])
def test_what_trains_stays_and_gets_the_same_gradient(again, monkeypatch):
    """again: layers are computed again in the backward pass, and autograd keeps no copy of them."""
    gradients = []
    for away in (False, True):
        model = frozen("qwen3_moe")
        router = model.model.layers[0].mlp.gate.weight.requires_grad_()
        made = copies_of(model, monkeypatch) if away else []
        if away:
            offload(model, CPU)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        logits = model(torch.arange(24).view(2, 12)).logits
        kept = {id(ref()) for ref in made} - {id(None), id(router)}
        logits.float().square().sum().backward()
        gradients.append(router.grad)
        if away:
            assert bool(kept) != again and id(router) not in offloaded(model)
            assert model.model.layers[0].mlp.gate.weight is router
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_a_layer_that_fails_gets_its_tensors_back():
    model = frozen("qwen3_moe")
    offload(model, CPU)
    layer = model.model.layers[0]
    before = list(layer.parameters())
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 4, 7), position_embeddings=(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)))
    assert all(one is other for one, other in zip(before, layer.parameters(), strict=True))
