"""What student and teacher say of the same text, each in tokens of its own: spans in the place of tokens.

B windows, T tokens of the student, U of the teacher, S spans at most in a window.
"""

from typing import NamedTuple

from torch import Tensor

from megakd.data.records import IGNORED, Paired
from megakd.losses.fused import FusedHead
from megakd.losses.live import label_logprobs
from megakd.losses.spans import span_logprobs


class Scores(NamedTuple):
    """Sums over the student's tokens: its cross entropy ce, and the teacher's own, which counts window by window.

    student_BS, teacher_BS: log-probabilities of spans where there_BS says that both can score them.
    """

    ce: Tensor
    teacher_ce: Tensor
    student_BS: Tensor
    teacher_BS: Tensor
    there_BS: Tensor


def span_scores(own: FusedHead, theirs: FusedHead, hidden_BTD: Tensor, taught_BUG: Tensor, paired: Paired) -> Scores:
    """Scores of last hidden states; gradients to both sides."""
    count = int(paired.span_count.max())
    each = [
        _label_scores(head, hidden, side.labels)
        for head, hidden, side in zip((own, theirs), (hidden_BTD, taught_BUG), paired[:2], strict=True)
    ]
    (student_BS, sizes_BS), (teacher_BS, _) = (
        span_logprobs(logprobs, side.label_spans, count) for logprobs, side in zip(each, paired[:2], strict=True)
    )
    tokens_B = (paired.student.labels != IGNORED).sum(1)
    teacher_ce = -(each[1] * per_token(paired.teacher.labels != IGNORED, tokens_B)).sum()
    return Scores(-each[0].sum(), teacher_ce, student_BS, teacher_BS, sizes_BS > 0)


def per_token(counted_BU: Tensor, tokens_B: Tensor) -> Tensor:
    """Weights [B, U] with which a sum over a window's counted positions is their mean times its tokens."""
    return counted_BU * (tokens_B / counted_BU.sum(1).clamp(min=1))[:, None]


def _label_scores(head: FusedHead, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """log p of each label, [B, T], 0 where there is none."""
    counted = labels_BT != IGNORED
    found_N = label_logprobs(head.logits, hidden_BTD[counted], labels_BT[counted], head.vocab_size)
    return found_N.new_zeros(labels_BT.shape).masked_scatter(counted, found_N)
