import random
import re
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest

from megakd.data.stream import Stream, shards_digest, share
from tests.conftest import ROOT, for_each


def shard_of(sizes: Sequence[int], index: int) -> int:
    return next(s for s in range(len(sizes)) if index < sum(sizes[: s + 1]))


def reference_shards(sizes: Sequence[int], order: Sequence[int], lanes: int) -> list[int]:
    """Whose turn it is: lane l goes through shards order[l], order[l + lanes], …; each lane gives a sample in turn."""
    queues = [[s for s in order[lane::lanes] for _ in range(sizes[s])] for lane in range(lanes)]
    turns = []
    while any(queues):
        turns += [queue.pop(0) for queue in queues if queue]
    return turns


@for_each("lanes", [0, 1, 3])
@for_each("sizes", [[1], [2], [3, 0, 4], [5, 9, 1, 7, 8]])
def test_take_is_a_pure_function_of_position(sizes, lanes):
    size = sum(sizes)
    whole = Stream(sizes, 5, lanes).take(0, 4 * size + 3)
    used = Stream(sizes, 5, lanes)  # asked here and there, back and forth, across epochs
    chooser = random.Random(0)
    for _ in range(50):
        position = chooser.randrange(4 * size)
        count = chooser.randint(0, len(whole) - position)
        assert used.take(position, count) == whole[position : position + count]
        assert Stream(sizes, 5, lanes).take(position, count) == whole[position : position + count]


@for_each("lanes", [0, 1, 2, 4, 9])
@for_each("sizes", [[1], [2], [3, 0, 4], [5, 9, 1, 7, 8]])
def test_each_epoch_has_every_sample_once(sizes, lanes):
    size = sum(sizes)
    stream = Stream(sizes, 0, lanes)
    for epoch in range(5):
        assert sorted(stream.take(epoch * size, size)) == list(range(size))


@for_each("lanes", [0, 1, 4])
def test_epochs_and_seeds_have_other_orders(lanes):
    sizes = [7, 8, 6, 9]
    orders = [Stream(sizes, seed, lanes).take(30 * epoch, 30) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert list(range(30)) not in orders


def test_without_lanes_shards_make_no_difference():
    assert Stream([30], 3).take(0, 90) == Stream([11, 19], 3).take(0, 90)


@for_each("seed", range(20))
def test_lanes_take_shards_in_turn(seed):
    """The first epoch in the order of the manifest; later ones in orders of their own, but by the same rule."""
    chooser = random.Random(seed)
    sizes, lanes = [chooser.randint(0, 7) for _ in range(12)] + [1], chooser.randint(1, 5)
    first = [shard_of(sizes, i) for i in Stream(sizes, seed, lanes).take(0, sum(sizes))]
    assert first == reference_shards(sizes, range(13), lanes)
    equal = [4] * 12  # then the order in which shards begin is the order of the shards
    epochs = [[i // 4 for i in Stream(equal, seed, lanes).take(48 * epoch, 48)] for epoch in range(4)]
    orders = [list(dict.fromkeys(epoch)) for epoch in epochs]
    assert orders[0] == list(range(12)) and len({tuple(order) for order in orders}) == 4
    assert epochs == [reference_shards(equal, order, lanes) for order in orders]


@for_each("epoch", [0, 1, 2])
@for_each("seed", range(10))
def test_at_most_as_many_shards_as_lanes_are_open(seed, epoch):
    """Open: from the first of its samples in an epoch to the last."""
    chooser = random.Random(seed)
    sizes = [chooser.randint(1, 9) for _ in range(chooser.randint(5, 15))]
    lanes, size = chooser.randint(1, 4), sum(sizes)
    shards = [shard_of(sizes, i) for i in Stream(sizes, seed, lanes).take(epoch * size, size)]
    spans = [(shards.index(s), size - shards[::-1].index(s)) for s in range(len(sizes))]
    assert max(sum(start <= p < end for start, end in spans) for p in range(size)) == lanes


def test_samples_of_a_shard_come_in_random_order():
    order = Stream([50, 50], 0, 1).take(0, 100)
    assert order[:50] != sorted(order[:50]) and sorted(order[:50]) == list(range(50))
    assert [i - 50 for i in order[50:]] != order[:50]


@for_each("seed", range(5))
def test_the_order_of_shards_is_not_that_within_the_first_of_them(seed):
    """They came from one generator: as many samples in a shard as there are shards, and both were shuffled alike."""
    count, epoch = 20, 3
    order = Stream([count] * count, seed, 1).take(epoch * count**2, count**2)
    shards = list(dict.fromkeys(i // count for i in order))
    within = {s: [i % count for i in order if i // count == s] for s in range(count)}
    assert sorted(shards) == list(range(count)) and shards not in within.values()
    assert len({tuple(each) for each in within.values()}) == count


def test_the_order_without_lanes_stays_that_of_runs_that_have_begun():
    assert Stream([11, 19], 3).take(28, 6) == np.random.default_rng([3, 0]).permutation(30)[28:].tolist() + (
        np.random.default_rng([3, 1]).permutation(30)[:4].tolist()
    )


def steps(stream: Stream, position: int, count: int, world: int, micro_batch: int, batch: int) -> list[list[int]]:
    """What all ranks together see in each step, put back into the order of the stream."""
    seen = []
    for start in range(position, position + count * batch, batch):
        indices = stream.take(start, batch)
        ranks = [share(indices, rank, world, micro_batch) for rank in range(world)]
        assert {len(group) for rank in ranks for group in rank} == {micro_batch}
        assert {len(rank) for rank in ranks} == {batch // world // micro_batch}
        seen.append([index for turn in zip(*ranks, strict=True) for group in turn for index in group])
    return seen


@for_each("world", [1, 2, 3, 4])
@for_each("micro_batch", [1, 2])
@for_each("lanes", [0, 2])
def test_any_number_of_ranks_covers_the_same_order(world, micro_batch, lanes):
    """24 samples a step of 31: steps cross the border of epochs."""
    found = steps(Stream([12, 19], 3, lanes), 0, 5, world, micro_batch, 24)
    order = Stream([12, 19], 3, lanes).take(0, 5 * 24)
    assert found == [order[i : i + 24] for i in range(0, len(order), 24)]


@for_each("seed", range(200))
def test_stopping_and_resuming_with_other_ranks_never_changes_the_order(seed):
    """Any shards, batch and lanes; stops at random steps, in the middle of epochs; from 1 to 4 ranks, micro-batches."""
    chooser = random.Random(seed)
    sizes = [chooser.randint(0, 40) for _ in range(chooser.randint(1, 9))] + [1]
    lanes, batch = chooser.randint(0, 6), 12 * chooser.randint(1, 3)
    undisturbed = steps(Stream(sizes, seed, lanes), 0, 12, 1, 1, batch)
    done: list[list[int]] = []
    while len(done) < 12:
        world = chooser.randint(1, 4)
        micro_batch = chooser.choice([m for m in range(1, batch + 1) if batch // world % m == 0])
        count = chooser.randint(1, 12 - len(done))
        stream = Stream(sizes, seed, lanes)  # a new process: it knows the position alone
        done += steps(stream, len(done) * batch, count, world, micro_batch, batch)
    assert done == undisturbed


def test_a_step_that_does_not_divide_is_our_mistake():
    with pytest.raises(AssertionError):
        share(list(range(10)), 0, 3, 1)
    with pytest.raises(AssertionError):
        share(list(range(12)), 0, 2, 4)
    with pytest.raises(AssertionError):
        Stream([0, 0], 0)


def test_shards_have_another_digest_when_a_position_would_mean_another_sample():
    names, sizes = ["shard-00000", "shard-00001", "shard-00002"], [5, 6, 6]
    others = [
        (names[:2], sizes[:2]),
        ([*names, "shard-00003"], [*sizes, 1]),
        (names, [5, 6, 7]),
        (names, [6, 5, 6]),
        (names[::-1], sizes),
        (["shard-00001", "shard-00000", "shard-00002"], sizes),
    ]
    assert shards_digest(names, sizes) == shards_digest(tuple(names), tuple(sizes))
    assert len({shards_digest(*each) for each in [(names, sizes), *others]}) == 7


def documented(name: str) -> Callable[..., list[int]]:
    """A function of docs/data-format.md, which needs nothing of MegaKD."""
    text = (ROOT / "docs" / "data-format.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    made: dict = {}
    exec(next(code for code in examples if f"def {name}(" in code), made)
    return made[name]


def test_the_documented_rule_gives_the_order():
    order_of = documented("order_of")
    sizes = [5, 1, 7, 3, 4]
    for seed, lanes in product((0, 3), (0, 1, 2, 5, 8)):
        expected = [sample for epoch in range(3) for sample in order_of(sizes, seed, epoch, lanes)]
        assert Stream(sizes, seed, lanes).take(0, 3 * sum(sizes)) == expected, (seed, lanes)
