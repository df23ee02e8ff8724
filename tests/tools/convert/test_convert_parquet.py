import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megakd.config.objective import CachedConfig
from megakd.errors import UserError
from megakd.objectives.cached import check_support, stored_in
from tests.conftest import VOCABULARY, files
from tests.tools.examples import LENGTH, SAMPLES, assert_alike, converted, head, random_logits, refused, tool, window

module = tool("convert/convert_parquet")
convert = partial(converted, module)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, shards) -> Path:
    """The shards as `to` writes them, some windows per row group."""
    path = tmp_path_factory.mktemp("parquet") / "store.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_ENTRIES", 200)
        module.main(["to", str(shards.folder), str(path)])
    assert 2 < pq.ParquetFile(path).num_row_groups < SAMPLES
    return path


def handmade(samples: int = 5) -> list[dict[str, Any]]:
    """Rows of 9 to 13 tokens, one to six entries per position."""
    rows = []
    for number in range(samples):
        tokens = window(number, VOCABULARY, 9 + number)[0]
        logits = random_logits(len(tokens), VOCABULARY, seed=70 + number).double()
        logprobs, ids = logits.log_softmax(-1).sort(-1, descending=True)
        widths = [1 + (number + t) % 6 for t in range(len(tokens))]
        rows.append({
            "input_ids": tokens.tolist(),
            "topk_ids": [ids[t, :width].tolist() for t, width in enumerate(widths)],
            "topk_logprobs": [logprobs[t, :width].tolist() for t, width in enumerate(widths)],
        })  # fmt: skip
    return rows


def write(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> Path:
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    pq.write_table(table, path, row_group_size=2)
    return path


def test_datasets_reads_the_file(shards, stored, tmp_path):
    found = datasets.load_dataset("parquet", data_files=str(stored), split="train", cache_dir=str(tmp_path))
    streamed = datasets.load_dataset("parquet", data_files=str(stored), split="train", streaming=True)
    assert json.loads(pq.read_schema(stored).metadata[b"facts"]) == shards.facts
    assert len(found) == SAMPLES
    for index, (row, other) in enumerate(zip(found, streamed, strict=True)):
        assert row == other
        sample = shards[index]
        assert row["input_ids"] == sample.tokens.tolist() and row["starts"] == sample.starts.tolist()
        for position in range(len(sample.tokens) - 1):
            logprobs = row["topk_logprobs"][position]
            assert dict(zip(row["topk_ids"][position], logprobs, strict=True)) == head(sample.targets, position)
            assert logprobs == sorted(logprobs, reverse=True)
        assert len(row["topk_ids"]) == len(row["label_nll"]) == len(sample.tokens) - 1
        assert np.array_equal(np.float32(row["label_nll"]), sample.targets.label_nll)
        assert np.array_equal(np.float32(row["log_tails"]), sample.targets.log_tails)
        assert np.array_equal(np.float32(row["tail_logprob"]), sample.targets.log_tails[:, 0])


def test_there_and_back(shards, stored, tmp_path):
    once = convert(stored, tmp_path / "once")
    assert_alike(once, shards)
    assert once.facts.pop("converted")["from"] == "store.parquet"
    assert once.facts == {**shards.facts, "book": once.facts["book"]} and once.sizes == shards.sizes
    module.main(["to", str(tmp_path / "once"), str(tmp_path / "again.parquet")])
    twice = convert(tmp_path / "again.parquet", tmp_path / "twice")
    for name in (f"{name}.tar" for name in once.names):
        assert (twice.folder / name).read_bytes() == (once.folder / name).read_bytes()


@pytest.mark.parametrize("form", ["lists", "large", "one shorter"])
def test_rows_of_others(folder, tmp_path, form):
    rows, types = handmade(), {}
    if form == "large":
        types = {"input_ids": pa.large_list(pa.uint16()), "topk_ids": pa.large_list(pa.list_(pa.int64()))}
        types["topk_logprobs"] = pa.list_(pa.large_list(pa.float64()))
    elif form == "one shorter":
        rows = [{**row, **{n: row[n][:-1] for n in ("topk_ids", "topk_logprobs")}} for row in rows]
    source = write(tmp_path / "mine.parquet", rows, **types)
    found = convert(source, tmp_path / "out", "--tokenizer", folder, "--values", "logprobs", "--pmin", 0)
    facts = found.facts
    assert facts["top_k"] == 6 and facts["tokens"]["sequence_length"] == 13 and facts["temperatures"] == [1.0]
    check_support(CachedConfig(temperature=1.0), stored_in(facts))
    for index, row in enumerate(rows):
        sample = found[index]
        assert sample.tokens.tolist() == row["input_ids"] and sample.starts.tolist() == [0]
        for position in range(len(row["input_ids"]) - 1):
            mine = head(sample.targets, position)
            theirs = dict(zip(row["topk_ids"][position], row["topk_logprobs"][position], strict=True))
            assert mine.keys() == theirs.keys()
            assert max(abs(math.exp(mine[i] / 2) - math.exp(theirs[i] / 2)) for i in mine) < 2 / facts["levels"]
            tail = 1 - sum(math.exp(value) for value in theirs.values())
            assert math.exp(sample.targets.log_tails[position, 0]) == pytest.approx(tail, abs=0.01)
    module.main(["to", str(tmp_path / "out"), str(tmp_path / "again.parquet")])
    assert "log_tails" not in pq.read_schema(tmp_path / "again.parquet").names
    assert_alike(convert(tmp_path / "again.parquet", tmp_path / "again"), found)


def test_fixed_size_lists_and_raw_logits(folder, tmp_path):
    numbers = np.sort(random_logits(2 * 9, 5, seed=3).numpy())[:, ::-1].reshape(2, 9, 5)
    ids = np.tile(np.arange(5), (2, 9, 1)) * 7
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 5), 9)
        for values in (ids, numbers)
    ]
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(18)), 9)
    pq.write_table(pa.table([tokens, *arrays], ["input_ids", "topk_ids", "topk_logprobs"]), tmp_path / "mine.parquet")
    argv = ["--tokenizer", folder, "--values", "logits", "--pmin", 0]
    found = convert(tmp_path / "mine.parquet", tmp_path / "out", *argv)
    with pytest.raises(UserError, match="truncated"):
        check_support(CachedConfig(tail="ghost", temperature=1.0), stored_in(found.facts))
    for index, position in itertools.product(range(2), range(8)):
        expected = np.exp(numbers[index, position]) / np.exp(numbers[index, position]).sum()
        mine = head(found[index].targets, position)
        assert [math.exp(mine[7 * i] / 2) for i in range(5)] == pytest.approx(
            np.sqrt(expected), abs=2 / found.facts["levels"]
        )
    module.main(["to", str(tmp_path / "out"), str(tmp_path / "again.parquet")])
    assert "tail_logprob" not in pq.read_schema(tmp_path / "again.parquet").names
    assert_alike(convert(tmp_path / "again.parquet", tmp_path / "again"), found)


def test_a_folder_is_its_files_in_order(folder, tmp_path, capsys):
    rows = handmade()
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "b.parquet", rows[3:])
    write(tmp_path / "parts" / "a.parquet", rows[:3])
    argv = ["--tokenizer", folder, "--values", "logprobs"]
    parts = convert(tmp_path / "parts", tmp_path / "out", *argv)
    whole = convert(write(tmp_path / "whole.parquet", rows), tmp_path / "whole", *argv)
    assert (parts.folder / "shard-00000.tar").read_bytes() == (whole.folder / "shard-00000.tar").read_bytes()
    write(tmp_path / "parts" / "c.parquet", [{**row, "more": 1} for row in rows])
    convert(tmp_path / "parts", tmp_path / "more", *argv)  # a column that nobody reads
    write(tmp_path / "parts" / "d.parquet", [{**row, "starts": [0]} for row in rows])
    assert "d.parquet has other columns than a.parquet" in refused(
        module, capsys, "from", tmp_path / "parts", tmp_path / "x", *argv
    )
    (tmp_path / "none").mkdir()
    assert "no *.parquet in it" in refused(module, capsys, "from", tmp_path / "none", tmp_path / "x", *argv)


def changed(name: str, change: Any, row: int = 3) -> Any:
    def apply(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**each, name: change(each.get(name))} if i == row else each for i, each in enumerate(rows)]

    return apply


def every(name: str, change: Any) -> Any:
    return lambda rows: [{**row, name: change(row.get(name))} for row in rows]


def place(position: int, entry: int, value: Any) -> Any:
    return lambda lists: [
        [value if (t, k) == (position, entry) else v for k, v in enumerate(values)] for t, values in enumerate(lists)
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: [{k: v for k, v in r.items() if k != "topk_ids"} for r in rows], "no column topk_ids"),
        (every("input_ids", lambda v: [float(t) for t in v]), "input_ids is list<element: double>, expected lists"),
        (every("topk_ids", lambda v: v[0]), "topk_ids is list<element: int64>, expected lists of lists of integers"),
        (every("topk_logprobs", lambda v: [[str(x) for x in r] for r in v]), "lists of lists of floating"),
        (every("starts", lambda v: 0), "starts is int64, expected lists of integers"),
        (changed("input_ids", lambda v: None), "row 3: input_ids: null"),
        (changed("topk_ids", lambda v: None), "row 3: topk_ids: null"),
        (changed("topk_ids", lambda v: [None, *v[1:]]), "row 3: topk_ids: null"),
        (changed("topk_logprobs", place(2, 0, None)), "row 3: topk_logprobs: null"),
        (changed("topk_ids", lambda v: [v[0] * 2, *v[1:]]), "row 3: topk_logprobs has other numbers"),
        (every("topk_ids", lambda v: v[::-1]), "row 0: topk_logprobs has other numbers"),
        (changed("input_ids", lambda v: [*v, 1, 1]), "topk_ids, sample 3: 12 rows next to 14 tokens"),
        (changed("input_ids", lambda v: v[:1]), "input_ids, sample 3: 1 tokens, a window needs 2"),
        (changed("input_ids", lambda v: [*v[:4], 400, *v[5:]]), "input_ids, sample 3, position 4: id 400 is beyond"),
        (changed("topk_ids", place(2, 1, 400)), "topk_ids, sample 3, position 2, entry 1: id 400 is beyond"),
        (changed("topk_logprobs", place(2, 0, math.nan)), "topk_logprobs, sample 3, position 2, entry 0: nan is no"),
        (changed("topk_logprobs", place(2, 0, 3.0)), "topk_logprobs, sample 3, position 2, entry 0: 3 is no log-prob"),
        (every("tail_logprob", lambda v: [0.0] * 13), "tail_logprob, sample 0, position 0: with the entries' prob"),
        (every("label_nll", lambda v: [1.0]), "label_nll, sample 0: 1 numbers, expected at least 8"),
        (lambda rows: [], "no column input_ids"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(folder, tmp_path, capsys, change, message):
    source = write(tmp_path / "mine.parquet", change(handmade()))
    said = refused(module, capsys, "from", source, tmp_path / "out", "--tokenizer", folder, "--values", "logprobs")
    assert said.startswith(f"convert_parquet: {source}: ") and message in said
    assert not (tmp_path / "out").exists()


def test_a_file_without_rows_is_refused(folder, tmp_path, capsys):
    pq.write_table(pa.Table.from_pylist(handmade()).slice(0, 0), tmp_path / "mine.parquet")
    argv = ["--tokenizer", folder, "--values", "logprobs"]
    assert "no row in it" in refused(module, capsys, "from", tmp_path / "mine.parquet", tmp_path / "out", *argv)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_refused(stored, tmp_path, capsys, share):
    data = stored.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: int(share * len(data))])
    said = refused(module, capsys, "from", tmp_path / "cut.parquet", tmp_path / "out")
    assert "cut.parquet: cannot be read as Parquet; was it cut short?" in said


def test_damage_in_the_middle_is_named(stored, tmp_path, capsys):
    data = bytearray(stored.read_bytes())
    metadata = pq.ParquetFile(stored).metadata
    first = metadata.row_group(0).num_rows
    columns = [metadata.row_group(1).column(i) for i in range(metadata.num_columns)]
    chunk = next(c for c in columns if c.path_in_schema.startswith("topk_logprobs"))
    data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = bytes(
        chunk.total_compressed_size
    )
    (tmp_path / "damaged.parquet").write_bytes(data)
    said = refused(module, capsys, "from", tmp_path / "damaged.parquet", tmp_path / "out")
    assert f"damaged.parquet: row {first} or one soon after cannot be read" in said


@pytest.mark.parametrize("rows", [3, 9])
def test_killed_and_started_again_gives_the_same(stored, tmp_path, monkeypatch, rows):
    """The first row after the kill stands in the middle of a row group."""
    table, stored = pq.read_table(stored), tmp_path / "store.parquet"
    pq.write_table(table, stored, row_group_size=rows)
    whole = convert(stored, tmp_path / "whole")
    foreign = tool("convert/foreign")
    sample_of = foreign.sample_of
    calls = itertools.count()

    def dies(row, reading):
        if next(calls) == SAMPLES + 6:  # the first pass is for the codebook
            raise KeyboardInterrupt
        return sample_of(row, reading)

    monkeypatch.setattr(foreign, "sample_of", dies)
    with pytest.raises(SystemExit, match="130"):
        convert(stored, tmp_path / "out")
    numbers: list[int] = []
    monkeypatch.setattr(
        foreign, "sample_of", lambda row, reading: numbers.append(row.number) or sample_of(row, reading)
    )
    convert(stored, tmp_path / "out")
    assert numbers[SAMPLES:] == [4, 5, 6, 7, 8]
    assert files(tmp_path / "out") == files(whole.folder)


def test_stated_facts_are_checked(stored, tmp_path, capsys):
    table = pq.read_table(stored)
    facts = json.loads(table.schema.metadata[b"facts"])
    for wrong, message in (
        ("us", "facts in its metadata are no JSON object"),
        (json.dumps({**facts, "tokens": 3}), "the facts it states lack tokens"),
        (json.dumps({**facts, "temperatures": ["a"]}), "temperatures ['a']: expected positive numbers"),
        (json.dumps({**facts, "top_k": 5}), "a row of 8 entries where 5 are the most"),
        (
            json.dumps({**facts, "temperatures": [1.0]}),
            "log_tails, sample 0: shape (20, 2), expected at least 20 rows of 1",
        ),
        (json.dumps({**facts, "tokens": {**facts["tokens"], "sequence_length": LENGTH - 1}}), "21 tokens do not fit"),
    ):
        pq.write_table(table.replace_schema_metadata({"facts": wrong}), tmp_path / "wrong.parquet")
        assert message in refused(module, capsys, "from", tmp_path / "wrong.parquet", tmp_path / "out")


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "convert_parquet.py to runs/a" in out and "convert_parquet.py from mine" in out
