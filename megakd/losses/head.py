"""The student's head and the distillation loss as one step: logits exist a chunk of tokens at a time.

N tokens, c of a chunk, V real entries of the vocabulary, D hidden size, K entries of the teacher's head, B = K + 1.
What losses/reference.py says with autograd is said here with its gradient in closed form, made during the forward.

With y the logits, T the temperature, Q = softmax(y / T) and v_b the slope of the divergence by log Q_b
(losses/divergence.py), the gradient by y / T is
  v_k - Q_k S      at the stored entries, S the sum of v over all buckets
  Q_j (v_tail / Q_tail - S)      at all others: one number a row times exp(y_j / T)
Draws with weights w: W Q_j, minus w_d at the draws, W their sum. Cross entropy: softmax(y)_j, minus 1 at the label. So
a row of the gradient is exp(y_j / T) and its power exp(y_j), each times a number, and a few entries of their own.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megakd.data.records import TeacherTargets
from megakd.losses.divergence import Divergence, divergence_slopes, divergence_terms
from megakd.losses.reference import (
    KL,
    DistillTerms,
    Stored,
    Tail,
    head_and_tail,
    is_kl_t1,
    knows_kl_t1,
    teacher_buckets,
)

# Of one [c, V] buffer in float32. Larger ones read the head's weight less often.
CHUNK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 28}
# Rows go through all element-wise work together while they are in the cache: of one core (L2, 2 MB), of a GPU.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 25}
SAFE = 60.0  # e^60 times any vocabulary fits float32
MOST_RATIO = 1e6  # of two factors of a row, the larger one over that which is taken out of both
LEAST_LEFT = 1e-30  # what a row may be divided by without leaving float32
SLICE = 8192  # rows of the head's gradient that are summed up at once where products are rounded to 16 bits


class SparseTeacher(NamedTuple):
    """Stored targets of the N tokens, and what stands for the tokens outside the head."""

    targets: TeacherTargets
    stored: Stored
    tail: Tail


class DenseTeacher(NamedTuple):
    """A teacher that is there: logits [N, >= V], or what gives those of a slice of the tokens. Right at any T.

    What gives them is called without gradients and without autocast.
    """

    logits: Tensor | Callable[[slice], Tensor]


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
        self.buffers_made: dict[Any, Tensor] = {}

    def forward(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        teacher: SparseTeacher | DenseTeacher,
        alpha: float,
        temperature: float,
        divergence: Divergence = KL,
    ) -> DistillTerms:
        """`distill_loss` of the logits that hidden_ND (counted rows alone) stands for."""
        job = _Job(
            labels_N, teacher, alpha, temperature, divergence, self.vocab_size, self.scale, self.softcap,
            compute_dtype(self.weight), torch.is_grad_enabled(), self.buffers_made,
        )  # fmt: skip
        total, ce, kl, kl_t1 = _FusedLoss.apply(hidden_ND, self.weight, job)
        dense = isinstance(teacher, DenseTeacher)
        known = dense or knows_kl_t1(teacher.stored, temperature, teacher.tail, divergence)
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


class _Job(NamedTuple):
    """What the loss of a batch is, besides hidden states and weight."""

    labels_N: Tensor
    teacher: SparseTeacher | DenseTeacher
    alpha: float
    temperature: float
    divergence: Divergence
    vocab_size: int
    scale: float
    softcap: float | None
    compute: torch.dtype
    differentiate: bool
    buffers_made: dict[Any, Tensor]

    @property
    def flat(self) -> float:
        """The higher one of the temperatures 1 and T: the exponentials of the other are powers of its own."""
        return max(self.temperature, 1.0)

    @property
    def power(self) -> float:
        return self.flat / min(self.temperature, 1.0)

    @property
    def slopes(self) -> tuple[float, float]:
        """Of the total by the divergence and by the cross entropy, by logits / flat instead of logits / their T."""
        return self.alpha * self.temperature * self.flat, (1 - self.alpha) * self.flat

    @property
    def cap(self) -> float | None:
        """softcap in units of logits / flat."""
        return None if self.softcap is None else self.softcap / self.flat


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Of the matrix products: autocast's where it is on, else the weight's."""
    device = weight.device.type
    cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else weight.dtype


class _FusedLoss(torch.autograd.Function):
    """Sums (total, ce, kl, kl_t1); backward only multiplies by the scalar that comes in."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, job: _Job) -> tuple[Tensor, ...]:
        wanted = [job.differentiate and needed for needed in ctx.needs_input_grad[:2]]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums, ctx.gradients = _run(hidden_ND.detach(), weight_VD.detach(), job, *wanted)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ce, kl, kl_t1 = sums.to(_work_dtype(job)).unbind()
        total = (1 - job.alpha) * sums[0] + job.alpha * job.temperature**2 * sums[1]
        ctx.mark_non_differentiable(ce, kl, kl_t1)
        return total.to(ce.dtype), ce, kl, kl_t1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # static
        factor = factors[0]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of the fused loss were handed over by an earlier backward")
        same = factor.device.type == "cpu" and factor.item() == 1  # a pass over the head's gradient less
        for gradient in gradients:
            if gradient is not None and not same:
                gradient.mul_(factor)  # in place, for there may be no room for another
        hidden, weight = (g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return hidden, weight, None


def _work_dtype(job: _Job) -> torch.dtype:
    """Of everything after the first matrix product."""
    return torch.float64 if job.compute == torch.float64 else torch.float32


def _run(
    hidden_ND: Tensor, weight_VD: Tensor, job: _Job, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Sums [ce, kl, kl_t1] in float64, and the gradients of the total by hidden_ND and weight_VD.

    Held at once: the gradients, one [c, V] in float32, and where products are of 16 bits one of those; with a soft cap
    two in float32. Autocast adds the head in its dtype.
    """
    tokens = len(hidden_ND)
    device, work = hidden_ND.device, _work_dtype(job)
    rounded = job.compute != work  # matrix products in 16 bits
    real_VD = weight_VD[: job.vocab_size].to(job.compute)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    hidden_grad = torch.empty_like(hidden_ND, dtype=job.compute) if for_hidden else None
    weight_grad = None
    if for_weight:
        weight_grad = torch.empty_like(weight_VD, dtype=work)
        weight_grad[job.vocab_size if tokens else 0 :] = 0
    # the product's place: what comes in by 16 bits goes out by 16 bits, with the same factor on both ways
    factor = job.scale / (job.flat if job.softcap is None else job.softcap)
    most = max(_budget(CHUNK_BYTES, device) // (4 * job.vocab_size), 1)
    parts = -(-tokens // most)
    borders = [tokens * part // max(parts, 1) for part in range(parts + 1)]  # equal parts, none longer than `most`
    chunks = [slice(*pair) for pair in pairwise(borders)]
    longest = -(-tokens // max(parts, 1))
    raw_cV = _buffer(job, "raw", job.compute, longest, device)
    work_cV = _buffer(job, "work", work, longest, device) if rounded or job.softcap is not None else raw_cV
    for chunk in chunks:
        hidden_cD = hidden_ND[chunk].to(job.compute)
        if not rounded:
            hidden_cD = hidden_cD * factor
        raw = raw_cV[: len(hidden_cD)]
        values = raw if work_cV is raw_cV else work_cV[: len(hidden_cD)]
        torch.mm(hidden_cD, real_VD.T, out=raw)
        part = _Chunk(raw, values, factor if rounded else 1.0, job, for_hidden or for_weight)
        sums += part.sparse(chunk) if isinstance(job.teacher, SparseTeacher) else part.dense(chunk)
        if hidden_grad is not None:
            torch.mm(raw, real_VD, out=hidden_grad[chunk])
            if not rounded:
                hidden_grad[chunk] *= factor if part.left_c1 is None else factor * part.left_c1
        if weight_grad is not None:
            if part.left_c1 is not None:
                hidden_cD *= part.left_c1
            add_product(weight_grad[: job.vocab_size], raw.T, hidden_cD, new=chunk.start == 0)
    return sums, [hidden_grad, weight_grad]


def _budget(bytes_by_device: dict[str, int], device: torch.device) -> int:
    return bytes_by_device["cpu" if device.type == "cpu" else "cuda"]


def _buffer(job: _Job, name: str, dtype: torch.dtype, rows: int, device: torch.device) -> Tensor:
    """[rows, V] without values; on a CPU the last call's, for malloc gives back what is large at every free."""
    made = job.buffers_made.get(name)
    if made is None or made.dtype != dtype or made.device != device or len(made) < rows:
        job.buffers_made.pop(name, None)
        made = torch.empty(rows, job.vocab_size, dtype=dtype, device=device)
        if device.type == "cpu" and not made.is_inference():  # which could not be written to in training
            job.buffers_made[name] = made
    return made[:rows]


def add_product(sum_VD: Tensor, left_Vc: Tensor, right_cD: Tensor, new: bool) -> None:
    """sum_VD = (0 if new else sum_VD) + left_Vc @ right_cD, the sum in sum_VD's own precision."""
    if left_Vc.dtype == sum_VD.dtype:
        torch.mm(left_Vc, right_cD, out=sum_VD) if new else sum_VD.addmm_(left_Vc, right_cD)
        return
    for start in range(0, len(sum_VD), SLICE):
        rows = slice(start, start + SLICE)
        product = left_Vc[rows] @ right_cD
        sum_VD[rows].copy_(product) if new else sum_VD[rows].add_(product)


class _Chunk:
    """The logits of some tokens, which become the gradient of the total by them, in place.

    raw_cV: products of the head as they came, and in the end their gradient. x_cV: logits / flat in between, the same
    tensor where nothing has to happen to raw_cV. factor: what raw_cV still has to be multiplied by.
    left_c1: what rows of the gradient still have to be multiplied by, left to the other side of the products, or None.
    """

    def __init__(self, raw_cV: Tensor, x_cV: Tensor, factor: float, job: _Job, differentiate: bool):
        self.raw_cV, self.x_cV, self.factor, self.job, self.differentiate = raw_cV, x_cV, factor, job, differentiate
        self.rows = max(_budget(BLOCK_BYTES, raw_cV.device) // (x_cV.element_size() * raw_cV.shape[1]), 1)
        self.scratch = torch.empty_like(x_cV[: self.rows])
        self.in_place = x_cV is raw_cV
        self.left_c1: Tensor | None = None
        if not self.in_place:
            for x, raw in self._blocks(raw_cV):
                self._scaled(raw, x)
                if job.cap is not None:
                    x.tanh_().mul_(job.cap)

    def _blocks(self, *others: Tensor, share: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """Views of x_cV and others that lie beside it, some rows at a time; share: so many times fewer."""
        rows = max(self.rows // share, 1)
        return zip(*(each.split(rows) for each in (self.x_cV, *others)), strict=True)

    def sparse(self, chunk: slice) -> Tensor:
        """Sums [ce, kl, kl_t1] over the chunk, of stored targets."""
        job, teacher = self.job, self.job.teacher
        assert isinstance(teacher, SparseTeacher)
        labels_c1 = job.labels_N[chunk, None]
        targets = TeacherTargets(*(field[chunk] for field in teacher.targets))
        ids_cK = targets.ids.long() if teacher.stored.head else labels_c1[:, :0]
        draws_cE = targets.draw_ids.long() if teacher.tail in ("sampled", "hybrid") else labels_c1[:, :0]
        places = torch.cat([ids_cK, draws_cE, labels_c1], 1)
        # what is looked at entry by entry is small: float64
        x_cK, x_cE, x_label_c1 = self.x_cV.gather(1, places).double().split([ids_cK.shape[1], draws_cE.shape[1], 1], 1)
        if teacher.stored.head:
            x_cK = x_cK.masked_fill(~(targets.logprobs > -torch.inf), -torch.inf)
        log_p_cB, slopes = self._told(targets)
        # rows that fill the cache one by one, and slopes that are known: all of it while a row is there
        at_once = slopes if self.differentiate and self.in_place and self.rows == 1 else None
        student = self._student(x_cK, ids_cK) if at_once is None else self._at_once(x_cK, ids_cK, at_once)
        log_q_cB = student.log_q(job.temperature)
        if log_p_cB is not None:
            value = divergence_terms(job.divergence, log_p_cB, log_q_cB).sum(-1)
            slopes = slopes or self._bucket_slopes(log_p_cB, log_q_cB)
        else:
            assert slopes is not None
            log_q_cE = student.scale(job.temperature) * x_cE - student.log_z(job.temperature)[:, None]
            of_head_cK = torch.where(slopes.head_cK < 0, slopes.head_cK * log_q_cB[:, :-1], 0.0)
            value = of_head_cK.sum(-1) + (slopes.draws_cE * log_q_cE).sum(-1) - targets.entropy.double()
        ce = student.log_z(1.0) - job.flat * x_label_c1[:, 0]
        kl_t1 = torch.zeros_like(ce)
        if is_kl_t1(job.temperature, teacher.tail, job.divergence):
            kl_t1 = value
        elif knows_kl_t1(teacher.stored, job.temperature, teacher.tail, job.divergence):
            log_tail = targets.log_tails[:, teacher.stored.column(1.0)]
            log_p = teacher_buckets(targets.logprobs.double(), log_tail, 1.0, "ghost", KL)
            kl_t1 = divergence_terms(KL, log_p, student.log_q(1.0)).sum(-1)
        if self.differentiate:
            if at_once is None:
                self._differentiate(student, slopes)
            own = self._own(student, slopes)
            self.x_cV.scatter_add_(1, places, own if self.left_c1 is None else own / self.left_c1)
            if not self.in_place:
                for x, raw in self._blocks(self.raw_cV):
                    self._to_raw(x, raw)
        return torch.stack([ce.sum(), value.sum(), kl_t1.sum()])

    def _told(self, targets: TeacherTargets) -> tuple[Tensor | None, "_Slopes | None"]:
        """log P of the buckets at T, None for draws; and the slopes, None where they depend on the student."""
        teacher, job = self.job.teacher, self.job
        assert isinstance(teacher, SparseTeacher)
        tail, temperature = teacher.tail, job.temperature
        column = teacher.stored.column(temperature) if tail in ("ghost", "hybrid") else 0
        if tail in ("ghost", "truncated"):
            log_tail_c = targets.log_tails[:, column]
            log_p_cB = teacher_buckets(targets.logprobs.double(), log_tail_c, temperature, tail, job.divergence)
            return log_p_cB, self._bucket_slopes(log_p_cB, log_p_cB) if job.divergence.kind == "kl" else None
        shares_cE = targets.draw_shares.double()
        head_cK = shares_cE.new_zeros(len(shares_cE), targets.ids.shape[1] if teacher.stored.head else 0)
        if tail == "hybrid":
            log_tail_c = targets.log_tails[:, column].double()
            head_cK, tail_c = head_and_tail(targets.logprobs.double(), log_tail_c, temperature)
            shares_cE = tail_c[:, None] * shares_cE
        total_c = head_cK.sum(-1) + shares_cE.sum(-1)
        return None, _Slopes(-head_cK, torch.zeros_like(total_c), -shares_cE, -total_c)

    def _bucket_slopes(self, log_p_cB: Tensor, log_q_cB: Tensor) -> "_Slopes":
        slopes_cB = divergence_slopes(self.job.divergence, log_p_cB, log_q_cB)
        return _Slopes(slopes_cB[:, :-1], slopes_cB[:, -1], slopes_cB[:, :0], slopes_cB.sum(-1))

    def _student(self, x_cK: Tensor, ids_cK: Tensor) -> "_Student":
        """Turn x into exp(x - its largest) over all places but ids_cK, 0 there, and sum that up."""
        power = self.job.power
        top, flat, sharp = (self.x_cV.new_zeros(len(self.x_cV), 1) for _ in range(3))
        least = torch.finfo(self.x_cV.dtype).min
        for x, ids, top_b1, flat_b1, sharp_b1 in self._blocks(ids_cK, top, flat, sharp):
            x.scatter_(1, ids, -torch.inf)
            # of the complement alone, so that its sums are at least 1 whatever was stored; none is left where K = V
            torch.amax(x, -1, keepdim=True, out=top_b1).clamp_(min=least)
            torch.sum(x.sub_(top_b1).exp_(), -1, keepdim=True, out=flat_b1)
            if power != 1:
                torch.sum(_power(x, power, self.scratch[: len(x)]), -1, keepdim=True, out=sharp_b1)
        return _Student(x_cK, *(each.double()[:, 0] for each in (top, flat, sharp)), self.job.flat, power)

    def _at_once(self, x_cK: Tensor, ids_cK: Tensor, slopes: "_Slopes") -> "_Student":
        """`_student` and `_differentiate` for one row after the other, with what a row needs in Python's floats.

        On one core rows of 152k then pass through the cache once, not twice: 90 of 300 microseconds a row.
        """
        job, power, scratch = self.job, self.job.power, self.scratch[0]
        least = torch.finfo(self.x_cV.dtype).min
        blank, number = x_cK.new_zeros(len(x_cK)), self.x_cV.new_zeros(())
        of_stored = _Student(x_cK, blank, blank, blank, job.flat, power).stored
        numbers = [each.tolist() for each in (*of_stored, slopes.rest_c, slopes.total_c)]
        found: list[tuple[float, float, float, float]] = []
        for x, ids, stored_flat, stored_sharp, rest, total in zip(
            self.x_cV.unbind(), ids_cK.unbind(), *numbers, strict=True
        ):
            top = max(x.scatter_(0, ids, -torch.inf).amax().item(), least)
            if 0 <= top <= SAFE / power:
                top = 0.0  # a pass less
            else:
                x.sub_(top)
            flat = sharp = x.exp_().sum().item()
            at_flat = at_sharp = flat, 1 / (flat + _exp(stored_flat - top))
            if power != 1:
                sharp = torch.dot(x, x).item() if power == 2 else _power(x, power, scratch).sum().item()
                at_sharp = sharp, 1 / (sharp + _exp(stored_sharp - power * top))
            at_t, at_1 = (at_flat, at_sharp) if job.temperature > 1 else (at_sharp, at_flat)
            by_flat, by_sharp = _factors(job, max(at_t[0], 1.0), at_t[1], at_1[1], rest, total)
            left = 1.0
            if power == 1:
                left = by_flat
            elif power == 2 and abs(by_sharp) < MOST_RATIO * abs(by_flat):
                # a x + b x^2 = a (x + b/a x^2) in one pass, a by the products' other side
                left = by_flat
                x.addcmul_(x, x, value=by_sharp / by_flat)
            else:
                base = x if power == 2 else _power(x, power - 1, scratch)
                x.mul_(torch.add(number.fill_(by_flat), base, alpha=by_sharp, out=scratch))
            if not abs(left) > LEAST_LEFT:
                x.mul_(left)
                left = 1.0
            found.append((top, flat, sharp, left))
        *sums, left_c = x_cK.new_tensor(found).unbind(1)
        self.left_c1 = left_c[:, None].to(self.x_cV.dtype)
        return _Student(x_cK, *sums, job.flat, power)

    def _differentiate(self, student: "_Student", slopes: "_Slopes") -> None:
        """Turn exp(x) into the gradient of the total by x, but for the `_own` entries."""
        job, t = self.job, self.job.temperature
        sum_c = student.sum(t).clamp(min=1)  # nothing to divide where nothing is left
        pair = _factors(job, sum_c, student.unit(t), student.unit(1.0), slopes.rest_c, slopes.total_c)
        flat, sharp = (each.to(self.x_cV.dtype)[:, None] for each in pair)
        for x, flat_b1, sharp_b1 in self._blocks(flat, sharp):
            if job.power == 1:
                x.mul_(flat_b1)
            else:
                scratch = self.scratch[: len(x)]
                base = x if job.power == 2 else _power(x, job.power - 1, scratch)
                x.mul_(torch.mul(base, sharp_b1, out=scratch).add_(flat_b1))

    def _own(self, student: "_Student", slopes: "_Slopes") -> Tensor:
        """What is added to the gradient by x at the stored entries, the draws and the label."""
        by_divergence, by_ce = self.job.slopes
        q_cK, q1_cK = (student.log_q(t)[:, :-1].exp() for t in (self.job.temperature, 1.0))
        at_head = by_divergence * (slopes.head_cK - q_cK * slopes.total_c[:, None]) + by_ce * q1_cK
        at_label = torch.full_like(slopes.total_c[:, None], -by_ce)
        return torch.cat([at_head, by_divergence * slopes.draws_cE, at_label], 1).to(self.x_cV.dtype)

    def dense(self, chunk: slice) -> Tensor:
        """Sums [ce, kl, kl_t1] over the chunk, of a teacher's logits."""
        job, teacher = self.job, self.job.teacher
        assert isinstance(teacher, DenseTeacher)
        logits_cV = teacher.logits[chunk] if isinstance(teacher.logits, Tensor) else teacher.logits(chunk)
        by_divergence, by_ce = job.slopes
        sums = torch.zeros(3, dtype=torch.float64, device=self.x_cV.device)
        # a quarter, for it takes a dozen temporary tensors of a block
        for x, raw, logits, labels_b1 in self._blocks(self.raw_cV, logits_cV, job.labels_N[chunk, None], share=4):
            p = logits[:, : job.vocab_size].to(x.dtype)
            log_p, log_q = (p / job.temperature).log_softmax(-1), (x * (job.flat / job.temperature)).log_softmax(-1)
            log_q1 = (x * job.flat).log_softmax(-1)
            value = divergence_terms(job.divergence, log_p, log_q)
            kl_t1 = divergence_terms(KL, p.log_softmax(-1), log_q1)
            sums += torch.stack([each.double().sum() for each in (-log_q1.gather(1, labels_b1), value, kl_t1)])
            if self.differentiate:
                slopes = divergence_slopes(job.divergence, log_p, log_q)
                torch.sub(slopes, log_q.exp_().mul_(slopes.sum(-1, keepdim=True)), out=x).mul_(by_divergence)
                x.add_(log_q1.exp_(), alpha=by_ce)
                x.scatter_add_(1, labels_b1, torch.full_like(x[:, :1], -by_ce))
                self._to_raw(x, raw)
        return sums

    def _scaled(self, raw: Tensor, out: Tensor) -> Tensor:
        """raw as it came, in `out`'s precision."""
        out.copy_(raw)
        return out.mul_(self.factor) if self.factor != 1 else out

    def _to_raw(self, gradient: Tensor, raw: Tensor) -> None:
        """The gradient by x becomes the gradient by raw, in its place."""
        if self.in_place:
            return
        if self.job.cap is not None:
            tanh = self._scaled(raw, self.scratch[: len(gradient)]).tanh_()
            gradient.mul_(tanh.square_().neg_().add_(1).mul_(self.job.cap))
        raw.copy_(gradient.mul_(self.factor) if self.factor != 1 else gradient)


class _Slopes(NamedTuple):
    """By log Q of the stored entries, of the bucket for the rest and of the draws; and the sum of all of them."""

    head_cK: Tensor
    rest_c: Tensor
    draws_cE: Tensor
    total_c: Tensor


class _Student(NamedTuple):
    """What the loss knows of the student: x = logits / flat at the stored entries, and sums over all others.

    top_c: the largest x of the others, or what else was taken off; flat_c, sharp_c: sums of exp(x - top) and its power.
    """

    x_cK: Tensor
    top_c: Tensor
    flat_c: Tensor
    sharp_c: Tensor
    flat: float
    power: float

    def scale(self, temperature: float) -> float:
        """logits / temperature = scale * x."""
        return self.flat / temperature

    def sum(self, temperature: float) -> Tensor:
        return self.flat_c if temperature == self.flat else self.sharp_c

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the sums of exp(x) and of its power over the stored entries."""
        return self.x_cK.logsumexp(-1), (self.power * self.x_cK).logsumexp(-1)

    def log_rest(self, temperature: float) -> Tensor:
        return self.scale(temperature) * self.top_c + self.sum(temperature).log()

    def log_z(self, temperature: float) -> Tensor:
        stored_c = self.stored[temperature != self.flat]
        return torch.logaddexp(stored_c, self.log_rest(temperature))

    def log_q(self, temperature: float) -> Tensor:
        """[c, K + 1]: the stored entries, and one bucket for all others."""
        x_cB = torch.cat([self.scale(temperature) * self.x_cK, self.log_rest(temperature)[:, None]], 1)
        return x_cB - self.log_z(temperature)[:, None]

    def unit(self, temperature: float) -> Tensor:
        """Q of a token whose x is top: exp(scale * top - log_z)."""
        stored_c = self.stored[temperature != self.flat] - self.scale(temperature) * self.top_c
        return 1 / (self.sum(temperature) + stored_c.exp())


def _factors(job: _Job, sum_at_t: Any, unit_at_t: Any, unit_at_1: Any, rest: Any, total: Any) -> tuple[Any, Any]:
    """What exp(x - top) and its power are multiplied by in the gradient by x; tensors, or floats of one row."""
    by_divergence, by_ce = job.slopes
    at_t, at_1 = by_divergence * (rest / sum_at_t - total * unit_at_t), by_ce * unit_at_1
    if job.power == 1:
        return at_t + at_1, at_1
    return (at_t, at_1) if job.temperature > 1 else (at_1, at_t)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _power(x: Tensor, power: float, out: Tensor) -> Tensor:
    """x ** power of numbers >= 0; torch's own is 5 times as slow but for some powers."""
    if power in (0.5, 2, 3):
        return torch.pow(x, power, out=out)
    return torch.log(x, out=out).mul_(power).exp_()
