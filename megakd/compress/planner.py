"""Which form every projection gets: a budget of parameters, and of FLOPs, spent where predictions say it buys most."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from megakd.compress.forms import Candidate
from megakd.errors import UserError
from megakd.models.shared_core import Form

BISECTIONS = 60  # of the price of a FLOP


def allocate(
    tables: Mapping[tuple[int, str], Sequence[Candidate]],
    dense_parameters: int,
    budget: float,
    dense_flops: float = 0.0,
    flops: float | None = None,
) -> dict[tuple[int, str], Form]:
    """The forms of least summed error with at most `budget` of the dense parameters and `flops` of the dense FLOPs.

    Every (layer, projection) counts the same, relative to its energy: the scale of a layer's weights says little of its
    weight in the result, for norms follow. Scale the errors where more is known. On the lower convex hull of
    (parameters, error) of each, steps are taken in the order of their gain a parameter until one does not fit
    (Lagrange; optimal but for that last step), which then goes as far as it can. With `flops`, error + price * FLOPs
    takes the place of the error, at the lowest price that keeps to them.
    """
    limit = budget * dense_parameters
    smallest = sum(min(c.parameters for c in table) for table in tables.values())
    if smallest > limit:
        least = math.ceil(smallest / dense_parameters * 1000) / 1000
        raise UserError(f"compress.budget={budget:g}: the smallest of compress.shapes need {least:g}")
    keys = sorted(tables)
    found = _spend([tables[key] for key in keys], limit, 0.0)
    if flops is not None and _flops(found) > flops * dense_flops:
        found = _within_flops([tables[key] for key in keys], limit, budget, flops, dense_flops)
    return {key: candidate.form for key, candidate in zip(keys, found, strict=True)}


def _hull(table: Sequence[Candidate], price: float) -> list[Candidate]:
    """The lower convex hull of (parameters, error + price * FLOPs), from the fewest parameters to the least value."""

    def value(c: Candidate) -> float:
        return c.error + price * c.flops

    hull: list[Candidate] = []
    for c in sorted(table, key=lambda c: (c.parameters, value(c), c.form)):
        if hull and value(c) >= value(hull[-1]):
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            # slopes compared as products: b stays where the gain from a to b is steeper than the one from b to c
            first, second = value(a) - value(b), value(b) - value(c)
            if first * (c.parameters - b.parameters) > second * (b.parameters - a.parameters):
                break
            hull.pop()
        hull.append(c)
    return hull


def _spend(tables: list[Sequence[Candidate]], limit: float, price: float) -> list[Candidate]:
    """Greedy along the hulls up to `limit` parameters; the step that does not fit goes as far as it can."""
    hulls = [_hull(table, price) for table in tables]
    steps = []
    for i, hull in enumerate(hulls):
        for a, b in pairwise(hull):
            gain = a.error + price * a.flops - b.error - price * b.flops
            steps.append((-gain / (b.parameters - a.parameters), i, b))
    # gains fall along a hull: the order keeps steps of one table in theirs
    steps.sort(key=lambda step: (step[0], step[1], step[2].parameters))
    found = [hull[0] for hull in hulls]
    spent = sum(c.parameters for c in found)
    for _, i, after in steps:
        more = after.parameters - found[i].parameters
        if spent + more > limit:
            room = limit - spent + found[i].parameters
            fitting = [c for c in tables[i] if c.parameters <= room]
            found[i] = min(fitting, key=lambda c: (c.error + price * c.flops, c.parameters, c.form))
            break
        found[i], spent = after, spent + more
    return found


def _within_flops(
    tables: list[Sequence[Candidate]], limit: float, budget: float, flops: float, dense_flops: float
) -> list[Candidate]:
    """`_spend` at the lowest price of a FLOP that keeps to the FLOPs; then, one by one, as at a price just too low."""
    allowed = flops * dense_flops
    low, high = 0.0, 1 / dense_flops
    while _flops(dear := _spend(tables, limit, high)) > allowed:
        low, high = high, high * 16
        if high * dense_flops > 1e18:
            least = math.ceil(_flops(dear) / dense_flops * 1000) / 1000
            raise UserError(
                f"compress.flops={flops:g}: with compress.budget={budget:g} the experts need at least {least:g}"
            )
    best, cheap = dear, _spend(tables, limit, low)
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high) if low > 0 else high / 16
        found = _spend(tables, limit, middle)
        if _flops(found) > allowed:
            low, cheap = middle, found
        else:
            high = middle
            best = min(best, found, key=lambda chosen: sum(c.error for c in chosen))
        if low > 0 and high / low < 1 + 1e-6:
            break
    # where tables are equal, many change at one price
    best = list(best)
    for i, other in sorted(enumerate(cheap), key=lambda pair: pair[1].error - best[pair[0]].error):
        changed = [*best[:i], other, *best[i + 1 :]]
        fits = _flops(changed) <= allowed and sum(c.parameters for c in changed) <= limit
        if fits and other.error < best[i].error:
            best = changed
    return best


def _flops(found: Sequence[Candidate]) -> float:
    return sum(c.flops for c in found)
