"""20,000 ways to damage records and folders, each of which can be made again by its number."""

import random
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import zstandard

from megakd.data.codec import DamagedRecord, Layout, decode, encode
from megakd.data.records import Sample
from tests.data import reference_codec as reference
from tests.data.test_codec import Case, assert_like_reference, example, targets_of

SEED = 6
UNSEALED, RESEALED, PLANES, HEADERS, FOLDERS = 8000, 5000, 4000, 1000, 2000  # mutations of each kind
PYTHON_KERNELS = 3000  # of those with a checksum that fits, once more with every index checked
HEADER = reference.HEADER
WINDOW = zstandard.ZstdCompressionParameters.from_level(1, window_log=18, write_content_size=False)

CASES = [
    Case("topk", 1, 5, top_k=2, temperatures=(1.0,)),
    Case("topk", 7, 33, temperatures=(1.0, 0.5, 2.0, 3.0), starts=(2, 7)),
    Case("topk", 8, 2000, top_k=12, starts=(8,)),
    Case("topk", 40, 2000, top_k=2, pmin=0.1, starts=(1,)),
    Case("topk", 40, 2000, top_k=2, pmin=0.0, spread=0.5),
    Case("topk", 4, 400, top_k=300, pmin=0.0, spread=0.1),
    Case("sampled", 3, 5, draws=7, starts=(1,)),
    Case("sampled", 9, 400, draws=255),
    Case("sampled", 4, 5, draws=255, spread=0.5),
    Case("hybrid", 2, 9, top_k=3, draws=5, starts=(1, 2)),
    Case("hybrid", 13, 33, top_k=6, draws=20, starts=(4, 5)),
    Case("hybrid", 6, 2000, draws=9),
]


class Record(NamedTuple):
    """A record and another one of the same layout."""

    sample: Sample
    layout: Layout
    data: bytes
    sibling: bytes


@cache
def whole_records() -> list[Record]:
    """Two of each case; ids of the second one are not what its codebook was made for, so they take many raw bits."""
    found = []
    for case in CASES:
        first, layout = example(case)
        more = case._replace(seed=1, positions=case.positions + 2)
        logits = max(case.spread, 1) * torch.randn(more.positions, case.vocabulary, generator=torch.manual_seed(2))
        second, _ = example(more, logits)
        left, right = encode(first, layout), encode(second, layout)
        found += [Record(first, layout, left, right), Record(second, layout, right, left)]
    return found


def chance(*name: object) -> random.Random:
    """Of its own for every mutation, so that one can be made again without those before it."""
    return random.Random("/".join(map(str, (SEED, *name))))


def flip_bits(chooser: random.Random, data: bytearray) -> bytearray:
    for _ in range(chooser.choice((1, 1, 2, 5))):
        data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
    return data


def change_bytes(chooser: random.Random, data: bytearray) -> bytearray:
    for _ in range(chooser.choice((1, 1, 2, 5))):
        data[chooser.randrange(len(data))] = chooser.choice((0, 1, 0x7F, 0x80, 0xFF, chooser.randrange(256)))
    return data


def change_run(chooser: random.Random, data: bytearray) -> bytearray:
    at, size = chooser.randrange(len(data)), chooser.randrange(1, 40)
    data[at : at + size] = chooser.choice((bytes(size), b"\xff" * size, chooser.randbytes(size)))
    return data


def cut_end(chooser: random.Random, data: bytearray) -> bytearray:
    return data[: chooser.randrange(len(data))]


def cut_out(chooser: random.Random, data: bytearray) -> bytearray:
    at = chooser.randrange(len(data))
    del data[at : at + chooser.randrange(1, 40)]
    return data


def put_in(chooser: random.Random, data: bytearray) -> bytearray:
    at = chooser.choice((len(data), chooser.randrange(len(data))))
    data[at:at] = chooser.choice((bytes(1), bytes(9), chooser.randbytes(chooser.randrange(1, 40)), bytes(data)))
    return data


def move_between(chooser: random.Random, data: bytearray) -> bytearray:
    """What one byte loses another one, mostly a near one, gains: sums stay what they were."""
    for _ in range(chooser.choice((1, 3))):
        left = chooser.randrange(len(data))
        right = chooser.choice((chooser.randrange(len(data)), (left + chooser.randrange(-3, 4)) % len(data)))
        amount = chooser.choice((1, 1, 2, data[left], chooser.randrange(256)))
        data[left], data[right] = (data[left] - amount) % 256, (data[right] + amount) % 256
    return data


def exchange(chooser: random.Random, data: bytearray) -> bytearray:
    left, right = chooser.randrange(len(data)), chooser.randrange(len(data))
    data[left], data[right] = data[right], data[left]
    return data


MUTATIONS: tuple[Callable[[random.Random, bytearray], bytearray], ...] = (
    flip_bits, change_bytes, change_run, cut_end, cut_out, put_in, move_between, exchange,
)  # fmt: skip


def sections(data: bytes) -> list[bytes]:
    """Header, frame and bits."""
    end = HEADER.size + reference.read_header(data).frame
    return [data[: HEADER.size], data[HEADER.size : end], data[end:]]


def swap_sections(chooser: random.Random, left: bytes, right: bytes) -> bytes:
    """One section of three from the right record, the others from the left, or the other way round."""
    parts, others = chooser.sample([sections(left), sections(right)], 2)
    part = chooser.randrange(3)
    parts[part] = others[part]
    return b"".join(parts)


def sealed(data: bytearray | bytes) -> bytes:
    """With the magic and the checksum that belong to the rest."""
    return b"MKD3" + struct.pack("<I", zlib.crc32(data[8:])) + bytes(data[8:])


def rebuilt(data: bytes, planes: dict[str, bytes], raw: bytes) -> bytes:
    """The record with other planes and bits; frame, lengths and checksum are those that belong to them."""
    frame = zstandard.ZstdCompressor(compression_params=WINDOW).compress(b"".join(planes.values()))
    header = reference.read_header(data)._replace(
        positions=len(planes["index_in_row"]),
        starts=len(planes["starts"]) // 2,
        head=len(planes["gaps"]),
        draws=len(planes["draw_gaps"]),
        large=len(planes["large"]),
        others=max(len(planes["buckets"]) - 1, 0),
        frame=len(frame),
    )
    return sealed(HEADER.pack(*header) + frame + raw)


def assert_in_bounds(found: Sample, layout: Layout) -> None:
    """Whatever was damaged, what comes out is a sample that training can take."""
    targets, vocabulary = targets_of(found), len(layout.book.places)
    positions = len(found.tokens) - 1
    assert 0 < positions <= layout.sequence_length
    for ids in (found.tokens, targets.ids, targets.draw_ids):
        assert ids.dtype == np.int32 and ((ids >= 0) & (ids < vocabulary)).all()
    assert found.starts[0] == 0 and (np.diff(found.starts) > 0).all() and found.starts[-1] <= positions
    for name, width in (("ids", layout.top_k), ("logprobs", layout.top_k), ("log_tails", len(layout.temperatures))):
        assert getattr(targets, name).shape == (positions, width), name
    assert targets.draw_ids.shape == targets.draw_shares.shape == (positions, layout.draws)
    for name in ("logprobs", "log_tails"):
        assert not np.isnan(getattr(targets, name)).any() and not np.isposinf(getattr(targets, name)).any(), name
    if layout.top_k:
        assert np.isfinite(targets.logprobs[:, 0]).all()
        mass = np.exp(np.c_[targets.logprobs, targets.log_tails[:, :1]].astype(np.float64)).sum(1)
        assert np.abs(mass - 1).max() < 1e-5
    if layout.draws:
        shares = targets.draw_shares.astype(np.float64)
        assert (shares >= 0).all() and np.abs(shares.sum(1) - 1).max() < 1e-6
    for numbers in (targets.label_nll, targets.entropy):
        assert numbers.shape == (positions,) and (numbers >= 0).all() and np.isfinite(numbers).all()


def decoded(data: bytes, layout: Layout, what: str) -> Sample | None:
    """None when it was refused; what: to find the mutation again."""
    try:
        return decode("key", data, layout)
    except DamagedRecord:
        return None
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}\n{data.hex()}") from error


def refused_or_in_bounds(data: bytes, layout: Layout, what: str) -> bool:
    """Whether it was refused; what comes out else is what the reference reads."""
    found = decoded(data, layout, what)
    if found is None:
        return True
    try:
        assert_in_bounds(found, layout)
        assert_like_reference(found, data, layout)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}\n{data.hex()}") from error
    return False
