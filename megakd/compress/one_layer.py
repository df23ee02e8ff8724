"""Run a family's own model one decoder layer at a time: its forward leads to a layer, and stops behind it.

Masks, rotary embeddings, sliding windows and scales of embeddings are the family's, whatever it calls them. The layers
before hand on what they are given; the one that runs gets its own hidden states in place of that.
B sequences, T positions, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class OneLayer:
    """A causal LM's decoder in float32, its parameters on the meta device but for those of the layer that runs."""

    def __init__(self, config: Any, device: torch.device):
        from accelerate import init_empty_weights
        from transformers import AutoModel

        config = deepcopy(config)
        config.output_router_logits = config.output_hidden_states = config.output_attentions = False
        with init_empty_weights(include_buffers=False):
            self.model: Any = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32).eval()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self.layers = list(self.model.layers)
        for layer in self.layers:
            layer.forward = _hand_on

    def embed(self, table_VD: Tensor, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """What the first layer gets for rows of the embedding's table, [B, T, D]; positions restart with documents."""
        embedding = self.model.get_input_embeddings()
        embedding.padding_idx = None  # of no effect but on gradients, and beyond a table of some rows
        embeds_BTD = functional_call(embedding, {"weight": table_VD}, (ids_BT,))
        with self._stops(0, None) as found:
            self._forward(embeds_BTD, positions_BT)
        return found[0]

    def run(self, index: int, hidden_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Hidden states behind a layer that has its weights, [B, T, D]."""
        del self.layers[index].forward
        try:
            with self._stops(index, hidden_BTD) as found:
                self._forward(hidden_BTD, positions_BT)
        finally:
            self.layers[index].forward = _hand_on
        return found[0]

    def _forward(self, embeds_BTD: Tensor, positions_BT: Tensor) -> None:
        try:
            self.model(inputs_embeds=embeds_BTD, position_ids=positions_BT, use_cache=False)
        except _Stop:
            return
        except (RuntimeError, NotImplementedError) as error:
            if "meta" in str(error):
                raise ValueError("its model computes with weights that are in none of its layers") from error
            raise

    @contextmanager
    def _stops(self, index: int, hidden_BTD: Tensor | None) -> Iterator[list[Tensor]]:
        """Stop behind a layer that is given these hidden states, or in front of it; what it gave, or was given."""
        layer, found = self.layers[index], []

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            if hidden_BTD is None:
                found.append(_hand_on(*args, **kwargs))
                raise _Stop
            if args:
                return (hidden_BTD, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden_BTD}

        def behind(_: Any, args: Any, output: Any) -> None:
            first, *others = output if isinstance(output, tuple) else (output,)
            if any(other is not None for other in others):
                raise ValueError("its layers give the next one more than hidden states")
            found.append(first)
            raise _Stop

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(behind)]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


class _Stop(Exception):
    """Nothing behind the layer need run."""


def _hand_on(*args: Any, **kwargs: Any) -> Tensor:
    """The forward of a layer that changes nothing."""
    return args[0] if args else kwargs["hidden_states"]


def without_parameters(layer: nn.Module) -> dict[str, Tensor]:
    """The state of a layer on the meta device, to be loaded with assign=True; buffers that are not stored stay."""
    return {name: tensor.to("meta") for name, tensor in layer.state_dict().items()}
