"""Damaged records: each is refused or read as it was, and nothing is read out of bounds."""

from collections.abc import Callable

import pytest

from megakd.data import codec
from megakd.data import kernels as codec_kernels
from megakd.data.codec import DamagedRecord, decode, encode
from megakd.data.records import TeacherTargets
from tests.data import reference_codec as reference
from tests.data.damage import (
    FOLDERS,
    HEADERS,
    MUTATIONS,
    PLANES,
    PYTHON_KERNELS,
    RESEALED,
    SEED,
    UNSEALED,
    Record,
    chance,
    change_bytes,
    decoded,
    exchange,
    flip_bits,
    move_between,
    rebuilt,
    refused_or_in_bounds,
    sealed,
    swap_sections,
    whole_records,
)
from tests.data.test_codec import same


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return whole_records()


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
        found = decoded(data, record.layout, what)
        if found is None:
            continue
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


Maker = Callable[[Record, int], tuple[bytes, str]]


def count_refused(records: list[Record], mutations: int, make: Maker) -> int:
    refused = 0
    for number in range(mutations):
        record = records[number // 8 % len(records)]
        data, what = make(record, number)
        refused += refused_or_in_bounds(data, record.layout, what)
    return refused


def test_damage_under_a_checksum_that_fits(records):
    # most of it shows, some is another record
    assert RESEALED / 2 < count_refused(records, RESEALED, resealed) < RESEALED


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
    refused = count_refused(records, PLANES, other_planes)
    assert PLANES / 4 < refused < PLANES * 3 / 4, refused


def test_a_record_put_together_again_is_the_same(records):
    """Else the damage above would be refused for how the test writes, not for what it changed."""
    for record in records:
        _, planes, raw = reference.open_record(record.data, record.layout)
        found = decode("key", rebuilt(record.data, planes, raw), record.layout)
        assert same(found, decode("key", record.data, record.layout))
        assert sealed(record.data) == record.data


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


def test_number_of_mutations():
    assert UNSEALED + RESEALED + PLANES + HEADERS + FOLDERS == 20_000
    assert TeacherTargets._fields == reference.Targets._fields
