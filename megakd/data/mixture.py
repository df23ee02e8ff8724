"""Sequences of several sources in one order: the share of each is the asked one in every stretch of the data.

Each sequence comes from the source that lacks most tokens once another sequence is there: that of the largest
w (N + T) - n, where n is the number of tokens that it has given so far, w its weight, N the tokens of all sources and T
those of a whole sequence. So no source is ever further from its share than about one sequence's tokens, and the order
depends on the sequences alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from megakd.data.packing import Window
from megakd.data.windows import SourceWindows, State, total


class Given(NamedTuple):
    """What a source has given so far: its state, and the tokens that its sequences predict."""

    state: State
    tokens: int

    def record(self) -> dict[str, Any]:
        return {**self.state.record(), "tokens": self.tokens}


class Mixture:
    """The sources of a part from where each stands. ended: the index of the source that had no more, or None."""

    def __init__(
        self, sources: Sequence[SourceWindows], weights: Sequence[float], tokens: Sequence[int], sequence_length: int
    ):
        self.sources, self.tokens, self.sequence_length = sources, list(tokens), sequence_length
        self.weights = [weight / sum(weights) for weight in weights]
        self.ended: int | None = None

    def __iter__(self) -> Iterator[Window]:
        """Sequences until a source that is wanted has no more: without it the shares would not be those asked for."""
        while True:
            then = sum(self.tokens) + self.sequence_length
            lacking = [weight * then - given for given, weight in zip(self.tokens, self.weights, strict=True)]
            chosen = lacking.index(max(lacking))
            window = self.sources[chosen].take()
            if window is None:
                self.ended = chosen
                return
            self.tokens[chosen] += len(window.tokens) - 1
            yield window

    @property
    def given(self) -> list[Given]:
        return [Given(source.state, count) for source, count in zip(self.sources, self.tokens, strict=True)]

    @property
    def state(self) -> State:
        """The counts of all sources together."""
        return total([source.state for source in self.sources])

    def record(self) -> Any:
        """What a sidecar keeps for a resume: of one source its state, else each source's with its tokens."""
        return self.given[0].state.record() if len(self.sources) == 1 else [each.record() for each in self.given]

    def shares(self) -> list[dict[str, Any]]:
        """A manifest's lines about several sources; none of a single one, which has all."""
        if len(self.sources) == 1:
            return []
        whole = max(sum(self.tokens), 1)
        return [
            {"source": source.source.source, "weight": weight, "share": given.tokens / whole, **given.record()}
            for source, weight, given in zip(self.sources, self.weights, self.given, strict=True)
        ]


def given_of(recorded: Any, tokens: int, count: int) -> list[Given]:
    """Where the sources stood, from the `record` of the last shard and the tokens of all shards; at first, None."""
    if recorded is None:
        return [Given(State(), 0)] * count
    if isinstance(recorded, dict):
        return [Given(State(**recorded), tokens)]
    found = []
    for each in recorded:
        own = dict(each)
        found.append(Given(replace(State(), **{name: own[name] for name in own.keys() - {"tokens"}}), own["tokens"]))
    return found
