"""Divergences between teacher and student over the buckets of a distribution, and their slopes by either side.

P teacher, Q student: log-probabilities [.., B], -inf where a side has nothing; b = mix.

  kl          KL(P || Q)                                          Hinton et al. 2015, Distilling the Knowledge
  reverse_kl  KL(Q || P)                                          Gu et al. 2024, MiniLLM
  jsd         b KL(P || M) + (1 - b) KL(Q || M), M = bP + (1-b)Q  Agarwal et al. 2024, GKD, equation 1
  skew_kl     KL(P || bP + (1 - b)Q)                              Ko et al. 2024, DistiLLM, equation 4
  tvd         sum |P - Q| / 2                                     Wen et al. 2023, f-divergence minimization

Each is a sum over buckets of f(P_b, Q_b). Merging buckets makes it smaller, never larger: on the stored entries and one
bucket for all others it is a true divergence, of a coarser distribution.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["kl", "reverse_kl", "jsd", "skew_kl", "tvd"]


class Divergence(NamedTuple):
    """mix: b of jsd and skew_kl, between 0 and 1; the others have none."""

    kind: Kind = "kl"
    mix: float = 0.5


def divergence_terms(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """f(P_b, Q_b) of every bucket, [.., B]: their sum is the divergence."""
    return TERMS[divergence.kind](log_p, log_q, divergence.mix)


def divergence_slopes(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """v_b = df(P_b, Q_b) / dlog Q_b, [.., B]; by the logits of a softmax Q the gradient is v_b - Q_b sum(v)."""
    return SLOPES[divergence.kind](log_p, log_q, divergence.mix)


def teacher_slopes(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """u_b = df(P_b, Q_b) / dlog P_b, [.., B]; by the logits of a softmax P the gradient is u_b - P_b sum(u)."""
    return TEACHER_SLOPES[divergence.kind](log_p, log_q, divergence.mix)


def _weighted(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """weight * log_ratio, 0 where the weight is 0 and the ratio has no meaning."""
    return torch.where(weight > 0, weight * log_ratio, 0.0)


def _mixture(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(mix), log_q + math.log1p(-mix))


def _kl(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    return _weighted(log_p.exp(), log_p - log_q)


def _kl_slope(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    return -log_p.exp()


def _reverse_kl(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    return _weighted(log_q.exp(), log_q - log_p)


def _reverse_kl_slope(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    return _weighted(log_q.exp(), log_q - log_p + 1)


def _jsd(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    log_m = _mixture(log_p, log_q, mix)
    return mix * _weighted(log_p.exp(), log_p - log_m) + (1 - mix) * _weighted(log_q.exp(), log_q - log_m)


def _jsd_slope(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    return (1 - mix) * _weighted(log_q.exp(), log_q - _mixture(log_p, log_q, mix))


def _skew_kl(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    return _weighted(log_p.exp(), log_p - _mixture(log_p, log_q, mix))


def _skew_kl_slope(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    share = (log_q + math.log1p(-mix) - _mixture(log_p, log_q, mix)).exp()  # of Q in the mixture
    return torch.where(log_p > -torch.inf, -log_p.exp() * share, 0.0)


def _skew_kl_teacher_slope(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    log_m = _mixture(log_p, log_q, mix)
    share = (log_q + math.log1p(-mix) - log_m).exp()  # of Q in the mixture
    return _weighted(log_p.exp(), log_p - log_m + share)


def _tvd(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    return (log_p.exp() - log_q.exp()).abs() / 2


def _tvd_slope(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    q = log_q.exp()
    return (q - log_p.exp()).sign() * q / 2


Function = Callable[[Tensor, Tensor, float], Tensor]
TERMS: dict[Kind, Function] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "tvd": _tvd,
}
SLOPES: dict[Kind, Function] = {
    "kl": _kl_slope,
    "reverse_kl": _reverse_kl_slope,
    "jsd": _jsd_slope,
    "skew_kl": _skew_kl_slope,
    "tvd": _tvd_slope,
}
# f(P, Q) of most is f(Q, P) of another one, so its slope by the teacher is that one's by the student
TEACHER_SLOPES: dict[Kind, Function] = {
    "kl": lambda log_p, log_q, mix: _reverse_kl_slope(log_q, log_p, mix),
    "reverse_kl": lambda log_p, log_q, mix: _kl_slope(log_q, log_p, mix),
    "jsd": lambda log_p, log_q, mix: _jsd_slope(log_q, log_p, 1 - mix),
    "skew_kl": _skew_kl_teacher_slope,
    "tvd": lambda log_p, log_q, mix: _tvd_slope(log_q, log_p, mix),
}
