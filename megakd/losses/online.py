"""Cross entropy and divergence to a live teacher that may learn too: gradients reach both, logits are never all kept.

N tokens, V real vocabulary, D hidden of the student, G of the teacher. Float32 after the heads (float64 stays float64);
sums, not means: who calls divides once by the tokens of all ranks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megakd.losses.divergence import Divergence, divergence_slopes, divergence_terms, teacher_slopes
from megakd.losses.head import FusedHead, add_product, compute_dtype, rows_within
from megakd.losses.hidden import wide

# of float32 logits of one model; some six of them are there at once
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**26}
KL = Divergence()


class LiveTerms(NamedTuple):
    """Sums over tokens: total is what is differentiated; the others are detached.

    kl: the divergence that trains, at T, without T^2, weighted; kl_t1: KL(teacher || student) at T = 1, unweighted;
    teacher_ce: the teacher's own cross entropy.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    kl_t1: Tensor
    teacher_ce: Tensor


def live_loss(
    student: FusedHead,
    teacher: FusedHead,
    student_ND: Tensor,
    teacher_NG: Tensor,
    labels_N: Tensor,
    alpha: float,
    temperature: float,
    *,
    weights_N: Tensor | None = None,
    kl_weight: float = 1.0,
    divergence: Divergence = KL,
    chunk_bytes: int | None = None,
) -> LiveTerms:
    """sum over tokens of (1 - alpha) CE + alpha kl_weight T^2 D_T(teacher, student), from last hidden states.

    student, teacher: the heads behind them, of one vocabulary. labels_N: real token ids. divergence: D, over the whole
    vocabulary; KL(teacher || student) = sum of p (log p - log q) with p the teacher's: its entropy is a part of what is
    differentiated, for a teacher that learns it is not constant (a soft cross entropy would teach the router to be
    certain). weights_N: how much each token's D counts, a constant; 1 each where it is None.
    chunk_bytes: of one model's logits in float32 that exist at once; None: what suits the device (CHUNK_BYTES).

    Gradients are made with the loss, chunk by chunk, so no logits are kept, and none are computed again; one backward.
    """
    assert student.vocab_size == teacher.vocab_size, (student.vocab_size, teacher.vocab_size)
    differentiate = torch.is_grad_enabled()
    rows = _chunk_rows(labels_N.device, student.vocab_size, chunk_bytes)
    job = _Job((student, teacher), labels_N, weights_N, alpha, temperature, kl_weight, divergence, differentiate, rows)
    return LiveTerms(*_LiveLoss.apply(job, student_ND, teacher_NG, student.weight, teacher.weight))


class _Job(NamedTuple):
    heads: tuple[FusedHead, FusedHead]
    labels_N: Tensor
    weights_N: Tensor | None
    alpha: float
    temperature: float
    kl_weight: float
    divergence: Divergence
    differentiate: bool
    rows: int  # of a chunk

    @property
    def slopes(self) -> tuple[float, float]:
        """Of the total by a token's CE, and by its divergence at T with its logits as they are: T^2 / T."""
        return 1 - self.alpha, self.alpha * self.kl_weight * self.temperature


class _LiveLoss(torch.autograd.Function):
    """Sums (total, ce, kl, kl_t1, teacher_ce); backward only multiplies by the scalar that comes in."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, ...]:
        wanted = [job.differentiate and needed for needed in ctx.needs_input_grad[1:]]
        dtypes = [compute_dtype(head.weight) for head in job.heads]  # autocast's, where it is on
        with torch.autocast(tensors[0].device.type, enabled=False):
            sums, ctx.gradients = _run(job, [tensor.detach() for tensor in tensors], wanted, dtypes)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # static
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of the live loss were passed on by an earlier backward")
        made = zip(gradients, ctx.dtypes, strict=True)
        return None, *(None if gradient is None else gradient.mul_(factors[0]).to(dtype) for gradient, dtype in made)


def _run(
    job: _Job, tensors: list[Tensor], wanted: list[bool], dtypes: list[torch.dtype]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The sums, and the gradients of the total by (student_ND, teacher_NG and their heads' weights) if wanted.

    dtypes: of either side's matrix products.
    """
    # over chunks a weight's add up: never in 16 bits
    gradients = [
        torch.zeros_like(tensor, dtype=tensor.dtype if number < 2 else wide(tensor[:0]).dtype) if want else None
        for number, (tensor, want) in enumerate(zip(tensors, wanted, strict=True))
    ]
    vocab_size = job.heads[0].vocab_size
    real_VD = [weight[:vocab_size].to(dtype) for weight, dtype in zip(tensors[2:], dtypes, strict=True)]
    parts = []
    for start in range(0, len(job.labels_N), job.rows):
        chunk = slice(start, start + job.rows)
        hidden = [side[chunk].to(dtype) for side, dtype in zip(tensors[:2], dtypes, strict=True)]
        logits = [
            _capped(head, wide(h_cD @ w_VD.T)) for head, h_cD, w_VD in zip(job.heads, hidden, real_VD, strict=True)
        ]
        found, slopes = _rows(job, chunk, *logits, wanted[0] or wanted[2], wanted[1] or wanted[3])
        parts.append(found)
        for side, (head, slope) in enumerate(zip(job.heads, slopes, strict=True)):
            if slope is None:
                continue
            raw_cV = _uncapped(head, slope, logits[side]).to(dtypes[side])
            by_hidden, by_weight = gradients[side], gradients[side + 2]
            if by_hidden is not None:
                by_hidden[chunk] = raw_cV @ real_VD[side]
            if by_weight is not None:
                add_product(by_weight[:vocab_size], raw_cV.T, hidden[side], new=False)
    sums = [torch.stack(part).sum() for part in zip(*parts, strict=True)]
    ce, kl, *_ = sums = sums or list(wide(tensors[0]).new_zeros(4).unbind())
    return [(1 - job.alpha) * ce + job.alpha * job.kl_weight * job.temperature**2 * kl, *sums], gradients


def _capped(head: FusedHead, products_cV: Tensor) -> Tensor:
    """Logits from the head's products (`FusedHead.logits`), in their place."""
    logits_cV = products_cV if head.scale == 1 else products_cV.mul_(head.scale)
    return logits_cV if head.softcap is None else logits_cV.div_(head.softcap).tanh_().mul_(head.softcap)


def _uncapped(head: FusedHead, slope_cV: Tensor, logits_cV: Tensor) -> Tensor:
    """The slope by the head's products from that by its logits."""
    if head.softcap is not None:
        slope_cV = slope_cV * (1 - (logits_cV / head.softcap).square_())
    return slope_cV if head.scale == 1 else slope_cV * head.scale


def _rows(
    job: _Job, chunk: slice, s_NV: Tensor, t_NV: Tensor, of_student: bool, of_teacher: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Sums (ce, kl, kl_t1, teacher_ce) of some tokens' logits, and the slopes of the total by them, [n, V].

    With q = softmax(s / T), p = softmax(t / T), q1 at T = 1, y the label, d = log p - log q, for the KL:
        by s: (1 - alpha) (q1 - y) + alpha kl_weight T w (q - p)        by t: alpha kl_weight T w p (d - KL)
    `_slopes` says what takes the place of (q - p) and of p (d - KL) for another divergence.
    """
    labels_N1 = job.labels_N[chunk, None]
    w_N1 = None if job.weights_N is None else job.weights_N[chunk, None].to(s_NV.dtype)
    of_ce, of_kl = job.slopes
    log_q1, log_p1 = s_NV.log_softmax(-1), t_NV.log_softmax(-1)
    ce, teacher_ce = (-side.gather(1, labels_N1).sum() for side in (log_q1, log_p1))
    log_q, log_p = log_q1, log_p1
    p1 = log_p1.exp()
    kl_t1 = torch.linalg.vecdot(p1, log_p1 - log_q1).sum()
    p = p1
    if job.temperature != 1:
        log_q, log_p = (side.div(job.temperature).log_softmax(-1) for side in (s_NV, t_NV))
        p = log_p.exp()
    scale = of_kl if w_N1 is None else of_kl * w_N1
    slopes_of = _kl_slopes if job.divergence.kind == "kl" else partial(_slopes, job.divergence)
    each_N1, by_s, by_t = slopes_of(log_p, log_q, p, scale, of_student, of_teacher)
    divergence = (each_N1 if w_N1 is None else w_N1 * each_N1).sum()
    if by_s is not None:
        if of_ce:
            by_s.add_(log_q1.exp_(), alpha=of_ce)
        by_s.scatter_add_(1, labels_N1, by_s.new_full(labels_N1.shape, -of_ce))
    return [ce, divergence, kl_t1, teacher_ce], [by_s, by_t]


Slopes = tuple[Tensor, Tensor | None, Tensor | None]  # D of each row [n, 1]; of scale times D by s / T and t / T [n, V]


def _kl_slopes(
    log_p: Tensor, log_q: Tensor, p: Tensor, scale: float | Tensor, of_student: bool, of_teacher: bool
) -> Slopes:
    """Of KL(teacher || student), in as few passes over the vocabulary as it takes."""
    d = log_p - log_q
    kl_N1 = torch.linalg.vecdot(p, d)[:, None]
    by_s = (log_q.exp() - p).mul_(scale) if of_student else None
    by_t = d.sub_(kl_N1).mul_(p).mul_(scale) if of_teacher else None
    return kl_N1, by_s, by_t


def _slopes(
    divergence: Divergence,
    log_p: Tensor,
    log_q: Tensor,
    p: Tensor,
    scale: float | Tensor,
    of_student: bool,
    of_teacher: bool,
) -> Slopes:
    """Of any divergence: with v = dD / dlog q and u = dD / dlog p, v - q sum(v) and u - p sum(u)."""
    each_N1 = divergence_terms(divergence, log_p, log_q).sum(-1, keepdim=True)
    by_s = by_t = None
    if of_student:
        v = divergence_slopes(divergence, log_p, log_q)
        by_s = (v - log_q.exp() * v.sum(-1, keepdim=True)).mul_(scale)
    if of_teacher:
        u = teacher_slopes(divergence, log_p, log_q)
        by_t = (u - p * u.sum(-1, keepdim=True)).mul_(scale)
    return each_N1, by_s, by_t


def label_logprobs(
    logits: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    labels_N: Tensor,
    vocab_size: int,
    chunk_bytes: int | None = None,
) -> Tensor:
    """log p of each label, [N], from last hidden states; chunk by chunk, computed again in the backward pass."""

    def chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return -functional.cross_entropy(wide(logits(hidden)[:, :vocab_size]), labels, reduction="none")

    rows = _chunk_rows(hidden_ND.device, vocab_size, chunk_bytes)
    return torch.cat(_chunked(chunk, rows, hidden_ND, labels_N))


def _chunked(function: Callable[..., Any], rows: int, *tensors: Tensor) -> list[Any]:
    """function of so many of the tensors' rows at once."""
    # no tokens: one chunk of none, 0 with a live graph
    parts = zip(*(tensor.split(rows) if len(tensor) else (tensor,) for tensor in tensors), strict=True)
    if not torch.is_grad_enabled():
        return [function(*part) for part in parts]
    return [checkpoint(function, *part, use_reentrant=False) for part in parts]


def _chunk_rows(device: torch.device, vocab_size: int, chunk_bytes: int | None) -> int:
    """How many rows of a model's logits fit chunk_bytes; None: CHUNK_BYTES of the device."""
    if chunk_bytes is None:
        return rows_within(CHUNK_BYTES, device, vocab_size)
    return max(chunk_bytes // (4 * vocab_size), 1)


def kl_rows(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of each row, [N]; gradients to both."""
    log_p, log_q = teacher_NV.log_softmax(-1), student_NV.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
