"""Cross entropy and KL to a teacher that is there and learns too: gradients reach both, and logits are never all kept.

N tokens, V real vocabulary, D hidden of the student, G of the teacher. Float32 after the heads (float64 stays float64);
sums, not means: who calls divides once by the tokens of all ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megakd.losses.hidden import wide

CHUNK_BYTES = 2**27  # of float32 logits of one model; a backward pass needs about six of them


class LiveTerms(NamedTuple):
    """Sums over tokens: total is what is differentiated; the others are detached.

    kl: KL(teacher || student) at T, without T^2, weighted; kl_t1: at T = 1, unweighted; teacher_ce: the teacher's own
    cross entropy.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    kl_t1: Tensor
    teacher_ce: Tensor


def live_loss(
    student: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor],
    student_ND: Tensor,
    teacher_NG: Tensor,
    labels_N: Tensor,
    alpha: float,
    temperature: float,
    vocab_size: int,
    weights_N: Tensor | None = None,
    kl_weight: float = 1.0,
) -> LiveTerms:
    """sum over tokens of (1 - alpha) CE + alpha kl_weight T^2 KL_T(teacher || student), from last hidden states.

    student, teacher: hidden states [n, D] or [n, G] to logits [n, >= V]. labels_N: real token ids.
    KL = sum of p (log p - log q) with p the teacher's: its entropy is a part of what is differentiated, for a teacher
    that learns it is not constant (a soft cross entropy would teach the router to be certain).
    weights_N: how much each token's KL counts, a constant; 1 each where it is None.
    Chunk by chunk, each computed again in the backward pass.
    """
    weights_N = torch.ones_like(labels_N, dtype=torch.float32) if weights_N is None else weights_N

    def chunk(s_ND: Tensor, t_NG: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        s_NV, t_NV = (wide(logits[:, :vocab_size]) for logits in (student(s_ND), teacher(t_NG)))
        ce = functional.cross_entropy(s_NV, labels, reduction="sum")
        kl = (weights * kl_rows(t_NV / temperature, s_NV / temperature)).sum()
        with torch.no_grad():
            kl_t1 = kl_rows(t_NV, s_NV).sum()
            teacher_ce = functional.cross_entropy(t_NV, labels, reduction="sum")
        return ce, kl, kl_t1, teacher_ce

    parts = _chunked(chunk, vocab_size, student_ND, teacher_NG, labels_N, weights_N)
    ce, kl, kl_t1, teacher_ce = (torch.stack(part).sum() for part in zip(*parts, strict=True))
    total = (1 - alpha) * ce + alpha * kl_weight * temperature**2 * kl
    return LiveTerms(total, ce.detach(), kl.detach(), kl_t1, teacher_ce)


def label_logprobs(logits: Callable[[Tensor], Tensor], hidden_ND: Tensor, labels_N: Tensor, vocab_size: int) -> Tensor:
    """log p of each label, [N], from last hidden states; chunk by chunk, computed again in the backward pass."""

    def chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return -functional.cross_entropy(wide(logits(hidden)[:, :vocab_size]), labels, reduction="none")

    return torch.cat(_chunked(chunk, vocab_size, hidden_ND, labels_N))


def _chunked(function: Callable[..., Any], vocab_size: int, *tensors: Tensor) -> list[Any]:
    """function of the tensors' rows, so many at once that a model's logits of them fit CHUNK_BYTES."""
    rows = max(CHUNK_BYTES // (4 * vocab_size), 1)
    # no tokens: one chunk of none, 0 with a live graph
    parts = zip(*(tensor.split(rows) if len(tensor) else (tensor,) for tensor in tensors), strict=True)
    if not torch.is_grad_enabled():
        return [function(*part) for part in parts]
    return [checkpoint(function, *part, use_reentrant=False) for part in parts]


def kl_rows(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of each row, [N]; gradients to both."""
    log_p, log_q = teacher_NV.log_softmax(-1), student_NV.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
