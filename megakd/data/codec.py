"""TeacherTargets ↔ bytes: a checksummed header, then fp16 log-probabilities and int32 ids under zstd.

Rounding a log-probability to fp16 moves it by at most 2^-11 of its size (0.002 at -4); `decode` rescales each row so
that stored mass and tail sum to 1. K = 64 of a 152k vocabulary takes about 250 bytes a token.
"""

import struct
import zlib

import numpy as np
import zstandard

from megakd.data.records import TeacherTargets

NAME = "fp16-zstd-1"
HEADER = struct.Struct("<4sHHHxxI")  # magic, positions T, entries K, temperatures M, crc32 of the body
MAGIC = b"MKT1"


class DamagedRecord(Exception):
    """A record whose bytes are not what `encode` wrote; callers add shard and sample."""


def encode(targets: TeacherTargets) -> bytes:
    """Bytes of the targets of one sample (ids and logprobs [T, K], log_tails [T, M], label_nll [T])."""
    positions, entries = targets.ids.shape
    planes = (
        targets.ids.astype("<i4"),
        targets.logprobs.astype("<f2"),
        targets.log_tails.astype("<f2"),
        targets.label_nll.astype("<f4"),
    )
    # one byte plane after the other: high bytes are alike and compress
    body = zstandard.ZstdCompressor(level=1).compress(b"".join(_split_bytes(plane) for plane in planes))
    return HEADER.pack(MAGIC, positions, entries, targets.log_tails.shape[1], zlib.crc32(body)) + body


def decode(data: bytes) -> TeacherTargets:
    """The inverse of `encode` up to fp16 rounding; column 0 of log_tails is temperature 1. Raises DamagedRecord."""
    if len(data) < HEADER.size:
        raise DamagedRecord(f"{len(data)} bytes are too few for a header")
    magic, positions, entries, temperatures, crc = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    if magic != MAGIC:
        raise DamagedRecord(f"starts with {magic!r}, not {MAGIC!r}")
    if zlib.crc32(body) != crc:
        raise DamagedRecord("checksum does not match")
    shapes = [
        ("<i4", (positions, entries)),
        ("<f2", (positions, entries)),
        ("<f2", (positions, temperatures)),
        ("<f4", (positions,)),
    ]
    size = sum(np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in shapes)
    try:
        raw = zstandard.ZstdDecompressor().decompress(body, max_output_size=size)
    except zstandard.ZstdError as error:
        raise DamagedRecord(str(error)) from error
    if len(raw) != size:
        raise DamagedRecord(f"{len(raw)} bytes of content where {size} were announced")
    arrays, offset = [], 0
    for kind, shape in shapes:
        count = np.dtype(kind).itemsize * int(np.prod(shape))
        arrays.append(_join_bytes(raw[offset : offset + count], kind, shape))
        offset += count
    ids, logprobs, log_tails, label_nll = arrays
    logprobs, log_tails = logprobs.astype(np.float32), log_tails.astype(np.float32)
    total = np.log(np.exp(logprobs).sum(1) + np.exp(log_tails[:, 0]))
    log_tails[:, 0] -= total
    return TeacherTargets(ids, logprobs - total[:, None], log_tails, label_nll)


def _split_bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def _join_bytes(data: bytes, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(kind).itemsize, -1)
    return np.ascontiguousarray(planes.T).view(kind).reshape(shape)
