import codecs
import gzip
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from pydoc_data import topics

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megakd.data.documents import _from_hub, held_out, iter_documents, python_documents, source_files
from megakd.errors import UserError
from megakd.system.files import digest

TEXTS = ["one\ntwo", "Grüße, 東京 🙂", "  leading and trailing  ", 'quotes " and \\ backslashes', "the end"]
FINEWEB = ["text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count"]
LONG = "A docstring that is longer than eighty characters is kept as text, whatever it is that it says: {}."


def lines_of(texts: list[str]) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def write(folder: Path, kind: str, texts: list[str]) -> Path:
    """The texts as a file of one of the five kinds."""
    path = folder / f"some.{kind}"
    if kind == "parquet":
        rows = {
            "text": texts,
            "id": [f"<urn:uuid:{i}>" for i in range(len(texts))],
            "dump": ["CC-MAIN-2024-10"] * len(texts),
            "url": ["https://example.org/"] * len(texts),
            "date": [datetime(2024, 2, 29).isoformat()] * len(texts),
            "file_path": ["s3://commoncrawl/x.warc.gz"] * len(texts),
            "language": ["en"] * len(texts),
            "language_score": [0.97] * len(texts),
            "token_count": list(range(len(texts))),
        }
        assert list(rows) == FINEWEB
        pyarrow.parquet.write_table(pyarrow.table(rows), path, row_group_size=2)
    elif kind == "txt":
        path.write_text("\n\n\n".join(texts), encoding="utf-8")
    else:
        content = lines_of(texts).encode()
        if kind == "jsonl.gz":
            content = gzip.compress(content)
        elif kind == "jsonl.zst":
            content = zstandard.compress(content)
        path.write_bytes(content)
    return path


def error_of(source: object, **arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        list(iter_documents(str(source), **arguments))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_python_documents_are_the_same_every_time():
    documents = list(islice(python_documents(), 130))
    assert documents == list(islice(python_documents(), 130))
    modules = documents[len(topics.topics) :]
    assert len(modules) > 30 and len(modules) == len(set(modules))
    assert list(islice(iter_documents("python-docs", skip=97), 5)) == documents[97:102]


def test_each_docstring_appears_once(tmp_path):
    first, second, third, inner = (LONG.format(name) for name in ("first", "second", "third", "inner"))
    (tmp_path / "a.py").write_text(
        f'"""{first}"""\ndef f():\n    """{second}"""\nclass C:\n    def g(self):\n        """{inner}"""\n'
    )
    (tmp_path / "b.py").write_text(f'"""{second}"""\nasync def h():\n    """{third}"""\n')
    (tmp_path / "c.py").write_text(f'"""{third}"""\n')  # nothing new: no document
    (tmp_path / "d.py").write_text('"""Too short."""\n')
    (tmp_path / "e.py").write_text(f'"""{LONG.format("broken")}"""\nprint "python 2"\n')
    (tmp_path / "f.py").write_bytes(b'"""' + LONG.format("latin").encode() + b'\xe9"""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "g.py").write_text(f'"""{LONG.format("in a test")}"""\n')
    documents = list(python_documents([tmp_path]))
    assert len(documents) == 2
    assert Counter("\n\n".join(documents).split("\n\n")) == Counter([first, second, inner, third])
    assert documents[1] == third


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt"])
def test_every_kind_of_file_gives_its_texts(tmp_path, kind):
    path = write(tmp_path, kind, TEXTS)
    assert list(iter_documents(str(path))) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt"])
def test_skip_leaves_out_the_first_documents(tmp_path, kind):
    path = write(tmp_path, kind, TEXTS)
    for skip in range(len(TEXTS) + 2):
        assert list(iter_documents(str(path), skip=skip)) == TEXTS[skip:]


def test_other_columns_and_fields_can_be_the_text(tmp_path):
    assert list(iter_documents(str(write(tmp_path, "parquet", TEXTS)), text_field="language")) == ["en"] * len(TEXTS)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert list(iter_documents(str(tmp_path / "a.jsonl"), text_field="body")) == ["x"]


def test_empty_texts_and_blank_lines_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n{"text": null}\n  \n{"text": "x"}\n')
    (tmp_path / "b.txt").write_text("\n\n\none\n\n\n \n\n\ntwo\n\nstill two")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["", "y", None]}), tmp_path / "c.parquet")
    assert list(iter_documents(str(tmp_path / "a.jsonl"))) == ["x"]
    assert [d.strip() for d in iter_documents(str(tmp_path / "b.txt"))] == ["one", "two\n\nstill two"]
    assert list(iter_documents(str(tmp_path / "c.parquet"))) == ["y"]


def test_folder_and_glob_read_files_in_name_order(tmp_path, monkeypatch):
    for name, texts in {
        "b.jsonl": ["3", "4"],
        "a.jsonl": ["1", "2"],
        "deep/c.jsonl": ["5"],
        "README.md": ["no text"],
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines_of(texts))
    assert list(iter_documents(str(tmp_path))) == ["1", "2", "3", "4", "5"]
    assert list(iter_documents(str(tmp_path), skip=3)) == ["4", "5"]
    assert list(iter_documents(str(tmp_path / "*.jsonl"))) == ["1", "2", "3", "4"]
    assert list(iter_documents(str(tmp_path / "**" / "*.jsonl"))) == ["1", "2", "3", "4", "5"]
    monkeypatch.chdir(tmp_path)
    assert list(iter_documents("deep/c.jsonl")) == ["5"]


def test_zst_files_of_several_frames_are_read_to_their_end(tmp_path):
    """pzstd and `cat a.zst b.zst` write such files."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(lines_of([text]).encode()) for text in TEXTS))
    assert list(iter_documents(str(path))) == TEXTS


def test_held_out_depends_on_the_text_alone():
    texts = [f"document {i}" for i in range(4000)]
    for fraction in (0.01, 0.2, 0.5):
        share = sum(held_out(t, fraction) for t in texts) / len(texts)
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / len(texts)) ** 0.5
        assert [held_out(t, fraction) for t in reversed(texts)] == [held_out(t, fraction) for t in texts][::-1]
    assert all(held_out(t, 0.5) for t in texts if held_out(t, 0.2))  # a larger validation set holds the smaller one


def test_missing_file_is_named(tmp_path):
    for source in (tmp_path / "none.jsonl", tmp_path / "none", tmp_path / "*.jsonl", "not/here.parquet", "./not-here"):
        assert str(source) in error_of(source)


def test_a_folder_named_like_a_file_as_spark_writes_them(tmp_path):
    spark = tmp_path / "data" / "some.parquet"
    spark.mkdir(parents=True)
    write(spark, "parquet", ["x", "y"]).rename(spark / "part-00000.parquet")
    (spark / "_SUCCESS").touch()
    assert list(iter_documents(str(tmp_path))) == list(iter_documents(str(spark))) == ["x", "y"]
    assert list(iter_documents(f"{spark}/*.parquet")) == ["x", "y"]
    assert f"{spark} is a folder; a pattern must name files: {spark}/*.parquet" in error_of(f"{spark.parent}/*.parquet")


def test_wrong_suffix_is_named_with_the_right_ones(tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n")
    message = error_of(tmp_path / "a.csv")
    assert "a.csv" in message and ".parquet" in message and ".jsonl.zst" in message
    assert ".jsonl" in error_of(tmp_path)  # a folder without any


def test_missing_column_names_the_columns_there_are(tmp_path):
    message = error_of(write(tmp_path, "parquet", TEXTS), text_field="content")
    assert "some.parquet" in message and "'content'" in message
    assert all(name in message for name in FINEWEB)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"this is not parquet")
    assert "a.parquet" in error_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("bad", ['{"body": "no text"}', '{"text": "cut', '["text"]', "7", '"text"'])
def test_bad_line_is_named_with_its_number(tmp_path, kind, bad):
    content = (lines_of(["one", "two"]) + "\n" + bad + "\n").encode()
    path = tmp_path / f"a.{kind}"
    path.write_bytes({"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[kind](content))
    assert f"a.{kind}:4:" in error_of(path)


def test_a_text_that_is_no_string_is_named_with_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 5}\n')
    assert "a.jsonl:2:" in error_of(tmp_path / "a.jsonl")


def test_a_column_that_holds_no_text_is_named(tmp_path):
    assert "'token_count'" in error_of(write(tmp_path, "parquet", TEXTS), text_field="token_count")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_bytes_that_are_not_utf8_are_an_error_with_the_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes('{"text": "é"}\n'.encode("latin-1"))
    assert path.name in error_of(path)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_compressed_file_that_is_cut_is_an_error_with_the_file(tmp_path, kind):
    """As after a download that broke off: its documents must not be taken for all there are."""
    path = write(tmp_path, kind, [f"{i} {text}" for i in range(300) for text in TEXTS])
    path.write_bytes(path.read_bytes()[:-40])
    assert path.name in error_of(path)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_an_error_with_the_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_text(lines_of(TEXTS))
    assert path.name in error_of(path)


def test_a_lone_surrogate_does_not_get_as_far_as_the_hash(tmp_path):
    """JSON can spell half a character; it must be mended or refused with its place, not stop the pass later."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "half \\ud83d of one"}\n')
    try:
        documents = list(iter_documents(str(path)))
    except UserError as error:
        assert "a.jsonl:2" in str(error)
    else:
        assert len(documents) == 2 and all(isinstance(held_out(d, 0.5), bool) for d in documents)


MARK = codecs.BOM_UTF8


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt"])
def test_byte_order_marks_are_no_part_of_the_text(tmp_path, kind):
    """At the beginning, and in the middle of files that were put together."""
    parts = [write(tmp_path, kind.split(".")[0], TEXTS).read_bytes() for _ in range(2)]
    content = MARK + (b"\n\n\n" + MARK if kind == "txt" else MARK).join(parts)
    path = tmp_path / f"marked.{kind}"
    path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(kind[6:], bytes)(content))
    assert list(iter_documents(str(path))) == TEXTS * 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt"])
def test_text_in_utf16_is_refused_by_that_name(tmp_path, kind, encoding):
    """Without a mark every second byte of English is 0, which UTF-8 would take for a character."""
    path = tmp_path / f"a.{kind}"
    content = '{"text": "one"}\n'.encode(encoding)
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    expected = "UTF-32" if encoding == "utf-32" else "UTF-16"
    assert expected in error_of(path) and "convert it to UTF-8" in error_of(path)


def test_a_text_file_is_cut_as_one_string_would_be(tmp_path):
    """Against str.split of the whole file, which read all of it at once."""
    for number, text in enumerate(
        ["a\n\n\nb", "\n\n\n\na\n\n\n\n\nb\n", "a\n\nb", "", "\n\n\n", "a\n \n\n\nb\n\n\n\n\n\nc"]
    ):
        (tmp_path / f"{number}.txt").write_text(text)
        expected = [part for part in text.split("\n\n\n") if part.strip()]
        assert list(iter_documents(str(tmp_path / f"{number}.txt"))) == expected


def test_a_text_file_is_never_in_memory_as_a_whole(tmp_path):
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(200):
            file.write("x" * 50_000 + "\n\n\n")
    tracemalloc.start()
    count = sum(1 for _ in iter_documents(str(tmp_path / "a.txt")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 200 and peak < 1e6  # of 10 MB


@pytest.mark.parametrize("column", ["string_view", "dictionary", "large_string"])
def test_parquet_text_is_read_however_it_is_stored(tmp_path, column):
    texts = pyarrow.array([*TEXTS, None, ""])
    kinds = {"string_view": pyarrow.string_view(), "large_string": pyarrow.large_string()}
    stored = texts.dictionary_encode() if column == "dictionary" else texts.cast(kinds[column])
    pyarrow.parquet.write_table(pyarrow.table({"text": stored}), tmp_path / "a.parquet")
    assert list(iter_documents(str(tmp_path / "a.parquet"))) == TEXTS


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet: 2 columns are named 'text'" in error_of(tmp_path / "a.parquet")


def test_a_line_nested_too_deeply_is_named_with_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "x", "y": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert "a.jsonl:2: a JSON value nested too deeply" in error_of(tmp_path / "a.jsonl")


def test_whatever_a_library_raises_names_the_file(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet", TEXTS)

    def strange(*_: object, **__: object) -> None:
        raise pyarrow.ArrowKeyError("a fault of a class that no list has")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", strange)
    assert error_of(path).startswith(f"{path}: cannot be read to its end: ") and "no list has" in error_of(path)


class Hub:
    """`datasets.load_dataset` of rows in memory, whose reading fails at the given rows, each time once."""

    def __init__(self, rows: list[dict[str, object]], fails: list[int], error: Exception):
        self.rows, self.fails, self.error = rows, fails, error
        self.asked: list[object] = []
        self.waits: list[float] = []

    def load_dataset(self, *_: object, revision: object = None, **__: object) -> datasets.IterableDataset:
        self.asked.append(revision)
        return datasets.IterableDataset.from_generator(self.generate)

    def generate(self):
        for number, row in enumerate(self.rows):
            if number in self.fails:
                self.fails.remove(number)
                raise self.error
            yield row


@pytest.fixture
def hub(monkeypatch):
    def make(rows: list[dict[str, object]], fails: Sequence[int] = (), error: Exception | None = None) -> Hub:
        made = Hub(rows, list(fails), error or ConnectionError("Connection broken: IncompleteRead"))
        monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
        monkeypatch.setattr(time, "sleep", made.waits.append)
        return made

    return make


EMPTY_ROWS = [{"text": text} for i in range(12) for text in (f"document {i}", "", None)]


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_without_text_are_not_counted_when_a_hub_source_is_resumed(tmp_path, streaming):
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(EMPTY_ROWS), tmp_path / "data" / "train-00000.parquet")
    for skip in (0, 3, 7, 12, 13):
        found = list(_from_hub(str(tmp_path), None, "train", "text", streaming, skip))
        assert found == [f"document {i}" for i in range(skip, 12)]


def test_a_data_set_with_a_script_is_read_from_the_hubs_parquet(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"openwebtext comes with a script.*: data\.revision=refs/convert/parquet$"):
        list(iter_documents("openwebtext"))


def test_a_connection_that_breaks_loses_and_repeats_no_row(hub, capsys):
    made = hub(EMPTY_ROWS, fails=[0, 5, 5, 5, 5, 5, 31], error=ConnectionError("broken"))
    assert list(iter_documents("some/set", skip=2)) == [f"document {i}" for i in range(2, 12)]
    assert made.waits == [1, 1, 2, 4, 8, 16, 1]  # begins anew after every row that came
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 7 and said[1].endswith("some/set: reading broke off after 5 rows: broken; trying again in 1 s")


def test_a_hub_that_stays_away_is_one_line_after_five_attempts(hub):
    made = hub(EMPTY_ROWS, fails=[5] * 9)
    with pytest.raises(UserError, match=r"broke off after 5 rows: Connection broken: .*; the same command goes on"):
        list(iter_documents("some/set"))
    assert made.waits == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("error", [ValueError("no such feature"), PermissionError("gated"), KeyError("text")])
def test_what_another_attempt_cannot_help_is_not_tried_again(hub, error):
    made = hub(EMPTY_ROWS, fails=[5], error=error)
    with pytest.raises(UserError, match=r"broke off after 5 rows: .*(no such feature|gated|text)"):
        list(iter_documents("some/set"))
    assert made.waits == []


@pytest.mark.parametrize("value", [["a"], [{"role": "user", "content": "hi"}], 7, b"bytes", {"a": "b"}])
def test_a_hub_column_that_holds_no_text_is_named_with_its_row(hub, value):
    hub([{"text": value}, {"text": value}])
    assert "some/set: row 1: column 'text' holds" in error_of("some/set")


def test_a_hub_source_is_read_at_its_revision(hub):
    made = hub([{"text": "x"}])
    assert list(iter_documents("some/set", revision="v2")) == ["x"] and made.asked == ["v2"]


def test_hub_source_that_cannot_be_reached_is_one_line():
    """In a process of its own: the hub's client reads HF_HUB_OFFLINE when it is imported."""
    program = """if True:
        from megakd.data.documents import iter_documents
        from megakd.errors import UserError
        try:
            next(iter_documents("nobody/no-such-data-set"))
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "'nobody/no-such-data-set'" in line and "; without a network: the path of a .parquet, .jsonl" in line


def test_hub_data_sets_stream_through_datasets(tmp_path, monkeypatch):
    """The hub's own reader on a folder in its layout: `load_dataset(streaming=True)`, with and without a skip."""
    (tmp_path / "data").mkdir()
    texts = [f"document {i}" for i in range(7)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "data" / "train-00000.parquet")
    for streaming in (True, False):
        for skip in (0, 3):
            found = list(_from_hub(str(tmp_path), None, "train", "text", streaming, skip))
            assert found == texts[skip:], (streaming, skip)


def test_source_files_are_known_by_name_size_and_order(tmp_path):
    folder = tmp_path / "text"
    (folder / "b").mkdir(parents=True)
    for name, size in (("a.txt", 3), ("b/c.jsonl", 5), ("b/readme.md", 7)):
        (folder / name).write_bytes(b"x" * size)
    whole = source_files(str(folder))
    assert whole is not None and (whole["count"], whole["bytes"]) == (2, 8)
    assert source_files(f"{folder}/**/*[tl]") == whole == source_files(f"{folder}/")
    moved = folder.rename(tmp_path / "moved")
    assert source_files(str(moved)) == whole
    (moved / "a.txt").rename(moved / "z.txt")
    other = source_files(str(moved))
    assert other == {**whole, "digest": other and other["digest"]} != whole
    (moved / "z.txt").write_bytes(b"x" * 5)
    (moved / "b" / "c.jsonl").write_bytes(b"x" * 3)
    assert source_files(str(moved)) not in (whole, other)
    assert source_files(str(moved / "z.txt")) == {"count": 1, "bytes": 5, "digest": digest([["z.txt", 5]])}
    for name in ("python-docs", "HuggingFaceFW/fineweb", str(folder), str(moved / "none.txt")):
        assert source_files(name) is None
    (moved / "y.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"y\.txt: cannot be read: No such file"):
        source_files(str(moved))
