"""What student and teacher say of the same text, each in tokens of its own: spans in the place of tokens.

B windows, T tokens of the student, U of the teacher, S spans at most in a window.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megakd.data.records import IGNORED, Batch, Paired, Rows, Side, labelled, scored_spans, shared_spans
from megakd.losses.head import Device, FusedHead
from megakd.losses.per_token import label_logprobs
from megakd.losses.spans import span_attention, span_logprobs, span_means


class Scores(NamedTuple):
    """Sums over the student's tokens: its cross entropy ce, and the teacher's own, which counts window by window.

    student_BS, teacher_BS: log-probabilities of spans; there: those that both can score.
    """

    ce: Tensor
    teacher_ce: Tensor
    student_BS: Tensor
    teacher_BS: Tensor
    there: Rows


def span_scores(
    own: FusedHead,
    theirs: FusedHead,
    hidden_BTD: Tensor,
    taught_BUG: Tensor,
    paired: Paired,
    sizes_of: Device | None = None,
) -> Scores:
    """Scores of last hidden states; gradients to both sides. sizes_of: as for `FusedHead`."""
    there = scored_spans(paired)
    each = [
        _label_scores(head, hidden, side, sizes_of)
        for head, hidden, side in zip((own, theirs), (hidden_BTD, taught_BUG), paired[:2], strict=True)
    ]
    (student_BS, _), (teacher_BS, _) = (
        span_logprobs(logprobs, side.label_spans, there.length) for logprobs, side in zip(each, paired[:2], strict=True)
    )
    tokens_B = (paired.student.labels != IGNORED).sum(1)
    teacher_ce = -(each[1] * per_token(paired.teacher.labels != IGNORED, tokens_B)).sum()
    return Scores(-each[0].sum(), teacher_ce, student_BS, teacher_BS, there)


def per_token(counted_BU: Tensor, tokens_B: Tensor) -> Tensor:
    """Weights [B, U] with which a sum over a window's counted positions is their mean times its tokens."""
    return counted_BU * (tokens_B / counted_BU.sum(1).clamp(min=1))[:, None]


def of_tokens(values_BS: Tensor, label_spans_BU: Tensor) -> Tensor:
    """Each token's value, that of its label's span, [B, U]; 0 where there is none."""
    # a column of zeros for tokens of no span, and for windows without spans
    places_BU = torch.where(label_spans_BU >= 0, label_spans_BU, values_BS.shape[1])
    return functional.pad(values_BS, (0, 1)).gather(1, places_BU)


class Units(NamedTuple):
    """What the parts compare: positions, or spans of text where the teacher has another tokenizer.

    counted: which of them count, of [B, N]. own, theirs: student's and teacher's hidden states of tokens to those of
    units; own_maps, their_maps: the same for attention maps.
    """

    counted: Rows
    own: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]
    own_maps: Callable[[Tensor], Tensor]
    their_maps: Callable[[Tensor], Tensor]


def units_of(batch: Batch) -> Units:
    """Positions with a label; spans that have tokens on both sides."""
    if batch.paired is None:
        return Units(labelled(batch), *[lambda values: values] * 4)
    shared = shared_spans(batch.paired)
    count, own, theirs = shared.length, *(side.spans for side in batch.paired[:2])
    return Units(
        shared,
        *(partial(_means, spans, count) for spans in (own, theirs)),
        *(partial(span_attention, spans_BT=spans, count=count) for spans in (own, theirs)),
    )


def _label_scores(head: FusedHead, hidden_BTD: Tensor, side: Side, sizes_of: Device | None) -> Tensor:
    """log p of each label, [B, T], 0 where there is none."""
    rows = labelled(side)
    return rows.place(label_logprobs(head, rows.pick(hidden_BTD), rows.pick(side.labels), sizes_of))


def _means(spans_BT: Tensor, count: int, hidden_BTD: Tensor) -> Tensor:
    return span_means(hidden_BTD, spans_BT, count)[0]
