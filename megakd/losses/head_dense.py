"""The fused head's loss to a live teacher: both distributions over the whole vocabulary, gradients to both models.

b tokens of a block, V real vocabulary. With s, t the logits of student and teacher, q = softmax(s / T) and
p = softmax(t / T), q1 at T = 1, y the label, w the token's weight, v = dD / dlog q and u = dD / dlog p, the slopes are
  by s      (1 - alpha) (q1 - y) + alpha kl_weight T w (v - q sum(v))
  by t      alpha kl_weight T w (u - p sum(u))
For KL(teacher || student) the brackets are q - p and p (d - KL) with d = log p - log q. The teacher's entropy is a part
of what is differentiated: a soft cross entropy, which leaves it out, would teach the teacher to be certain.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megakd.losses.divergence import Divergence, divergence_slopes, divergence_terms, teacher_slopes
from megakd.losses.head_chunk import Chunk
from megakd.losses.signals import Dense


def dense_sums(chunk: slice, student: Chunk, teacher: Chunk) -> Tensor:
    """Sums [ce, kl, kl_t1, teacher_ce] over the chunk; where gradients are asked for, the parts become them."""
    labels_c1, weights_c1 = student.job.labels_N[chunk, None], _weights(chunk, student)
    blocks = student.blocks(student.raw_cV, teacher.x_cV, teacher.raw_cV, labels_c1, weights_c1)
    return torch.cat([_block((student, teacher), *views) for views in blocks], 1).sum(-1)


# a function, so that the temporary tensors of a block are gone before those of the next one
def _block(
    parts: tuple[Chunk, Chunk],
    s: Tensor,
    s_raw: Tensor,
    t: Tensor,
    t_raw: Tensor,
    labels_b1: Tensor,
    weights_b1: Tensor,
) -> Tensor:
    """The terms of each row, [4, b]; s and t, and the products that they are made of, become their gradients."""
    student, teacher = parts
    by_divergence, by_ce = student.job.slopes
    both = _both(s, t, student.job.temperature)
    log_p1, log_q1 = both.at_1
    ce_b1, teacher_ce_b1 = (-side.gather(1, labels_b1) for side in (log_q1, log_p1))
    kl_t1_b1 = torch.linalg.vecdot(both.p1, log_p1 - log_q1)[:, None]
    by_s, by_t = s if student.differentiate else None, t if teacher.differentiate else None
    value_b1 = _compared(student.job.divergence, both, by_divergence * weights_b1, by_s, by_t)
    if by_s is not None:
        if by_ce:
            by_s.add_(log_q1.exp_(), alpha=by_ce)
        by_s.scatter_add_(1, labels_b1, by_s.new_full(labels_b1.shape, -by_ce))
        student.to_raw(by_s, s_raw)
    if by_t is not None:
        teacher.to_raw(by_t, t_raw)
    return torch.cat([ce_b1, weights_b1 * value_b1, kl_t1_b1, teacher_ce_b1], 1).T


def _weights(chunk: slice, student: Chunk) -> Tensor:
    """How much each token's divergence counts, [c, 1]."""
    signal = student.job.teacher
    assert isinstance(signal, Dense)
    if signal.weights_N is None:
        return student.x_cV.new_ones(len(student.x_cV), 1)
    return signal.weights_N[chunk, None].to(student.x_cV.dtype)


class Both(NamedTuple):
    """Log-probabilities of teacher and student at T and at 1, and the teacher's probabilities, [b, V] each."""

    at_t: tuple[Tensor, Tensor]
    p: Tensor
    at_1: tuple[Tensor, Tensor]
    p1: Tensor


def _both(s: Tensor, t: Tensor, temperature: float) -> Both:
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    at_1 = (log_p, log_q), log_p.exp()
    if temperature == 1:
        return Both(*at_1, *at_1)
    log_q, log_p = (side.div(temperature).log_softmax(-1) for side in (s, t))
    return Both((log_p, log_q), log_p.exp(), *at_1)


def _compared(divergence: Divergence, both: Both, scale_b1: Tensor, by_s: Tensor | None, by_t: Tensor | None) -> Tensor:
    """D of each row, [b, 1]; by_s, by_t become the slopes of scale * D by s / T and t / T where they are given."""
    log_p, log_q = both.at_t
    if divergence.kind == "kl":  # the usual one, in as few passes over the vocabulary as it takes
        d = log_p - log_q
        value_b1 = torch.linalg.vecdot(both.p, d)[:, None]
        if by_s is not None:
            torch.sub(log_q.exp(), both.p, out=by_s).mul_(scale_b1)
        if by_t is not None:
            torch.mul(d.sub_(value_b1), both.p, out=by_t).mul_(scale_b1)
        return value_b1
    value_b1 = divergence_terms(divergence, log_p, log_q).sum(-1, keepdim=True)
    if by_s is not None:
        v = divergence_slopes(divergence, log_p, log_q)
        torch.sub(v, log_q.exp().mul_(v.sum(-1, keepdim=True)), out=by_s).mul_(scale_b1)
    if by_t is not None:
        u = teacher_slopes(divergence, log_p, log_q)
        torch.sub(u, both.p * u.sum(-1, keepdim=True), out=by_t).mul_(scale_b1)
    return value_b1
