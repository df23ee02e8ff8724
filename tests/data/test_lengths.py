"""Sequences of about one length side by side: every sample once, the same order everywhere, and little padding."""

from itertools import pairwise

import numpy as np
import pytest

from megakd.config.parsing import load_recipe
from megakd.data.batches import batch_width
from megakd.data.lengths import SORTED_GROUPS, Groups
from megakd.data.stream import Stream, share
from megakd.errors import UserError
from megakd.run import Run
from tests.conftest import for_each


def lengths_of_documents(count: int, longest: int, seed: int = 0) -> np.ndarray:
    """As web pages have them: a factor of 20 between the shortest and the longest tenth, cut at the longest."""
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 4), 1.2, count)
    return np.clip(drawn, 2, longest).astype(np.int32)


@for_each("size", [1, 3, 8, 100, 5000])
def test_each_epoch_has_every_sample_once_and_any_place_can_be_asked(size):
    groups = Groups(lengths_of_documents(700, 64), size)
    whole = Stream([300, 400], 5, groups=groups).take(0, 1400)
    assert sorted(whole[:700]) == sorted(whole[700:]) == list(range(700)) and whole[:700] != whole[700:]
    assert Stream([300, 400], 5, groups=groups).take(650, 100) == whole[650:750]
    assert Stream([300, 400], 6, groups=groups).take(0, 700) != whole[:700]


def test_groups_are_neighbours_in_length_in_a_random_order():
    size, lengths = 8, np.random.default_rng(1).permutation(SORTED_GROUPS * 8)
    order = Groups(lengths, size).order(np.arange(len(lengths)), np.random.default_rng(2))
    found = lengths[order].reshape(-1, size)
    assert (found == found[:, :1] + np.arange(size)).all() and not (np.diff(found[:, 0]) > 0).all()


@for_each("micro_batch", [1, 4, 16])
@for_each("steps_own", [1, 4])
def test_padding_stays_below_a_tenth(micro_batch, steps_own):
    """However few micro-batches a step has, where its sequences come in groups."""
    longest, step = 2048, steps_own * micro_batch
    lengths = lengths_of_documents(6000, longest)

    def padding(groups: Groups | None) -> float:
        stream, tokens, positions = Stream([6000], 0, groups=groups), 0, 0
        for start in range(0, 6000 - step, step):
            ordered = sorted(stream.take(start, step), key=lambda index: -lengths[index])
            for batch in share(ordered, 0, 1, micro_batch):
                tokens += int(lengths[batch].sum())
                positions += len(batch) * batch_width(lengths[batch].tolist(), longest)
        return 1 - tokens / positions

    assert padding(Groups(lengths, step)) <= 0.1
    if micro_batch == 16 and steps_own == 1:
        assert padding(None) > 0.4  # what groups are for


@for_each("world", [1, 2, 4])
def test_ranks_share_the_micro_batches_of_one(world):
    one = share(list(range(48)), 0, 1, 3)
    turns = zip(*(share(list(range(48)), rank, world, 3) for rank in range(world)), strict=True)
    assert [batch for turn in turns for batch in turn] == one
    assert all(b[0] == a[-1] + 1 for a, b in pairwise(one))


def test_what_has_no_effect_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"stream.group_by_length.*data.packing=documents makes others"):
        Run.create(recipe, ["stream.group_by_length=8"], tmp_path / "run")
    with pytest.raises(UserError, match=r"group_by_length=8 is an order of its own: set stream.lanes=0"):
        load_recipe(recipe, ["stream.group_by_length=8", "data.packing=documents", "stream.lanes=2"])
