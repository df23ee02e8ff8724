"""Losses between hidden states and attentions of teacher and student, and weights of positions by how far they differ.

B windows, T positions, D features, H heads of the student, G of the teacher, N counted positions, which are told by a
boolean mask [B, T] or by their places (`Rows`), on a GPU by these: a mask makes the CPU wait for their number.
Float32 after the inputs (float64 stays float64). Sums over counted positions, which do not depend on what else is in
the batch; positions that do not count are skipped before anything is computed, so not even NaN there has a say.
Gradients reach both sides.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from megakd.data.records import Rows, rows_of

# Added to a variance, so that a constant vector has a gradient; negligible above a standard deviation of about 1e-3.
VARIANCE_FLOOR = 1e-8
# Of an attention probability. Its inverse is the largest slope, and that times a loss scale must fit float32.
ATTENTION_FLOOR = 1e-20
# Of a gap in nats: below it gaps are rounding, and count alike.
GAP_FLOOR = 1e-6


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer that each of the student's S is compared with: ceil((i + 1) T / S) - 1, from 0.

    Evenly spread, never falling, last to last; each once where S <= T (Jiao et al. 2020, TinyBERT, section 3: S | T).
    """
    assert student_layers > 0 and teacher_layers > 0, (student_layers, teacher_layers)
    return [-(-(i + 1) * teacher_layers // student_layers) - 1 for i in range(student_layers)]


def feature_loss(student_BTD: Tensor, teacher_BTD: Tensor, counted_BT: Tensor | Rows) -> Tensor:
    """sum over counted positions of mean over features of (norm(s) - norm(t))^2, norm(x) = (x - mean) / deviation.

    It is 2 (1 - correlation), 0 to 4: no side makes it small by scale or shift. Who calls has projected the student to
    the teacher's width. (Sun et al. 2019, Patient Knowledge Distillation, section 3.2: divided by the norm alone.)
    """
    assert student_BTD.shape == teacher_BTD.shape, (student_BTD.shape, teacher_BTD.shape)
    rows = as_rows(counted_BT)
    student_ND, teacher_ND = (_standardised(wide(rows.pick(side))) for side in (student_BTD, teacher_BTD))
    return (student_ND - teacher_ND).square().mean(-1).sum()


def attention_loss(student_BHTT: Tensor, teacher_BGTT: Tensor, counted_BT: Tensor | Rows) -> Tensor:
    """sum over counted queries of mean over heads of KL(teacher's row || student's row), rows of probabilities.

    Unequal heads: both sides become gcd(H, G) heads, each the mean of as many neighbours; all heads where that is 1.
    counted_BT says which queries; keys that a query may not see have probability 0 on both sides. 0 log 0 = 0, and a
    student's 0 is taken as ATTENTION_FLOOR. (Wang et al. 2020, MiniLM, section 3.1.)
    """
    assert student_BHTT.shape[2:] == teacher_BGTT.shape[2:], (student_BHTT.shape, teacher_BGTT.shape)
    heads = math.gcd(student_BHTT.shape[1], teacher_BGTT.shape[1])
    p_NhT, q_NhT = (attention_rows(side, counted_BT, heads) for side in (teacher_BGTT, student_BHTT))
    log_p_NhT, log_q_NhT = (side.clamp(min=ATTENTION_FLOOR).log() for side in (p_NhT, q_NhT))
    return (p_NhT * (log_p_NhT - log_q_NhT)).sum(-1).mean(-1).sum()


def contrastive_loss(student_BTD: Tensor, teacher_BTD: Tensor, counted_BT: Tensor | Rows, temperature: float) -> Tensor:
    """sum over counted i of -log of exp(cos(s_i, t_i) / T) / sum_j exp(cos(s_i, t_j) / T), j counted in i's window.

    Negatives from the same window alone, whatever else is in the batch. 0 for a window of fewer than two. A window
    needs T x T similarities. (InfoNCE: van den Oord et al. 2018, section 2.3; between models: Sun et al. 2020,
    CoDIR, section 3.)
    """
    assert student_BTD.shape == teacher_BTD.shape, (student_BTD.shape, teacher_BTD.shape)
    rows, windows = as_rows(counted_BT), []
    sides = (rows.pick(side).split(rows.sizes) for side in (student_BTD, teacher_BTD))
    for both in zip(*sides, strict=True):
        student_ND, teacher_ND = (functional.normalize(wide(side), dim=-1) for side in both)
        cosine_NN = student_ND @ teacher_ND.T / temperature
        windows.append((cosine_NN.logsumexp(-1) - cosine_NN.diagonal()).sum())
    return torch.stack(windows).sum()


@torch.no_grad()
def gap_weights(gap_BT: Tensor, counted_BT: Tensor, strength: float) -> Tensor:
    """(gap + GAP_FLOOR)^strength over its mean over the window's counted positions, [B, T]; 0 at others; no gradient.

    gap: how far teacher and student are apart at a position, in nats; below 0 is 0. strength 0: 1 each. The factor of
    the focal loss (Lin et al. 2017, section 3.2) with a gap in the place of 1 - p, and a sum that stays the same.
    """
    if not gap_BT.shape[-1]:  # windows of no spans
        return wide(gap_BT)
    log_BT = strength * (wide(gap_BT).clamp(min=0) + GAP_FLOOR).log()
    log_BT = torch.where(counted_BT, log_BT, -torch.inf)
    # over the largest: a power alone may leave float32
    power_BT = torch.where(counted_BT, (log_BT - log_BT.amax(-1, keepdim=True)).exp(), 0.0)
    mean_B1 = power_BT.sum(-1, keepdim=True) / counted_BT.sum(-1, keepdim=True)
    return torch.where(counted_BT, power_BT / mean_B1, 0.0)


def as_rows(counted_BT: Tensor | Rows) -> Rows:
    return counted_BT if isinstance(counted_BT, Rows) else rows_of(counted_BT)


def wide(values: Tensor) -> Tensor:
    """Float32, or float64 where it is that already."""
    return values if values.dtype == torch.float64 else values.float()


def _standardised(values_ND: Tensor) -> Tensor:
    return functional.layer_norm(values_ND, values_ND.shape[-1:], eps=VARIANCE_FLOOR)


def attention_rows(attention_BHTT: Tensor, counted_BT: Tensor | Rows, heads: int) -> Tensor:
    """The counted queries' rows with neighbouring heads averaged to `heads`, [N, h, T]."""
    rows = as_rows(counted_BT)
    window_N, query_N = rows.flat // rows.length, rows.flat % rows.length
    # by two places: flattened, the transposed maps would be copied as a whole
    rows_NHT = wide(attention_BHTT.transpose(1, 2)[window_N, query_N])
    return rows_NHT.unflatten(1, (heads, -1)).mean(2)
