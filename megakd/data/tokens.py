"""Documents → packed windows of tokens, and the fingerprint of a tokenizer."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megakd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Cursor(NamedTuple):
    """Where packing stands: the next token to pack is token `token` of document `document`."""

    document: int
    token: int


class Window(NamedTuple):
    """At most T+1 tokens, the offsets at which documents begin, and where packing goes on after it."""

    tokens: np.ndarray
    starts: np.ndarray
    after: Cursor


def pack(documents: Iterable[tuple[int, list[int]]], sequence_length: int, skip_tokens: int = 0) -> Iterator[Window]:
    """Concatenate (index, tokens) documents and cut windows of `sequence_length` + 1 tokens.

    A document cut by a window's end goes on in the next window from its last token, so every token but the first
    of a document is predicted exactly once. The last window is shorter; no token is dropped.
    skip_tokens: leave out that many tokens of the first document: packing resumed at `after` gives the same windows.
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
    if len(buffer) > 1:
        yield Window(np.array(buffer, np.int32), np.array(starts, np.int32), Cursor(index + 1, 0))


def tokenizer_facts(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What must be equal for token ids to mean the same: real vocabulary size, end token, hash of behaviour.

    The hash covers every (token, id) pair and the ids of probe texts, so that equal vocabularies with other
    merges or normalisation differ.
    """
    probes = ["Hello, world!\n  x = 1", "Grüße 東京 🙂", "  leading", "3.14159 1,000", "<|endoftext|>"]
    ids = [tokenizer(probe, add_special_tokens=False)["input_ids"] for probe in probes]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), ids], ensure_ascii=False)
    return {
        "vocab_size": len(tokenizer),
        "eos": int(tokenizer.eos_token_id),  # type: ignore[arg-type]
        "hash": hashlib.sha256(content.encode()).hexdigest()[:16],
    }


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder, from its own files alone; UserError without one or its end token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer that transformers can load ({str(error).splitlines()[0]})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token, which documents are packed with")
    return tokenizer
