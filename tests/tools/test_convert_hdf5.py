import itertools
import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from megakd.cli import run_verb
from megakd.config import ObjectiveConfig
from megakd.data.shards import ShardSet
from megakd.data.tokens import tokenizer_facts
from megakd.errors import UserError
from megakd.files import read_json
from megakd.losses.distill import topk_kl
from megakd.objectives.cached import check_support, stored_in
from megakd.preflight import check
from tests.conftest import VOCABULARY, files
from tests.tools.examples import (
    LENGTH,
    SAMPLES,
    assert_alike,
    head,
    make_shards,
    random_logits,
    refused,
    token_shards,
    tool,
    window,
)  # fmt: skip

TOP_K = 6
module = tool("convert_hdf5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A tokenizer's folder."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer) -> ShardSet:
    return make_shards(tmp_path_factory.mktemp("shards"), tokenizer)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, shards) -> Path:
    """The shards as `to` writes them."""
    path = tmp_path_factory.mktemp("hdf5") / "store.h5"
    module.main(["to", str(shards.folder), str(path)])
    return path


class Handmade:
    """The three arrays of a hand-made store, and the teacher's logits behind them."""

    def __init__(self, values: str, samples: int = 5, tokens: int = 13):
        self.logits = [random_logits(tokens, VOCABULARY, seed=7 + i).numpy() for i in range(samples)]
        self.input_ids = np.stack([window(i, VOCABULARY, tokens)[0] for i in range(samples)])
        whole = [each - np.log(np.exp(each.astype(np.float64)).sum(1, keepdims=True)) for each in self.logits]
        self.logprobs = np.stack(whole)
        numbers = self.logprobs if values == "logprobs" else np.stack(self.logits) + 3.0
        self.indices = np.argsort(-numbers, axis=2)[:, :, :TOP_K].astype(np.int32)
        self.values = np.take_along_axis(numbers, self.indices, 2).astype(np.float16)

    def write(self, path: Path, **changes: Any) -> Path:
        """changes: another array under a name, or None to leave it out."""
        arrays = {"input_ids": self.input_ids, "topk_values": self.values, "topk_indices": self.indices, **changes}
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                if array is not None:
                    file.create_dataset(name, data=array)
        return path


def convert(source: Path, out: Path, *argv: object) -> ShardSet:
    module.main([str(arg) for arg in ("from", source, out, *argv)])
    run_verb(["inspect", str(out), "--verify"])
    return ShardSet(out)


def test_the_file_is_what_hand_made_readers_expect(shards, stored):
    with h5py.File(stored) as file:
        facts = json.loads(file.attrs["facts"])
        assert facts == shards.facts
        tokens, values, indices = file["input_ids"], file["topk_values"], file["topk_indices"]
        assert (tokens.shape, tokens.dtype) == ((SAMPLES, LENGTH + 1), np.int32)
        assert (values.shape, values.dtype) == ((SAMPLES, LENGTH + 1, 8), np.float16)
        assert (indices.shape, indices.dtype) == ((SAMPLES, LENGTH + 1, 8), np.int32)
        assert values.chunks == (1, LENGTH + 1, 8) and values.compression == "gzip"
        for index in range(SAMPLES):
            sample = shards[index]
            length = len(sample.tokens)
            assert file["lengths"][index] == length and np.array_equal(file["starts"][index], sample.starts)
            assert np.array_equal(tokens[index][:length], sample.tokens) and not tokens[index][length:].any()
            rows = values[index].astype(np.float32)
            assert (rows[:, 1:] <= rows[:, :-1]).all()  # the most probable first
            for row in range(length - 1):
                kept = rows[row] > -np.inf
                mine = dict(zip(indices[index][row][kept].tolist(), rows[row][kept].tolist(), strict=True))
                theirs = {i: float(np.float16(p)) for i, p in head(sample.targets, row).items()}
                assert mine == theirs
            # what no token follows is a certainty, which any softmax survives
            assert (rows[length - 1 :, 0] == 0).all() and np.isneginf(rows[length - 1 :, 1:]).all()
            assert np.array_equal(file["log_tails"][index][: length - 1], sample.targets.log_tails)
            assert np.array_equal(file["label_nll"][index][: length - 1], sample.targets.label_nll)


def test_there_and_back(shards, stored, tmp_path):
    """Not bit by bit: a row was scaled to 1, so an entry may be rounded to the next step; but that does not go on."""
    once = convert(stored, tmp_path / "once")
    assert_alike(once, shards)
    names = [f"{name}.tar" for name in once.names]
    assert [files(once.folder)[name] for name in names] != [files(shards.folder)[name] for name in names]
    converted = once.facts.pop("converted")
    assert converted["from"] == "store.h5" and converted["values"] == "logprobs" and converted["label_nll"] == "stored"
    assert once.facts == {**shards.facts, "book": once.facts["book"]} and once.sizes == shards.sizes
    module.main(["to", str(tmp_path / "once"), str(tmp_path / "again.h5")])
    twice = convert(tmp_path / "again.h5", tmp_path / "twice")
    assert [files(twice.folder)[name] for name in names] == [files(once.folder)[name] for name in names]


def test_from_and_to_keeps_the_values(folder, tmp_path):
    mine = Handmade("logprobs")
    argv = ["--tokenizer", folder, "--values", "logprobs", "--pmin", 0]
    found = convert(mine.write(tmp_path / "mine.h5"), tmp_path / "out", *argv)
    module.main(["to", str(tmp_path / "out"), str(tmp_path / "again.h5")])
    with h5py.File(tmp_path / "again.h5") as file:
        assert np.array_equal(file["input_ids"][:, :13], mine.input_ids)
        values, indices = file["topk_values"][:, :12].astype(np.float64), file["topk_indices"][:, :12]
    for sample, row in itertools.product(range(5), range(12)):
        left = dict(zip(indices[sample, row].tolist(), np.exp(values[sample, row] / 2), strict=True))
        right = {i: math.exp(mine.logprobs[sample, row, i] / 2) for i in mine.indices[sample, row].tolist()}
        assert left.keys() == right.keys()
        assert max(abs(left[i] - right[i]) for i in left) < 2 / found.facts["levels"]


def test_log_probabilities_know_their_tail(folder, tmp_path, capsys):
    mine = Handmade("logprobs")
    found = convert(
        mine.write(tmp_path / "mine.h5"), tmp_path / "out", "--tokenizer", folder, "--values", "logprobs",
        "--pmin", 0.01, "--teacher", "some/teacher", "--weights", "0123",
    )  # fmt: skip
    facts = found.facts
    assert facts["tails"] and facts["temperatures"] == [1.0] and facts["pmin"] == 0.01 and facts["top_k"] == TOP_K
    assert facts["teacher"] == {"id": "some/teacher", "revision": None, "weights": "0123"}
    assert facts["tokens"]["sequence_length"] == 13 and facts["vocab_size"] == VOCABULARY
    check_support(ObjectiveConfig(temperature=1.0), stored_in(facts))
    said = capsys.readouterr().err
    assert "5 windows" in said and "are below 0.01 and left out" in said and "of the mass" in said
    assert "unknown" not in said
    for index, row in itertools.product(range(5), range(12)):
        targets = found[index].targets
        assert targets is not None
        every = mine.logprobs[index, row]
        kept = [i for i in mine.indices[index, row] if every[i] >= math.log(0.01)] or [every.argmax()]
        assert head(targets, row).keys() == set(kept)
        tail = 1 - sum(math.exp(every[i]) for i in kept)
        angle = math.asin(math.exp(targets.log_tails[row, 0] / 2))
        assert angle == pytest.approx(math.asin(math.sqrt(max(tail, 0))), abs=0.03 if tail < 0.02 else 0.005)
        label = found[index].tokens[row + 1]
        known = label in mine.indices[index, row]
        nll = -every[label] if known else -every[mine.indices[index, row]].min()
        assert math.log1p(targets.label_nll[row]) == pytest.approx(math.log1p(nll), abs=0.03)


def test_raw_logits_have_no_tail(folder, tmp_path):
    mine = Handmade("logits")
    argv = ["--tokenizer", folder, "--values", "logits", "--pmin", 0]
    found = convert(mine.write(tmp_path / "mine.h5"), tmp_path / "out", *argv)
    assert found.facts["tails"] is False
    stored = stored_in(found.facts)
    with pytest.raises(UserError, match=r"set objective\.tail=truncated"):
        check_support(ObjectiveConfig(tail="ghost", temperature=1.0), stored)
    check_support(ObjectiveConfig(tail="truncated", temperature=2.0), stored)
    student = random_logits(12, VOCABULARY, seed=99)
    for index in range(5):
        targets = found[index].targets
        assert targets is not None
        ids, logprobs = torch.from_numpy(targets.ids), torch.from_numpy(targets.logprobs)
        kl = topk_kl(student, ids, logprobs, torch.zeros(12), 2.0, "truncated")
        for row in range(12):
            teacher = torch.tensor(mine.values[index, row].astype(np.float64) / 2).softmax(0)
            log_q = (student[row].double() / 2).log_softmax(0)[mine.indices[index, row].tolist()]
            expected = float((teacher * (teacher.log() - log_q)).sum())
            assert float(kl[row]) == pytest.approx(expected, abs=0.02)
    # and back: they say so themselves
    module.main(["to", str(tmp_path / "out"), str(tmp_path / "again.h5")])
    with h5py.File(tmp_path / "again.h5") as file:
        assert "log_tails" not in file
    assert_alike(convert(tmp_path / "again.h5", tmp_path / "again"), found)


def test_facts_are_those_that_training_checks(prepared, sibling, tmp_path, capsys):
    """Three datasets and what compress.json says make shards that `train` accepts, and no others."""
    original = ShardSet(prepared / "data" / "logits" / "train")
    module.main(["to", str(original.folder), str(tmp_path / "whole.h5")])
    with h5py.File(tmp_path / "whole.h5") as whole, h5py.File(tmp_path / "bare.h5", "w") as bare:
        for name in ("input_ids", "topk_values", "topk_indices"):
            bare.create_dataset(name, data=whole[name][:5, :32])
    # the teacher itself is asked for the NLL of some labels
    convert(tmp_path / "whole.h5", tmp_path / "whole")
    assert "the teacher's NLL of the labels of 8 samples: within" in capsys.readouterr().out
    made_by = read_json(prepared / "student-0" / "compress.json")["teacher"]
    argv = ["--tokenizer", prepared / "student-0", "--values", "logprobs", "--weights", made_by["weights"]]
    module.main(["from", *map(str, [tmp_path / "bare.h5", tmp_path / "named", *argv, "--teacher", made_by["id"]])])
    named = ShardSet(tmp_path / "named")
    assert named.facts.keys() == {*original.facts, "converted"}
    assert named.facts["tokens"].keys() == original.facts["tokens"].keys()
    run = sibling("objective.tail=ghost", "objective.temperature=1.0")
    run.path("data", "logits").unlink()
    run.path("data", "logits").mkdir()
    run.path("data", "logits", "train").symlink_to(tmp_path / "named")
    assert len(check(run)) == 5
    convert(tmp_path / "bare.h5", tmp_path / "nameless", *argv)
    run.path("data", "logits", "train").unlink()
    run.path("data", "logits", "train").symlink_to(tmp_path / "nameless")
    with pytest.raises(UserError, match="logits made by unknown"):
        check(run)


def test_padding_ends_windows(folder, tmp_path):
    """By lengths, by a padding id, by the end token, of which one is the document's own."""
    mine = Handmade("logprobs", samples=3)
    padded = mine.input_ids % (VOCABULARY - 1) + 1  # no end token, which is 0
    padded[0, 9:] = 0
    padded[1, 12:] = 0
    mine.values[0, 9:], mine.indices[0, 9:] = np.nan, -1  # nobody looks at what stands there
    argv = ["--tokenizer", folder, "--values", "logprobs"]
    source = mine.write(tmp_path / "end.h5", input_ids=padded)
    found = convert(source, tmp_path / "end", *argv, "--pad", 0)
    assert [found[i].tokens.tolist() for i in range(3)] == [padded[0, :10].tolist(), *padded[1:].tolist()]
    other = np.where(padded == 0, -100, padded)
    found = convert(mine.write(tmp_path / "pad.h5", input_ids=other), tmp_path / "pad", *argv, "--pad", -100)
    assert [found[i].tokens.tolist() for i in range(3)] == [
        padded[0, :9].tolist(),
        padded[1, :12].tolist(),
        padded[2].tolist(),
    ]
    source = mine.write(tmp_path / "lengths.h5", input_ids=other, lengths=np.array([9, 12, 13]))
    same = convert(source, tmp_path / "lengths", *argv)
    assert all(np.array_equal(same[i].tokens, found[i].tokens) for i in range(3))


def test_documents_begin_where_the_file_or_the_end_token_says(folder, tmp_path):
    mine = Handmade("logprobs", samples=2)
    mine.input_ids[mine.input_ids == 0] = 1
    mine.input_ids[0, [3, 12]] = 0
    argv = ["--tokenizer", folder, "--values", "logprobs"]
    source = mine.write(tmp_path / "mine.h5")
    whole = convert(source, tmp_path / "whole", *argv)
    assert [whole[i].starts.tolist() for i in range(2)] == [[0], [0]]
    apart = convert(source, tmp_path / "apart", *argv, "--split-at-end")
    assert [apart[i].starts.tolist() for i in range(2)] == [[0, 4], [0]]
    labelled = [(each[0].targets.label_nll > 0).tolist() for each in (whole, apart)]
    assert labelled == [[True] * 12, [True] * 3 + [False] + [True] * 8]


def test_entries_below_pmin_go_to_every_tail(shards, stored, tmp_path):
    """But the best of a row stays; here some rows have none above."""
    found = convert(stored, tmp_path / "out", "--pmin", 0.2)
    assert found.facts["pmin"] == 0.2
    alone = 0
    for index in range(SAMPLES):
        mine, before = found[index].targets, shards[index].targets
        assert mine is not None and before is not None
        for row in range(len(found[index].tokens) - 1):
            entries = head(before, row)
            kept = {i for i, p in entries.items() if p >= math.log(0.2)}
            alone += not kept
            kept = kept or {max(entries, key=lambda i: entries[i])}
            assert head(mine, row).keys() == kept
            for column, temperature in enumerate((1.0, 2.0)):
                dropped = [p / temperature for i, p in entries.items() if i not in kept]
                expected = np.logaddexp.reduce([*dropped, before.log_tails[row, column]])
                tails = expected, mine.log_tails[row, column]
                heads = ([each[i] / temperature for i in kept] for each in (entries, head(mine, row)))
                odds = [t - np.logaddexp.reduce(h) for t, h in zip(tails, heads, strict=True)]
                angles = [math.atan(math.exp(each / 2)) for each in odds]
                assert angles[0] == pytest.approx(angles[1], abs=1.5 * math.pi / 2 / 255)
    assert alone


def test_masked_entries_are_none(folder, tmp_path):
    mine = Handmade("logprobs")
    values, indices = mine.values.copy(), mine.indices.copy()
    values[:, :, 4:], indices[:, :, 4:] = -1e4, -1
    argv = ["--tokenizer", folder, "--values", "logprobs", "--pmin", 0]
    masked = mine.write(tmp_path / "masked.h5", topk_values=values, topk_indices=indices)
    narrow = mine.write(tmp_path / "narrow.h5", topk_values=values[:, :, :4], topk_indices=indices[:, :, :4])
    found, expected = (convert(path, tmp_path / path.stem, *argv) for path in (masked, narrow))
    assert (found.facts["top_k"], expected.facts["top_k"]) == (TOP_K, 4)
    assert_alike(found, expected, steps=0)


@pytest.mark.parametrize("chunks", [None, (5, 13, 6), (2, 5, 4)])
def test_any_chunks_are_read(folder, tmp_path, chunks):
    mine = Handmade("logprobs")
    argv = ["--tokenizer", folder, "--values", "logprobs"]
    plain = convert(mine.write(tmp_path / "mine.h5"), tmp_path / "plain", *argv)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["input_ids"] = mine.input_ids
        for name, array in (("topk_values", mine.values), ("topk_indices", mine.indices)):
            packed = {"compression": "gzip"} if chunks else {}
            file.create_dataset(name, data=array, chunks=chunks, **packed)
    other = convert(tmp_path / "other.h5", tmp_path / "other", *argv)
    assert (other.folder / "shard-00000.tar").read_bytes() == (plain.folder / "shard-00000.tar").read_bytes()


def test_chunks_of_many_windows_are_unpacked_once(tmp_path):
    """All chunks that hold a part of a window stay in memory; 40 times as fast with 64 windows a chunk."""
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file.create_dataset("input_ids", (50, 130), np.int32, chunks=(20, 100), compression="gzip")
        file.create_dataset("topk_values", (50, 130, 9), np.float32, chunks=(20, 100, 4), compression="gzip")
        file.create_dataset("topk_indices", (50, 130, 9), np.int32, chunks=(1, 130, 9), compression="gzip")
    names = module.Names("input_ids", "topk_indices", "topk_values", "starts", "log_tails", "label_nll")
    with module.Hdf5Source(tmp_path / "mine.h5", names) as source:
        datasets = source.tokens, source.values, source.ids
        caches = [each.id.get_access_plist().get_chunk_cache()[1] for each in datasets]
    assert caches[:2] == [4 * 20 * 200, 4 * 20 * 200 * 12]
    assert caches[2] < 1 << 24  # of the library


def test_rows_may_be_one_fewer_and_names_others(folder, tmp_path):
    mine = Handmade("logprobs")
    argv = ["--tokenizer", folder, "--values", "logprobs"]
    plain = convert(mine.write(tmp_path / "mine.h5"), tmp_path / "plain", *argv, "--sequence-length", 16)
    assert plain.facts["tokens"]["sequence_length"] == 16
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["tokens"] = mine.input_ids.astype(np.uint16)
        file["kd/values"], file["kd/ids"] = (
            mine.values[:, :12].astype(np.float32),
            mine.indices[:, :12].astype(np.int64),
        )
    names = ["--ids", "tokens", "--values-name", "kd/values", "--indices", "kd/ids", "--sequence-length", 16]
    other = convert(tmp_path / "other.h5", tmp_path / "other", *argv, *names)
    assert (other.folder / "shard-00000.tar").read_bytes() == (plain.folder / "shard-00000.tar").read_bytes()


def put(name: str, place: tuple[int, ...], value: float) -> Any:
    def change(mine: Handmade) -> dict[str, Any]:
        array = {"topk_values": mine.values, "topk_indices": mine.indices, "input_ids": mine.input_ids}[name].copy()
        array[place] = value
        return {name: array}

    return change


def extra(name: str, array: Any) -> Any:
    return lambda mine: {name: array}


@pytest.mark.parametrize(
    "change, message",
    [
        (extra("topk_values", None), "no dataset topk_values; it holds input_ids, topk_indices"),
        (extra("input_ids", np.zeros(5, np.int32)), "input_ids has shape (5,), expected [N, T]"),
        (extra("input_ids", np.zeros((5, 1), np.int32)), "input_ids has shape (5, 1)"),
        (extra("input_ids", np.zeros((5, 13))), "input_ids is of type float64, expected integers"),
        (extra("topk_values", np.zeros((5, 11, 6))), "topk_values has shape (5, 11, 6), expected (5, 13, 6)"),
        (extra("topk_values", np.zeros((5, 13, 7))), "topk_indices has shape (5, 13, 6), expected (5, 13, 7)"),
        (extra("topk_values", np.zeros((5, 13))), "topk_values has shape (5, 13)"),
        (extra("topk_values", np.zeros((5, 13, 6), np.int8)), "topk_values is of type int8, expected floating"),
        (extra("lengths", np.full(4, 13)), "lengths has shape (4,), expected (5,)"),
        (extra("lengths", np.array([13, 13, 14, 13, 13])), "lengths, sample 2: 14 of 13 tokens"),
        (extra("lengths", np.array([13, 1, 13, 13, 13])), "input_ids, sample 1: 1 tokens, a window needs 2"),
        (extra("starts", np.zeros(5, np.int32)), "starts is not 5 lists of integers"),
        (extra("log_tails", np.zeros((5, 13, 2))), "tails at 2 temperatures"),
        (extra("log_tails", np.zeros((5, 13, 1))), "log_tails, sample 0, position 0: with the entries' probabilities"),
        (extra("label_nll", np.full((5, 13), np.nan)), "label_nll, sample 0, position 0: nan is no negative"),
        (put("topk_values", (2, 3, 4), np.nan), "topk_values, sample 2, position 3, entry 4: nan is no number"),
        (put("topk_values", (2, 3, 4), np.inf), "topk_values, sample 2, position 3, entry 4: inf is no number"),
        (put("topk_values", (2, 3), -np.inf), "topk_values, sample 2, position 3: a row without an entry"),
        (put("topk_values", (2, 3, 4), 5.0), "entry 4: 5 is no log-probability; are these raw logits?"),
        (put("topk_values", (4, 0), -0.1), "topk_values, sample 4, position 0: probabilities that sum to 5.4"),
        (put("topk_indices", (1, 5, 0), 400), "topk_indices, sample 1, position 5, entry 0: id 400 is beyond"),
        (put("topk_indices", (1, 5, 0), -1), "topk_indices, sample 1, position 5, entry 0: id -1 is beyond"),
        (put("topk_indices", (1, 5), 7), "topk_indices, sample 1, position 5: an id twice in one row"),
        (put("input_ids", (3, 4), 400), "input_ids, sample 3, position 4: id 400 is beyond the vocabulary of 400"),
        (put("input_ids", (3, 12), -100), "id -100 is beyond the vocabulary of 400 (is it padding? see --pad)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(folder, tmp_path, capsys, change, message):
    mine = Handmade("logprobs")
    source = mine.write(tmp_path / "mine.h5", **change(mine))
    said = refused(module, capsys, "from", source, tmp_path / "out", "--tokenizer", folder, "--values", "logprobs")
    assert said.startswith(f"convert_hdf5: {source}: ") and message in said
    assert not (tmp_path / "out").exists()


def test_starts_are_checked(folder, tmp_path, capsys):
    mine = Handmade("logprobs", samples=2)
    for wrong in ([], [1], [0, 5, 5], [0, 13]):
        starts = np.empty(2, object)
        starts[:] = [np.array([0], np.int32), np.array(wrong, np.int32)]
        source = mine.write(tmp_path / "mine.h5")
        with h5py.File(source, "a") as file:
            file.create_dataset("starts", data=starts, dtype=h5py.vlen_dtype(np.int32))
        said = refused(module, capsys, "from", source, tmp_path / "out", "--tokenizer", folder, "--values", "logprobs")
        assert "starts, sample 1: not 0 and then ascending offsets below 13" in said
    said = refused(
        module,
        capsys,
        "from",
        source,
        tmp_path / "out",
        "--tokenizer",
        folder,
        "--values",
        "logprobs",
        "--split-at-end",
    )
    assert "says itself where documents begin" in said


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_refused(stored, tmp_path, capsys, share):
    data = stored.read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[: int(share * len(data))])
    said = refused(module, capsys, "from", tmp_path / "cut.h5", tmp_path / "out")
    assert "cut.h5: cannot be read as HDF5; was it cut short?" in said


def test_a_damaged_chunk_is_named(shards, stored, tmp_path, capsys):
    data = bytearray(stored.read_bytes())
    with h5py.File(stored) as file:
        chunk = file["topk_values"].id.get_chunk_info(6)
    data[chunk.byte_offset + 20 : chunk.byte_offset + 60] = bytes(40)
    (tmp_path / "damaged.h5").write_bytes(data)
    said = refused(module, capsys, "from", tmp_path / "damaged.h5", tmp_path / "out")
    assert "topk_values, sample 6: cannot be read" in said


def test_what_must_be_said_about_a_file(folder, stored, tmp_path, capsys):
    mine = Handmade("logprobs").write(tmp_path / "mine.h5")
    out = tmp_path / "out"
    assert "so --tokenizer FOLDER is needed" in refused(module, capsys, "from", mine, out)
    assert "so --values logprobs (or logits) is needed" in refused(
        module, capsys, "from", mine, out, "--tokenizer", folder
    )
    assert "no such file" in refused(module, capsys, "from", tmp_path / "none.h5", out)
    for option in (["--values", "logits"], ["--dtype", "float32"], ["--sequence-length", 5], ["--temperatures", 1]):
        said = refused(module, capsys, "from", stored, out, *option)
        assert f"{option[0]}: {stored} states it among its facts" in said
    foreign = ["from", mine, out, "--tokenizer", folder, "--values", "logprobs"]
    assert "do not fit a sequence length of 11" in refused(module, capsys, *foreign, "--sequence-length", 11)
    assert "pmin 1 must be" in refused(module, capsys, *foreign, "--pmin", 1)
    assert "tails at 1 temperatures" in refused(module, capsys, *foreign, "--temperatures", 1, 2)
    assert not out.exists()
    with h5py.File(mine, "a") as file:
        file.attrs["facts"] = json.dumps({"vocab_size": 400})
    assert "the facts it states lack top_k" in refused(module, capsys, "from", mine, out)
    with h5py.File(mine, "a") as file:
        file.attrs["facts"] = "us"
    assert "attribute facts is no JSON object" in refused(module, capsys, "from", mine, out)


def test_suspicious_numbers_are_said_aloud(folder, tmp_path, capsys):
    mine = Handmade("logits")
    normalised = np.log(torch.tensor(mine.values.astype(np.float64)).softmax(-1).numpy())
    mine.indices[:, :, 0] = mine.input_ids  # the best entry is the token itself
    mine.indices[:, :, 1:] = (mine.input_ids[:, :, None] + np.arange(1, TOP_K)) % VOCABULARY
    source = mine.write(tmp_path / "mine.h5", topk_values=normalised)
    convert(source, tmp_path / "out", "--tokenizer", folder, "--values", "logprobs")
    said = capsys.readouterr().err
    assert "sums to 1; normalised over its entries? then --values logits" in said
    assert "are the rows shifted by one?" in said and "the teacher is unknown, so train will refuse" in said


def test_killed_and_started_again_gives_the_same(stored, tmp_path, capsys, monkeypatch):
    whole = convert(stored, tmp_path / "whole")
    foreign = tool("foreign")
    sample_of = foreign.sample_of
    calls = itertools.count()

    def dies(row, reading):
        if next(calls) == SAMPLES + 6:  # the first pass is for the book
            raise KeyboardInterrupt
        return sample_of(row, reading)

    monkeypatch.setattr(foreign, "sample_of", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(stored, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("shard*")) == ["shard-00000.json", "shard-00000.tar"]
    with pytest.raises(UserError, match="not finished"):
        ShardSet(tmp_path / "out")
    numbers = []
    monkeypatch.setattr(
        foreign, "sample_of", lambda row, reading: numbers.append(row.number) or sample_of(row, reading)
    )
    assert "holds something else already" in refused(module, capsys, "from", stored, tmp_path / "out", "--pmin", 0.1)
    numbers.clear()
    convert(stored, tmp_path / "out")
    assert numbers[SAMPLES:] == [4, 5, 6, 7, 8]
    assert files(tmp_path / "out") == files(whole.folder)
    convert(stored, tmp_path / "out")
    assert "is finished already" in capsys.readouterr().err


def test_what_exists_stays(shards, stored, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "exists already" in refused(module, capsys, "from", stored, tmp_path / "out")
    assert "exists already" in refused(module, capsys, "to", shards.folder, tmp_path / "out" / "precious")
    assert "holds something else already" in refused(module, capsys, "from", stored, shards.folder)
    assert files(tmp_path / "out") == {"precious": b"mine"}


def test_profiles_without_a_place_are_refused_or_said(tokenizer, shards, tmp_path, capsys):
    tokens = token_shards(tmp_path / "tokens", shards)
    assert "holds tokens alone" in refused(module, capsys, "to", tokens.folder, tmp_path / "out.h5")
    sampled = make_shards(tmp_path / "sampled", tokenizer, profile="sampled", draws=9)
    assert "holds draws alone" in refused(module, capsys, "to", sampled.folder, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()
    hybrid = make_shards(tmp_path / "hybrid", tokenizer, profile="hybrid", draws=9)
    module.main(["to", str(hybrid.folder), str(tmp_path / "out.h5")])
    assert "the draws are left out" in capsys.readouterr().err
    found = convert(tmp_path / "out.h5", tmp_path / "out")
    assert_alike(found, hybrid)
    assert (found.facts["profile"], found.facts["draws"]) == ("topk", 0) and found[0].targets.draw_ids.shape[1] == 0


def test_another_tokenizer_and_a_corrected_teacher(tokenizer, stored, folder, teacher_of, tmp_path, capsys):
    argv = ["--tokenizer", folder, "--teacher", "right/one", "--revision", "r2", "--part", "holdout", "--levels", 200]
    found = convert(stored, tmp_path / "out", *argv)
    assert found.facts["teacher"] == {"id": "right/one", "revision": "r2", "weights": "0123456789abcdef"}
    assert found.facts["tokens"]["part"] == "holdout" and found.facts["levels"] == 200
    assert found.facts["tokens"]["tokenizer"] == tokenizer_facts(tokenizer)
    said = refused(module, capsys, "from", stored, tmp_path / "other", "--tokenizer", teacher_of)
    assert "is another than" in said


@pytest.fixture
def teacher_of(tmp_path, documents) -> Path:
    """Another tokenizer's folder."""
    from megakd.models.tiny import train_tokenizer

    train_tokenizer(documents[:5], 300).save_pretrained(tmp_path / "another")
    return tmp_path / "another"


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "convert_hdf5.py to runs/a" in out and "convert_hdf5.py from mine.h5" in out
    with pytest.raises(SystemExit):
        module.main(["from", "--help"])
    assert '"unknown", which train refuses' in " ".join(capsys.readouterr().out.split())
