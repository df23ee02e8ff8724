"""The fused head's loss to logits of the teacher that exist: both distributions over the whole vocabulary."""

import torch
from torch import Tensor

from megakd.losses.divergence import divergence_slopes, divergence_terms
from megakd.losses.head_chunk import Chunk
from megakd.losses.reference import KL
from megakd.losses.signals import Dense


def dense_sums(part: Chunk, chunk: slice) -> Tensor:
    """Sums [ce, kl, kl_t1] over the chunk in float64; where gradients are asked for, `part` becomes the gradient.

    With v the slopes of the divergence by log Q, the gradient by logits / T is v - Q sum(v), as for stored entries.
    """
    job, teacher = part.job, part.job.teacher
    assert isinstance(teacher, Dense)
    by_divergence, by_ce = job.slopes
    sums = torch.zeros(3, dtype=torch.float64, device=part.x_cV.device)
    # a quarter, for it takes a dozen temporary tensors of a block
    blocks = part.blocks(part.raw_cV, teacher.of(chunk), job.labels_N[chunk, None], share=4)
    for x, raw, logits, labels_b1 in blocks:
        p = logits[:, : job.vocab_size].to(x.dtype)
        log_p = (p / job.temperature).log_softmax(-1)
        log_q = (x * (job.flat / job.temperature)).log_softmax(-1)
        log_q1 = (x * job.flat).log_softmax(-1)
        ce = -log_q1.gather(1, labels_b1)
        value = divergence_terms(job.divergence, log_p, log_q)
        kl_t1 = divergence_terms(KL, p.log_softmax(-1), log_q1)
        sums += torch.stack([each.double().sum() for each in (ce, value, kl_t1)])
        if part.differentiate:
            slopes = divergence_slopes(job.divergence, log_p, log_q)
            torch.sub(slopes, log_q.exp_().mul_(slopes.sum(-1, keepdim=True)), out=x).mul_(by_divergence)
            x.add_(log_q1.exp_(), alpha=by_ce)
            x.scatter_add_(1, labels_b1, torch.full_like(x[:, :1], -by_ce))
            part.to_raw(x, raw)
    return sums
