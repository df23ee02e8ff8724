import random

import pytest

from megakd.data.stream import Stream, share


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_take_is_a_pure_function_of_position(size):
    whole = Stream(size, seed=5).take(0, 4 * size + 3)
    used = Stream(size, seed=5)  # asked here and there, back and forth, across epochs
    chooser = random.Random(0)
    for _ in range(50):
        position = chooser.randrange(4 * size)
        count = chooser.randint(0, len(whole) - position)
        assert used.take(position, count) == whole[position : position + count]
        assert Stream(size, seed=5).take(position, count) == whole[position : position + count]


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_each_epoch_is_a_permutation(size):
    stream = Stream(size, seed=0)
    for epoch in range(5):
        assert sorted(stream.take(epoch * size, size)) == list(range(size))


def test_epochs_and_seeds_have_other_orders():
    orders = [Stream(30, seed).take(30 * epoch, 30) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert list(range(30)) not in orders


def steps(stream: Stream, position: int, count: int, world: int, micro_batch: int, batch: int) -> list[list[int]]:
    """What all ranks together see in each step, put back into the order of the stream."""
    seen = []
    for start in range(position, position + count * batch, batch):
        indices = stream.take(start, batch)
        ranks = [share(indices, rank, world, micro_batch) for rank in range(world)]
        assert {len(group) for rank in ranks for group in rank} == {micro_batch}
        assert {len(rank) for rank in ranks} == {batch // world // micro_batch}
        flat = [[index for group in rank for index in group] for rank in ranks]
        seen.append([index for column in zip(*flat, strict=True) for index in column])
    return seen


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_any_number_of_ranks_covers_the_same_order(world, micro_batch):
    """24 samples a step of 31: steps cross the border of epochs."""
    found = steps(Stream(31, seed=3), 0, 5, world, micro_batch, 24)
    order = Stream(31, seed=3).take(0, 5 * 24)
    assert found == [order[i : i + 24] for i in range(0, len(order), 24)]


@pytest.mark.parametrize("before, after", [(1, 4), (4, 3), (3, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_in_the_middle_of_an_epoch(before, after):
    undisturbed = steps(Stream(31, seed=3), 0, 6, 1, 1, 12)
    first = steps(Stream(31, seed=3), 0, 2, before, 1, 12)
    assert first + steps(Stream(31, seed=3), 2 * 12, 4, after, 2 if after < 4 else 1, 12) == undisturbed


def test_a_step_that_does_not_divide_is_our_mistake():
    with pytest.raises(AssertionError):
        share(list(range(10)), 0, 3, 1)
    with pytest.raises(AssertionError):
        share(list(range(12)), 0, 2, 4)
