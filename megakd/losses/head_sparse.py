"""The fused head's loss to cached teacher logits, with its gradient in closed form.

K entries of the teacher's head, E draws, B = K + 1 buckets. With y the logits, T the temperature, Q = softmax(y / T)
and v_b the slope of the divergence by log Q_b (losses/divergence.py), the gradient by y / T is
  v_k - Q_k S      at the stored entries, S the sum of v over all buckets
  Q_j (v_tail / Q_tail - S)      at all others: one number a row times exp(y_j / T)
Draws with weights w: W Q_j, minus w_d at the draws, W their sum. Cross entropy: softmax(y)_j, minus 1 at the label. So
a row of the gradient is exp(y_j / T) and its power exp(y_j), each times a number, and a few entries of their own.
"""

import torch
from torch import Tensor

from megakd.data.records import TeacherTargets
from megakd.losses.divergence import divergence_slopes, divergence_terms
from megakd.losses.head_chunk import Chunk, Job
from megakd.losses.head_cpu import Rows
from megakd.losses.head_rows import Slopes, Student, factors, to_power
from megakd.losses.reference import KL, head_and_tail, is_kl_t1, knows_kl_t1, teacher_buckets
from megakd.losses.signals import Sparse
from megakd.losses.tails import tail_for


def sparse_sums(chunk: slice, part: Chunk) -> Tensor:
    """Sums [ce, kl, kl_t1] over the chunk in float64; where gradients are asked for, `part` becomes the gradient."""
    job, teacher = part.job, part.job.teacher
    assert isinstance(teacher, Sparse)
    labels_c1 = job.labels_N[chunk, None]
    targets = TeacherTargets(*(field[chunk] for field in teacher.targets))
    ids_cK = targets.ids.long() if teacher.stored.head else labels_c1[:, :0]
    draws_cE = targets.draw_ids.long() if teacher.tail in ("sampled", "hybrid") else labels_c1[:, :0]
    places = torch.cat([ids_cK, draws_cE, labels_c1], 1)
    # what is looked at entry by entry is small: float64
    x_cK, x_cE, x_label_c1 = part.x_cV.gather(1, places).double().split([ids_cK.shape[1], draws_cE.shape[1], 1], 1)
    if teacher.stored.head:
        x_cK = x_cK.masked_fill(~(targets.logprobs > -torch.inf), -torch.inf)
    log_p_cB, slopes = _of_teacher(job, teacher, targets)
    passes = Rows if Rows.fit(part) else Blocks
    student = passes.student(part, x_cK, ids_cK, slopes)

    log_q_cB = student.log_q(job.temperature)
    if log_p_cB is not None:
        value = divergence_terms(job.divergence, log_p_cB, log_q_cB).sum(-1)
        slopes = slopes or _bucket_slopes(job, log_p_cB, log_q_cB)
    else:
        assert slopes is not None
        log_q_cE = student.scale(job.temperature) * x_cE - student.log_z(job.temperature)[:, None]
        of_head_cK = torch.where(slopes.head_cK < 0, slopes.head_cK * log_q_cB[:, :-1], 0.0)
        value = of_head_cK.sum(-1) + (slopes.draws_cE * log_q_cE).sum(-1) - targets.entropy.double()
    ce = student.log_z(1.0) - job.flat * x_label_c1[:, 0]
    kl_t1 = _kl_t1(job, teacher, targets, student, value)

    if part.differentiate:
        passes.differentiate(part, student, slopes)
        own = _own_entries(part, student, slopes)
        part.x_cV.scatter_add_(1, places, own if part.left_c1 is None else own / part.left_c1)
        if not job.in_place:
            for x, raw in part.blocks(part.raw_cV):
                part.to_raw(x, raw)
    return torch.stack([ce.sum(), value.sum(), kl_t1.sum()])


class Blocks:
    """Two passes over blocks of rows that are in the cache: the student's sums, then the gradient."""

    @staticmethod
    def student(part: Chunk, x_cK: Tensor, ids_cK: Tensor, slopes: Slopes | None) -> Student:
        """Turn x into exp(x - its largest) over all places but ids_cK, 0 there, and sum that up."""
        power = part.job.power
        top, flat, sharp = (part.x_cV.new_zeros(len(part.x_cV), 1) for _ in range(3))
        least = torch.finfo(part.x_cV.dtype).min
        for x, ids, top_b1, flat_b1, sharp_b1 in part.blocks(ids_cK, top, flat, sharp):
            x.scatter_(1, ids, -torch.inf)
            # of the complement alone, so that its sums are at least 1 whatever was stored; none is left where K = V
            torch.amax(x, -1, keepdim=True, out=top_b1).clamp_(min=least)
            torch.sum(x.sub_(top_b1).exp_(), -1, keepdim=True, out=flat_b1)
            if power != 1:
                torch.sum(to_power(x, power, part.scratch[: len(x)]), -1, keepdim=True, out=sharp_b1)
        return Student(x_cK, *(each.double()[:, 0] for each in (top, flat, sharp)), part.job.flat, power)

    @staticmethod
    def differentiate(part: Chunk, student: Student, slopes: Slopes) -> None:
        """Turn exp(x) into the gradient of the total by x, but for the entries of their own."""
        job, t = part.job, part.job.temperature
        sum_c = student.sum(t).clamp(min=1)  # nothing to divide where nothing is left
        pair = factors(job, sum_c, student.unit(t), student.unit(1.0), slopes.rest_c, slopes.total_c)
        flat, sharp = (each.to(part.x_cV.dtype)[:, None] for each in pair)
        for x, flat_b1, sharp_b1 in part.blocks(flat, sharp):
            if job.power == 1:
                x.mul_(flat_b1)
            else:
                scratch = part.scratch[: len(x)]
                base = x if job.power == 2 else to_power(x, job.power - 1, scratch)
                x.mul_(torch.mul(base, sharp_b1, out=scratch).add_(flat_b1))


def _of_teacher(job: Job, teacher: Sparse, targets: TeacherTargets) -> tuple[Tensor | None, Slopes | None]:
    """log P of the buckets at T, None for draws; and the slopes, None where they depend on the student."""
    tail, temperature = teacher.tail, job.temperature
    if tail in ("ghost", "truncated"):
        log_tail_c = tail_for(targets, teacher.stored, tail, temperature)
        log_p_cB = teacher_buckets(targets.logprobs.double(), log_tail_c, temperature, tail, job.divergence)
        return log_p_cB, _bucket_slopes(job, log_p_cB, log_p_cB) if job.slopes_known else None
    shares_cE = targets.draw_shares.double()
    head_cK = shares_cE.new_zeros(len(shares_cE), targets.ids.shape[1] if teacher.stored.head else 0)
    if tail == "hybrid":
        log_tail_c = tail_for(targets, teacher.stored, tail, temperature).double()
        head_cK, tail_c = head_and_tail(targets.logprobs.double(), log_tail_c, temperature)
        shares_cE = tail_c[:, None] * shares_cE
    total_c = head_cK.sum(-1) + shares_cE.sum(-1)
    return None, Slopes(-head_cK, torch.zeros_like(total_c), -shares_cE, -total_c)


def _bucket_slopes(job: Job, log_p_cB: Tensor, log_q_cB: Tensor) -> Slopes:
    slopes_cB = divergence_slopes(job.divergence, log_p_cB, log_q_cB)
    return Slopes(slopes_cB[:, :-1], slopes_cB[:, -1], slopes_cB[:, :0], slopes_cB.sum(-1))


def _kl_t1(job: Job, teacher: Sparse, targets: TeacherTargets, student: Student, value_c: Tensor) -> Tensor:
    """KL(teacher || student) at T = 1 of each row; 0 where the data cannot tell it. value_c: what trains."""
    if is_kl_t1(job.temperature, teacher.tail, job.divergence):
        return value_c
    if not knows_kl_t1(teacher, job.temperature, job.divergence):
        return torch.zeros_like(value_c)
    log_tail_c = targets.log_tails[:, teacher.stored.column(1.0)]
    log_p_cB = teacher_buckets(targets.logprobs.double(), log_tail_c, 1.0, "ghost", KL)
    return divergence_terms(KL, log_p_cB, student.log_q(1.0)).sum(-1)


def _own_entries(part: Chunk, student: Student, slopes: Slopes) -> Tensor:
    """What is added to the gradient by x at the stored entries, the draws and the label."""
    by_divergence, by_ce = part.job.slopes
    q_cK, q1_cK = (student.log_q(t)[:, :-1].exp() for t in (part.job.temperature, 1.0))
    at_head = by_divergence * (slopes.head_cK - q_cK * slopes.total_c[:, None]) + by_ce * q1_cK
    at_label = torch.full_like(slopes.total_c[:, None], -by_ce)
    return torch.cat([at_head, by_divergence * slopes.draws_cE, at_label], 1).to(part.x_cV.dtype)
