"""A teacher whose hidden states come from vLLM: checked against transformers before its first answer.

Head, tails, draws and everything that is stored are computed by the code of every other teacher (teacher.py).
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megakd.capture.teacher import Teacher
from megakd.config.data import LogitsConfig
from megakd.errors import UserError
from megakd.models.isolation import Packing
from megakd.system.logging import say

Answer = Callable[[Sequence[Sequence[int]]], Tensor]  # documents → hidden states [N, D] after the final norm
ROWS, POSITIONS = 4, 128  # of the first batch, which both engines answer

# Of the differences of log-probabilities between the engines, over the top_k tokens of either one. float32: the
# largest. bfloat16: the mean over positions of the differences weighted by p, for an expert's choice that rounding
# flips moves single log-probabilities far.
LARGEST, MEAN = 1e-4, 0.05


class VllmDecoder(nn.Module):
    """A decoder's place in a Teacher: each document of a batch is a request of its own."""

    def __init__(self, answer: Answer):
        super().__init__()
        self.answer = answer

    def forward(self, tokens_BT: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        documents = split(tokens_BT.flatten(), position_ids.flatten())
        hidden_ND = self.answer(documents).to(tokens_BT.device)
        return SimpleNamespace(last_hidden_state=hidden_ND.unflatten(0, tokens_BT.shape))


def split(tokens_N: Tensor, positions_N: Tensor) -> list[list[int]]:
    """The documents of rows one after another: each begins where positions restart at 0."""
    starts = (positions_N == 0).nonzero()[:, 0].tolist()
    assert starts and starts[0] == 0, positions_N[:8]
    tokens = tokens_N.tolist()
    return [tokens[start:end] for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)]


class VllmTeacher(Teacher):
    """Checks the model in transformers with the first batch, compares vLLM with it, then keeps the head alone.

    start: loads the model in vLLM, once the one in transformers is gone from memory; returns what answers.
    """

    def __init__(self, model: Any, kept: LogitsConfig, vocab_size: int, packing: Packing, start: Callable[[], Answer]):
        super().__init__(model, kept, vocab_size, packing)
        self.start = start

    @torch.no_grad()
    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor, offsets_BT: Tensor) -> Any:
        if self.unchecked:
            self._replace(tokens_BT[:ROWS, :POSITIONS].cpu(), tokens_BT.device)
        return super().forward(tokens_BT, labels_BT, positions_BT, offsets_BT)

    def _replace(self, tokens_BT: Tensor, device: torch.device) -> None:
        whole = self.unchecked.pop()
        place = getattr(whole, "name_or_path", "") or self.config.model_type
        self._check(whole, tokens_BT[:, :8])
        positions_BT = self._positions(tokens_BT)
        theirs = self._log_p(tokens_BT, positions_BT)
        self.model = nn.Identity()  # the decoder in transformers: its memory is free before vLLM needs it
        del whole
        self.model = VllmDecoder(self.start())
        mean, largest = difference(theirs, self._log_p(tokens_BT, positions_BT), self.kept.top_k)
        exact = self.lm_head.weight.dtype == torch.float32
        found, bound, what = (largest, LARGEST, "at most") if exact else (mean, MEAN, "in the mean")
        if not found <= bound:  # NaN too
            raise UserError(
                f"{place}: log-probabilities of vLLM differ from those of transformers by {found:.2g} {what}, and "
                f"{bound:g} is allowed; no shard was written; use logits.engine=transformers in a new run"
            )
        say(f"generate-logits: vLLM and transformers agree: log-probabilities differ by {found:.2g} {what}")
        self.lm_head.to(device)

    def _positions(self, tokens_BT: Tensor) -> Tensor:
        """Two documents in each row where documents are packed, else one."""
        count = tokens_BT.shape[1]
        first = count // 3 if self.packing == "packed" else 0
        return torch.cat([torch.arange(first), torch.arange(count - first)]).expand(tokens_BT.shape)

    def _log_p(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        hidden_BTD = self.model(tokens_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
        return self.lm_head(hidden_BTD)[..., : self.vocab_size].float().log_softmax(-1)


def difference(theirs: Tensor, ours: Tensor, top_k: int) -> tuple[float, float]:
    """Of log-probabilities [B, T, V]: mean over positions of Σ p |difference|, and the largest |difference|.

    Over the top_k tokens of either: tokens that change places at the last rank differ by as little as their
    log-probabilities do.
    """
    count = min(top_k, theirs.shape[-1])
    moved = (theirs - ours).abs()
    largest = max(float(moved.gather(-1, each.topk(count).indices).max()) for each in (theirs, ours))
    ids = theirs.topk(count).indices
    weighted = (theirs.gather(-1, ids).exp() * moved.gather(-1, ids)).sum(-1)
    return float(weighted.mean()), largest if moved.isfinite().all() else float("nan")
