"""Windows of one tokenizer → the same text in two tokenizers, aligned at characters where both end a token.

A boundary is a character position where a token ends on both sides. A span is the text between two neighbouring
boundaries, so that its tokens stand for the same text on both sides. Both tokenizers encode the text that the
student's decodes to, as plain text: the name of a special token in it is text.
"""

import copy
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from megakd.data.records import IGNORED, Paired, Sample, Side
from megakd.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

BEYOND = np.int64(2**62)  # a position behind every text
UNREADABLE = "\ufffd"  # what part of a character decodes to
BEFORE = "\0"  # what the BOS of both sides covers
OUTSIDE = "\0\0"  # two characters behind each text: the end token's, and one that no token covers
SPACES = np.array([chr(code).isspace() for code in range(0x3002)])  # Unicode has none beyond


def pair(
    samples: Sequence[Sample],
    student: "PreTrainedTokenizerBase",
    teacher: "PreTrainedTokenizerBase",
    student_length: int,
    teacher_length: int,
    teacher_limit: int | None = None,
    bos: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Paired:
    """Both models' views of windows of the student's tokens, row by row the same text; [B, student_length] and so on.

    Each document of a window, decoded, is encoded by both. One that ended with the student's end token ends with each
    side's own, and these two are a span. A row has at most length + 1 tokens on either side, the last only as a label
    (as in `collate`). The teacher's side is teacher_length wide, or as many quarters of student_length wider as its
    longest row needs, up to teacher_limit (None: teacher_length). Where a side has more, spans end at the last shared
    boundary that fits, and so does the teacher's row; the student's goes on without spans, so that it loses no label.
    A span is scored (label_spans) when every token of it is predicted: not when it holds the first token of a document
    on either side.

    Where the ends of tokens do not coincide, a span grows until they do, also over whitespace. Whitespace that a
    tokenizer drops lies between two of its tokens, and every position in it is an end of the first. No boundary lies
    inside text that a normaliser rewrites as a whole, such as combining marks that NFC reorders or composes. Text that
    a side has no tokens for at all is skipped on both.
    bos: the ids that documents begin with on each side (`pair_bos`). The student's windows hold them already; the
    teacher's side gets its own where they do, and both are a span. Where the student's documents have none, the
    teacher's side has them before every piece of text, also of a document that goes on.
    UserError for a tokenizer without offsets (a slow one) or without an end token.
    """
    sides = _reader(student), _reader(teacher)
    texts, begun_P, ended_P, rows_P = _texts(samples, sides[0], list(bos[0]))
    encodings = [side.backend.encode_batch(texts, add_special_tokens=False) for side in sides]
    known = [all(len(e) for e in both) for both in zip(*encodings, strict=True)]
    texts = [text if keep else "" for text, keep in zip(texts, known, strict=True)]
    layout = _Layout.of(texts, ended_P, begun_P, shared_bos=all(map(len, bos)))
    views = [_view(found, layout, side.end, list(own)) for found, side, own in zip(encodings, sides, bos, strict=True)]
    rewritten_C = np.zeros(len(layout.solid_C), bool)
    for view, side in zip(views, sides, strict=True):
        rewritten_C |= _rewritten(view, layout, side.rewritten)
    ends_K = _match(*(_ends(view, layout, rewritten_C) for view in views))  # token indices on each side
    cuts = [_Cut.of(view, ends, rows_P, len(samples)) for view, ends in zip(views, ends_K, strict=True)]

    teacher_limit = max(teacher_limit or 0, teacher_length)
    fits_K = (cuts[0].sizes_K <= student_length + 1) & (cuts[1].sizes_K <= teacher_limit + 1)
    span_rows_K = cuts[0].rows_N[ends_K[0]]
    count_B = np.bincount(span_rows_K[fits_K], minlength=len(samples))
    first_span_B = np.searchsorted(span_rows_K, np.arange(len(samples)))
    unscored_K = np.zeros(len(fits_K), bool)
    for view, cut in zip(views, cuts, strict=True):
        held_N = cut.spans_N[view.firsts_N]
        unscored_K[held_N[held_N < len(unscored_K)]] = True  # a text without a shared boundary has none
    last_K = (first_span_B + count_B - 1)[count_B > 0]
    taught_B = np.zeros(len(samples), np.int64)
    taught_B[count_B > 0] = cuts[1].sizes_K[last_K]
    more = max(int(taught_B.max(initial=0)) - 1 - teacher_length, 0)
    quarter = max(student_length // 4, 1)  # few widths, so that the allocator finds blocks of the right size
    teacher_length = min(teacher_length + -(-more // quarter) * quarter, teacher_limit)
    own_B = np.minimum(np.bincount(cuts[0].rows_N, minlength=len(samples)), student_length + 1)
    student_side, teacher_side = (
        _side(view, cut, size_B, count_B, first_span_B, unscored_K, length)
        for view, cut, size_B, length in zip(
            views, cuts, (own_B, taught_B), (student_length, teacher_length), strict=True
        )
    )
    return Paired(student_side, teacher_side, torch.from_numpy(count_B))


class _Reader(NamedTuple):
    """What is needed of a tokenizer.

    backend:   its Rust part, which reads special tokens as text
    end:       its end token
    bytes:     the bytes of its byte tokens by id
    rewritten: `_inner_rewrites` of its normaliser; None without one
    """

    backend: Any
    end: int
    bytes: dict[int, int]
    rewritten: Callable[[str], tuple[int, ...]] | None


_made: "WeakKeyDictionary[PreTrainedTokenizerBase, _Reader]" = WeakKeyDictionary()


def _reader(tokenizer: "PreTrainedTokenizerBase") -> _Reader:
    """Made once for a tokenizer: a copy, for the settings would change what its owner gets, in other threads too."""
    if tokenizer in _made:
        return _made[tokenizer]
    name = f"{tokenizer.name_or_path or 'tokenizer'} ({type(tokenizer).__name__})"
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{name}: gives no character offsets; two tokenizers are aligned only when both are fast ones")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no end-of-sequence token, which documents end with")
    backend: Any = copy.deepcopy(tokenizer.backend_tokenizer)  # type: ignore[attr-defined]
    backend.post_processor = None  # that of many trims spaces off the offsets
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    ids = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    ids.pop(None, None)
    rewritten = None if backend.normalizer is None else _inner_rewrites(backend.normalizer.normalize_str)
    _made[tokenizer] = _Reader(backend, int(tokenizer.eos_token_id), ids, rewritten)  # type: ignore[arg-type]
    return _made[tokenizer]


def _inner_rewrites(normalize: Callable[[str], str]) -> Callable[[str], tuple[int, ...]]:
    """A function of a text: the positions x inside it with N(text[:x]) + N(text[x:]) ≠ N(text), ascending.

    No part of N(text) stands for text[:x] at such a position. N is taken between two digits, which compose with no
    character: what a normaliser puts before a text or strips off its ends does not count.
    """
    before = len(normalize("0"))

    def inner(text: str) -> str:
        return normalize(f"0{text}0")[before:-1]

    @lru_cache(2**16)
    def rewrites(text: str) -> tuple[int, ...]:
        whole = inner(text)
        return tuple(x for x in range(1, len(text)) if inner(text[:x]) + inner(text[x:]) != whole)

    return rewrites


def _texts(
    samples: Sequence[Sample], reader: _Reader, bos: list[int]
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """The text of every document in every sample, whether it began and ended in it, and its row.

    Part of a character, where a window cuts one, is taken off, and so is BOS. Without BOS nothing tells whether a
    document goes on from the window before: every one counts as begun.
    """
    documents, opens, begun, ended, rows = [], [], [], [], []
    for row, sample in enumerate(samples):
        tokens = sample.tokens.tolist()
        for start, stop in pairwise([*sample.starts.tolist(), len(tokens)]):
            ids = tokens[start:stop]
            begun.append(ids[: len(bos)] == bos)
            ids = ids[len(bos) :] if begun[-1] else ids
            opens.append(start == 0)
            ended.append(ids[-1:] == [reader.end])
            rows.append(row)
            ids = ids[:-1] if ended[-1] else _without_cut_end(ids, reader.bytes)
            documents.append(_without_cut_start(ids, reader.bytes) if opens[-1] else ids)
    texts = reader.backend.decode_batch(documents, skip_special_tokens=False)
    for i, text in enumerate(texts):
        text = text.lstrip(UNREADABLE) if opens[i] else text
        texts[i] = text if ended[i] else text.rstrip(UNREADABLE)
    return texts, np.array(begun, bool), np.array(ended, bool), np.array(rows, np.int64)


# Byte tokens are cut by hand: next to an incomplete character, tokenizers' decoder makes the whole run unreadable.
def _without_cut_start(ids: list[int], bytes_of: dict[int, int]) -> list[int]:
    """Without byte tokens that go on with a character, at most 3."""
    count = 0
    while count < min(3, len(ids)) and 0x80 <= bytes_of.get(ids[count], 0) < 0xC0:
        count += 1
    return ids[count:]


def _without_cut_end(ids: list[int], bytes_of: dict[int, int]) -> list[int]:
    """Without byte tokens that begin a character and do not finish it, at most 3."""
    for count, token in enumerate(ids[: -min(4, len(ids) + 1) : -1], 1):
        byte = bytes_of.get(token, 0)
        if byte >= 0xC0:
            return ids[:-count] if count < 2 + (byte >= 0xE0) + (byte >= 0xF0) else ids
        if byte < 0x80:
            break
    return ids


class _Layout(NamedTuple):
    """P texts one behind the other, each with OUTSIDE behind it, and a character for BOS before it: C characters.

    begins_P, lengths_P: where a text begins (with BOS, if both sides have one) and its characters (with that of BOS)
    bos_P, begun_P, ended_P: how many of its characters are BOS's, whether it has BOS, and an end token
    text:        all C characters; codes_C: their code points
    solid_C:     whether the character before a position 0..C is no whitespace [C + 1]
    solid_end_C: end of the last such one among them, 0 if there is none [C + 1]
    """

    begins_P: np.ndarray
    lengths_P: np.ndarray
    bos_P: np.ndarray
    begun_P: np.ndarray
    ended_P: np.ndarray
    text: str
    codes_C: np.ndarray
    solid_C: np.ndarray
    solid_end_C: np.ndarray

    @classmethod
    def of(
        cls, texts: list[str], ended_P: np.ndarray, begun_P: np.ndarray | None = None, shared_bos: bool = False
    ) -> "_Layout":
        begun_P = np.zeros(len(texts), bool) if begun_P is None else begun_P
        bos_P = (begun_P & shared_bos).astype(np.int64)
        lengths_P = np.array([len(text) for text in texts], np.int64) + bos_P
        strides_P = lengths_P + len(OUTSIDE)
        whole = "".join(chain.from_iterable((BEFORE * n, text, OUTSIDE) for n, text in zip(bos_P, texts, strict=True)))
        codes_C = np.frombuffer(whole.encode("utf-32-le"), np.uint32)
        solid = ~SPACES[np.minimum(codes_C, len(SPACES) - 1)]
        positions = np.where(solid, np.arange(1, len(solid) + 1), 0)
        return cls(
            np.cumsum(strides_P) - strides_P,
            lengths_P,
            bos_P,
            begun_P,
            ended_P,
            whole,
            codes_C,
            np.concatenate([[False], solid]),
            np.concatenate([[0], np.maximum.accumulate(positions)]),
        )


class _View(NamedTuple):
    """All N tokens of one side in order: ids, characters of the layout they cover, their text, firsts of a text."""

    ids_N: np.ndarray
    starts_N: np.ndarray
    stops_N: np.ndarray
    pieces_N: np.ndarray
    firsts_N: np.ndarray


def _view(encodings: "list[Encoding]", layout: _Layout, end: int, bos: Sequence[int] = ()) -> _View:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    counts_P = np.zeros(len(encodings), np.int64)
    lengths = (layout.lengths_P - layout.bos_P).tolist()
    facts = zip(lengths, layout.bos_P.tolist(), layout.begun_P.tolist(), layout.ended_P.tolist(), strict=True)
    for i, (encoding, (length, shared, begun, ended)) in enumerate(zip(encodings, facts, strict=True)):
        before = len(ids)
        # BOS of one side alone has no character; with nothing behind it, it would belong to no span
        if begun and (shared or length or ended):
            ids += bos
            offsets += [(-shared, 0)] * len(bos)
        if length:
            ids += encoding.ids
            offsets += encoding.offsets
        if ended:
            ids.append(end)
            offsets.append((length, length + 1))
        counts_P[i] = len(ids) - before
    pieces_N = np.repeat(np.arange(len(encodings)), counts_P)
    bounds_N2 = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
    bounds_N2 += (layout.begins_P + layout.bos_P)[pieces_N, None]
    firsts_N = np.diff(pieces_N, prepend=-1) != 0
    return _View(np.array(ids, np.int64), bounds_N2[:, 0], bounds_N2[:, 1], pieces_N, firsts_N)


def _rewritten(view: _View, layout: _Layout, rewrites: Callable[[str], tuple[int, ...]] | None) -> np.ndarray:
    """The positions inside text that this side's normaliser rewrites as a whole, [C + 1].

    Offsets do not tell them: NFC reports "a", U+0301, U+0328 as characters 0 and 2. Looked at are runs of combining
    characters and of characters without a token, with one character before and behind.
    """
    found_C = np.zeros(len(layout.solid_C), bool)
    if rewrites is None:
        return found_C
    size = len(found_C)
    has_text_N = view.stops_N > view.starts_N
    opened, closed = (np.bincount(at_N[has_text_N], minlength=size) for at_N in (view.starts_N, view.stops_N))
    looked_C = (np.cumsum(opened - closed)[:-1] == 0) & layout.solid_C[1:] & (layout.codes_C != 0)
    beyond = np.flatnonzero(layout.codes_C >= 0x300)
    codes, which = np.unique(layout.codes_C[beyond], return_inverse=True)
    looked_C[beyond] |= np.array([_combines(code) for code in codes.tolist()], bool)[which]
    changes = np.flatnonzero(np.diff(looked_C, prepend=False, append=False))
    for start, stop in zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True):
        first = max(start - 1, 0)
        found_C[[first + x for x in rewrites(layout.text[first : stop + 1])]] = True
    return found_C


@lru_cache(None)
def _combines(code: int) -> bool:
    """Whether a code point may compose or change places with the one before: a mark, a Hangul vowel or final.

    Also what NFKC makes one of, such as half-width kana's voice marks.
    """
    first = unicodedata.normalize("NFKD", chr(code))[0]
    return unicodedata.category(first)[0] == "M" or 0x1160 <= ord(first) < 0x1200


class _Ends(NamedTuple):
    """Tokens of one side at which a span may end: their indices, and the first and last position where it may; [E]."""

    indices: np.ndarray
    at: np.ndarray
    until: np.ndarray


def _ends(view: _View, layout: _Layout, rewritten_C: np.ndarray) -> _Ends:
    """The tokens that complete all characters begun.

    Several tokens may share a character, or have none. A character between two tokens that neither covers, such as an
    accent that normalisation took, belongs to the first, unless the position behind it is one of rewritten_C [C + 1],
    where nothing ends. Whitespace that neither covers belongs to either. The last token of a text ends where the text
    does.
    """
    if not len(view.ids_N):
        return _Ends(*np.zeros((3, 0), np.int64))
    text_ends_N = (layout.begins_P + layout.lengths_P)[view.pieces_N]
    is_end_N = view.stops_N > text_ends_N  # end tokens
    limits_N = text_ends_N + is_end_N
    has_text_N = view.stops_N > view.starts_N
    stops_N = np.maximum.accumulate(np.where(has_text_N, view.stops_N, layout.begins_P[view.pieces_N]))
    last_N = np.append((np.diff(view.pieces_N) != 0) | is_end_N[1:], True)
    stops_N[last_N] = limits_N[last_N]
    starts_N = np.where(has_text_N, view.starts_N, BEYOND)
    next_starts_N = np.append(np.minimum.accumulate(starts_N[:0:-1])[::-1], BEYOND)
    next_starts_N = np.minimum(next_starts_N, limits_N)
    at_N = np.maximum(stops_N, layout.solid_end_C[next_starts_N])
    until_N = np.where(rewritten_C[at_N], at_N, next_starts_N)
    at_N = np.maximum.accumulate(np.where(rewritten_C, 0, np.arange(len(rewritten_C))))[at_N]
    is_boundary_N = (next_starts_N >= stops_N) & (at_N >= stops_N) & (at_N > layout.begins_P[view.pieces_N])
    indices = np.flatnonzero(is_boundary_N)
    indices = indices[np.diff(at_N[indices], append=-1) != 0]  # a token without characters goes with the one before
    return _Ends(indices, at_N[indices], until_N[indices])


def _match(student: _Ends, teacher: _Ends) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tokens that end the K spans, on each side [K]: as many as can end at a common position.

    Of several tokens that can end where one of the other side can (in whitespace that it drops), the first does.
    """
    near_t, near_s = _holding(teacher, student.at), _holding(student, teacher.at)
    pairs = np.concatenate(
        [
            np.stack([np.flatnonzero(near_t >= 0), near_t[near_t >= 0]], 1),
            np.stack([near_s[near_s >= 0], np.flatnonzero(near_s >= 0)], 1),
        ]
    )
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]  # both sides ascend
    pairs = pairs[(np.diff(pairs, axis=0, prepend=-1) != 0).any(1)]
    kept = np.ones(len(pairs), bool)
    last = 0
    for i in np.flatnonzero((pairs[1:] == pairs[:-1]).any(1)) + 1:
        last = i - 1 if kept[i - 1] else last
        kept[i] = (pairs[i] != pairs[last]).all()
    return student.indices[pairs[kept, 0]], teacher.indices[pairs[kept, 1]]


def _holding(ends: _Ends, at: np.ndarray) -> np.ndarray:
    """Which of the ends can be at each position; -1 for none."""
    found = np.searchsorted(ends.at, at, side="right") - 1
    return np.where((found >= 0) & (at <= np.append(ends.until, -1)[found]), found, -1)


class _Cut(NamedTuple):
    """Where spans and rows are on one side.

    sizes_K: tokens of its row up to the end of each span
    spans_N, rows_N, columns_N: each token's span (in the whole batch), row, and index in the row
    """

    sizes_K: np.ndarray
    spans_N: np.ndarray
    rows_N: np.ndarray
    columns_N: np.ndarray

    @classmethod
    def of(cls, view: _View, ends_K: np.ndarray, rows_P: np.ndarray, batch_size: int) -> "_Cut":
        index_N = np.arange(len(view.ids_N))
        rows_N = rows_P[view.pieces_N]
        columns_N = index_N - np.searchsorted(rows_N, np.arange(batch_size))[rows_N]
        return cls(columns_N[ends_K] + 1, np.searchsorted(ends_K, index_N), rows_N, columns_N)


def unaligned_labels(side: Side) -> torch.Tensor:
    """How many labels of each row are in no scored span, [B].

    They lie in the first span of a document, or behind the last span of the row: the other side has no room for them.
    """
    return ((side.labels != IGNORED) & (side.label_spans < 0)).sum(1)


def _side(
    view: _View,
    cut: _Cut,
    size_B: np.ndarray,
    count_B: np.ndarray,
    first_span_B: np.ndarray,
    unscored_K: np.ndarray,
    length: int,
) -> Side:
    """The first size_B tokens of every row, and their places in its first count_B spans, as padded tensors."""
    shape = (len(count_B), length)
    tokens, spans = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    labels, label_spans = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
    restarts = np.zeros(shape, np.int64)

    spans_N = cut.spans_N - first_span_B[cut.rows_N]
    spans_N[spans_N >= count_B[cut.rows_N]] = -1
    scored_N = (spans_N >= 0) & ~np.append(unscored_K, True)[cut.spans_N]

    read = np.flatnonzero(cut.columns_N < size_B[cut.rows_N] - 1)  # the last is only a label
    row, column = cut.rows_N[read], cut.columns_N[read]
    tokens[row, column], spans[row, column] = view.ids_N[read], spans_N[read]
    restarts[row, column] = np.where(view.firsts_N[read], column, 0)
    padded = np.flatnonzero(size_B <= length)
    restarts[padded, np.maximum(size_B[padded] - 1, 0)] = np.maximum(size_B[padded] - 1, 0)

    said = np.flatnonzero((cut.columns_N < size_B[cut.rows_N]) & ~view.firsts_N)
    row, column = cut.rows_N[said], cut.columns_N[said] - 1
    labels[row, column] = view.ids_N[said]
    label_spans[row, column] = np.where(scored_N[said], spans_N[said], -1)
    position_ids = np.arange(length) - np.maximum.accumulate(restarts, axis=1)
    arrays = tokens, labels, position_ids, spans, label_spans
    tokens_BL, labels_BL, position_ids_BL, spans_BL, label_spans_BL = map(torch.from_numpy, arrays)
    return Side(tokens_BL, labels_BL, position_ids_BL, spans_BL, label_spans_BL)
