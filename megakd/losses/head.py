"""The student's head and the distillation loss as one step: logits exist a chunk of tokens at a time.

N tokens, c of a chunk, V real entries of the vocabulary, D hidden size. What losses/reference.py says with autograd is
computed here with its gradient in closed form, during the forward pass: head_sparse.py for cached teacher logits,
head_dense.py for logits that exist.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megakd.losses.divergence import Divergence
from megakd.losses.head_chunk import Chunk, Job
from megakd.losses.head_dense import dense_sums
from megakd.losses.head_sparse import sparse_sums
from megakd.losses.reference import KL, DistillTerms, knows_kl_t1
from megakd.losses.signals import Sparse, TeacherSignal

# Of one [c, V] buffer in float32. Larger ones read the head's weight less often.
CHUNK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 28}
# Rows go through all element-wise work together while they are in the cache: of one core (L2, 2 MB), of a GPU.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 25}
SLICE = 8192  # rows of the head's gradient that are summed up at once where products are rounded to 16 bits


class FusedHead(nn.Module):
    """The student's output embeddings and the loss behind them; its weight is the student's own Parameter.

    A module, because ZeRO-3 gathers a module's direct parameters while it runs. Register it after the student, whose
    name the weight keeps; it adds nothing to a state_dict.
    vocab_size: real entries: rows of the weight beyond them are padding, and get no gradient.
    scale, softcap: logits = scale * hidden @ weight.T (Cohere, Granite), then softcap * tanh(logits / softcap) (Gemma).
    """

    def __init__(self, weight: nn.Parameter, vocab_size: int, scale: float = 1.0, softcap: float | None = None):
        super().__init__()
        self.weight = weight
        self.vocab_size, self.scale, self.softcap = vocab_size, scale, softcap
        self.buffers_made: dict[str, Tensor] = {}

    def forward(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        teacher: TeacherSignal,
        alpha: float,
        temperature: float,
        divergence: Divergence = KL,
    ) -> DistillTerms:
        """`distill_loss` of the logits that hidden_ND (counted rows alone) stands for."""
        job = Job(
            labels_N=labels_N,
            teacher=teacher,
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            vocab_size=self.vocab_size,
            scale=self.scale,
            softcap=self.softcap,
            compute=compute_dtype(self.weight),
            differentiate=torch.is_grad_enabled(),
        )
        total, ce, kl, kl_t1 = _FusedLoss.apply(hidden_ND, self.weight, job, self.buffers_made)
        known = not isinstance(teacher, Sparse) or knows_kl_t1(teacher, temperature, divergence)
        return DistillTerms(total, ce, kl, kl_t1 if known else None)

    def logits(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """The dense logits, [N, V]: what the loss never stores. out: where their product may go, without gradients."""
        logits_NV = torch.matmul(hidden_ND, self.weight[: self.vocab_size].T, out=out)
        if self.scale != 1:  # else a pass over the vocabulary, and a second buffer, for nothing
            logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * (logits_NV / self.softcap).tanh()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The weight is saved as the student's."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The weight is loaded as the student's."""


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Of the matrix products: autocast's where it is on, else the weight's."""
    device = weight.device.type
    cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else weight.dtype


def rows_within(bytes_by_device: dict[str, int], device: torch.device, vocab_size: int, itemsize: int = 4) -> int:
    """How many rows of [., V] fit the bytes for this kind of device, at least one."""
    return max(bytes_by_device["cpu" if device.type == "cpu" else "cuda"] // (itemsize * vocab_size), 1)


class _FusedLoss(torch.autograd.Function):
    """Sums (total, ce, kl, kl_t1); backward only multiplies by the scalar that comes in."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, job: Job, made: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        wanted = [job.differentiate and needed for needed in ctx.needs_input_grad[:2]]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums, ctx.gradients = _run(hidden_ND.detach(), weight_VD.detach(), job, made, *wanted)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ce, kl, kl_t1 = sums.to(job.work).unbind()
        total = (1 - job.alpha) * sums[0] + job.alpha * job.temperature**2 * sums[1]
        ctx.mark_non_differentiable(ce, kl, kl_t1)
        return total.to(ce.dtype), ce, kl, kl_t1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # static
        factor = factors[0]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of the fused loss were passed on by an earlier backward")
        same = factor.device.type == "cpu" and factor.item() == 1  # a pass over the head's gradient less
        for gradient in gradients:
            if gradient is not None and not same:
                gradient.mul_(factor)  # in place, for there may be no room for another
        hidden, weight = (g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return hidden, weight, None, None


def _run(
    hidden_ND: Tensor, weight_VD: Tensor, job: Job, made: dict[str, Tensor], for_hidden: bool, for_weight: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Sums [ce, kl, kl_t1] in float64, and the gradients of the total by hidden_ND and weight_VD.

    Held at once: the gradients, one [c, V] in float32, and where products are of 16 bits one of those; with a soft cap
    two in float32. Autocast adds the head in its dtype.
    """
    tokens, device = len(hidden_ND), hidden_ND.device
    real_VD = weight_VD[: job.vocab_size].to(job.compute)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    hidden_grad = torch.empty_like(hidden_ND, dtype=job.compute) if for_hidden else None
    weight_grad = None
    if for_weight:
        weight_grad = torch.empty_like(weight_VD, dtype=job.work)
        weight_grad[job.vocab_size if tokens else 0 :] = 0
    chunks = _equal_parts(tokens, rows_within(CHUNK_BYTES, device, job.vocab_size))
    longest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    raw_cV = _buffer(made, "raw", job.compute, longest, job.vocab_size, device)
    work_cV = raw_cV if job.in_place else _buffer(made, "work", job.work, longest, job.vocab_size, device)
    block_rows = rows_within(BLOCK_BYTES, device, job.vocab_size, job.work.itemsize)
    # What is multiplied by the factor: the product of 16 bits after it came, else the smaller hidden states before.
    before, after = (1.0, job.factor) if job.rounded else (job.factor, 1.0)
    for chunk in chunks:
        hidden_cD = hidden_ND[chunk].to(job.compute)
        if not job.rounded:
            hidden_cD = hidden_cD * before
        raw, values = raw_cV[: len(hidden_cD)], work_cV[: len(hidden_cD)]
        torch.mm(hidden_cD, real_VD.T, out=raw)
        part = Chunk(raw, values, after, job, for_hidden or for_weight, block_rows)
        of_signal = sparse_sums if isinstance(job.teacher, Sparse) else dense_sums
        sums += of_signal(part, chunk)  # from here on `raw` is the gradient by the product
        if hidden_grad is not None:
            torch.mm(raw, real_VD, out=hidden_grad[chunk])
            if not job.rounded:
                hidden_grad[chunk] *= before if part.left_c1 is None else before * part.left_c1
        if weight_grad is not None:
            if part.left_c1 is not None:
                hidden_cD *= part.left_c1
            add_product(weight_grad[: job.vocab_size], raw.T, hidden_cD, new=chunk.start == 0)
    return sums, [hidden_grad, weight_grad]


def _equal_parts(tokens: int, most: int) -> list[slice]:
    """Chunks that differ by one token at most, none longer than `most`: a short product is slow."""
    parts = -(-tokens // most)
    return [slice(*pair) for pair in pairwise(tokens * part // max(parts, 1) for part in range(parts + 1))]


def _buffer(
    made: dict[str, Tensor], name: str, dtype: torch.dtype, rows: int, vocab_size: int, device: torch.device
) -> Tensor:
    """[rows, V] without values; on a CPU the last call's, for malloc gives back what is large at every free."""
    buffer = made.get(name)
    if buffer is None or buffer.dtype != dtype or buffer.device != device or len(buffer) < rows:
        made.pop(name, None)
        buffer = torch.empty(rows, vocab_size, dtype=dtype, device=device)
        if device.type == "cpu" and not buffer.is_inference():  # which could not be written to in training
            made[name] = buffer
    return buffer[:rows]


def add_product(sum_VD: Tensor, left_Vc: Tensor, right_cD: Tensor, new: bool) -> None:
    """sum_VD = (0 if new else sum_VD) + left_Vc @ right_cD, the sum in sum_VD's own precision."""
    if left_Vc.dtype == sum_VD.dtype:
        torch.mm(left_Vc, right_cD, out=sum_VD) if new else sum_VD.addmm_(left_Vc, right_cD)
        return
    for start in range(0, len(sum_VD), SLICE):
        rows = slice(start, start + SLICE)
        product = left_Vc[rows] @ right_cD
        sum_VD[rows].copy_(product) if new else sum_VD[rows].add_(product)
