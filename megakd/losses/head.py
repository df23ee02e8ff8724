"""The student's head and the distillation loss as one step: logits exist a chunk of tokens at a time.

N tokens, c of a chunk, V real entries of the vocabulary, D hidden size of a model, G of the teacher. What
losses/reference.py says with autograd is computed here with its gradient in closed form, during the forward pass:
head_sparse.py for cached teacher logits, head_dense.py for a live teacher, which may learn too.
"""

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megakd.losses.divergence import Divergence
from megakd.losses.head_chunk import Chunk, Job
from megakd.losses.head_dense import dense_sums
from megakd.losses.head_sparse import sparse_sums
from megakd.losses.reference import KL, DistillTerms, knows_kl_t1
from megakd.losses.signals import Dense, Head, Sparse, TeacherSignal

Device = Literal["cpu", "cuda"]
# Of one [c, V] buffer in float32. Larger ones read the head's weight less often.
CHUNK_BYTES: dict[str, int] = {"cpu": 1 << 27, "cuda": 1 << 28}
# Rows go through all element-wise work together while they are in the cache: of one core (L2, 2 MB), of a GPU.
BLOCK_BYTES: dict[str, int] = {"cpu": 1 << 20, "cuda": 1 << 25}
# The same next to a live teacher: two models have such buffers, and a dozen temporary tensors have the size of a block.
DENSE_CHUNK_BYTES: dict[str, int] = {"cpu": 1 << 24, "cuda": 1 << 26}
DENSE_BLOCK_BYTES: dict[str, int] = {"cpu": 1 << 18, "cuda": 1 << 26}
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
        *,
        kl_weight: float = 1.0,
        sizes_of: Device | None = None,
    ) -> DistillTerms:
        """sum over tokens of (1 - alpha) CE + alpha kl_weight T^2 D_T(teacher, student): `distill_loss` of the logits.

        hidden_ND: counted rows alone; labels_N: real token ids. Gradients are made with the loss, a chunk at a time, so
        no logits are kept and none are computed again; there is one backward.
        sizes_of: the device whose sizes of chunks are taken, None for that of the tensors.
        """
        job = Job(
            labels_N=labels_N,
            teacher=teacher,
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            differentiate=torch.is_grad_enabled(),
            kl_weight=kl_weight,
            **_form_of(self),
        )
        plan = _plan(job, sizes_of or kind_of(hidden_ND.device))
        if isinstance(teacher, Sparse):
            models = [_Model(job, plan, self.buffers_made)]
            total, ce, kl, kl_t1 = _FusedLoss.apply(models, plan, hidden_ND, self.weight)
            return DistillTerms(total, ce, kl, kl_t1 if knows_kl_t1(teacher, temperature, divergence) else None)
        assert self.vocab_size == teacher.head.vocab_size, (self.vocab_size, teacher.head.vocab_size)
        # chunks are small enough for malloc to keep them: no buffers between calls
        models = [_Model(job, plan, {}), _Model(job._replace(**_form_of(teacher.head)), plan, {})]
        tensors = hidden_ND, self.weight, teacher.hidden_NG, teacher.head.weight
        return DistillTerms(*_FusedLoss.apply(models, plan, *tensors))

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


def _form_of(head: Head) -> dict[str, Any]:
    """What a `Job` says of the model whose head it is."""
    compute = compute_dtype(head.weight)
    return {"vocab_size": head.vocab_size, "scale": head.scale, "softcap": head.softcap, "compute": compute}


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Of the matrix products: autocast's where it is on, else the weight's."""
    device = weight.device.type
    cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else weight.dtype


def kind_of(device: torch.device) -> Device:
    return "cpu" if device.type == "cpu" else "cuda"


def rows_within(bytes_of: dict[str, int], device: Device, vocab_size: int, itemsize: int = 4) -> int:
    """How many rows of [., V] fit the bytes for this kind of device, at least one."""
    return max(bytes_of[device] // (itemsize * vocab_size), 1)


class _Plan(NamedTuple):
    """Chunks of tokens, and how many rows of a chunk go through all element-wise work together."""

    chunks: list[slice]
    block_rows: int


def _plan(job: Job, device: Device) -> _Plan:
    tokens, itemsize = len(job.labels_N), job.work.itemsize
    if isinstance(job.teacher, Sparse):
        chunks = _equal_parts(tokens, rows_within(CHUNK_BYTES, device, job.vocab_size))
        return _Plan(chunks, rows_within(BLOCK_BYTES, device, job.vocab_size, itemsize))
    rows = rows_within(DENSE_CHUNK_BYTES, device, job.vocab_size)
    chunks = [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]
    return _Plan(chunks, rows_within(DENSE_BLOCK_BYTES, device, job.vocab_size, itemsize))


def _equal_parts(tokens: int, most: int) -> list[slice]:
    """Chunks that differ by one token at most, none longer than `most`: a short product is slow."""
    parts = -(-tokens // most)
    return [slice(*pair) for pair in pairwise(tokens * part // max(parts, 1) for part in range(parts + 1))]


class _FusedLoss(torch.autograd.Function):
    """(total, ce, kl, kl_t1), and teacher_ce of a live teacher; backward only multiplies by the scalar that comes in.

    tensors: hidden states and the head's weight of each of the models.
    """

    @staticmethod
    def forward(ctx: Any, models: list["_Model"], plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        job, needed = models[0].job, ctx.needs_input_grad[2:]
        with torch.autocast(tensors[0].device.type, enabled=False):
            for number, model in enumerate(models):
                own = slice(2 * number, 2 * number + 2)
                hidden, weight = (tensor.detach() for tensor in tensors[own])
                model.take(hidden, weight, *needed[own])
            sums = _run(models, plan.chunks)
        ctx.gradients = [gradient for model in models for gradient in (model.by_hidden, model.by_weight)]
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        terms = sums.to(job.work).unbind()
        ce, kl = sums[:2]
        total = (1 - job.alpha) * ce + job.alpha * job.kl_weight * job.temperature**2 * kl
        ctx.mark_non_differentiable(*terms)
        return total.to(job.work), *terms

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
        typed = zip(gradients, ctx.dtypes, strict=True)
        return None, None, *(gradient if gradient is None else gradient.to(dtype) for gradient, dtype in typed)


def _run(models: list["_Model"], chunks: list[slice]) -> Tensor:
    """Sums [ce, kl, kl_t1], and teacher_ce of a live teacher; the models have their gradients then.

    Held at once: the gradients, and of each model one [c, V] in float32, where products are of 16 bits one of those,
    with a soft cap two in float32. Autocast adds the head in its dtype.
    """
    dense = isinstance(models[0].job.teacher, Dense)
    sums = []
    for chunk in chunks:
        parts = [model.logits(chunk) for model in models]
        sums.append(dense_sums(chunk, *parts) if dense else sparse_sums(chunk, *parts))
        for model, part in zip(models, parts, strict=True):
            model.add(chunk, part)
    if not sums:
        return models[0].hidden_ND.new_zeros(4 if dense else 3, dtype=models[0].job.work)
    return torch.stack(sums, 1).sum(-1)


class _Model:
    """One model's head in the loop over chunks; by_hidden, by_weight: the gradients of the total, where needed."""

    def __init__(self, job: Job, plan: _Plan, made: dict[str, Tensor]):
        self.job, self.plan, self.made = job, plan, made
        # What is multiplied by the factor: the product of 16 bits after it came, else the smaller hidden states before.
        self.before, self.after = (1.0, job.factor) if job.rounded else (job.factor, 1.0)

    def take(self, hidden_ND: Tensor, weight_VD: Tensor, of_hidden: bool, of_weight: bool) -> None:
        """Begin with these, and with room for the gradients that are needed."""
        job, device = self.job, hidden_ND.device
        self.hidden_ND, self.real_VD = hidden_ND, weight_VD[: job.vocab_size].to(job.compute)
        self.by_hidden = self.by_weight = None
        if job.differentiate and of_hidden:
            # under autocast these differ; both ways round as they always did
            dtype = hidden_ND.dtype if isinstance(job.teacher, Dense) else job.compute
            self.by_hidden = torch.empty_like(hidden_ND, dtype=dtype)
        if job.differentiate and of_weight:
            self.by_weight = torch.empty_like(weight_VD, dtype=job.work)
            self.by_weight[job.vocab_size if len(hidden_ND) else 0 :] = 0
        longest = max((chunk.stop - chunk.start for chunk in self.plan.chunks), default=0)
        self.raw_cV = _buffer(self.made, "raw", job.compute, (longest, job.vocab_size), device)
        self.work_cV = self.raw_cV
        if not job.in_place:
            self.work_cV = _buffer(self.made, "work", job.work, (longest, job.vocab_size), device)

    def logits(self, chunk: slice) -> Chunk:
        hidden_cD = self.hidden_ND[chunk].to(self.job.compute)
        self.hidden_cD = hidden_cD if self.before == 1 else hidden_cD * self.before
        raw_cV = torch.mm(self.hidden_cD, self.real_VD.T, out=self.raw_cV[: len(hidden_cD)])
        differentiate = self.by_hidden is not None or self.by_weight is not None
        work_cV = self.work_cV[: len(hidden_cD)]
        return Chunk(raw_cV, work_cV, self.after, self.job, differentiate, self.plan.block_rows)

    def add(self, chunk: slice, part: Chunk) -> None:
        """What the chunk's gradient by the product, `part.raw_cV`, is for the gradients of both factors."""
        if self.by_hidden is not None:
            place = self.by_hidden[chunk]
            if place.dtype == self.job.compute:
                torch.mm(part.raw_cV, self.real_VD, out=place)
            else:
                place.copy_(part.raw_cV @ self.real_VD)
            if self.before != 1 or part.left_c1 is not None:
                place *= self.before if part.left_c1 is None else self.before * part.left_c1
        if self.by_weight is not None:
            hidden_cD = self.hidden_cD if part.left_c1 is None else self.hidden_cD * part.left_c1
            real_VD = self.by_weight[: self.job.vocab_size]
            add_product(real_VD, part.raw_cV.T, hidden_cD, new=chunk.start == 0)


def _buffer(
    made: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """[rows, V] without values; on a CPU the last call's, for malloc gives back what is large at every free."""
    rows, _ = shape
    buffer = made.get(name)
    if buffer is None or buffer.dtype != dtype or buffer.device != device or len(buffer) < rows:
        made.pop(name, None)
        buffer = torch.empty(shape, dtype=dtype, device=device)
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
