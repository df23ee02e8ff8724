"""Cross entropy and the KL divergence to K stored teacher entries.

N tokens, V real vocabulary, K stored entries. Everything is computed in float32 (float64 stays float64); sums, not
means: who calls divides once by the tokens of all ranks.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Tail = Literal["ghost", "truncated"]


class DistillTerms(NamedTuple):
    """Sums over counted tokens: total is what is differentiated; ce, kl (at T, without T^2) and kl_t1 are detached."""

    total: Tensor
    ce: Tensor
    kl: Tensor
    kl_t1: Tensor


def distill_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    log_tail_N: Tensor,
    log_tail_t1_N: Tensor,
    alpha: float,
    temperature: float,
    tail: Tail,
) -> DistillTerms:
    """sum over tokens of (1 - alpha) * CE + alpha * T^2 * KL_T(teacher || student) (Hinton et al. 2015, section 2).

    labels_N: every entry a real token id: rows that do not count are left out by the caller.
    log_tail_N: log of the sum over tokens that are not stored of p^(1/T); log_tail_t1_N the same at T = 1.
    T^2 is inside `total`, so that gradients carry it. KL at T = 1 is always measured.
    """
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    ce = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    kl = topk_kl(logits_NV, ids_NK, logprobs_NK, log_tail_N, temperature, tail).sum()
    if temperature == 1.0 and tail == "ghost":
        kl_t1 = kl.detach()
    else:
        with torch.no_grad():
            kl_t1 = topk_kl(logits_NV, ids_NK, logprobs_NK, log_tail_t1_N, 1.0, "ghost").sum()
    total = (1 - alpha) * ce + alpha * temperature**2 * kl
    return DistillTerms(total, ce.detach(), kl.detach(), kl_t1)


def topk_kl(
    logits_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, log_tail_N: Tensor, temperature: float, tail: Tail
) -> Tensor:
    """KL(teacher || student) at temperature T per token, from K stored teacher entries, [N]; never negative.

    Teacher: P_k proportional to p_k^(1/T). Student: Q = softmax(logits / T) over all V tokens.
    ghost      the mass outside the K entries is one more bucket on both sides: a true KL of a coarser distribution.
               Student's bucket: logsumexp over the complement, never log(1 - sum): NaN once the sum rounds to 1.
    truncated  the teacher renormalised over its K entries and zero elsewhere; biased towards them.
    """
    scaled_NV = logits_NV / temperature
    scaled_NK = scaled_NV.gather(-1, ids_NK)
    log_p_NK = logprobs_NK.to(scaled_NV.dtype) / temperature
    if tail == "truncated":
        log_p_NK = log_p_NK.log_softmax(-1)
        log_q_NK = scaled_NK - scaled_NV.logsumexp(-1, keepdim=True)
        return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
    log_tail_N = log_tail_N.to(scaled_NV.dtype)
    total_N = torch.logaddexp(log_p_NK.logsumexp(-1), log_tail_N)
    log_p_NK, log_tail_N = log_p_NK - total_N[:, None], log_tail_N - total_N
    log_rest_N = scaled_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1)
    # the normaliser from its two parts: one pass over the vocabulary, not two
    log_z_N = torch.logaddexp(scaled_NK.logsumexp(-1), log_rest_N)
    log_q_NK, log_q_tail_N = scaled_NK - log_z_N[:, None], log_rest_N - log_z_N
    tail_N = log_tail_N.exp()
    # where the teacher has no tail (K = V) the bucket adds 0, whatever the student's -inf
    bucket_N = torch.where(tail_N > 0, tail_N * (log_tail_N - log_q_tail_N), 0.0)
    return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1) + bucket_N
