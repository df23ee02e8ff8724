"""Conversations in sequences: each whole, in order, with the mask of what the assistant speaks."""

import numpy as np
import pytest

from megakd.data.packing import pack_whole

Conversation = tuple[int, list[int], list[bool]]


def conversations(count: int, most: int, seed: int = 0) -> list[Conversation]:
    chooser = np.random.default_rng(seed)
    found = []
    for index in range(0, 2 * count, 2):  # the other documents belong to the other part
        size = int(chooser.choice([0, *range(2, most + 1)]))
        spoken = (chooser.random(size) < 0.5).tolist()
        found.append((index, chooser.integers(0, 99, size).tolist(), spoken))
    return found


def reference(found: list[Conversation], room: int, apart: bool) -> list[list[Conversation]]:
    """Which conversations each sequence holds."""
    groups: list[list[Conversation]] = []
    for each in found:
        if not each[1]:
            continue
        fits = groups and sum(len(tokens) for _, tokens, _ in groups[-1]) + len(each[1]) <= room
        if fits and not apart:
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("length, most", [(7, 8), (33, 20), (33, 34), (100, 5)])
def test_sequences_are_those_of_the_reference(length, most, apart):
    found = conversations(60, most)
    windows, groups = list(pack_whole(found, length, apart)), reference(found, length + 1, apart)
    assert len(windows) == len(groups)
    for window, group in zip(windows, groups, strict=True):
        assert window.tokens.tolist() == [token for _, tokens, _ in group for token in tokens]
        assert len(window.tokens) <= length + 1 and window.mask is not None
        counted = [said and at > 0 for _, _, spoken in group for at, said in enumerate(spoken)]
        assert window.mask.tolist() == counted[1:]
        assert [window.tokens[start] for start in window.starts] == [tokens[0] for _, tokens, _ in group]


@pytest.mark.parametrize("apart", [False, True])
def test_packing_goes_on_after_any_sequence(apart):
    found = conversations(40, 20)
    windows = list(pack_whole(found, 33, apart))
    for number, window in enumerate(windows):
        assert window.after.token == 0
        rest = list(pack_whole([each for each in found if each[0] >= window.after.document], 33, apart))
        assert [each.tokens.tolist() for each in rest] == [each.tokens.tolist() for each in windows[number + 1 :]]
