"""20,000 damaged records and folders: each is refused by name or read as it was, and nothing is read out of bounds."""

import random
import shutil
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import zstandard

from megakd.data import codec, codec_kernels
from megakd.data.book import save_book
from megakd.data.codec import DamagedRecord, Layout, decode, encode
from megakd.data.records import Sample, TeacherTargets
from megakd.data.shards import ShardSet, shard_name, summary_of, write_manifest, write_shard
from megakd.errors import UserError
from tests.data import reference_codec as reference
from tests.data.test_codec import Case, assert_like_reference, example, same, targets_of

SEED = 6
UNSEALED, RESEALED, PLANES, HEADERS, FOLDERS = 8000, 5000, 4000, 1000, 2000  # mutations of each kind
PYTHON_KERNELS = 3000  # of those with a checksum that fits, once more with every index checked
HEADER = reference.HEADER
FIELDS = {"kind": (8, 1), "temperatures": (9, 1), "positions": (10, 2), "starts": (12, 2)}  # offset and bytes
FIELDS |= {"head": (14, 4), "draws": (18, 4), "large": (22, 4), "others": (26, 2), "book": (28, 4), "frame": (32, 4)}
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


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Two of each case; ids of the second one are not what its book was made for, so they take many raw bits."""
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


def refused_or_in_bounds(data: bytes, layout: Layout, what: str) -> bool:
    """Whether it was refused; what: to find the mutation again."""
    try:
        found = decode("key", data, layout)
    except DamagedRecord:
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}\n{data.hex()}") from error
    try:
        assert_in_bounds(found, layout)
        assert_like_reference(found, data, layout)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}\n{data.hex()}") from error
    return False


def test_damage_is_noticed(records):
    """With the checksum as it was, nothing but the record itself is read."""
    for number in range(UNSEALED):
        chooser, record = chance("unsealed", number), records[number // 8 % len(records)]
        other = chooser.choice([record.sibling, chooser.choice(records).data])
        if number % 10 == 9:
            data = swap_sections(chooser, record.data, other)
        else:
            data = bytes(chooser.choice(MUTATIONS)(chooser, bytearray(record.data)))
        what = f"seed {SEED}, unsealed {number}"
        try:
            found = decode("key", data, record.layout)
        except DamagedRecord:
            continue
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}\n{data.hex()}") from error
        # two changes may cancel; where there are no bits, all of a record but its bits is that record
        assert data in (record.data, other), f"{what}: read in spite of its damage\n{data.hex()}"
        assert same(found, decode("key", data, record.layout)), what


def resealed(record: Record, number: int) -> tuple[bytes, str]:
    """Damage anywhere behind the checksum, which then fits: what a writer with an error in it would write."""
    chooser = chance("resealed", number)
    if number % 5 == 4:
        data = bytearray(swap_sections(chooser, record.data, record.sibling))
    else:
        body = chooser.choice(MUTATIONS)(chooser, bytearray(record.data[8:]))
        data = bytearray(record.data[:8] + body)
    return sealed(data), f"seed {SEED}, resealed {number}"


def test_damage_under_a_checksum_that_fits(records):
    refused = 0
    for number in range(RESEALED):
        record = records[number // 8 % len(records)]
        data, what = resealed(record, number)
        refused += refused_or_in_bounds(data, record.layout, what)
    assert RESEALED / 2 < refused < RESEALED  # most of it shows, some is another record


SAME_SIZE = (flip_bits, change_bytes, move_between, move_between, exchange)
BESIDE = {"gaps": "values", "values": "gaps", "buckets": "label_nll", "label_nll": "buckets", "draw_gaps": "pairs"}


def other_planes(record: Record, number: int) -> tuple[bytes, str]:
    """Damage to a plane or two, which zstd cannot notice, or to the bits; every length is in order."""
    chooser = chance("planes", number)
    _, planes, raw = reference.open_record(record.data, record.layout)
    kind = number % 8
    if kind == 7 and raw:
        raw = bytes(chooser.choice(MUTATIONS)(chooser, bytearray(raw)))
        return rebuilt(record.data, planes, raw), f"seed {SEED}, planes {number} (bits)"
    names = chooser.sample([name for name, plane in planes.items() if plane], chooser.choice((1, 1, 2)))
    for name in names:
        plane = bytearray(planes[name])
        if kind in (0, 1):  # an entry more or less in this plane, and in the one that goes with it
            at, size, new = chooser.randrange(len(plane) + 1), chooser.choice((1, 1, 2)), chooser.randbytes(2)
            for each in (name, BESIDE.get(name, name)):
                old = planes[each]
                planes[each] = (old[:at] + old[at + size :]) if kind else (old[:at] + new[:size] + old[at:])
        elif kind == 2:
            planes[name] = bytes(chooser.choice(MUTATIONS)(chooser, plane))
        elif kind == 3:
            planes[name] = chooser.choice((b"", bytes(len(plane)), b"\xff" * len(plane), bytes(reversed(plane))))
        else:
            planes[name] = bytes(chooser.choice(SAME_SIZE)(chooser, plane))
    return rebuilt(record.data, planes, raw), f"seed {SEED}, planes {number} ({', '.join(names)})"


def test_damage_within_the_planes(records):
    refused = 0
    for number in range(PLANES):
        record = records[number // 8 % len(records)]
        data, what = other_planes(record, number)
        refused += refused_or_in_bounds(data, record.layout, what)
    assert PLANES / 4 < refused < PLANES * 3 / 4, refused


def test_a_record_put_together_again_is_the_same(records):
    """Else the damage above would be refused for how the test writes, not for what it changed."""
    for record in records:
        _, planes, raw = reference.open_record(record.data, record.layout)
        found = decode("key", rebuilt(record.data, planes, raw), record.layout)
        assert same(found, decode("key", record.data, record.layout))
        assert sealed(record.data) == record.data


def hostile_values(chooser: random.Random, size: int, true: int) -> int:
    most = (1 << 8 * size) - 1
    return chooser.choice((0, 1, most, most - 1, most // 2, most // 2 + 1, true + 1, max(true - 1, 0))) & most


def test_hostile_lengths_take_no_memory(records):
    """Every number of the header, checksum fitting; the layout allows windows of 65,535 tokens, so it is no help."""
    allowed = [record.layout._replace(sequence_length=65535) for record in records]
    for record, layout in zip(records, allowed, strict=True):
        decode("key", record.data, layout)  # what is compiled or imported at first use is not what is measured
    tracemalloc.start()
    slowest = 0.0
    try:
        for number in range(HEADERS):
            chooser, record = chance("headers", number), records[number // 8 % len(records)]
            data, names = bytearray(record.data), chooser.sample(sorted(FIELDS), chooser.choice((1, 1, 2, 3)))
            for name in names:
                at, size = FIELDS[name]
                true = int.from_bytes(data[at : at + size], "little")
                data[at : at + size] = hostile_values(chooser, size, true).to_bytes(size, "little")
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
            what = f"seed {SEED}, headers {number} ({', '.join(names)})"
            try:
                found = decode("key", sealed(data), allowed[number // 8 % len(records)])
            except DamagedRecord:
                pass
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}\n{data.hex()}") from error
            else:
                assert_in_bounds(found, allowed[number // 8 % len(records)])
            slowest = max(slowest, time.perf_counter() - start)
            taken = tracemalloc.get_traced_memory()[1] - before
            assert taken < 64 << 20, f"{what}: {taken} bytes\n{data.hex()}"
    finally:
        tracemalloc.stop()
    assert slowest < 2, slowest


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


@pytest.fixture
def checked_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as plain Python: numpy raises IndexError where compiled code would read whatever lies there."""
    for name, kernel in vars(codec_kernels).copy().items():
        if hasattr(kernel, "py_func"):
            monkeypatch.setattr(codec_kernels, name, kernel.py_func)


def test_every_index_is_within_its_array(records, checked_kernels):
    assert not hasattr(codec.kernels.unpack_rows, "py_func")
    for record in records:
        assert encode(record.sample, record.layout) == record.data  # the writer's indices too
    small = [record for record in records if sum(reference.read_header(record.data)[6:8]) < 200]  # entries
    for number in range(PYTHON_KERNELS):
        record = small[number // 8 % len(small)]
        make = (resealed, other_planes, other_planes)[number % 3]
        data, what = make(record, number)
        refused_or_in_bounds(data, record.layout, f"{what}, kernels in Python")


def test_bits_that_end_anywhere(records, checked_kernels):
    """Rows are read a little beyond the end, into padding; never beyond that."""
    longest = 0
    for number, record in enumerate(records):
        _, planes, raw = reference.open_record(record.data, record.layout)
        rows = reference.read_header(record.data).positions
        for length in range(len(raw)) if len(raw) < 300 else ():
            with pytest.raises(DamagedRecord):
                print(number, decode("key", rebuilt(record.data, planes, raw[:length]), record.layout))
            longest = max(longest, rows)
    assert longest > 30


# A folder of shards


def folder_facts(layout: Layout) -> dict[str, Any]:
    return {
        "tokens": {"sequence_length": layout.sequence_length},
        "vocab_size": len(layout.book.places),
        "codec": codec.NAME,
        "book": layout.book.digest,
        "top_k": layout.top_k,
        "draws": layout.draws,
        "levels": layout.levels,
        "temperatures": list(layout.temperatures),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of three samples each."""
    folder = tmp_path_factory.mktemp("logits") / "train"
    case = Case("hybrid", 5, 33, top_k=4, draws=6, temperatures=(1.0, 2.0), starts=(2,))
    layout = example(case)[1]
    facts, shards = folder_facts(layout), []
    for number in range(2):
        samples = []
        for index in range(3 * number, 3 * number + 3):
            sample, own = example(case._replace(seed=index, positions=4 + index))
            assert own._replace(book=layout.book) == layout
            samples.append(sample._replace(key=f"{index:09d}"))
        shards.append(summary_of(shard_name(number), write_shard(folder, shard_name(number), samples, facts, layout)))
    save_book(folder, layout.book)
    write_manifest(folder, facts, shards, complete=True)
    return folder


FILES = ["manifest.json", "shard-00000.tar", "shard-00000.json", "shard-00001.tar", "shard-00001.json", "book-"]


def file_of(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}*")
    return path


def damage(chooser: random.Random, path: Path, originals: dict[str, bytes]) -> tuple[str, list[str]]:
    """Change a file in one of many ways; what was done, and the files it was done to."""
    kind, data = chooser.randrange(10), originals[path.name]
    if kind == 0:
        path.unlink()
        return "deleted", [path.name]
    if kind == 1:
        other = chooser.choice([name for name in sorted(originals) if name != path.name])
        path.write_bytes(originals[other])
        if chooser.random() < 0.7:
            path.with_name(other).write_bytes(data)
            return f"exchanged with {other}", [path.name, other]
        return f"overwritten by {other}", [path.name]
    if kind == 2:
        path.write_bytes(data[: chooser.choice((0, 1, chooser.randrange(len(data)), len(data) - 1))])
        return "cut", [path.name]
    mutation = chooser.choice(MUTATIONS)
    path.write_bytes(mutation(chooser, bytearray(data)))
    return mutation.__name__, [path.name]


def assert_named_or_same(folder: Path, expected: list[Sample], touched: list[str], what: str, **how: Any) -> None:
    try:
        shards = ShardSet(folder, **how)
    except UserError as error:
        assert any(name in str(error) for name in touched) and "\n" not in str(error), f"{what}: {error}"
        return
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert len(shards) == len(expected), what
    for index, sample in enumerate(expected):
        try:
            found = shards[index]
        except UserError as error:
            shard = shard_name(index // 3)
            assert f"{shard}.tar" in str(error) and sample.key in str(error), f"{what}: {error}"
            assert any(name.startswith(shard) for name in touched) and "\n" not in str(error), f"{what}: {error}"
        except Exception as error:
            raise AssertionError(f"{what}, sample {index}: {type(error).__name__}: {error}") from error
        else:
            assert found.key == sample.key and same(found, sample), f"{what}: sample {index} reads differently"
    shards.close()


@pytest.mark.parametrize("name", [*FILES[:-1], pytest.param(FILES[-1])])
def test_damaged_folder(written, tmp_path, name):
    """Any file of it changed, gone or another one: what is read is what was written, else the error names a file."""
    folder = Path(shutil.copytree(written, tmp_path / "logits" / "train"))
    originals = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert len(originals) == len(FILES)
    shards = ShardSet(folder)
    expected = list(map(shards.__getitem__, range(6)))
    shards.close()
    for number in range(-(-FOLDERS // len(FILES))):
        path = file_of(folder, name)
        done, touched = damage(chance("folder", name, number), path, originals)
        what = f"seed {SEED}, folder {path.name} {number} ({done})"
        assert_named_or_same(folder, expected, touched, what)
        if path.suffix == ".tar" and path.exists():
            assert_named_or_same(folder, expected, touched, f"{what}, tolerant", tolerant=True)
        for other in touched:
            path.with_name(other).write_bytes(originals[other])
    assert_named_or_same(folder, expected, [], f"seed {SEED}, folder as it was")
    assert sorted(path.name for path in folder.iterdir()) == sorted(originals)


def test_a_shard_that_goes_after_opening(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "logits" / "train"))
    shards = ShardSet(folder)
    (folder / "shard-00001.tar").unlink()
    assert shards[2].key == "000000002"
    with pytest.raises(UserError, match=r"shard-00001\.tar"):
        print(shards[3])


def test_number_of_mutations():
    assert UNSEALED + RESEALED + PLANES + HEADERS + FOLDERS == 20_000
    assert TeacherTargets._fields == reference.Targets._fields
