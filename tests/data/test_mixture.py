"""The order of several sources: whatever their sequences are, no source is far from its share."""

from typing import Any

import numpy as np
import pytest

from megakd.data.mixture import Mixture, given_of
from megakd.data.packing import Cursor, Window
from megakd.data.windows import State


class Source:
    """Sequences of random lengths that begin with the number of the source."""

    def __init__(self, name: int, count: int, longest: int):
        self.sizes = np.random.default_rng(name).integers(2, longest + 2, count).tolist()
        self.name, self.state = name, State()

    def take(self) -> Window | None:
        if not self.sizes:
            return None
        tokens = np.full(self.sizes.pop(0), self.name, np.int32)
        return Window(tokens, np.zeros(1, np.int32), Cursor(0, 0))


def mixture(weights: list[float], count: int = 400, longest: int = 32) -> Mixture:
    sources: Any = [Source(name, count, longest) for name in range(len(weights))]
    return Mixture(sources, weights, [0] * len(weights), longest)


def order(mixed: Mixture) -> list[tuple[int, int]]:
    """(source, tokens) of each sequence."""
    return [(int(window.tokens[0]), len(window.tokens) - 1) for window in mixed]


@pytest.mark.parametrize(
    "weights", [[1, 1], [7, 2, 1], [0.62, 0.38], [100, 1], [10, 1, 1, 1, 1, 1, 1], [3, 3, 3, 3, 1e-3], [5]]
)
def test_a_source_is_never_further_from_its_share_than_a_sequence(weights):
    longest = 32
    given, total = [0] * len(weights), 0
    for source, tokens in order(mixture(weights, longest=longest)):
        given[source] += tokens
        total += tokens
        for have, weight in zip(given, weights, strict=True):
            assert abs(have - total * weight / sum(weights)) <= longest


def test_weights_count_in_proportion():
    assert order(mixture([0.3, 0.2])) == order(mixture([30, 20]))


def test_it_ends_where_a_source_that_is_wanted_has_no_more():
    mixed = mixture([1, 1], count=50)
    found = order(mixed)
    assert mixed.ended in (0, 1) and sum(source == mixed.ended for source, _ in found) == 50


def test_states_are_read_back_as_they_were_written():
    mixed = mixture([3, 1], count=20)
    order(mixed)
    assert given_of(mixed.record(), sum(mixed.tokens), 2) == mixed.given
    single = mixture([1], count=20)
    tokens = sum(tokens for _, tokens in order(single))
    assert given_of(single.record(), tokens, 1) == single.given and "tokens" not in single.record()
    assert [each.tokens for each in given_of(None, 0, 3)] == [0, 0, 0]
