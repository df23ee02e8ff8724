"""A frozen model whose layers lie in CPU memory and come to the device one at a time, in every pass.

While a layer runs, its parameters and buffers are copies on the device; behind it they are gone. Autograd would keep
them for the backward pass, so where gradients go through the model its layers must be computed again there (activation
checkpointing), which brings their copies once more. What trains lies on the device and stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn


def offload(model: Any, device: torch.device) -> None:
    """Keep the layers of a causal LM in CPU memory from now on, and everything else on the device.

    On a GPU the CPU's memory is pinned, so that a copy runs next to what the GPU still has to do.
    """
    layers = model.get_decoder().layers
    inside = {id(tensor) for tensor in (*layers.parameters(), *layers.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
        elif device.type == "cuda":
            tensor.data = tensor.data.cpu().pin_memory()
    for layer in layers:
        layer.forward = _streamed(layer, layer.forward, device)


def offloaded(model: Any) -> set[int]:
    """The ids of the parameters and buffers that `offload` keeps away from the device."""
    layers = model.get_decoder().layers
    return {id(tensor) for tensor in (*layers.parameters(), *layers.buffers()) if not tensor.requires_grad}


def _streamed(layer: nn.Module, forward: Any, device: torch.device) -> Any:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _there(layer, device):
            return forward(*args, **kwargs)

    return run


@contextmanager
def _there(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """The layer with copies on the device in the place of what does not train.

    Not by `.data`: autograd keeps the tensors that it was given, and these must stay what they were.
    """
    owners: list[dict[str, Any]] = [own for module in layer.modules() for own in (module._parameters, module._buffers)]
    tensors = [(own, name, tensor) for own in owners for name, tensor in own.items() if tensor is not None]
    before = [(own, name, tensor) for own, name, tensor in tensors if not tensor.requires_grad]
    try:
        for own, name, tensor in before:
            copy = tensor.to(device, non_blocking=True, copy=True)
            own[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
        yield
    finally:
        for own, name, tensor in before:
            own[name] = tensor
