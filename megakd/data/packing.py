"""Pack tokenized documents into sequences of equal length, and conversations whole."""

from collections.abc import Generator, Iterable
from typing import NamedTuple

import numpy as np


class Cursor(NamedTuple):
    """Where packing stands: the next token to pack is token `token` of document `document`."""

    document: int
    token: int


class Window(NamedTuple):
    """At most T+1 tokens, the offsets at which documents begin, and where packing goes on after it.

    mask: of conversations, whether the label at each position counts, [T] bool.
    """

    tokens: np.ndarray
    starts: np.ndarray
    after: Cursor
    mask: np.ndarray | None = None


def pack(
    documents: Iterable[tuple[int, list[int]]], sequence_length: int, skip_tokens: int = 0, apart: bool = False
) -> Generator[Window, None, None]:
    """Concatenate (index, tokens) documents and cut windows of `sequence_length` + 1 tokens.

    A document cut by a window's end goes on in the next window from its last token, so every token but the first
    of a document is predicted exactly once. The last window is shorter; no token is dropped.
    skip_tokens: skip that many tokens of the first document: packing resumed at `after` gives the same windows.
    apart: end a window where its document ends; one of a single token, which predicts nothing, has no window.
    """
    buffer: list[int] = []
    starts: list[int] = []
    index = 0
    for index, tokens in documents:
        position, skip_tokens = skip_tokens, 0
        while position < len(tokens):
            starts.append(len(buffer))
            taken = tokens[position : position + sequence_length + 1 - len(buffer)]
            buffer.extend(taken)
            position += len(taken)
            if len(buffer) == sequence_length + 1:
                whole = position == len(tokens)
                position -= not whole
                after = Cursor(index + 1, 0) if whole else Cursor(index, position)
                yield Window(np.array(buffer, np.int32), np.array(starts, np.int32), after)
                buffer, starts = [], []
        if apart:
            if len(buffer) > 1:
                yield Window(np.array(buffer, np.int32), np.array(starts, np.int32), Cursor(index + 1, 0))
            buffer, starts = [], []
    if len(buffer) > 1:
        yield Window(np.array(buffer, np.int32), np.array(starts, np.int32), Cursor(index + 1, 0))


def pack_whole(
    conversations: Iterable[tuple[int, list[int], list[bool]]], sequence_length: int, apart: bool = False
) -> Generator[Window, None, None]:
    """Place (index, tokens, spoken) conversations whole into windows of at most `sequence_length` + 1 tokens, in order.

    A window ends before the first conversation that it has no room for, because the rest of a conversation means
    nothing without what was said before it. apart: a window is one conversation. One without tokens takes no place.
    The label at a position is the next token; it counts where the assistant speaks that token.
    """
    buffer: list[int] = []
    counted: list[bool] = []
    starts: list[int] = []

    def window(after: int) -> Window:
        mask = np.array(counted[1:], bool)
        return Window(np.array(buffer, np.int32), np.array(starts, np.int32), Cursor(after, 0), mask)

    index = 0
    for index, tokens, spoken in conversations:
        assert len(tokens) <= sequence_length + 1, (index, len(tokens))
        if buffer and tokens and (apart or len(buffer) + len(tokens) > sequence_length + 1):
            yield window(index)
            buffer, counted, starts = [], [], []
        if tokens:
            starts.append(len(buffer))
            buffer.extend(tokens)
            counted.extend([False, *spoken[1:]])  # the first token of a conversation is the label of nothing
    if buffer:
        yield window(index + 1)
