"""Sequences of about one length side by side, so that little of a batch is padding."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megakd.config.data import StreamConfig
from megakd.data.shards import ShardSet

SORTED_GROUPS = 32  # are sorted by length together: the more, the more alike are the lengths in a group


class Groups(NamedTuple):
    """lengths: of the samples, [N]. size: samples in a row that are of about one length."""

    lengths: np.ndarray
    size: int

    def order(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The samples of `order` in groups.

        Every SORTED_GROUPS * size in a row are sorted by length and cut into groups, which come in a random order.
        """
        groups = []
        for start in range(0, len(order), SORTED_GROUPS * self.size):
            block = order[start : start + SORTED_GROUPS * self.size]
            block = block[np.argsort(self.lengths[block], kind="stable")]
            cut = [block[first : first + self.size] for first in range(0, len(block), self.size)]
            groups += [cut[at] for at in generator.permutation(len(cut))]
        return np.concatenate(groups)


def open_groups(config: StreamConfig, dataset: ShardSet) -> Groups | None:
    """The groups of a data set; None where its samples come in any order."""
    if not config.group_by_length:
        return None
    lengths = np.array([dataset.length(index) for index in range(len(dataset))], np.int32)
    return Groups(lengths, config.group_by_length)


def longest_first(dataset: ShardSet, indices: Sequence[int]) -> list[int]:
    """The samples in falling order of length, equal ones as they come: neighbours of a batch need little padding.

    The longest come first, so that memory that does not suffice is missed at once.
    """
    return sorted(indices, key=lambda index: -dataset.length(index))
