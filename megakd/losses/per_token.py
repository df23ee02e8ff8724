"""One number per token from last hidden states: log p of its label, and the KL between two models at T = 1.

N tokens, V real vocabulary, D hidden size of a model, G of the teacher. Logits exist a chunk of tokens at a time.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megakd.losses.head import DENSE_CHUNK_BYTES, Device, FusedHead, kind_of, rows_within
from megakd.losses.hidden import wide
from megakd.losses.signals import Head

KL_ROWS = 256  # of logits at once, where no gradient is needed
MOST_NLL = 709.0  # of which a float still holds the exponential


def perplexity(nll: float) -> float:
    """exp of a mean -log p in nats; inf where it is too large for a float, NaN of NaN."""
    return math.exp(nll) if nll < MOST_NLL else nll * math.inf


def label_logprobs(head: FusedHead, hidden_ND: Tensor, labels_N: Tensor, sizes_of: Device | None = None) -> Tensor:
    """log p of each label, [N]; a chunk's logits are computed again in the backward pass.

    sizes_of: as for `FusedHead`.
    """

    def chunk(hidden_cD: Tensor, labels_c: Tensor) -> Tensor:
        logits_cV = wide(head.logits(hidden_cD)[:, : head.vocab_size])
        return -functional.cross_entropy(logits_cV, labels_c, reduction="none")

    rows = rows_within(DENSE_CHUNK_BYTES, sizes_of or kind_of(hidden_ND.device), head.vocab_size)
    # no tokens: one chunk of none, 0 with a live graph
    parts = zip(hidden_ND.split(rows), labels_N.split(rows), strict=True) if len(labels_N) else [(hidden_ND, labels_N)]
    if not torch.is_grad_enabled():
        return torch.cat([chunk(*part) for part in parts])
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])  # type: ignore[list-item]


@torch.no_grad()
def kl_each(teacher: Head, teacher_NG: Tensor, student: Head, student_ND: Tensor) -> Tensor:
    """KL(teacher || student) at T = 1 of each token, [N]."""
    parts = zip(teacher_NG.split(KL_ROWS), student_ND.split(KL_ROWS), strict=True)
    return torch.cat([kl_rows(teacher.logits(t).float(), student.logits(s).float()) for t, s in parts])


def kl_rows(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of each row, [N]; gradients to both."""
    log_p, log_q = teacher_NV.log_softmax(-1), student_NV.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
