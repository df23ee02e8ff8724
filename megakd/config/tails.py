"""Which temperatures a data set's tails reach: the declared ones, and those near enough to interpolate.

With b = 1/T and p the teacher at T = 1, F(b) = log of the sum of p^b over the tokens outside the head is convex in b.
It is stored at the declared temperatures, and F(0) = log(V - K) is known for V tokens and K stored entries. Between
those points F is the cubic through the two before and the two after b (losses/tails.py). Its error is a fourth
derivative of F times the product of b - b_k over the four points, and the rounding of stored tails grows by the sum of
the weights' magnitudes: `reaches` bounds both. What that costs: docs/experiments/2026-11-30-tail-temperatures.md.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

DEFAULT = (1.0, 1.33, 2.0, 4.0)  # they reach every T in [1, 4]
NEAREST = 4  # points of a polynomial: with more of them the rounding of stored tails grows more than the error falls
MOST_PRODUCT = 4.2e-3
MOST_GROWTH = 2.0
RAMP_POINTS = 64  # at which a range of temperatures is checked


class Near(NamedTuple):
    """The points of a temperature's polynomial: places in `points`, and what F counts there; weights sum to 1."""

    places: range
    weights: tuple[float, ...]
    product: float


def points(temperatures: Sequence[float]) -> list[float]:
    """The b at which F is known, ascending: 0, then 1/T of the declared temperatures from the highest."""
    return [0.0, *(1 / t for t in sorted(set(temperatures), reverse=True))]


def near(temperatures: Sequence[float], temperature: float) -> Near:
    """The points about b = 1/T, two on each side where there are, and Lagrange's weights."""
    known, b = points(temperatures), 1 / temperature
    before = sum(x <= b for x in known)
    first = max(min(before - NEAREST // 2, len(known) - NEAREST), 0)
    places = range(first, min(first + NEAREST, len(known)))
    xs = [known[i] for i in places]
    weights = tuple(math.prod((b - x) / (own - x) for x in xs if x != own) for own in xs)
    return Near(places, weights, math.prod(abs(b - x) for x in xs))


def reaches(temperatures: Sequence[float], temperature: float) -> bool:
    """Whether the tails at T are stored, or interpolated within the stated error; never beyond the declared range."""
    if temperature in temperatures:
        return True
    if not temperatures or not min(temperatures) < temperature < max(temperatures):
        return False
    _, weights, product = near(temperatures, temperature)
    return product <= MOST_PRODUCT and sum(map(abs, weights)) <= MOST_GROWTH


def reaches_all(temperatures: Sequence[float], start: float, end: float) -> bool:
    """`reaches` at both ends and at every temperature between them."""
    between = (start + (end - start) * i / RAMP_POINTS for i in range(1, RAMP_POINTS))
    return all(reaches(temperatures, each) for each in (start, end, *between))
