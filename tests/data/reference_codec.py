"""The record format once more, slow and obvious: Python loops over rows and entries, one big integer for the bits.

Written from the description at the head of megakd/data/codec.py and independent of it and of its kernels; of a codebook
it takes the order of the ids and the widths of the buckets, everything else is derived here. It trusts the record: a
damaged one ends in an AssertionError at best. Numbers are Python floats; only the result is float32.
"""

import hashlib
import math
import struct
import zlib
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import zstandard

HEADER = struct.Struct("<4sIBBHHIIIHII")
Rows = list[list[tuple[int, int]]]


class Targets(NamedTuple):
    """The fields of TeacherTargets."""

    ids: np.ndarray
    logprobs: np.ndarray
    log_tails: np.ndarray
    draw_ids: np.ndarray
    draw_shares: np.ndarray
    entropy: np.ndarray
    label_nll: np.ndarray


class Header(NamedTuple):
    """36 bytes; head and draws: how many entries there are in all; large: draws of 16 or more; others: labels apart."""

    magic: bytes
    crc32: int
    kind: int
    temperatures: int
    positions: int
    starts: int
    head: int
    draws: int
    large: int
    others: int
    book: int
    frame: int


class Record(NamedTuple):
    """What is stored, before it means numbers: (id, value) of every entry of every row, bytes of everything else.

    counts: of each position, whether its label counts; only those have rows.
    """

    counts: list[bool]
    tokens: list[int]
    starts: list[int]
    head: Rows
    draws: Rows
    tails: list[bytes]
    entropy: bytes
    index_in_row: bytes
    label_nll: list[float]


class Bits:
    """Numbers taken from a string of bits, lowest first, from front to back."""

    def __init__(self, data: bytes):
        self.bits, self.at, self.end = int.from_bytes(data, "little"), 0, 8 * len(data)

    def number(self, width: int) -> int:
        self.at += width
        assert self.at <= self.end, "bits end early"
        return (self.bits >> (self.at - width)) & ((1 << width) - 1)


def decode(data: bytes, layout: Any) -> tuple[np.ndarray, np.ndarray, Targets]:
    """(tokens, starts, targets) of a record; layout: see codec.Layout."""
    record = parse(data, layout)
    rows, columns = sum(record.counts), len(layout.temperatures)
    ids, logprobs, log_tails, draw_ids, shares = [], [], [], [], []
    for row in range(rows):
        if layout.top_k:
            head = head_row(record.head[row], [tail[row] for tail in record.tails], layout)
        else:
            head = [], [], [-math.inf] * columns
        draws = draws_row(record.draws[row], layout) if layout.draws else ([], [])
        for field, value in zip((ids, logprobs, log_tails, draw_ids, shares), head + draws, strict=True):
            field.append(value)
    positions, entropy, nll = len(record.counts), from_log_bytes(record.entropy), nlls(record, logprobs, layout)

    def placed(values: list[Any], nothing: Any) -> list[Any]:
        """A row for every position, that of `nothing` where the label does not count."""
        left = list(values)
        return [left.pop(0) if counts else nothing for counts in record.counts]

    targets = Targets(
        array(placed(ids, [0] * layout.top_k), np.int32, (positions, layout.top_k)),
        array(placed(logprobs, [-math.inf] * layout.top_k), np.float32, (positions, layout.top_k)),
        array(placed(log_tails, [-math.inf] * columns), np.float32, (positions, columns)),
        array(placed(draw_ids, [0] * layout.draws), np.int32, (positions, layout.draws)),
        array(placed(shares, [0.0] * layout.draws), np.float32, (positions, layout.draws)),
        array(placed(entropy or [0.0] * rows, 0.0), np.float32, (positions,)),
        array(nll, np.float32, (positions,)),
    )
    return np.array(record.tokens, np.int32), np.array(record.starts, np.int32), targets


def mask(data: bytes) -> list[bool]:
    """Whether each label counts: all do where the record has no label mask."""
    header = read_header(data)
    if not header.kind & 4:
        return [True] * header.positions
    bits = Bits(data[HEADER.size : HEADER.size + -(-header.positions // 8)])
    counts = [bool(bits.number(1)) for _ in range(header.positions)]
    assert not bits.number(bits.end - bits.at), "bits beyond the positions"
    return counts


def parse(data: bytes, layout: Any) -> Record:
    header, planes, raw = open_record(data, layout)
    counts = mask(data)
    size, columns, bits = sum(counts), len(layout.temperatures), Bits(raw)
    assert header.kind == (1 if layout.top_k else 0) + (2 if layout.draws else 0) + (4 if layout.masked else 0), header
    assert header.temperatures == columns, header
    assert header.book == int(book_digest(layout.book)[:8], 16), header
    tails = [planes["tails"][m * size : (m + 1) * size] for m in range(columns)]
    by_tail, by_entropy = order(tails[0]), order(planes["entropy"])
    starts = [planes["starts"][i] + 256 * planes["starts"][i + 1] for i in range(0, 2 * header.starts, 2)]

    begins = [0, *accumulate(1 << int(width) for width in layout.book.widths)]  # of each bucket, among the ids
    apart = [take_id(layout.book, begins, bucket, bits) for bucket in planes["buckets"]]
    head, draws = [], []
    if layout.top_k:
        head = take_ids(head_planes(planes, by_tail), by_tail, layout.book, begins, bits)
    if layout.draws:
        draws = take_ids(draws_planes(planes, by_entropy, layout), by_entropy, layout.book, begins, bits)
    assert -(-bits.at // 8) == len(raw), (bits.at, len(raw))

    tokens, stored_nll, label_nll = [apart.pop(0)], from_log_bytes(planes["label_nll"]), []
    left = list(zip(head or draws, planes["index_in_row"], strict=True))
    for counted in counts:
        if not counted:
            tokens.append(apart.pop(0))
            continue
        row, index = left.pop(0)
        tokens.append(apart.pop(0) if index == 255 else row[index][0])
        label_nll.append(stored_nll.pop(0) if index == 255 or not layout.top_k else -1.0)
    assert not apart and not stored_nll, (apart, stored_nll)
    return Record(counts, tokens, starts, head, draws, tails, planes["entropy"], planes["index_in_row"], label_nll)


def nlls(record: Record, logprobs: list[list[float]], layout: Any) -> list[float]:
    """Of a label in its row of the head: that entry's; elsewhere as stored; 0 where no label counts."""
    found, row = [], -1
    for position, counts in enumerate(record.counts):
        row += counts
        told = record.label_nll[row] if counts else 0.0
        if not counts or position + 1 in record.starts:
            found.append(0.0)
        elif layout.top_k and record.index_in_row[row] < 255:
            found.append(-logprobs[row][record.index_in_row[row]])
        else:
            found.append(told)
    return found


def from_log_bytes(data: bytes) -> list[float]:
    """x of rint(32 log(1 + x) + d), never below 0; d: the fraction of t times the golden section, less a half."""
    golden = (math.sqrt(5) - 1) / 2
    return [math.exp(max(byte - (t * golden % 1 - 0.5), 0) / 32) - 1 for t, byte in enumerate(data)]


def open_record(data: bytes, layout: Any) -> tuple[Header, dict[str, bytes], bytes]:
    """(header, planes, raw bits)."""
    header = read_header(data)
    assert header.magic == b"MKD3" and zlib.crc32(data[8:]) == header.crc32, header
    begin = HEADER.size + (-(-header.positions // 8) if header.kind & 4 else 0)
    frame, raw = data[begin : begin + header.frame], data[begin + header.frame :]
    content = zstandard.ZstdDecompressor().decompressobj().decompress(frame)
    planes, at = {}, 0
    for name, size in plane_sizes(header, layout, sum(mask(data))).items():
        planes[name] = content[at : at + size]
        at += size
    assert at == len(content), (at, len(content))
    return header, planes, raw


def read_header(data: bytes) -> Header:
    return Header(*HEADER.unpack_from(data))


def plane_sizes(header: Header, layout: Any, size: int) -> dict[str, int]:
    """Bytes of each plane, in their order, with `size` rows; of entries per row there are low bytes and high bytes."""
    return {
        "tails": header.temperatures * size,
        "entropy": size if layout.draws else 0,
        "label_nll": header.others - (header.positions - size) if layout.top_k else size,
        "counts_low": size if layout.top_k else 0,
        "counts_high": size if layout.top_k else 0,
        "gaps": header.head,
        "values": header.head,
        "draw_gaps": header.draws,
        "pairs": (header.draws + 1) // 2,
        "large": header.large,
        "index_in_row": size,
        "buckets": 1 + header.others,
        "starts": 2 * header.starts,
    }


def order(keys: bytes) -> list[int]:
    """The order in which rows lie: ascending in `keys`, rows of equal keys as they come."""
    return sorted(range(len(keys)), key=lambda row: keys[row])


def head_planes(planes: dict[str, bytes], by_tail: list[int]) -> Rows:
    """(gap, value) of every entry of every row."""
    rows: Rows = [[] for _ in by_tail]
    at = 0
    for row, low, high in zip(by_tail, planes["counts_low"], planes["counts_high"], strict=True):
        for _ in range(low + 256 * high):
            rows[row].append((planes["gaps"][at], planes["values"][at]))
            at += 1
        assert rows[row] and all(value > 0 for _, value in rows[row]), row
    assert at == len(planes["gaps"]), at
    return rows


def draws_planes(planes: dict[str, bytes], by_entropy: list[int], layout: Any) -> Rows:
    """(gap, count) of every entry. Counts are nibbles, low one first: n - 1, or 15 for the next of the large ones."""
    large = list(planes["large"])
    rows: Rows = [[] for _ in by_entropy]
    at = 0
    for row in by_entropy:
        while sum(count for _, count in rows[row]) < layout.draws:
            pair = planes["pairs"][at // 2]
            nibble = pair // 16 if at % 2 else pair % 16
            count = large.pop(0) if nibble == 15 else nibble + 1
            assert nibble < 15 or count >= 16, count
            rows[row].append((planes["draw_gaps"][at], count))
            at += 1
        assert sum(count for _, count in rows[row]) == layout.draws, row
    assert at == len(planes["draw_gaps"]) and not large, (at, large)
    return rows


def take_ids(rows: Rows, row_order: list[int], book: Any, begins: list[int], bits: Bits) -> Rows:
    """(id, value) from (gap, value) of every entry of every row."""
    found: Rows = [[] for _ in rows]
    for row in row_order:
        bucket = 0
        for gap, value in rows[row]:
            bucket += gap
            found[row].append((take_id(book, begins, bucket, bits), value))
    return found


def take_id(book: Any, begins: list[int], bucket: int, bits: Bits) -> int:
    """The id at a place of a bucket; bucket b begins where the buckets before it end and holds 2^width(b) places."""
    assert bucket < 256, bucket
    place = begins[bucket] + bits.number(int(book.widths[bucket]))
    assert place < len(book.places), (place, "beyond the vocabulary")
    return int(book.ids[place])


def head_row(
    entries: list[tuple[int, int]], tail_bytes: list[int], layout: Any
) -> tuple[list[int], list[float], list[float]]:
    """p = c q^2 with c such that all p and the tail sum to 1; the tail at T is s / (1 - s) of the head's sum there."""
    shares = [math.sin(byte / 255 * math.pi / 2) ** 2 for byte in tail_bytes]
    squares = sum(value**2 for _, value in entries)
    p = [(1 - shares[0]) * value**2 / squares for _, value in entries]
    log_tails = []
    for share, temperature in zip(shares, layout.temperatures, strict=True):
        head = sum(x ** (1 / temperature) for x in p)
        log_tails.append(math.log(share / (1 - share) * head) if share > 0 else -math.inf)
    fill = layout.top_k - len(entries)
    ids = [token for token, _ in entries] + [entries[0][0]] * fill
    return ids, [math.log(x) for x in p] + [-math.inf] * fill, log_tails


def draws_row(entries: list[tuple[int, int]], layout: Any) -> tuple[list[int], list[float]]:
    """Ids and the share of the row's draws that fell on each."""
    fill = layout.draws - len(entries)
    ids = [token for token, _ in entries] + [entries[0][0]] * fill
    return ids, [value / layout.draws for _, value in entries] + [0.0] * fill


def book_digest(book: Any) -> str:
    """sha256 over 256 widths and all ids in their order, int32, in hex."""
    numbers = [int(width) for width in book.widths] + [int(i) for i in book.ids[: len(book.places)]]
    return hashlib.sha256(struct.pack(f"<{len(numbers)}i", *numbers)).hexdigest()


def array(rows: list[Any], dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, dtype).reshape(shape)
