"""Records whose lengths lie take neither memory nor time."""

import random
import struct
import tracemalloc

import pytest
import zstandard

from megakd.data.codec import DamagedRecord, decode
from tests.data import reference_codec as reference
from tests.data.damage import (
    HEADER,
    HEADERS,
    SEED,
    WINDOW,
    Record,
    assert_in_bounds,
    chance,
    decoded,
    rebuilt,
    sealed,
    whole_records,
)

FIELDS = {"kind": (8, 1), "temperatures": (9, 1), "positions": (10, 2), "starts": (12, 2)}  # offset and bytes
FIELDS |= {"head": (14, 4), "draws": (18, 4), "large": (22, 4), "others": (26, 2), "book": (28, 4), "frame": (32, 4)}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return whole_records()


def hostile_values(chooser: random.Random, size: int, true: int) -> int:
    most = (1 << 8 * size) - 1
    return chooser.choice((0, 1, most, most - 1, most // 2, most // 2 + 1, true + 1, max(true - 1, 0))) & most


def test_hostile_lengths_take_no_memory(records):
    """Every number of the header, checksum fitting; the layout allows windows of 65,535 tokens, so it is no help."""
    allowed = [record.layout._replace(sequence_length=65535) for record in records]
    for record, layout in zip(records, allowed, strict=True):
        decode("key", record.data, layout)  # what is compiled or imported at first use is not what is measured
    tracemalloc.start()
    try:
        for number in range(HEADERS):
            chooser, record = chance("headers", number), records[number // 8 % len(records)]
            data, names = bytearray(record.data), chooser.sample(sorted(FIELDS), chooser.choice((1, 1, 2, 3)))
            for name in names:
                at, size = FIELDS[name]
                true = int.from_bytes(data[at : at + size], "little")
                data[at : at + size] = hostile_values(chooser, size, true).to_bytes(size, "little")
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            what = f"seed {SEED}, headers {number} ({', '.join(names)})"
            layout = allowed[number // 8 % len(records)]
            found = decoded(sealed(data), layout, what)
            if found is not None:
                assert_in_bounds(found, layout)
            taken = tracemalloc.get_traced_memory()[1] - before
            assert taken < 64 << 20, f"{what}: {taken} bytes\n{data.hex()}"
    finally:
        tracemalloc.stop()


def hostile_frames(content: bytes) -> dict[str, bytes]:
    """zstd frames that announce or hold far more than a record does, and others that `encode` does not write."""
    big = bytes(1 << 28)
    frame = zstandard.ZstdCompressor(compression_params=WINDOW).compress(content)
    block = struct.pack("<I", len(content) << 3 | 1)[:3] + content  # one raw block, the last
    return {
        "nothing": b"",
        "256 MiB of zeros": zstandard.ZstdCompressor(compression_params=WINDOW).compress(big),
        "256 MiB, announced": zstandard.ZstdCompressor(level=1).compress(big),
        "its size announced": zstandard.ZstdCompressor(level=1).compress(content),
        "a window of 128 MiB": b"\x28\xb5\x2f\xfd\x00\x88" + block,
        "a window of 3.75 TiB": b"\x28\xb5\x2f\xfd\x00\xff" + block,
        "2^64 - 2 bytes announced": b"\x28\xb5\x2f\xfd\xc0\x00" + struct.pack("<Q", 2**64 - 2) + block,
        "a dictionary": b"\x28\xb5\x2f\xfd\x03\x00" + struct.pack("<I", 7) + block,
        "a frame to skip": b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip" + frame,
        "a frame to skip of 4 GiB": b"\x50\x2a\x4d\x18" + struct.pack("<I", 2**32 - 1) + frame,
        "a reserved bit": b"\x28\xb5\x2f\xfd\x08\x00" + block,
        "two frames": frame[:-1] + frame,
        "a byte less": zstandard.ZstdCompressor(compression_params=WINDOW).compress(content[:-1]),
        "a byte more": zstandard.ZstdCompressor(compression_params=WINDOW).compress(content + b"\0"),
    }


def test_hostile_frames_take_no_memory(records):
    record = records[4]
    _, planes, raw = reference.open_record(record.data, record.layout)
    assert raw
    frames = hostile_frames(b"".join(planes.values()))
    tracemalloc.start()
    try:
        for name, frame in frames.items():
            header = reference.read_header(record.data)._replace(frame=len(frame))
            data = sealed(HEADER.pack(*header) + frame + raw)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(DamagedRecord):
                print(name, decode("key", data, record.layout))
            taken = tracemalloc.get_traced_memory()[1] - before
            assert taken < 64 << 20, f"{name}: {taken} bytes"
    finally:
        tracemalloc.stop()


def test_a_tiny_record_of_a_long_window(records):
    """65,535 positions of one entry each in a hundred bytes take the memory of such a window, no more."""
    record, size = records[2], 65535
    layout = record.layout._replace(top_k=64, sequence_length=size)
    _, planes, _ = reference.open_record(record.data, layout)
    planes = dict.fromkeys(planes, b"") | {
        "tails": bytes(size * len(layout.temperatures)),
        "counts_low": b"\1" * size,
        "counts_high": bytes(size),
        "gaps": bytes(size),
        "values": b"\1" * size,
        "index_in_row": bytes(size),
        "buckets": b"\0",
        "starts": b"\0\0",
    }
    data = rebuilt(record.data, planes, b"")
    tracemalloc.start()
    try:
        found = decode("key", data, layout)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_in_bounds(found, layout)
    assert len(data) < 200 and taken < 64 << 20, (len(data), taken)
