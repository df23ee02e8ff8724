"""Which sample comes when: a permutation per (seed, epoch) over the whole set; the state is one integer."""

import numpy as np


class Stream:
    """An endless order of `size` samples, shuffled anew each epoch, the same for any number of ranks.

    position = samples taken since the beginning of training. `take` is a pure function of it: a run goes on
    anywhere, on any number of ranks, by remembering the position alone.
    """

    def __init__(self, size: int, seed: int):
        assert size > 0, size
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def take(self, position: int, count: int) -> list[int]:
        """Indices of the samples at `position`, …, `position + count - 1`."""
        return [self._at(p) for p in range(position, position + count)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            self._epoch = epoch
        return int(self._order[place])


def share(indices: list[int], rank: int, world: int, micro_batch: int) -> list[list[int]]:
    """The micro-batches of one rank: samples rank, rank + world, … in groups of `micro_batch`."""
    mine = indices[rank::world]
    assert len(indices) % (world * micro_batch) == 0, (len(indices), world, micro_batch)
    return [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]
