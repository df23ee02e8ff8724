import hashlib
from pathlib import Path

import numpy as np
import pytest

from megakd.data.codebook import BUCKETS, MAX_WIDTH, Book, build_book, load_book, save_book
from megakd.errors import UserError

SIZES = [1, 2, 5, 33, 255, 256, 257, 258, 400, 511, 513, 5000]


def zipf(vocabulary: int, count: int, seed: int = 0) -> np.ndarray:
    """Ids as teachers name them: few of them often, distributed over the vocabulary at random."""
    chooser = np.random.default_rng(seed)
    p = 1 / (np.arange(vocabulary) + 3.0)
    return chooser.permutation(vocabulary)[chooser.choice(vocabulary, count, p=p / p.sum())]


def assert_consistent(book: Book, vocabulary: int) -> None:
    """Every id once, at a place of a bucket that holds it; buckets lie side by side and cover the vocabulary."""
    assert len(book.places) == len(book.buckets) == vocabulary and len(book.starts) == len(book.widths) == BUCKETS
    ids = book.ids[:vocabulary].tolist()
    assert sorted(ids) == list(range(vocabulary)) and set(book.ids[vocabulary:].tolist()) <= {-1}
    start = 0
    for bucket in range(BUCKETS):
        width = int(book.widths[bucket])
        assert 0 <= width <= MAX_WIDTH and book.starts[bucket] == start
        start += 1 << width
    assert start == len(book.ids) <= 4 * vocabulary + BUCKETS
    for place, token in enumerate(ids):
        bucket = int(book.buckets[place])
        assert book.places[token] == place
        assert book.starts[bucket] <= place < book.starts[bucket] + (1 << book.widths[bucket])
    assert (book.ids.dtype, book.places.dtype, book.buckets.dtype) == (np.int32, np.int32, np.uint8)
    packed = np.concatenate([book.widths, book.ids[:vocabulary]]).astype("<i4").tobytes()
    assert book.digest == hashlib.sha256(packed).hexdigest()[:16]


def assert_equal(found: Book, expected: Book) -> None:
    assert found.digest == expected.digest
    for name in ("ids", "places", "buckets", "starts", "widths"):
        left, right = getattr(found, name), getattr(expected, name)
        assert left.dtype == right.dtype and np.array_equal(left, right), name


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("count", [0, 1, 3000])
def test_every_id_has_one_place(vocabulary, count):
    assert_consistent(build_book(zipf(vocabulary, count), vocabulary), vocabulary)


@pytest.mark.parametrize("used", [[0], [4], [4] * 1000, [0, 4, 2, 2], list(range(5)) * 50])
def test_a_tiny_vocabulary_however_it_is_used(used):
    assert_consistent(build_book(np.array(used), 5), 5)


@pytest.mark.parametrize("pattern", ["one", "even", "halves", "steps"])
def test_unusual_use(pattern):
    """All use on one id, the same use of all, of half of them, and use that halves from id to id."""
    ids = {
        "one": np.full(10**6, 4999),
        "even": np.arange(5000).repeat(3),
        "halves": np.arange(2500, 5000).repeat(100),
        "steps": np.repeat(np.arange(20), 2 ** np.arange(20)),
    }[pattern]
    assert_consistent(build_book(ids, 5000), 5000)


def test_ids_lie_in_the_order_of_their_use():
    """The shape of the array does not matter; ids of equal use, ids never seen among them, come in ascending order."""
    ids = np.array([[7, 7, 7], [3, 9, 3], [9, 5, 7]])
    book = build_book(ids, 12)
    assert book.ids[:12].tolist() == [7, 3, 9, 5, 0, 1, 2, 4, 6, 8, 10, 11]
    assert_equal(build_book(ids.ravel()[::-1], 12), book)


def test_ids_never_seen_have_places():
    """Nothing seen at all, and a vocabulary of which a hundredth was seen: whatever comes later can be written."""
    assert build_book(np.zeros(0, np.int32), 400).ids[:400].tolist() == list(range(400))
    book = build_book(np.arange(300, 350), 5000)
    assert_consistent(book, 5000)
    assert set(book.ids[:50].tolist()) == set(range(300, 350))
    assert np.log2(np.bincount(book.buckets)).max() <= book.widths.max() <= 8  # ids not seen are not all in one bucket


def test_frequent_ids_have_narrow_buckets():
    """As a code for what it was made of, a codebook costs little more than the entropy of the ids."""
    later = zipf(5000, 50_000)
    book = build_book(later[::10], 5000)
    buckets = book.buckets[book.places[later]]
    p_id, p_bucket = (np.bincount(x) / len(x) for x in (later, buckets))
    entropy, coded = (-(p[p > 0] * np.log2(p[p > 0])).sum() for p in (p_id, p_bucket))
    assert coded + book.widths[buckets].mean() <= entropy + 0.35, (coded, book.widths[buckets].mean(), entropy)
    assert (np.diff(book.widths[: book.buckets.max()]) >= 0).mean() > 0.9  # narrow ones first


def test_a_vocabulary_of_152k(tmp_path):
    vocabulary = 151_936
    ids = zipf(vocabulary, 200_000)
    book = build_book(ids, vocabulary)
    save_book(tmp_path, book)
    loaded = load_book(tmp_path, book.digest)
    assert_equal(loaded, book)
    assert_consistent(book, vocabulary)
    assert (tmp_path / book.file_name).stat().st_size < 4 * (vocabulary + BUCKETS) + 1000


def test_same_ids_same_digest_other_ids_another(tmp_path):
    ids = zipf(400, 3000)
    book = build_book(ids, 400)
    assert_equal(build_book(ids, 400), book)
    others = [build_book(zipf(400, 3000, seed=1), 400), build_book(ids, 401)]
    assert len({book.digest, *(other.digest for other in others)}) == 3
    assert len(book.digest) == 16 and int(book.digest, 16) >= 0


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 256, 257, 5000])
def test_saved_and_loaded(tmp_path, vocabulary):
    book = build_book(zipf(vocabulary, 3000), vocabulary)
    save_book(tmp_path, book)
    assert [path.name for path in tmp_path.iterdir()] == [f"book-{book.digest}.npy"] == [book.file_name]
    assert_equal(load_book(tmp_path, book.digest), book)
    first = (tmp_path / book.file_name).stat()
    save_book(tmp_path, book)  # there already: left alone
    assert (tmp_path / book.file_name).stat() == first


def error_of(folder: Path, digest: str) -> str:
    with pytest.raises(UserError) as caught:
        load_book(folder, digest)
    assert "\n" not in str(caught.value) and f"book-{digest}.npy" in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Book]:
    book = build_book(zipf(33, 300), 33)
    save_book(tmp_path, book)
    return tmp_path / book.file_name, book


def test_missing(saved):
    path, book = saved
    path.unlink()
    assert "missing" in error_of(path.parent, book.digest)
    path.mkdir()
    error_of(path.parent, book.digest)


def test_of_another_digest(saved):
    path, _ = saved
    path.rename(path.with_name("book-0123456789abcdef.npy"))
    assert "not what its name says" in error_of(path.parent, "0123456789abcdef")


def test_every_cut(saved):
    path, book = saved
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        error_of(path.parent, book.digest)


def npy(header: str, data: bytes) -> bytes:
    """An .npy file of that header, whatever it says."""
    return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117).encode("latin1") + b"\n" + data


HEADER = "{'descr': '<i4', 'fortran_order': False, 'shape': (289,), }"  # 256 widths and 33 ids
SPOILT_HEADERS = {
    "other numbers": HEADER.replace("<i4", "<f4"),
    "other order of bytes": HEADER.replace("<i4", ">i4"),
    "letters": HEADER.replace("<i4", "<U1"),
    "fields": HEADER.replace("'<i4'", "[('a', '<i4')]"),
    "objects": HEADER.replace("<i4", "|O4"),
    "no type": HEADER.replace("<i4", "?!4"),
    "two dimensions": HEADER.replace("(289,)", "(17, 17)"),
    "no dimension": HEADER.replace("(289,)", "()"),
    "no number of dimensions": HEADER.replace("(289,)", "289"),
    "a shape below nothing": HEADER.replace("289", "-1"),
    "trillions of ids": HEADER.replace("289", "9" * 15),
    "more ids than numbers count": HEADER.replace("289", "9" * 30),
    "a key too many": HEADER.replace("}", "'x': 1}"),
    "no dictionary": HEADER.replace("{'descr'", "['descr'"),
    "a bracket left open": HEADER.replace("}", " "),
    "a parenthesis left open": HEADER.replace(",)", ", "),
    "a string left open": HEADER.replace("'descr'", "'descr"),
    "a call": HEADER.replace("289", "f(9)"),
    "letters of no alphabet": HEADER.replace("descr", "d\xffscr"),
    "null bytes": "\0" * 117,
    "nothing": "",
}


LET_THROUGH = {"no dimension", "trillions of ids", "more ids than numbers count", "a bracket left open"}
LET_THROUGH |= {"a parenthesis left open"}


@pytest.mark.parametrize(
    "header",
    [pytest.param(h, id=name) for name, h in SPOILT_HEADERS.items()],
)
def test_spoilt_header(saved, header):
    """np.load gives up in many ways; each is the same mistake to a user. A reader that can do without may."""
    path, book = saved
    content = path.read_bytes()
    assert npy(HEADER, content[128:]) == content
    path.write_bytes(npy(header, content[128:]))
    assert_refused_or_equal(path, book)


def assert_refused_or_equal(path: Path, book: Book) -> None:
    try:
        found = load_book(path.parent, book.digest)
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        assert_equal(found, book)


OTHER_FILES = [b"", b"\n", b'{"format": "other"}', b"\x80\x04\x95\x10"]


@pytest.mark.parametrize("content", [*OTHER_FILES, pytest.param(b"PK\x03\x04" + bytes(99))])
def test_another_file_in_its_place(saved, content):
    path, book = saved
    path.write_bytes(content)
    error_of(path.parent, book.digest)


def test_an_archive_of_arrays_in_its_place(saved):
    path, book = saved
    with path.open("wb") as file:
        np.savez(file, a=np.arange(289, dtype=np.int32))
    error_of(path.parent, book.digest)


def test_every_flipped_bit(saved):
    """Content: refused. Header: refused, or what is not looked at and the codebook is the same."""
    path, book = saved
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if bit // 8 >= 128:
            error_of(path.parent, book.digest)
        else:
            assert_refused_or_equal(path, book)


def named(folder: Path, packed: np.ndarray) -> str:
    """Save numbers as a codebook of the name that belongs to them; the digest."""
    digest = hashlib.sha256(packed.tobytes()).hexdigest()[:16]
    np.save(folder / f"book-{digest}.npy", packed)
    return digest


def packed_of(widths: list[int], ids: list[int]) -> np.ndarray:
    return np.array([*widths, *[0] * (BUCKETS - len(widths)), *ids], np.int32)


NO_BOOKS = {
    "an id twice": packed_of([4], [0, 1, 1]),
    "an id too many": packed_of([4], [0, 1, 3]),
    "an id below nothing": packed_of([4], [0, 1, -1]),
    "width below nothing": packed_of([-1], [0, 1, 2]),
    "width of 25": packed_of([25], list(range(300))),
    "width of 64": packed_of([64], list(range(300))),
    "buckets short of the ids": packed_of([], list(range(257))),
    "buckets far beyond the ids": packed_of([20], list(range(300))),
    "no ids": packed_of([], []),
    "not all widths": np.zeros(10, np.int32),
    "nothing": np.zeros(0, np.int32),
}
TAKEN = {"no ids", "not all widths", "nothing"}


@pytest.mark.parametrize("packed", [pytest.param(x, id=name) for name, x in NO_BOOKS.items()])
def test_numbers_that_are_no_book(tmp_path, packed):
    """Of the right name, so that nothing but the numbers themselves can tell."""
    error_of(tmp_path, named(tmp_path, packed))


def test_widths_that_another_program_chose_are_a_book_too(tmp_path):
    """The cut into buckets is the writer's choice; a reader takes any that covers the vocabulary."""
    digest = named(tmp_path, packed_of([3, 0, 2], list(range(12, -1, -1))))
    book = load_book(tmp_path, digest)
    assert_consistent(book, 13)
    assert book.places.tolist() == list(range(12, -1, -1)) and book.widths[:4].tolist() == [3, 0, 2, 0]
