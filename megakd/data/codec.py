"""A Sample with teacher targets ↔ bytes: byte planes under zstd, raw bits for places in codebook buckets, a checksum.

Record, little-endian:
  header   magic "MKD3", crc32 of all that follows; head and draws there?, temperatures M, positions T, starts S,
           entries of the head, distinct draws, draws of 16 or more, labels not in their row, half of the codebook's
           digest, bytes of the zstd frame
  mask     with a label mask only: a bit a position, lowest first, 1 where the label counts. The others have no row: T
           then counts the rows in the planes below, and their labels are among those not in their row, without NLL
  planes   one zstd frame, a block a plane, so that zstd is a Huffman coder with a table a plane:
           tails [M, T]; entropy [T] (draws only); NLL of the label [T] (with a head: of labels not in their row,
           for that of the others is known);
           head: entries per row (low bytes, then high), gaps between ascending buckets, values; draws: gaps, counts - 1
           in halves of bytes (low one first, 15: a large one), large counts; index of the label in its row (of the
           head, if there is one) [T], 255 for none; buckets of the first token and of such labels; starts.
           Rows of the head are taken in the order of their tail, of the draws in that of their entropy (like rows make
           narrow tables); a row of draws ends when all are there.
  bits     places inside buckets, packed: first token and labels not in their row, then head, then draws

What is kept of a number, each rounded to a byte where the rounding costs the KL as much for small as for large ones:
  p         rint(levels sqrt(p)), at least 1            d(KL) = (dp)^2 / 2p is even over p in steps of sqrt(p)
  tail s    rint(255 asin(sqrt(s)) 2/pi), 1 to 254      s: share of what is outside the head at that temperature
  NLL, entropy x of the t-th   rint(32 log(1 + x) + d_t)  within 1.6 % of 1 + x; d_t = frac(0.618.. t) - 1/2 is taken
                                                        away again: where x are alike, their mean stays right
Decoding scales each row so that head and tail sum to 1. docs/data-format.md has the table of what this costs.
"""

import math
import struct
import threading
import zlib
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import zstandard

from megakd.data import kernels as kernels
from megakd.data.codebook import MAX_WIDTH, Book
from megakd.data.records import Sample, TeacherTargets, by_probability

NAME = "mkd-3"
MASKED_NAME = "mkd-3-masked"  # the same with a label mask in every record, which readers of mkd-3 alone refuse
MAGIC = b"MKD3"
HEADER = struct.Struct("<4sIBBHHIIIHII")
QUARTERS = 4  # of the rows: each its own table for gaps and values
LOG_STEPS = 32


class DamagedRecord(Exception):
    """A record whose bytes are not what `encode` wrote; callers add shard and sample."""


class Layout(NamedTuple):
    """What every record of a data set has in common: entries of the head a row (at most), draws a row (in all).

    levels: steps of sqrt(p). Mean KL is inverse to its square, 1.6e-4 at 238 and 50 entries; a halved KL costs half a
    bit an entry. The profile follows: `topk` has a head, `sampled` has draws, `hybrid` has both.
    """

    top_k: int
    draws: int
    levels: int
    temperatures: tuple[float, ...]
    sequence_length: int
    book: Book
    masked: bool = False

    @property
    def kind(self) -> int:
        """The header's byte: 1 for a head, 2 for draws, 3 for both; 4 more with a label mask."""
        return bool(self.top_k) + 2 * bool(self.draws) + 4 * self.masked


def encode(sample: Sample, layout: Layout) -> bytes:
    """Bytes of a sample with targets (see TeacherTargets); every row of head and draws holds an entry."""
    targets, book = sample.targets, layout.book
    assert targets is not None and (sample.mask is not None) == layout.masked, sample.key
    places, mask = book.places[sample.tokens], np.ones(len(sample.tokens) - 1, bool)
    if sample.mask is not None:
        mask = sample.mask
        targets = TeacherTargets(*(field[mask] for field in targets))
    rows = len(targets.label_nll)
    sets, entropy = [], _log_bytes(targets.entropy) if layout.draws else np.empty(0, np.uint8)
    tails = np.zeros((len(layout.temperatures), rows), np.uint8)
    if layout.top_k:
        roots = np.exp(targets.logprobs * np.float32(0.5))
        values = np.empty(roots.shape, np.uint8)
        kernels.round_roots(roots, targets.logprobs, np.float32(layout.levels), values)
        for m, temperature in enumerate(layout.temperatures):
            tails[m] = _tail_byte(roots, targets.log_tails[:, m], temperature)
        sets.append(_Set(*_keys(targets.ids, values, book), tails[0]))
    if layout.draws:
        counts = np.rint(targets.draw_shares * layout.draws).astype(np.uint8)
        sets.append(_Set(*_keys(targets.draw_ids, counts, book), entropy))
    found = np.empty(rows, np.uint8)
    kernels.find_labels(sets[0].keys, sets[0].counts, places[1:][mask], found)
    others = np.concatenate([places[:1], places[1:][_spread(found, mask, 255) == 255]])
    entries = [int(each.counts.sum()) for each in sets]
    words = np.zeros(MAX_WIDTH * (sum(entries) + len(others)) // 64 + 2, np.uint64)
    buckets, end = kernels.pack_ids(others, book.buckets, book.starts, book.widths, words)
    untold = found == 255 if layout.top_k else slice(None)
    planes = [*tails, *([entropy] if layout.draws else []), _log_bytes(targets.label_nll[untold])]
    large = np.empty(0, np.uint8)
    for each in sets:
        order = _order(each.like)
        gaps, values, end = kernels.pack_rows(
            each.keys, each.counts, order, book.buckets, book.starts, book.widths, words, end
        )
        sizes = each.counts[order]
        if layout.draws and each is sets[-1]:
            pairs, large = kernels.pack_draws(values)
            planes += [*_quarters(gaps, sizes), *_quarters(pairs, sizes / 2), large]
        else:
            low, high = sizes.astype(np.uint8), (sizes >> 8).astype(np.uint8)
            planes += [*_quarters(low, np.ones_like(sizes)), high, *_quarters(gaps, sizes), *_quarters(values, sizes)]
    planes += [found, buckets, np.asarray(sample.starts, "<u2")]
    frame = _compress(planes)
    header = HEADER.pack(
        MAGIC, 0, layout.kind, len(layout.temperatures), len(mask), len(sample.starts),
        entries[0] if layout.top_k else 0, entries[-1] if layout.draws else 0, len(large), len(others) - 1, _tag(book),
        len(frame),
    )  # fmt: skip
    bits = np.packbits(mask, bitorder="little").tobytes() if layout.masked else b""
    body = header[8:] + bits + frame + words.astype("<u8").tobytes()[: (int(end) + 7) // 8]
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def decode(key: str, data: bytes, layout: Layout, order: Literal["stored", "probability"] = "stored") -> Sample:
    """The inverse of `encode` up to rounding. Raises DamagedRecord, whatever the bytes are.

    order: of a row's head: as it is stored (by place in the codebook), or from the most probable entry.
    """
    sample = _decode(key, data, layout)
    assert sample.targets is not None
    return sample if order == "stored" else sample._replace(targets=by_probability(sample.targets))


def _decode(key: str, data: bytes, layout: Layout) -> Sample:
    if len(data) < HEADER.size:
        raise DamagedRecord(f"{len(data)} bytes are too few for a header")
    magic, crc, kind, temperatures, positions, starts, head, drawn, large, others, tag, size = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DamagedRecord(f"starts with {magic!r}, not {MAGIC!r}")
    if zlib.crc32(memoryview(data)[8:]) != crc:
        raise DamagedRecord("checksum does not match")
    if tag != _tag(layout.book):
        raise DamagedRecord("was written with another codebook")
    if (kind, temperatures) != (layout.kind, len(layout.temperatures)):
        raise DamagedRecord("was written with another profile or other temperatures than the manifest states")
    if not 0 < positions <= layout.sequence_length or not 0 < starts <= positions + 1 or others > positions:
        raise DamagedRecord(f"has {positions} positions, {starts} documents and {others} labels apart")
    mask, begin = _mask(data, positions) if layout.masked else (None, HEADER.size)
    rows = positions if mask is None else int(np.count_nonzero(mask))
    if head > rows * layout.top_k or drawn > rows * layout.draws or large > drawn or others < positions - rows:
        raise DamagedRecord(f"announces {head} and {drawn} entries for {rows} positions")
    book, size = layout.book, begin + size
    words = _words(memoryview(data)[size:], MAX_WIDTH * max(layout.top_k, layout.draws) // 8)
    end = 8 * max(len(data) - size, 0)
    untold = others - (positions - rows) if layout.top_k else rows
    content = (temperatures + bool(layout.draws) + 1) * rows + untold + 1 + others + 2 * starts
    content += bool(layout.top_k) * (2 * rows + 2 * head) + drawn + (drawn + 1) // 2 + large
    planes = _Planes(memoryview(data)[begin:size], content)
    tails = planes.take(temperatures * rows).reshape(temperatures, rows)
    like = planes.take(rows) if layout.draws else np.zeros(0, np.uint8)
    told = _from_log_bytes(planes.take(untold))
    ids, logprobs = np.empty((rows, layout.top_k), np.int32), np.empty((rows, layout.top_k), np.float32)
    draw_ids = np.empty((rows, layout.draws), np.int32)
    shares = np.empty((rows, layout.draws), np.float32)
    sets: list[tuple] = []
    if layout.top_k:
        counts, order = np.empty(rows, np.int32), _order(tails[0])
        counts[order] = planes.take(rows).astype(np.int32) | planes.take(rows).astype(np.int32) << 8
        gaps, values = planes.take(head), planes.take(head)
        sums_TM = np.empty((rows, temperatures))
        if (
            tails.max(initial=0) > 254
            or kernels.head_sums(values, counts, order, _powers(layout.temperatures), sums_TM) < 0
        ):
            raise DamagedRecord("a row without entries, an entry without value or a tail of everything")
        shifts, log_tails = _scales(tails, np.log(sums_TM, out=sums_TM), layout.temperatures)
        sets.append((counts, order, gaps, values, _LOG_Q, shifts, np.float32(-np.inf), ids, logprobs))
    else:
        log_tails = np.full((rows, temperatures), -np.inf, np.float32)
    if layout.draws:
        gaps, pairs, many = planes.take(drawn), planes.take((drawn + 1) // 2), planes.take(large)
        counts, values, order = np.empty(rows, np.int32), np.empty(drawn, np.uint8), _order(like)
        if kernels.unpack_draws(pairs, many, layout.draws, order, counts, values) < 0:
            raise DamagedRecord(f"a row whose draws are not {layout.draws}")
        share = np.arange(256, dtype=np.float32) / np.float32(layout.draws)
        sets.append((counts, order, gaps, values, share, np.zeros(rows, np.float32), np.float32(0), draw_ids, shares))
    found, buckets = planes.take(rows), planes.take(1 + others)
    offsets = planes.take(2 * starts).view("<u2").astype(np.int32)
    apart, tokens = np.empty(1 + others, np.int32), np.empty(positions + 1, np.int32)
    at = int(kernels.unpack_ids(buckets, book.ids, book.starts, book.widths, words, 0, end, apart))
    for *stored, out, means in sets:
        if at >= 0:
            at = int(kernels.unpack_rows(*stored, book.ids, book.starts, book.widths, words, at, end, out, means))
    if at < 0 or (at + 7) // 8 != len(data) - size:
        raise DamagedRecord("its planes and its bits do not fit together")
    entropy, lengths = _from_log_bytes(like) if layout.draws else np.zeros(rows, np.float32), sets[0][0]
    if mask is not None:  # a row without entries for each label that does not count
        apart_T = _spread(found, mask, 255) == 255
        told = _spread(told, mask[apart_T] if layout.top_k else mask, 0)
        found, lengths, ids, draw_ids = (_spread(each, mask, 0) for each in (found, lengths, ids, draw_ids))
        found[~mask] = 255
        logprobs, log_tails = _spread(logprobs, mask, -np.inf), _spread(log_tails, mask, -np.inf)
        shares, entropy = _spread(shares, mask, 0), _spread(entropy, mask, 0)
    nll = np.empty(positions, np.float32) if layout.top_k else told
    among = ids if layout.top_k else draw_ids
    if kernels.put_labels(found, lengths, among, logprobs, apart, told, tokens, nll) < 0:
        raise DamagedRecord("a label that is not where it should be")
    if offsets[0] != 0 or (offsets[1:] <= offsets[:-1]).any() or offsets[-1] > positions:
        raise DamagedRecord("document starts out of order")
    nll[offsets[1:] - 1] = 0
    return Sample(key, tokens, offsets, TeacherTargets(ids, logprobs, log_tails, draw_ids, shares, entropy, nll), mask)


def _mask(data: bytes, positions: int) -> tuple[np.ndarray, int]:
    """The label mask behind the header, [T] bool, and where it ends."""
    end = HEADER.size + (positions + 7) // 8
    bits = np.frombuffer(data, np.uint8)[HEADER.size : end]
    if len(bits) < end - HEADER.size or (positions % 8 and bits[-1] >> positions % 8):
        raise DamagedRecord("a label mask of other bits than it has positions")
    return np.unpackbits(bits, count=positions, bitorder="little").astype(bool), end


def _spread(values: np.ndarray, mask: np.ndarray, filler: float) -> np.ndarray:
    """Rows where the mask is true, in order, and `filler` elsewhere; DamagedRecord where they are not as many."""
    if len(values) != np.count_nonzero(mask):
        raise DamagedRecord(f"{len(values)} rows for {np.count_nonzero(mask)} places")
    out = np.full((len(mask), *values.shape[1:]), filler, values.dtype)
    out[mask] = values
    return out


_SHARE = np.sin(np.arange(256) / 255 * math.pi / 2) ** 2
with np.errstate(divide="ignore"):
    _LOG_SHARE, _LOG_REST = np.log(_SHARE), np.log1p(-_SHARE)
    _LOG_Q = (2 * np.log(np.arange(256))).astype(np.float32)
_DITHER = ((np.arange(1 << 16) * ((math.sqrt(5) - 1) / 2)) % 1 - 0.5).astype(np.float32)  # as even as can be
# there are no repetitions to find: the cheapest search, which beats level 1 in time and by a hair in size
_HUFFMAN = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=18, hash_log=10, chain_log=6, search_log=1, min_match=7,
    write_content_size=False,
)  # fmt: skip
_local = threading.local()


class _Set(NamedTuple):
    """Rows of ascending keys, how many each has, and the bytes by which rows are alike."""

    keys: np.ndarray
    counts: np.ndarray
    like: np.ndarray


class _Planes:
    """The content of the zstd frame, which must be exactly `size` bytes, taken plane by plane."""

    def __init__(self, frame: memoryview, size: int):
        if not hasattr(_local, "decompressor"):  # one a thread: they are not safe to share
            _local.decompressor = zstandard.ZstdDecompressor()
        try:
            announced = zstandard.get_frame_parameters(frame)
            # either would make the decompressor allocate what a damaged header says
            if announced.content_size != zstandard.CONTENTSIZE_UNKNOWN or announced.window_size > 1 << 18:
                raise DamagedRecord("a frame that `encode` does not write")
            content = _local.decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise DamagedRecord(str(error)) from error
        if len(content) != size:
            raise DamagedRecord(f"{len(content)} bytes of content where {size} were announced")
        self.content = np.frombuffer(content, np.uint8)
        self.at = 0

    def take(self, size: int) -> np.ndarray:
        self.at += size
        return self.content[self.at - size : self.at]


def _keys(ids_TK: np.ndarray, values_TK: np.ndarray, book: Book) -> tuple[np.ndarray, np.ndarray]:
    keys, counts = np.empty(ids_TK.shape, np.uint32), np.empty(len(ids_TK), np.int32)
    kernels.make_keys(ids_TK, values_TK, book.places, keys, counts)
    assert counts.all(), "a row without entries"
    keys.sort(axis=1)
    return keys, counts


def _order(like: np.ndarray) -> np.ndarray:
    return np.argsort(like, kind="stable")


def _quarters(plane: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """The plane cut at quarters of its rows; a reader does not need to know where."""
    ends = np.cumsum(sizes).astype(np.int64)
    return np.split(
        plane, [ends[len(sizes) * q // QUARTERS - 1] for q in range(1, QUARTERS) if len(sizes) * q >= QUARTERS]
    )


def _compress(planes: list[np.ndarray]) -> bytes:
    if not hasattr(_local, "compressor"):  # one a thread: they are not safe to share
        _local.compressor = zstandard.ZstdCompressor(compression_params=_HUFFMAN)
    compressor, parts = _local.compressor.compressobj(), []
    for plane in planes:  # a block of its own each, that is a Huffman table
        parts += [compressor.compress(plane.tobytes()), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, compressor.flush()])


def _words(data: memoryview, spare: int) -> np.ndarray:
    """64 little-endian bits from every byte of `data` and `spare` zeros on: up to 57 bits at any bit are one load."""
    buffer = bytearray(len(data) + spare + 8)
    buffer[: len(data)] = data
    return np.ndarray((len(data) + spare,), "<u8", buffer, strides=(1,))


def _tail_byte(roots_TK: np.ndarray, log_tail_T: np.ndarray, temperature: float) -> np.ndarray:
    """asin(sqrt(share)) of what lies outside the head, in 254 steps; roots: of the head's probabilities."""
    if temperature == 1.0:
        head_T = np.einsum("tk,tk->t", roots_TK, roots_TK)
    elif temperature == 2.0:
        head_T = roots_TK.sum(1)
    else:
        with np.errstate(divide="ignore"):  # in logarithms: at low temperatures powers vanish
            log_p_TK = np.log(roots_TK.astype(np.float64)) * (2 / temperature)
        top_T = log_p_TK.max(1)
        head_T = np.exp(log_p_TK - top_T[:, None]).sum(1)
        log_tail_T = log_tail_T - top_T
    tail_T = np.exp(log_tail_T).astype(np.float32)
    angle = np.arcsin(np.sqrt(tail_T / (head_T + tail_T)))
    # 0 is kept for nothing at all: a tail that vanished would make the KL of what it held infinite
    return np.clip(np.rint(255 * 2 / np.pi * angle), tail_T > 0, 254).astype(np.uint8)


def _log_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(LOG_STEPS * np.log1p(np.maximum(values, 0)) + _DITHER[: len(values)]), 0, 255).astype(
        np.uint8
    )


def _from_log_bytes(data: np.ndarray) -> np.ndarray:
    return np.expm1(np.maximum(data - _DITHER[: len(data)], 0) / np.float32(LOG_STEPS))


@lru_cache(8)
def _powers(temperatures: tuple[float, ...]) -> np.ndarray:
    """q^(2/T_m) of all values q, [M, 256]."""
    return np.arange(256.0) ** (2 / np.array(temperatures)[:, None])


def _scales(
    tails_MT: np.ndarray, log_sums_TM: np.ndarray, temperatures: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The c of log p = 2 log q + c by which each row and its tail sum to 1, [T], and the log tails, [T, M]."""
    log_rest_MT, log_tails_TM = _LOG_REST.take(tails_MT), _LOG_SHARE.take(tails_MT.T)
    shifts = log_rest_MT[0] - log_sums_TM[:, 0]
    for m, temperature in enumerate(temperatures):
        if m > 0:  # s / (1 - s) of the head's sum there
            log_tails_TM[:, m] += log_sums_TM[:, m] - log_rest_MT[m] + shifts / temperature
    return shifts.astype(np.float32), log_tails_TM.astype(np.float32)


def _tag(book: Book) -> int:
    return int(book.digest[:8], 16)
