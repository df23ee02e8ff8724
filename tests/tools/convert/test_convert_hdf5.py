"""HDF5 and back: what is in the file, and what its numbers become."""

import itertools
import json
import math
from functools import partial

import h5py
import numpy as np
import pytest
import torch

from megakd.config.objective import CachedConfig
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.losses.reference import topk_kl
from megakd.objectives.cached import check_support, stored_in
from megakd.system.files import read_json
from megakd.train.checks import check
from tests.conftest import VOCABULARY, files
from tests.tools.convert.handmade import TOP_K, Handmade
from tests.tools.examples import LENGTH, SAMPLES, assert_alike, converted, head, random_logits, refused, tool

module = tool("convert/convert_hdf5")
convert = partial(converted, module)


def test_the_file_is_what_hand_made_readers_expect(shards, hdf5):
    with h5py.File(hdf5) as file:
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


def test_there_and_back(shards, hdf5, tmp_path):
    """Not bit by bit: a row was scaled to 1, so an entry may be rounded to the next step; but that does not go on."""
    once = convert(hdf5, tmp_path / "once")
    assert_alike(once, shards)
    names = [f"{name}.tar" for name in once.names]
    assert [files(once.folder)[name] for name in names] != [files(shards.folder)[name] for name in names]
    origin = once.facts.pop("converted")
    assert origin["from"] == "store.h5" and origin["values"] == "logprobs" and origin["label_nll"] == "stored"
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
    check_support(CachedConfig(temperature=1.0), stored_in(facts))
    said = capsys.readouterr().err
    assert "5 windows" in said and "are below 0.01 and skipped" in said and "of the mass" in said
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
        check_support(CachedConfig(tail="ghost", temperature=1.0), stored)
    check_support(CachedConfig(tail="truncated", temperature=2.0), stored)
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
    assert named.facts["tokens"].keys() == original.facts["tokens"].keys() - {"files"}  # of text
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


def test_entries_below_pmin_go_to_every_tail(shards, hdf5, tmp_path):
    """But the best of a row stays; here some rows have none above."""
    found = convert(hdf5, tmp_path / "out", "--pmin", 0.2)
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


def test_killed_and_started_again_gives_the_same(hdf5, tmp_path, capsys, monkeypatch):
    whole = convert(hdf5, tmp_path / "whole")
    foreign = tool("convert/foreign")
    sample_of = foreign.sample_of
    calls = itertools.count()

    def dies(row, reading):
        if next(calls) == SAMPLES + 6:  # the first pass is for the codebook
            raise KeyboardInterrupt
        return sample_of(row, reading)

    monkeypatch.setattr(foreign, "sample_of", dies)
    with pytest.raises(SystemExit, match="130"):
        convert(hdf5, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("shard*")) == ["shard-00000.json", "shard-00000.tar"]
    with pytest.raises(UserError, match="not finished"):
        ShardSet(tmp_path / "out")
    numbers = []
    monkeypatch.setattr(
        foreign, "sample_of", lambda row, reading: numbers.append(row.number) or sample_of(row, reading)
    )
    assert "holds something else already" in refused(module, capsys, "from", hdf5, tmp_path / "out", "--pmin", 0.1)
    numbers.clear()
    convert(hdf5, tmp_path / "out")
    assert numbers[SAMPLES:] == [4, 5, 6, 7, 8]
    assert files(tmp_path / "out") == files(whole.folder)
    convert(hdf5, tmp_path / "out")
    assert "is finished already" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "convert_hdf5.py to runs/a" in out and "convert_hdf5.py from mine.h5" in out
    with pytest.raises(SystemExit):
        module.main(["from", "--help"])
    assert '"unknown", which train refuses' in " ".join(capsys.readouterr().out.split())
