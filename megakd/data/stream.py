"""Which sample comes when: an order per (seed, epoch) over the whole set; the state is one integer."""

from collections.abc import Sequence

import numpy as np

from megakd.data.curriculum import Curriculum
from megakd.data.lengths import Groups
from megakd.system.files import digest


class Stream:
    """An endless order of samples, shuffled anew each epoch, the same for any number of ranks.

    position = samples taken since the beginning of training. `take` is a pure function of it: a run goes on
    anywhere, on any number of ranks, by remembering the position alone.

    sizes: samples of each shard. stream.lanes=0: any sample may follow any other. stream.lanes=L: L shards are read at
    a time,
    one sample of each in turn, each shard in random order: what remote shards and a capture that still runs need. The
    first epoch then takes shards in the order of the manifest, later ones in a random order.
    curriculum: epochs that begin with a competence below 1 take easy samples first, still each once.
    groups: samples in a row are of about one length. At most one of the three is given.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        lanes: int = 0,
        curriculum: Curriculum | None = None,
        groups: Groups | None = None,
    ):
        self.sizes, self.seed, self.lanes = np.asarray(sizes, np.int64), seed, lanes
        self.size = int(self.sizes.sum())
        self.curriculum, self.groups = curriculum, groups
        assert self.size > 0, sizes
        assert bool(lanes) + bool(curriculum) + bool(groups) <= 1, (lanes, curriculum, groups)
        assert curriculum is None or len(curriculum.easiest) == self.size, sizes
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def take(self, position: int, count: int) -> list[int]:
        """Indices of the samples at `position`, …, `position + count - 1`."""
        return [self._at(p) for p in range(position, position + count)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._order = self._epoch_order(epoch)
            self._epoch = epoch
        return int(self._order[place])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self.curriculum and self.curriculum.competence(epoch * self.size) < 1:
            return self.curriculum.order(epoch, self._generator(epoch))
        if self.lanes:
            return self._lanes(epoch)
        generator = self._generator(epoch)
        order = generator.permutation(self.size)
        return self.groups.order(order, generator) if self.groups else order

    def _generator(self, *name: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *name])

    def _lanes(self, epoch: int) -> np.ndarray:
        count, first = len(self.sizes), np.cumsum(self.sizes) - self.sizes
        shards = self._generator(epoch).permutation(count) if epoch else np.arange(count)
        samples, turns, lanes = [], [], []
        for lane in range(self.lanes):
            # from 1 on: numpy pads names with zeros, so that (epoch, 0) would be the generator of (epoch)
            mine = [
                first[s] + self._generator(epoch, int(s) + 1).permutation(self.sizes[s])
                for s in shards[lane :: self.lanes]
            ]
            own = np.concatenate(mine) if mine else np.empty(0, np.int64)
            samples.append(own)
            turns.append(np.arange(len(own)))
            lanes.append(np.full(len(own), lane))
        return np.concatenate(samples)[np.lexsort((np.concatenate(lanes), np.concatenate(turns)))]


def shards_digest(names: Sequence[str], sizes: Sequence[int], curriculum: Curriculum | None = None) -> str:
    """What a position counts over: over other shards, or as many in another order, it means another sample."""
    shards = digest([list(shard) for shard in zip(names, sizes, strict=True)])
    return digest([shards, curriculum.digest()]) if curriculum else shards


def share(indices: list[int], rank: int, world: int, micro_batch: int) -> list[list[int]]:
    """The micro-batches of one rank, made of neighbours in `indices`: number rank, rank + world, …"""
    assert len(indices) % (world * micro_batch) == 0, (len(indices), world, micro_batch)
    batches = [indices[i : i + micro_batch] for i in range(0, len(indices), micro_batch)]
    return batches[rank::world]
