"""Losses between models with tokenizers of their own: over spans of text whose ends both have in common.

B windows, T tokens, S spans at most in a window, D features. spans_BT: the number of a token's span, from 0; -1 (or
less) for none: such tokens are skipped before anything is computed, so not even NaN there has a say. Float32 after the
inputs (float64 stays float64). Sums over spans, which do not depend on what else is in the batch. Gradients reach both
sides.
"""

import math

import torch
from torch import Tensor

from megakd.data.records import Rows
from megakd.losses.hidden import as_rows, feature_loss, wide

# Taken off every span's log-probability: at probability 1 the slope towards a surer student would be infinite.
NEVER_CERTAIN = 1e-6
# Below it a log-probability is taken as it: -inf, a token that a model cannot say, would make the loss infinite.
LEAST_LOGPROB = -1e6


def span_means(hidden_BTD: Tensor, spans_BT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean hidden state over the tokens of each span [B, S, D], 0 without tokens, and how many there are [B, S]."""
    sums_BSD, sizes_BS = _span_sums(hidden_BTD, spans_BT, count)
    return sums_BSD / sizes_BS.clamp(min=1)[:, :, None], sizes_BS


def span_sizes(spans_BT: Tensor, count: int) -> Tensor:
    """How many tokens each span has, [B, S]."""
    return _span_sums(spans_BT.new_zeros(spans_BT.shape, dtype=torch.float32), spans_BT, count)[1]


def span_attention(attention_BHTT: Tensor, spans_BT: Tensor, count: int) -> Tensor:
    """How much each span attends to each, [B, H, S, S]: mean over its queries of the sum over the other's keys.

    Rows add up to 1, as those of a map do; rows of spans without tokens, and tokens of no span, are 0.
    """
    outside_BT = spans_BT < 0
    # skipped before anything is computed: NaN times 0 is NaN
    hidden_B1TT = outside_BT[:, None, :, None] | outside_BT[:, None, None, :]
    seen_BHTT = wide(attention_BHTT).masked_fill(hidden_B1TT, 0.0)
    belongs_B1TS = (spans_BT[:, None, :, None] == torch.arange(count, device=spans_BT.device)).to(seen_BHTT.dtype)
    means_B1ST = (belongs_B1TS / belongs_B1TS.sum(2, keepdim=True).clamp(min=1)).transpose(2, 3)
    return means_B1ST @ (seen_BHTT @ belongs_B1TS)


def span_feature_loss(student_BSD: Tensor, teacher_BSD: Tensor, there_BS: Tensor | Rows) -> Tensor:
    """`feature_loss` of spans: sum over those where both sides have tokens (there_BS), mean over features."""
    return feature_loss(student_BSD, teacher_BSD, there_BS)


def span_logprobs(logprobs_BT: Tensor, label_spans_BT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """log p of each span: the sum over its tokens [B, S], 0 without tokens, and how many there are [B, S].

    logprobs_BT: log p of the label of each position; label_spans_BT: the span of that label, not of the position.
    """
    return _span_sums(logprobs_BT, label_spans_BT, count)


def span_likelihood_loss(student_BS: Tensor, teacher_BS: Tensor, there_BS: Tensor | Rows, temperature: float) -> Tensor:
    """The sum of `span_likelihoods`."""
    return span_likelihoods(student_BS, teacher_BS, there_BS, temperature).sum()


def span_likelihoods(student_BS: Tensor, teacher_BS: Tensor, there_BS: Tensor | Rows, temperature: float) -> Tensor:
    """Of each span (there_BS) a log(a / b) + (1 - a) log((1 - a) / (1 - b)), a = p^(1/T), b = q^(1/T); [N].

    p, q: the span's probability, from log-probabilities of the teacher and of the student (span_logprobs).
    Approximate likelihood matching (Minixhofer, Vulić, Ponti 2025, Universal Cross-Tokenizer Distillation via
    Approximate Likelihood Matching, section 3); the paper takes T = 100.
    Neither T nor T^2 is inside, as in the paper. The slope by log q is (b - a) / (1 - b) / T: it falls with 1 / T, not
    with 1 / T^2 as that of logits does, for 1 - b itself is near -log q / T. T times the loss has a limit,
    |log p| log(log p / log q) - |log p| + |log q|, so a weight that grows with T holds its strength; T^2 would not.
    """
    rows = as_rows(there_BS)
    log_a, log_b = (_tempered(rows.pick(side), temperature) for side in (teacher_BS, student_BS))
    return log_a.exp() * (log_a - log_b) - log_a.expm1() * (log1mexp(log_a) - log1mexp(log_b))


def log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0: log(-expm1(x)) near 0, log1p(-exp(x)) elsewhere (Mächler 2012, equation 7)."""
    near = values > -math.log(2)
    # near 0 exp(x) is 1 and the slope of log1p(-1) infinite: times 0, as the form that is not taken, it would be NaN
    far = (-torch.where(near, -1.0, values).exp()).log1p()
    return torch.where(near, (-values.expm1()).log(), far)


def _tempered(logprobs: Tensor, temperature: float) -> Tensor:
    """log of p^(1/T), p a hair below what it is on both sides: still a divergence, 0 for equals."""
    return (wide(logprobs).clamp(LEAST_LOGPROB, 0.0) - NEVER_CERTAIN) / temperature


def _span_sums(values: Tensor, spans_BT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each span [B, S, ..] of values [B, T, ..], and how many there are [B, S]."""
    windows, inside_BT = len(spans_BT), spans_BT >= 0
    # by places alone: what belongs to no span goes to one that is dropped, and a number that is too large ends the run
    # (`index_add` on either device), for it would land in the next window
    number_BT = torch.where(spans_BT < count, spans_BT, windows * count + 1)
    places_BT = torch.arange(windows, device=spans_BT.device)[:, None] * count + number_BT
    index_N = torch.where(inside_BT, places_BT, windows * count).flatten()
    inside = inside_BT.view(*inside_BT.shape, *(1,) * (values.ndim - 2))
    picked = wide(torch.where(inside, values, 0.0)).flatten(0, 1)
    sums = picked.new_zeros(windows * count + 1, *picked.shape[1:]).index_add(0, index_N, picked)[:-1]
    sizes = index_N.new_zeros(windows * count + 1).index_add(0, index_N, torch.ones_like(index_N))[:-1]
    return sums.view(windows, count, *picked.shape[1:]), sizes.view(windows, count)
