"""Cross entropy and the divergence to stored teacher targets, from logits that exist: plain autograd.

Evaluation measures with it, and it is the reference of losses/head.py, which training uses.

N tokens, V real vocabulary, K entries of the head, D distinct draws. Everything is computed in float32 (float64 stays
float64); sums, not means: who calls divides once by the tokens of all ranks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.losses.divergence import Divergence, divergence_terms
from megakd.losses.signals import Sparse, Tail
from megakd.losses.tails import tail_for

KL = Divergence()
# A tail is stored as a byte: mass below (0.5 / 255)^2 = 4e-6 reads as none, and KL(Q || P) would be infinite.
TAIL_FLOOR = 1e-6


class DistillTerms(NamedTuple):
    """Sums over counted tokens: total is what is differentiated; the others are detached.

    kl: the divergence that trains, at T, without T^2, weighted where tokens are; kl_t1: always KL(teacher || student)
    at T = 1, unweighted, None where the data cannot tell it: draws at another temperature than 1 and no head.
    teacher_ce: the cross entropy of a live teacher, None for a cached one.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    kl_t1: Tensor | None
    teacher_ce: Tensor | None = None


def distill_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher: Sparse,
    alpha: float,
    temperature: float,
    divergence: Divergence = KL,
) -> DistillTerms:
    """sum over tokens of (1 - alpha) * CE + alpha * T^2 * KL_T(teacher || student) (Hinton et al. 2015, section 2).

    labels_N: every entry a real token id: rows that do not count are skipped by the caller, of the targets too.
    T^2 is inside `total`, so that gradients carry it. KL at T = 1 is always measured, as well as the data allows.
    """
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    ce = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    kl = kl_to_targets(logits_NV, teacher, temperature, divergence).sum()
    if is_kl_t1(temperature, teacher.tail, divergence):
        kl_t1: Tensor | None = kl.detach()
    elif knows_kl_t1(teacher, temperature, divergence):
        with torch.no_grad():
            kl_t1 = kl_to_targets(logits_NV, teacher._replace(tail="ghost"), 1.0).sum()
    else:
        kl_t1 = None
    total = (1 - alpha) * ce + alpha * temperature**2 * kl
    return DistillTerms(total, ce.detach(), kl.detach(), kl_t1)


def is_kl_t1(temperature: float, tail: Tail, divergence: Divergence) -> bool:
    """Whether what trains is itself the KL at T = 1, as well as the data can tell it."""
    return temperature == 1.0 and tail != "truncated" and divergence.kind == "kl"


def knows_kl_t1(teacher: Sparse, temperature: float, divergence: Divergence) -> bool:
    """Whether the KL at T = 1 can be told: it is what trains, or there is a head with a tail for T = 1."""
    told = teacher.stored.head and 1.0 in teacher.stored.temperatures
    return is_kl_t1(temperature, teacher.tail, divergence) or told


def kl_to_targets(
    logits_NV: Tensor,
    teacher: Sparse,
    temperature: float,
    divergence: Divergence = KL,
) -> Tensor:
    """KL(teacher || student) at temperature T per token in the form that the tail names, or another divergence, [N]."""
    targets, stored, tail = teacher
    if tail in ("ghost", "truncated"):
        log_tail_N = tail_for(targets, stored, tail, temperature)
        return topk_kl(logits_NV, targets.ids, targets.logprobs, log_tail_N, temperature, tail, divergence)
    ids, weights = targets.draw_ids, targets.draw_shares
    if tail == "hybrid":
        log_tail_N = tail_for(targets, stored, tail, temperature)
        head_NK, tail_N = head_and_tail(targets.logprobs, log_tail_N, temperature)
        ids = torch.cat([targets.ids, ids], -1)
        weights = torch.cat([head_NK, tail_N[:, None] * weights], -1)
    return sampled_kl(logits_NV, ids, weights, targets.entropy, temperature)


def topk_kl(
    logits_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    log_tail_N: Tensor,
    temperature: float,
    tail: Tail,
    divergence: Divergence = KL,
) -> Tensor:
    """KL(teacher || student) at temperature T per token, from the head's K entries, [N]; never negative.

    Teacher: P_k proportional to p_k^(1/T). Student: Q = softmax(logits / T) over all V tokens.
    ghost      the mass outside the K entries is one more bucket on both sides: a true KL of a coarser distribution.
               Student's bucket: logsumexp over the complement, never log(1 - sum): NaN once the sum rounds to 1.
    truncated  the teacher renormalised over its K entries and zero elsewhere; biased towards them.
    log_tail_N: log of the sum over tokens outside the head of p^(1/T). Entries of log-probability -inf are no entries;
    their id repeats one of the row.
    """
    scaled_NV = logits_NV / temperature
    log_p_NB = teacher_buckets(logprobs_NK.to(scaled_NV.dtype), log_tail_N, temperature, tail, divergence)
    log_q_NB, _ = student_buckets(scaled_NV, ids_NK.long(), logprobs_NK > -torch.inf)
    return divergence_terms(divergence, log_p_NB, log_q_NB).sum(-1)


def student_buckets(scaled_NV: Tensor, ids_NK: Tensor, kept_NK: Tensor) -> tuple[Tensor, Tensor]:
    """log Q of the K entries and of one bucket for all others, [N, K + 1], and the logsumexp of each row, [N].

    scaled_NV: logits / T. kept_NK: False where an entry is none and its id repeats another one's: -inf there.
    """
    log_rest_N1 = scaled_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return buckets(scaled_NV.gather(-1, ids_NK), log_rest_N1, kept_NK)


def buckets(stored_NK: Tensor, log_rest_N1: Tensor, kept_NK: Tensor) -> tuple[Tensor, Tensor]:
    """`student_buckets` of the scaled logits of the K entries and the logsumexp of all others."""
    scaled_NB = torch.cat([stored_NK, log_rest_N1], -1)
    # a bucket that the student does not have either (a repeated id, the tail where K = V) gets no gradient
    exists_NB = torch.cat([kept_NK, log_rest_N1 > -torch.inf], -1)
    # the normaliser from its parts: one pass over the vocabulary, not two
    log_z_N1 = scaled_NB.masked_fill(~exists_NB, -torch.inf).logsumexp(-1, keepdim=True)
    return (scaled_NB - log_z_N1).masked_fill(~exists_NB, -torch.inf), log_z_N1[:, 0]


def teacher_buckets(
    logprobs_NK: Tensor, log_tail_N: Tensor, temperature: float, tail: Tail, divergence: Divergence
) -> Tensor:
    """log P of the K entries at temperature T and of one bucket for all others, [N, K + 1]; truncated: -inf there."""
    head_NK, tail_N1 = logprobs_NK / temperature, log_tail_N[:, None].to(logprobs_NK.dtype)
    if tail == "truncated":
        tail_N1 = torch.full_like(tail_N1, -torch.inf)
    elif divergence.kind == "reverse_kl":
        tail_N1 = torch.maximum(tail_N1, head_NK.logsumexp(-1, keepdim=True) + math.log(TAIL_FLOOR))
    return torch.cat([head_NK, tail_N1], -1).log_softmax(-1)


def sampled_kl(logits_NV: Tensor, ids_ND: Tensor, weights_ND: Tensor, entropy_N: Tensor, temperature: float) -> Tensor:
    """-sum_d w_d log Q(d) - H(P), [N]: its mean over captures is KL(teacher || student) at T, as its gradient's is.

    weights_ND sum to 1 a row: shares of draws from P = p^(1/T) / Z, or exact P_k and shares of what is left (hybrid).
    They are never renormalised. A single row may be negative: it is an estimate. (Sparse Logit Sampling, ACL 2025.)
    """
    scaled_NV = logits_NV / temperature
    picked_N = (weights_ND.to(scaled_NV.dtype) * scaled_NV.gather(-1, ids_ND.long())).sum(-1)
    total_N = weights_ND.to(scaled_NV.dtype).sum(-1)
    return total_N * scaled_NV.logsumexp(-1) - picked_N - entropy_N.to(scaled_NV.dtype)


def head_and_tail(logprobs_NK: Tensor, log_tail_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """P_k = p_k^(1/T) / Z of the head, and the share of all others, from log of their sum of p^(1/T)."""
    log_p_NK = logprobs_NK / temperature
    total_N = torch.logaddexp(log_p_NK.logsumexp(-1), log_tail_N)
    return (log_p_NK - total_N[:, None]).exp(), (log_tail_N - total_N).exp()
