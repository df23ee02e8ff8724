"""What is wrong with an HDF5 file or a command line is one line with its place; nothing is overwritten."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from megakd.data.tokenizers import identify_tokenizer
from tests.conftest import VOCABULARY, files
from tests.tools.convert.handmade import TOP_K, Handmade
from tests.tools.examples import assert_alike, converted, make_shards, refused, token_shards, tool

module = tool("convert/convert_hdf5")
convert = partial(converted, module)


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
    mine, out = Handmade("logprobs", samples=2), tmp_path / "out"
    argv = ["--tokenizer", folder, "--values", "logprobs"]
    for wrong in ([], [1], [0, 5, 5], [0, 13]):
        starts = np.empty(2, object)
        starts[:] = [np.array([0], np.int32), np.array(wrong, np.int32)]
        source = mine.write(tmp_path / "mine.h5")
        with h5py.File(source, "a") as file:
            file.create_dataset("starts", data=starts, dtype=h5py.vlen_dtype(np.int32))
        said = refused(module, capsys, "from", source, out, *argv)
        assert "starts, sample 1: not 0 and then ascending offsets below 13" in said
    said = refused(module, capsys, "from", source, out, *argv, "--split-at-end")
    assert "says itself where documents begin" in said


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_refused(hdf5, tmp_path, capsys, share):
    data = hdf5.read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[: int(share * len(data))])
    said = refused(module, capsys, "from", tmp_path / "cut.h5", tmp_path / "out")
    assert "cut.h5: cannot be read as HDF5; was it cut short?" in said


def test_a_damaged_chunk_is_named(shards, hdf5, tmp_path, capsys):
    data = bytearray(hdf5.read_bytes())
    with h5py.File(hdf5) as file:
        chunk = file["topk_values"].id.get_chunk_info(6)
    data[chunk.byte_offset + 20 : chunk.byte_offset + 60] = bytes(40)
    (tmp_path / "damaged.h5").write_bytes(data)
    said = refused(module, capsys, "from", tmp_path / "damaged.h5", tmp_path / "out")
    assert "topk_values, sample 6: cannot be read" in said


def test_what_must_be_said_about_a_file(folder, hdf5, tmp_path, capsys):
    mine = Handmade("logprobs").write(tmp_path / "mine.h5")
    out = tmp_path / "out"
    both = "so --tokenizer FOLDER and --values logprobs (or logits) are needed (train also wants --teacher ID and"
    assert both in refused(module, capsys, "from", mine, out)
    bare = Handmade("logprobs").write(tmp_path / "bare.h5", topk_values=None, topk_indices=None)
    said = refused(module, capsys, "from", bare, out)  # all of it at once
    assert "no dataset topk_indices, topk_values; it holds input_ids" in said and both in said
    assert "so --values logprobs (or logits) is needed" in refused(
        module, capsys, "from", mine, out, "--tokenizer", folder
    )
    assert "no such file" in refused(module, capsys, "from", tmp_path / "none.h5", out)
    for option in (["--values", "logits"], ["--dtype", "float32"], ["--sequence-length", 5], ["--temperatures", 1]):
        said = refused(module, capsys, "from", hdf5, out, *option)
        assert f"{option[0]}: {hdf5} states it among its facts" in said
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


def test_what_exists_stays(shards, hdf5, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "exists already" in refused(module, capsys, "from", hdf5, tmp_path / "out")
    assert "exists already" in refused(module, capsys, "to", shards.folder, tmp_path / "out" / "precious")
    assert "holds something else already" in refused(module, capsys, "from", hdf5, shards.folder)
    assert files(tmp_path / "out") == {"precious": b"mine"}


def test_profiles_without_a_place_are_refused_or_said(tokenizer, shards, tmp_path, capsys):
    tokens = token_shards(tmp_path / "tokens", shards)
    assert "holds tokens alone" in refused(module, capsys, "to", tokens.folder, tmp_path / "out.h5")
    sampled = make_shards(tmp_path / "sampled", tokenizer, profile="sampled", draws=9)
    assert "holds draws alone" in refused(module, capsys, "to", sampled.folder, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()
    hybrid = make_shards(tmp_path / "hybrid", tokenizer, profile="hybrid", draws=9)
    module.main(["to", str(hybrid.folder), str(tmp_path / "out.h5")])
    assert "the draws are skipped" in capsys.readouterr().err
    found = convert(tmp_path / "out.h5", tmp_path / "out")
    assert_alike(found, hybrid)
    assert (found.facts["profile"], found.facts["draws"]) == ("topk", 0) and found[0].targets.draw_ids.shape[1] == 0


def test_another_tokenizer_and_a_corrected_teacher(tokenizer, hdf5, folder, teacher_of, tmp_path, capsys):
    argv = ["--tokenizer", folder, "--teacher", "right/one", "--revision", "r2", "--part", "holdout", "--levels", 200]
    found = convert(hdf5, tmp_path / "out", *argv)
    assert found.facts["teacher"] == {"id": "right/one", "revision": "r2", "weights": "0123456789abcdef"}
    assert found.facts["tokens"]["part"] == "holdout" and found.facts["levels"] == 200
    assert found.facts["tokens"]["tokenizer"] == identify_tokenizer(tokenizer).record()
    said = refused(module, capsys, "from", hdf5, tmp_path / "other", "--tokenizer", teacher_of)
    assert "is another than" in said


@pytest.fixture
def teacher_of(tmp_path, documents) -> Path:
    """Another tokenizer's folder."""
    from megakd.models.tiny import train_tokenizer

    train_tokenizer(documents[:5], 300).save_pretrained(tmp_path / "another")
    return tmp_path / "another"
