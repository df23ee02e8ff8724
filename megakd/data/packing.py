"""Pack tokenized documents into sequences of equal length."""

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    pass


class Cursor(NamedTuple):
    """Where packing stands: the next token to pack is token `token` of document `document`."""

    document: int
    token: int


class Window(NamedTuple):
    """At most T+1 tokens, the offsets at which documents begin, and where packing goes on after it."""

    tokens: np.ndarray
    starts: np.ndarray
    after: Cursor


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
                position -= position < len(tokens)
                yield Window(np.array(buffer, np.int32), np.array(starts, np.int32), Cursor(index, position))
                buffer, starts = [], []
        if apart:
            if len(buffer) > 1:
                yield Window(np.array(buffer, np.int32), np.array(starts, np.int32), Cursor(index + 1, 0))
            buffer, starts = [], []
    if len(buffer) > 1:
        yield Window(np.array(buffer, np.int32), np.array(starts, np.int32), Cursor(index + 1, 0))
