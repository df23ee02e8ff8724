"""The codebook of a data set: its vocabulary by how often teachers name each id, in 256 buckets of equal use.

A bucket holds a power of two of ids, so an id is a byte (its bucket, which entropy coding shrinks) and `width` raw bits
(its place there). Buckets are narrow where ids are frequent: about 8 bits an entry instead of 18 at 152k.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megakd.errors import UserError
from megakd.system.files import publishing

BUCKETS = 256
MAX_WIDTH = 24  # so that (place << 8 | value) sorts as one uint32
SMOOTHING = 0.1  # share of the use that is distributed over ids nobody has seen yet, Zipf-like in the order of ids


class Book(NamedTuple):
    """places [V]: id → place; buckets [V]: place → bucket; starts, widths [256]; its digest.

    ids: place → id, and -1 from V up to the last place that a bucket can name.
    """

    ids: np.ndarray
    places: np.ndarray
    buckets: np.ndarray
    starts: np.ndarray
    widths: np.ndarray
    digest: str

    @property
    def file_name(self) -> str:
        return f"book-{self.digest}.npy"


def build_book(ids: np.ndarray, vocab_size: int) -> Book:
    """A codebook from the ids [any shape] that a teacher stored at some thousand positions."""
    counts = np.bincount(ids.ravel(), minlength=vocab_size)
    assert len(counts) == vocab_size, (len(counts), vocab_size)
    order = np.lexsort((np.arange(vocab_size), -counts))
    prior = 1.0 / (np.arange(vocab_size) + 50)
    use = counts[order] + SMOOTHING * max(ids.size, 1) * prior / prior.sum()
    return _make(order.astype(np.int32), _cut(use / use.sum()))


def _cut(use: np.ndarray) -> np.ndarray:
    """Widths of buckets that hold about equal shares of what is left, the last one everything that is left."""
    above = np.concatenate([[0.0], np.cumsum(use)])
    size, start, widths = len(use), 0, []
    for bucket in range(BUCKETS):
        width = 0
        if bucket == BUCKETS - 1:
            width = max(size - start - 1, 0).bit_length()
        elif start < size:
            # buckets are cut before they would exceed this, so that most are below; 1.8 was the best of 1 to 2.6
            share = (1 - above[start]) / (BUCKETS - bucket) * 1.8
            while start + (2 << width) <= size and above[start + (2 << width)] - above[start] <= share:
                width += 1
        widths.append(width)
        start += 1 << width
    return np.array(widths, np.int32)


def _make(ids: np.ndarray, widths: np.ndarray) -> Book:
    starts = np.concatenate([[0], np.cumsum(1 << widths.astype(np.int64))])
    places = np.empty_like(ids)
    places[ids] = np.arange(len(ids), dtype=np.int32)
    buckets = np.searchsorted(starts, np.arange(len(ids)), side="right") - 1
    digest = hashlib.sha256(_pack(ids, widths).tobytes()).hexdigest()[:16]
    beyond = np.full(starts[-1] - len(ids), -1, np.int32)
    return Book(
        np.concatenate([ids, beyond]), places, buckets.astype(np.uint8), starts[:-1].astype(np.int32), widths, digest
    )


def _pack(ids: np.ndarray, widths: np.ndarray) -> np.ndarray:
    return np.concatenate([widths, ids]).astype("<i4")


def save_book(folder: Path, book: Book) -> None:
    """FOLDER/book-DIGEST.npy: 256 widths, then the ids in order, int32."""
    path = folder / book.file_name
    if not path.exists():
        with publishing(path) as temporary, temporary.open("wb") as file:
            np.save(file, _pack(book.ids[: len(book.places)], book.widths), allow_pickle=False)


def load_book(folder: Path, digest: str) -> Book:
    """The codebook of that digest; UserError when it is missing or is not what its name says."""
    path = folder / f"book-{digest}.npy"
    if not path.exists():
        raise UserError(f"{path}: missing; records cannot be read without it: copy it from where the shards were made")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}; copy it from where the shards were made") from error
    # behind the npy header, which is for other readers: its text could ask for anything
    content = data[10 + int.from_bytes(data[8:10], "little") :]
    if hashlib.sha256(content).hexdigest()[:16] != digest:
        raise UserError(f"{path}: its content is not what its name says; copy it from where the shards were made")
    if len(content) % 4 or len(content) <= 4 * BUCKETS:
        raise UserError(f"{path}: not a codebook: it must hold {BUCKETS} widths and every id once")
    packed = np.frombuffer(content, "<i4").astype(np.int32)
    widths, ids = packed[:BUCKETS], packed[BUCKETS:]
    if not np.array_equal(np.sort(ids), np.arange(len(ids))) or (widths < 0).any() or (widths > MAX_WIDTH).any():
        raise UserError(f"{path}: not a codebook: it must hold {BUCKETS} widths and every id once")
    if not len(ids) <= (1 << widths.astype(np.int64)).sum() <= 4 * len(ids) + BUCKETS:
        raise UserError(f"{path}: not a codebook: its buckets do not cover its {len(ids)} ids")
    return _make(ids, widths)
