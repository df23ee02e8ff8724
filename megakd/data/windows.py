"""The sequences of one source for one part of the data, resumable after each of them."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from megakd.config.data import SourceConfig
from megakd.data.conversations import Columns, Origin, iter_conversations
from megakd.data.documents import held_out, iter_documents
from megakd.data.packing import Window, pack, pack_whole
from megakd.data.templates import Encoded
from megakd.data.tokenizing import Document, Tokenizers
from megakd.errors import UserError
from megakd.system.logging import say

NAMED = 5  # bad lines of a source that are named


@dataclass(frozen=True)
class State:
    """Where a pass stands. Counts are those of documents packed to their end (`text_hash`: sum of their sha256).

    Of conversations: text_bytes and text_tokens are those that the assistant speaks. shortened: their last messages did
    not fit. too_long, silent: are not used, for their first answer does not fit, or there is none.
    bad_lines: lines and rows before `document` that were skipped, for they cannot be read; refused: conversations for
    which the chat template cannot be used. passes: how often the source was begun.
    """

    document: int = 0  # the next one to read from the source
    token: int = 0  # and the first of its tokens that is not packed yet
    windows: int = 0
    documents: int = 0
    text_bytes: int = 0
    text_tokens: int = 0
    text_hash: str = "0"
    shortened: int = 0
    too_long: int = 0
    silent: int = 0
    bad_lines: int = 0
    refused: int = 0
    passes: int = 1

    def record(self) -> dict[str, Any]:
        """As sidecars and manifests state it; the counts behind `text_hash` only where they say something."""
        rare = [field.name for field in fields(self)][7:]
        return {k: v for k, v in asdict(self).items() if k not in rare or v != getattr(State, k)}


def total(states: list[State]) -> State:
    """The counts of all sources; of one source its state."""
    if len(states) == 1:
        return states[0]
    sums = {name: sum(getattr(state, name) for state in states) for name in asdict(State()) if name != "text_hash"}
    text_hash = "0"
    for state in states:
        text_hash = add_hashes(text_hash, state.text_hash)
    return State(**{**sums, "passes": max(state.passes for state in states), "token": 0, "text_hash": text_hash})


class Reading(NamedTuple):
    """How a part of the data is read from a source. limit: tokens per sequence. masked: samples have a label mask."""

    part: str
    name: str  # as messages call the source
    limit: int
    apart: bool
    masked: bool
    holdout_fraction: float
    streaming: bool
    skips: bool
    revision: str | None
    bos: list[int]
    end: int


class SourceWindows:
    """The sequences of a source from a State on; `state` is always what a resume after the last one needs."""

    def __init__(self, source: SourceConfig, reading: Reading, tokenizers: Tokenizers, state: State):
        self.source, self.reading, self.tokenizers = source, reading, tokenizers
        self.begin = self.before = self.after = self.state = state
        self.read, self.bad, self.named = state.document, 0, 0
        if source.format == "text":
            self.windows = pack(self._documents(), reading.limit, state.token, reading.apart)
        else:
            self.windows = pack_whole(self._conversations(), reading.limit, reading.apart)

    def take(self) -> Window | None:
        """The next sequence; None where the source has ended."""
        window = next(self.windows, None)
        if window is None:
            self.state = replace(self.state, bad_lines=self.after.bad_lines)  # those behind its last document
            return None
        document, token = window.after
        base = self.before if document == self.before.document else self.after
        self.state = replace(base, document=document, token=token, windows=self.state.windows + 1)
        if window.mask is None and self.reading.masked:
            return window._replace(mask=_every_label(window))
        return window

    def close(self) -> None:
        self.windows.close()

    def _documents(self) -> Iterator[tuple[int, list[int]]]:
        """(index in the source, tokens with BOS and end) of this part's documents; keeps the counts around each."""
        bos, end = self.reading.bos, self.reading.end
        for document, ids in self.tokenizers.encode(self._read()):
            # text_tokens without BOS: it stands for no bytes, and is not predicted
            self._count(document, text_bytes=len(document.text.encode()), text_tokens=len(ids) + 1)
            yield document.number, [*bos, *ids, end]
        self.after = replace(self.after, bad_lines=self.bad)

    def _conversations(self) -> Iterator[tuple[int, list[int], list[bool]]]:
        """(index in the source, tokens, spoken) of this part's conversations; no tokens for one that is not used."""
        found: Encoded
        for document, found in self.tokenizers.encode(self._read(), self.reading.limit + 1):
            if found.refused:
                self._on_bad(UserError(f"{document.place}: {found.refused}"))
            self._count(
                document,
                documents=bool(found.ids),
                text_bytes=found.text_bytes,
                text_tokens=sum(found.spoken[1:]),
                shortened=found.shortened and bool(found.ids),
                too_long=not (found.ids or found.silent or found.refused),
                silent=found.silent,
                refused=bool(found.refused),
            )
            yield document.number, found.ids, found.spoken
        self.after = replace(self.after, bad_lines=self.bad)

    def _count(self, document: Document, documents: int = 1, **more: int) -> None:
        """Make `after` the state behind a document; each of `more` is added."""
        before = self.before = replace(self.after, document=document.number)
        self.after = replace(
            before,
            document=document.number + 1,
            documents=before.documents + documents,
            text_hash=add_hashes(before.text_hash, _hash(document.text)),
            bad_lines=document.bad,
            passes=document.passes,
            **{name: getattr(before, name) + value for name, value in more.items()},
        )

    def _read(self) -> Iterator[Document]:
        """This part's documents from `begin` on, when those before it are the same."""
        part, begin = self.reading.part, self.begin
        if begin.document:
            say(f"tokenize {part}: reads {begin.document:,} documents again, which are packed already")
        packed, index = "0", -1
        for index, document in enumerate(self._passes()):
            mine = held_out(document.text, self.reading.holdout_fraction) == (part == "holdout")
            if index < begin.document:
                packed = add_hashes(packed, _hash(document.text)) if mine else packed
                continue
            if index == begin.document:
                self._check_packed(packed)
            self.read = index + 1
            if mine:
                yield document._replace(number=index)
        if index < begin.document:
            self._check_packed(packed if index + 1 == begin.document else "")

    def _passes(self) -> Iterator[Document]:
        """The documents of the source, as often as it may be read; the validation set has each once."""
        count = 0
        for number in range(1, 1 + (self.source.passes if self.reading.part == "train" else 1)):
            if number > 1:
                if not count:
                    return
                of = f"pass {number} of {self.source.passes}"
                say(f"tokenize train: {self.reading.name} ended after {count:,} documents; {of} begins")
            for text, place in self._texts():
                count += 1
                yield Document(0, text, place, self.bad, number)

    def _texts(self) -> Iterator[tuple[str, str]]:
        """(text or conversation, where it is) of one pass."""
        source, reading = self.source, self.reading
        where = (source.source, source.subset, source.split)
        if source.format != "text":
            fields = (source.messages_field, source.prompt_field, source.completion_field, source.tools_field)
            origin = Origin(*where, reading.streaming, reading.revision)
            return iter_conversations(origin, Columns(source.format, *fields), self._on_bad_line)
        texts = iter_documents(
            *where, source.text_field, reading.streaming, revision=reading.revision, on_bad=self._on_bad_line
        )
        return ((text, "") for text in texts)

    def _on_bad_line(self, error: UserError) -> None:
        self._on_bad(error)
        self.bad += 1

    def _on_bad(self, error: UserError) -> None:
        if not self.reading.skips:
            raise UserError(f"{error}; data.on_bad_line=skip goes on without it") from error
        self.named += 1
        if self.named <= NAMED:
            say(f"tokenize {self.reading.part}: skipped: {error}")

    def _check_packed(self, text_hash: str) -> None:
        """UserError when the documents before `begin` are not those that the finished shards hold."""
        if text_hash != self.begin.text_hash:
            raise UserError(
                f"data.source: {self.source.source} has changed: its first {self.begin.document:,} documents are not "
                "those that the finished shards hold; restore it, or delete RUN/data/tokens and run this again"
            )


def _every_label(window: Window) -> np.ndarray:
    """The label mask of text among conversations: all count, but for those across the start of a document."""
    mask = np.ones(len(window.tokens) - 1, bool)
    mask[[start - 1 for start in window.starts if start > 0]] = False
    return mask


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def add_hashes(total: str, more: str) -> str:
    """The sum of two hex numbers modulo 2^256: a hash of a set of documents that can be resumed."""
    return f"{(int(total, 16) + int(more, 16)) % 2**256:x}"
