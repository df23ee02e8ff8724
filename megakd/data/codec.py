"""A Sample with teacher targets ↔ bytes: byte planes under zstd, raw bits for places in the book's buckets, a checksum.

Record, little-endian:
  header   magic "MKD2", crc32 of all that follows; head and draws there?, temperatures M, positions T, document
           starts S, entries of the head, distinct draws, first half of the book's digest, bytes of the zstd frame
  planes   one zstd frame, its blocks cut at plane borders (zstd then is a Huffman coder with a table a plane):
           head and draws each: entries a row, gaps between ascending buckets, values, both in quarters of rows with
           similar tail; tails [M, T]; entropy [T] (draws only); NLL of the label [T]; buckets of the tokens; starts
  bits     places inside buckets, packed: tokens, then head, then draws

What is kept of a number, each rounded to a byte where the rounding costs the KL as much for small as for large ones:
  p         rint(LEVELS sqrt(p)), at least 1            d(KL) = (dp)^2 / 2p is even over p in steps of sqrt(p)
  tail s    rint(255 asin(sqrt(s)) 2/pi), at most 254   s: share of what is outside the head at that temperature
  NLL, H    rint(64 log(1 + x))                         within 1 % of 1 + x, up to 52 nats
Decoding scales each row so that head and tail sum to 1. docs/data-format.md has the table of what this costs.
"""

import math
import struct
import threading
import zlib
from typing import NamedTuple

import numpy as np
import zstandard

from megakd.data import codec_kernels as kernels
from megakd.data.book import MAX_WIDTH, Book
from megakd.data.records import Sample, TeacherTargets

NAME = "mkd-2"
MAGIC = b"MKD2"
HEADER = struct.Struct("<4sIBBHHIIII")
GROUPS = 4
LEVELS = 236  # mean KL 1.6e-4 at top 64; its square is inverse to the KL, halving it costs 0.5 bit an entry


class DamagedRecord(Exception):
    """A record whose bytes are not what `encode` wrote; callers add shard and sample."""


class Layout(NamedTuple):
    """What every record of a data set has in common: entries of the head a row (at most), draws a row (in all).

    The profile follows: `topk` has a head, `sampled` has draws, `hybrid` has both.
    """

    top_k: int
    draws: int
    temperatures: tuple[float, ...]
    sequence_length: int
    book: Book

    @property
    def kind(self) -> int:
        """The header's byte: 1 for a head, 2 for draws, 3 for both."""
        return bool(self.top_k) + 2 * bool(self.draws)


def encode(sample: Sample, layout: Layout) -> bytes:
    """Bytes of a sample with targets (see TeacherTargets); every row of the head holds an entry."""
    targets, book = sample.targets, layout.book
    assert targets is not None, sample.key
    positions = len(sample.tokens) - 1
    entries = targets.logprobs.size + targets.draw_shares.size
    words = np.zeros(MAX_WIDTH * (entries + positions + 1) // 64 + 2, np.uint64)
    token_buckets, end = kernels.pack_ids(book.places[sample.tokens], book.buckets, book.starts, book.widths, words)
    planes: list[np.ndarray] = []
    sizes = [0, 0]
    tails = np.zeros((len(layout.temperatures), positions), np.uint8)
    if layout.top_k:
        roots = np.exp(targets.logprobs * np.float32(0.5))
        for m, temperature in enumerate(layout.temperatures):
            tails[m] = _tail_byte(roots, targets.log_tails[:, m], temperature)
        quantized = np.maximum(np.rint(LEVELS * roots), 1).astype(np.uint8) * (targets.logprobs > -np.inf)
        own, sizes[0], end = _pack_set(targets.ids, quantized, tails[0], book, words, end)
        planes += own
    if layout.draws:
        counts = np.rint(targets.draw_shares * layout.draws).astype(np.uint8)
        own, sizes[1], end = _pack_set(targets.draw_ids, counts, None, book, words, end)
        planes += own
    planes += list(tails)
    if layout.draws:
        planes.append(_log_byte(targets.entropy))
    planes += [_log_byte(targets.label_nll), token_buckets, np.asarray(sample.starts, "<u2")]
    frame = _compress(planes)
    header = HEADER.pack(
        MAGIC, 0, layout.kind, len(layout.temperatures), positions, len(sample.starts),
        *sizes, _tag(book), len(frame),
    )  # fmt: skip
    body = header[8:] + frame + words.astype("<u8").tobytes()[: (end + 7) // 8]
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def decode(key: str, data: bytes, layout: Layout) -> Sample:
    """The inverse of `encode` up to rounding. Raises DamagedRecord, whatever the bytes are."""
    if len(data) < HEADER.size:
        raise DamagedRecord(f"{len(data)} bytes are too few for a header")
    magic, crc, kind, temperatures, positions, starts, head, draws, tag, frame = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DamagedRecord(f"starts with {magic!r}, not {MAGIC!r}")
    if zlib.crc32(data[8:]) != crc:
        raise DamagedRecord("checksum does not match")
    if tag != _tag(layout.book):
        raise DamagedRecord("was written with another book")
    if (kind, temperatures) != (layout.kind, len(layout.temperatures)):
        raise DamagedRecord("was written with another profile or other temperatures than the manifest states")
    if not 0 < positions <= layout.sequence_length or not 0 < starts <= positions + 1:
        raise DamagedRecord(f"has {positions} positions and {starts} documents")
    if head > positions * layout.top_k or draws > positions * layout.draws:
        raise DamagedRecord(f"announces {head} and {draws} entries for {positions} positions")
    reader = _Planes(data[HEADER.size : HEADER.size + frame], _raw_size(layout, positions, starts, head, draws))
    raw = data[HEADER.size + frame :]
    words = _words(raw + bytes(MAX_WIDTH * max(layout.top_k, layout.draws) // 8))
    book, end = layout.book, 8 * len(raw)
    rows = [_read_rows(reader, positions, n) for n, there in ((head, layout.top_k), (draws, layout.draws)) if there]
    tails = reader.take(temperatures * positions).reshape(temperatures, positions)
    entropy = reader.take(positions) if layout.draws else np.zeros(positions, np.uint8)
    nll, chosen = reader.take(positions), reader.take(positions + 1)
    offsets = reader.take(2 * starts).view("<u2").astype(np.int32)
    tokens = np.empty(positions + 1, np.int32)
    at = int(kernels.unpack_ids(chosen, book.ids, book.starts, book.widths, words, 0, end, tokens))
    ids, logprobs = np.empty((positions, layout.top_k), np.int32), np.empty((positions, layout.top_k), np.float32)
    log_tails = np.empty((positions, temperatures), np.float32)
    if layout.top_k:
        values, at = _unpack(rows[0], tails[0], ids, book, words, at, end)
        if tails.max() > 254:
            raise DamagedRecord("a tail of everything")
        inverse = 1 / np.array(layout.temperatures)
        kernels.head_values(values, rows[0].counts, tails, _LOG_Q, inverse, _LOG_SHARE, _LOG_REST, logprobs, log_tails)
    else:
        log_tails[:] = -np.inf
    draw_ids = np.empty((positions, layout.draws), np.int32)
    shares = np.empty((positions, layout.draws), np.float32)
    if layout.draws:
        values, at = _unpack(rows[-1], None, draw_ids, book, words, at, end)
        if (values.sum(1, dtype=np.int64) != layout.draws).any():
            raise DamagedRecord(f"a row whose draws are not {layout.draws}")
        np.divide(values, np.float32(layout.draws), out=shares)
    if at < 0 or (at + 7) // 8 != len(raw):
        raise DamagedRecord("its planes and its bits do not fit together")
    if offsets[0] != 0 or (np.diff(offsets) <= 0).any() or offsets[-1] > positions:
        raise DamagedRecord("document starts out of order")
    targets = TeacherTargets(ids, logprobs, log_tails, draw_ids, shares, _LOG_VALUES[entropy], _LOG_VALUES[nll])
    return Sample(key, tokens, offsets, targets)


_LOG_VALUES = np.expm1(np.arange(256) / 64).astype(np.float32)
_SHARE = np.sin(np.arange(256) / 255 * math.pi / 2) ** 2
with np.errstate(divide="ignore"):
    _LOG_SHARE, _LOG_REST = np.log(_SHARE), np.log1p(-_SHARE)
    _LOG_Q = (2 * np.log(np.arange(256))).astype(np.float32)
# there are no repetitions to find: the cheapest search, which beats level 1 in time and by a hair in size
_HUFFMAN = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=18, hash_log=10, chain_log=6, search_log=1, min_match=7,
    write_content_size=False,
)  # fmt: skip
_local = threading.local()


class _Rows(NamedTuple):
    counts: np.ndarray
    gaps: np.ndarray
    values: np.ndarray


def _raw_size(layout: Layout, positions: int, starts: int, head: int, draws: int) -> int:
    sets = bool(layout.top_k) + bool(layout.draws)
    a_position = 2 * sets + len(layout.temperatures) + bool(layout.draws) + 2
    return a_position * positions + 2 * (head + draws) + 1 + 2 * starts


class _Planes:
    """The content of the zstd frame, which must be exactly `size` bytes, taken plane by plane."""

    def __init__(self, frame: bytes, size: int):
        if not hasattr(_local, "decompressor"):  # one a thread: they are not safe to share
            _local.decompressor = zstandard.ZstdDecompressor()
        try:
            announced = zstandard.get_frame_parameters(frame)
            # either would make the decompressor allocate what a damaged header says
            if announced.content_size != zstandard.CONTENTSIZE_UNKNOWN or announced.window_size > 1 << 18:
                raise DamagedRecord("a frame that `encode` does not write")
            content = _local.decompressor.decompress(frame, max_output_size=size)
        except zstandard.ZstdError as error:
            raise DamagedRecord(str(error)) from error
        if len(content) != size:
            raise DamagedRecord(f"{len(content)} bytes of content where {size} were announced")
        self.content = np.frombuffer(content, np.uint8)
        self.at = 0

    def take(self, size: int) -> np.ndarray:
        self.at += size
        return self.content[self.at - size : self.at]


def _read_rows(reader: _Planes, positions: int, size: int) -> _Rows:
    counts = reader.take(positions).astype(np.int32) | reader.take(positions).astype(np.int32) << 8
    rows = _Rows(counts, reader.take(size), reader.take(size))
    if not counts.all() or not rows.values.all():
        raise DamagedRecord("a row without entries, or an entry without value")
    return rows


def _unpack(
    rows: _Rows, tails: np.ndarray | None, ids: np.ndarray, book: Book, words: np.ndarray, at: int, end: int
) -> tuple[np.ndarray, int]:
    values = np.empty(ids.shape, np.uint8)
    order, _ = _groups(rows.counts if tails is None else tails)
    if at >= 0:
        at = int(kernels.unpack_rows(
            rows.counts, order, rows.gaps, rows.values, book.ids, book.starts, book.widths, words, at, end, ids, values
        ))  # fmt: skip
    if at < 0:
        raise DamagedRecord("its entries, gaps and bits do not fit together")
    return values, at


def _pack_set(
    ids_TK: np.ndarray, values_TK: np.ndarray, tails: np.ndarray | None, book: Book, words: np.ndarray, end: int
) -> tuple[list[np.ndarray], int, int]:
    keys, counts = np.empty(ids_TK.shape, np.uint32), np.empty(len(ids_TK), np.int32)
    kernels.make_keys(ids_TK, values_TK, book.places, keys, counts)
    keys.sort(axis=1)
    assert counts.all(), "a row without entries"
    order, sizes = _groups(counts if tails is None else tails)
    gaps, values, at = kernels.pack_rows(keys, counts, order, book.buckets, book.starts, book.widths, words, end)
    cuts = np.cumsum(np.add.reduceat(counts[order], sizes))[:-1]
    low, high = counts.astype(np.uint8), (counts >> 8).astype(np.uint8)
    return [low, high, *np.split(gaps, cuts), *np.split(values, cuts)], len(gaps), int(at)


def _compress(planes: list[np.ndarray]) -> bytes:
    if not hasattr(_local, "compressor"):  # one a thread: they are not safe to share
        _local.compressor = zstandard.ZstdCompressor(compression_params=_HUFFMAN)
    compressor, parts = _local.compressor.compressobj(), []
    for plane in planes:  # a block of its own each, that is a Huffman table
        parts += [compressor.compress(plane.tobytes()), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, compressor.flush()])


def _words(data: bytes) -> np.ndarray:
    """64 little-endian bits from every byte of `data` on: reads of up to 57 bits at any bit are one load."""
    return np.ndarray((len(data),), "<u8", bytearray(data) + bytes(8), strides=(1,))


def _groups(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order in which rows are packed, quarters of similar tail (or number of entries); where quarters begin."""
    order = np.argsort(rows, kind="stable")
    quarters = [len(rows) * g // GROUPS for g in range(GROUPS)]
    return order, np.array(sorted(set(quarters)))


def _tail_byte(roots_TK: np.ndarray, log_tail_T: np.ndarray, temperature: float) -> np.ndarray:
    """asin(sqrt(share)) of what lies outside the head, in 254 steps; roots: of the head's probabilities."""
    if temperature == 1.0:
        head_T = np.einsum("tk,tk->t", roots_TK, roots_TK)
    elif temperature == 2.0:
        head_T = roots_TK.sum(1)
    else:
        head_T = (roots_TK ** np.float32(2 / temperature)).sum(1)
    tail_T = np.exp(log_tail_T)
    angle = np.arcsin(np.sqrt(tail_T / (head_T + tail_T)))
    return np.minimum(np.rint(255 * 2 / np.pi * angle), 254).astype(np.uint8)


def _log_byte(values: np.ndarray) -> np.ndarray:
    return np.minimum(np.rint(64 * np.log1p(np.maximum(values, 0))), 255).astype(np.uint8)


def _tag(book: Book) -> int:
    return int(book.digest[:8], 16)
