"""The nouns of the data path: TeacherTargets, Sample, Batch."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = -100  # label of a position that counts for no loss (padding, document borders)


class TeacherTargets(NamedTuple):
    """What the teacher says about the next token at each position; numpy in samples, torch in batches.

    The head, K entries known exactly, in no particular order; a row with fewer repeats an id with log-probability -inf:
      ids         [.., T, K] int32
      logprobs    [.., T, K] float32 log p over the full vocabulary at temperature 1
      log_tails   [.., T, M] float32 log of the sum over all tokens outside the head of p^(1/T_m)
    D distinct draws from the whole distribution (K = 0) or from what is outside the head, at one temperature:
      draw_ids    [.., T, D] int32
      draw_shares [.., T, D] float32 how many of the draws fell on it, over their number; 0 fills a row
      entropy     [.., T]    float32 of the whole distribution at the draws' temperature; 0 where D = 0
    label_nll     [.., T]    float32 -log p(token t+1) at temperature 1; 0 where there is no label
    """

    ids: Any
    logprobs: Any
    log_tails: Any
    draw_ids: Any
    draw_shares: Any
    entropy: Any
    label_nll: Any


class Sample(NamedTuple):
    """One packed window of at most T+1 tokens; position t reads tokens[t] and predicts tokens[t+1].

    starts: offsets at which a document (or its continuation) begins, the first one 0. Attention, positions and
    labels never cross such an offset. Neighbouring windows share one token, so each token is predicted once.
    """

    key: str
    tokens: np.ndarray
    starts: np.ndarray
    targets: TeacherTargets | None = None


class Side(NamedTuple):
    """One model's view of a batch, shifted once like a Batch; all [B, L] int64.

    tokens, labels, position_ids: as in Batch; padding is a document without labels
    spans:       the span that tokens[b, t] belongs to, counted from 0 in its row; -1 in padding
    label_spans: the span of the label at t, token t+1; -1 where the label is IGNORED or its span cannot be scored
    """

    tokens: "torch.Tensor"
    labels: "torch.Tensor"
    position_ids: "torch.Tensor"
    spans: "torch.Tensor"
    label_spans: "torch.Tensor"


class Paired(NamedTuple):
    """Both sides of a batch; their spans have the same numbers. span_count: [B] int64, spans in each row."""

    student: Side
    teacher: Side
    span_count: "torch.Tensor"


class Batch(NamedTuple):
    """Samples side by side, shifted once: labels[b, t] is the token after tokens[b, t], or IGNORED. All [B, T].

    position_ids restart at every document: with no attention mask, transformers turns them into
    block-diagonal causal attention (see tests/data/test_batches.py).
    paired: the same text for a teacher with another tokenizer; its student side is this batch.
    """

    tokens: "torch.Tensor"
    labels: "torch.Tensor"
    position_ids: "torch.Tensor"
    targets: TeacherTargets | None = None
    paired: Paired | None = None
