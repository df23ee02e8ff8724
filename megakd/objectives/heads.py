"""The logits of any causal language model, a chunk of tokens at a time, from its decoder's last hidden states.

B sequences, T positions, n tokens of a chunk, D hidden size, V real vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.errors import UserError
from megakd.objectives.cached import answering, fused_head

FIRST = 8  # tokens on which the logits of the parts are compared with those of the whole model


class OtherLogits(UserError):
    """A model whose logits are not made from the last hidden states of its decoder."""


class StreamedHead(NamedTuple):
    """A model in two parts: `decoder` gives hidden states [B, T, D], `logits` maps [n, D] to the logits [n, V].

    The logits are good until the next call, which may write over them. Without gradients.
    own: the logits come from the model's own forward code, for its family makes them in a way that `FusedHead` does not
    know.
    """

    decoder: Any
    logits: Callable[[Tensor], Tensor]
    own: bool


@torch.no_grad()
def streamed_head(model: Any, vocab_size: int, tokens_BT: Tensor, positions_BT: Tensor) -> StreamedHead:
    """The two parts of `model`, checked on the first tokens given; OtherLogits when they do not give its logits.

    `FusedHead.logits` where it fits, which knows scales and soft caps of logits. Else the model's own forward, with
    hidden states of a chunk in place of its decoder's.
    """
    inputs = {"input_ids": tokens_BT[:1, :FIRST], "position_ids": positions_BT[:1, :FIRST], "use_cache": False}
    decoder = model.get_decoder()
    if decoder is not model:
        given: list[Tensor] = []
        handle = decoder.register_forward_hook(lambda module, args, output: given.append(output.last_hidden_state))
        try:
            theirs = model(**inputs).logits[0, :, :vocab_size]
        finally:
            handle.remove()
        hidden = given[0][0] if given else decoder(**inputs).last_hidden_state[0]
        for make in (_fused_logits, _own_logits):
            logits = make(model, vocab_size)
            if logits is not None and _same(theirs, logits(hidden)):
                return StreamedHead(decoder, logits, make is _own_logits)
    raise OtherLogits(f"{model.config.model_type}: its logits cannot be made from the hidden states of its decoder")


def _fused_logits(model: Any, vocab_size: int) -> Callable[[Tensor], Tensor] | None:
    try:
        head = fused_head(model, vocab_size, check=False)
    except UserError:
        return None
    buffers: list[Tensor] = []

    def logits(hidden_nD: Tensor) -> Tensor:
        if hidden_nD.device.type != "cpu":
            return head.logits(hidden_nD)
        # malloc gives back what is large at every free: to fault it in anew takes a fifth of the product's own time
        if not buffers or len(buffers[0]) < len(hidden_nD):
            buffers[:] = [hidden_nD.new_empty(len(hidden_nD), min(vocab_size, len(head.weight)))]
        return head.logits(hidden_nD, buffers[0][: len(hidden_nD)])

    return logits


def _own_logits(model: Any, vocab_size: int) -> Callable[[Tensor], Tensor]:
    def logits(hidden_nD: Tensor) -> Tensor:
        tokens = torch.zeros(1, len(hidden_nD), dtype=torch.int64, device=hidden_nD.device)
        with answering(model, hidden_nD[None]):
            return model(tokens, use_cache=False).logits[0, :, :vocab_size]

    return logits


def _same(theirs_nV: Tensor, ours_nV: Tensor) -> bool:
    """Whether logits are equal but for rounding; NaN equals NaN, so that damaged weights are no reason to refuse."""
    tolerance = 1e-4 if theirs_nV.dtype in (torch.float32, torch.float64) else 1e-2
    largest = float(theirs_nV.float().nan_to_num().abs().max())
    return torch.allclose(theirs_nV.float(), ours_nV.float(), atol=tolerance * largest, rtol=0, equal_nan=True)
