"""The teacher's mass outside the head at any temperature, and whole rows of log-probabilities from what is stored.

N tokens (any leading shape), K entries of the head, M declared temperatures, V real vocabulary, b = 1/T.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megakd.config.tails import near, points, reaches
from megakd.data.records import TeacherTargets
from megakd.errors import UserError
from megakd.losses.signals import Stored, Tail


def log_tail_at(targets: TeacherTargets, stored: Stored, temperature: float) -> Tensor:
    """F(b) = log of the sum over tokens outside the head of p^b, [N]: stored where T is declared, else interpolated.

    The cubic through the nearest points among what is stored and F(0) = log(V - entries of the row), kept within
    `log_tail_bounds`; float64. A constant of the loss: no gradient passes through it.
    """
    if temperature in stored.temperatures:
        return targets.log_tails[..., stored.column(temperature)]
    known = _known(targets, stored)
    places, weights, _ = near(stored.temperatures, temperature)
    value = torch.stack([weight * known[i] for i, weight in zip(places, weights, strict=True)]).sum(0)
    lower, upper = _bounds(known, stored, temperature)
    # rounded points may not be convex, and then the lower bound is above the upper one
    return torch.minimum(torch.maximum(value, lower), upper).masked_fill(_complete(targets, stored), -torch.inf)


def tail_for(targets: TeacherTargets, stored: Stored, tail: Tail, temperature: float) -> Tensor:
    """`log_tail_at` for a loss, [N]; truncated reads none, and has none where there is no column."""
    if tail == "truncated":
        return torch.zeros_like(targets.label_nll)
    return log_tail_at(targets, stored, temperature)


def log_tail_bounds(targets: TeacherTargets, stored: Stored, temperature: float) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of F(b), [N] each, up to the rounding of what is stored.

    F is convex: below the chord of the two points around b, above the chords of the points before and after them.
    """
    lower, upper = _bounds(_known(targets, stored), stored, temperature)
    complete = _complete(targets, stored)
    return lower.masked_fill(complete, -torch.inf), upper.masked_fill(complete, -torch.inf)


def reconstruct_logits(
    targets: TeacherTargets, vocab_size: int, temperature: float, temperatures: Sequence[float], rest: Any = None
) -> Tensor:
    """The teacher's log-probabilities at temperature T over the whole vocabulary, [.., V] float32, from a record.

    log P_i = log p_i / T - log Z at the K stored tokens, with Z the sum over the head of p^(1/T) plus r_T, the tail's
    sum; every other token has r_T / Z times its share. Rows sum to 1.
    targets: of one record or a batch ([.., K], numpy or tensors). temperatures: those of the tails, in the order of
    the manifest (`layout.temperatures`); T must be one that they reach.
    rest: None: equal shares, 1 / (V - K). Or weights [V] or [.., V], not negative: shares are proportional to them over
    the tokens outside the head (a unigram distribution, say); equal where a row has none.
    Error: at the head that of the codec. KL(teacher || this) is, on top of it, r_T / Z times the KL of the teacher's
    tail against the shares given. With equal shares that is 0.34 nats per token for SmolLM2-135M at T = 1, 1.18 at 2,
    0.66 at 3 and 0.37 at 4, which is why losses take the tail as one bucket.
    """
    if not targets.ids.shape[-1]:
        raise UserError("reconstruct_logits: these targets hold draws alone; it needs a head (profile topk or hybrid)")
    if not reaches(temperatures, temperature):
        known = ", ".join(f"{t:g}" for t in temperatures)
        raise UserError(f"reconstruct_logits: the targets carry tails for T = {known}, not {temperature:g}")
    targets = TeacherTargets(*map(torch.as_tensor, targets))
    stored = Stored(True, tuple(temperatures), None, vocab_size)
    ids, log_p = targets.ids.long(), targets.logprobs.double()
    kept = log_p > -torch.inf
    outside = torch.ones((*ids.shape[:-1], vocab_size), dtype=torch.bool).scatter(-1, ids, False)
    shares = outside.double()
    if rest is not None:
        given = shares * torch.as_tensor(rest).double()
        shares = torch.where(given.sum(-1, keepdim=True) > 0, given, shares)
    log_tail = log_tail_at(targets, stored, temperature).double()[..., None]
    log_tail = log_tail.masked_fill(~outside.any(-1, keepdim=True), -torch.inf)
    whole = shares.log() - shares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny).log() + log_tail
    # fillers repeat an id of their row: they go to a place of their own
    places = torch.where(kept, ids, vocab_size)
    whole = torch.cat([whole, torch.zeros_like(log_tail)], -1).scatter(-1, places, log_p / temperature)
    return whole[..., :vocab_size].log_softmax(-1).float()


def _known(targets: TeacherTargets, stored: Stored) -> list[Tensor]:
    """F at `points`, float64; where nothing is stored of a tail that exists, its upper bound.

    No token outside is more probable than the least of the head, so F falls at least that steeply. A byte cannot tell
    less than 4e-5 of the mass, so at T = 1 the bound may be far below what is stored.
    """
    kept = targets.logprobs > -torch.inf
    log_least = targets.logprobs.double().masked_fill(~kept, torch.inf).amin(-1)
    known = [(stored.vocab_size - kept.sum(-1)).clamp(min=1).double().log()]
    xs = points(stored.temperatures)
    for before, x in pairwise(xs):
        most = known[-1] + (x - before) * log_least
        told = targets.log_tails[..., stored.column(_temperature(stored, x))].double()
        known.append(torch.where(told > -torch.inf, torch.minimum(told, most), most))
    return known


def _temperature(stored: Stored, x: float) -> float:
    return next(t for t in stored.temperatures if 1 / t == x)


def _complete(targets: TeacherTargets, stored: Stored) -> Tensor:
    """Rows whose head is the whole vocabulary."""
    return (targets.logprobs > -torch.inf).sum(-1) >= stored.vocab_size


def _bounds(known: list[Tensor], stored: Stored, temperature: float) -> tuple[Tensor, Tensor]:
    xs, x = points(stored.temperatures), 1 / temperature

    def line(i: int) -> Tensor:
        """Through points i and i + 1."""
        share = (x - xs[i]) / (xs[i + 1] - xs[i])
        return known[i] + share * (known[i + 1] - known[i])

    at = max(i for i in range(len(xs) - 1) if xs[i] <= x)
    upper, lower = line(at), torch.full_like(known[0], -torch.inf)
    for neighbour in (at - 1, at + 1):
        if 0 <= neighbour < len(xs) - 1:
            lower = torch.maximum(lower, line(neighbour))
    return lower, upper
