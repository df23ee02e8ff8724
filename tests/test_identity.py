"""Which tensors a folder holds as transformers sees it, and what changes its fingerprint."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd import identity
from megakd.errors import UserError
from megakd.identity import (
    INDEX,
    WEIGHTS,
    DataIdentity,
    ModelIdentity,
    TeacherIdentity,
    TokenizerIdentity,
    changed_fingerprint,
    fingerprint,
    fingerprint_like,
    identify,
    sampled_files,
    stored_tensors,
)
from megakd.models.hub import write_weights
from megakd.models.loading import load_model

TENSORS = {"norm": torch.ones(8), "router": torch.randn(4, 8), "experts": torch.randn(2, 700, 500)}  # 2.8 MB: sampled


def folder_of(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, limit: int = 2**30, **config: Any) -> Path:
    write_weights(folder, tensors.items(), limit)
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "num_experts_per_tok": 2, **config}))
    return folder


def refused(*parts: object) -> Any:
    """UserError that says each of `parts`."""
    return pytest.raises(UserError, match="(?s)" + "".join(f"(?=.*{re.escape(str(part))})" for part in parts))


@pytest.mark.parametrize("name", TENSORS)
def test_fingerprint_changes_with_every_tensor(name, tmp_path):
    """A step of training changes all values of a tensor; of a small one a single value is enough."""
    first = fingerprint(folder_of(tmp_path / "a"))
    changed = TENSORS | {name: TENSORS[name].clone()}
    if name == "experts":
        changed[name] += 1e-3
    else:
        changed[name].view(-1)[-1] += 1e-3
    assert first.startswith("v2:") and fingerprint(folder_of(tmp_path / "b", changed)) != first


def test_fingerprint_sees_a_small_tensor_between_samples_of_a_large_file(tmp_path):
    """The old rule read 64 pieces of a file: all routers of a large one could be replaced unseen."""
    many = {f"{i:02d}": torch.zeros(2_000_000) for i in range(9)} | {"05.router": torch.randn(4, 8)}
    one, two = (folder_of(tmp_path / n, many | {"05.router": m * many["05.router"]}) for n, m in (("a", 1), ("b", -3)))
    assert sampled_files(one) == sampled_files(two)  # else this test shows nothing
    assert fingerprint(one) != fingerprint(two)


def test_fingerprint_changes_with_name_shape_and_dtype(tmp_path):
    x = TENSORS["router"]
    variants = [{"x": x}, {"y": x}, {"x": x.view(8, 4)}, {"x": x.view(torch.int32)}, {"x": x, "z": x}]
    assert len({fingerprint(folder_of(tmp_path / str(i), v)) for i, v in enumerate(variants)}) == len(variants)


def test_fingerprint_changes_with_what_config_says_of_the_model(tmp_path):
    changes = [{}, {"num_experts_per_tok": 1}, {"rope_parameters": {"rope_theta": 1e4}}, {"rms_norm_eps": 1e-5}]
    assert len({fingerprint(folder_of(tmp_path / str(i), **c)) for i, c in enumerate(changes)}) == len(changes)


def test_fingerprint_stays_where_no_answer_changes(tmp_path):
    """Another split into files or place, transformers' version, 1e4 for 10000, chat template, generation config."""
    first = fingerprint(folder_of(tmp_path / "a", rope_theta=10000))
    other = folder_of(
        tmp_path / "elsewhere" / "b", limit=1000, rope_theta=1e4, transformers_version="9", torch_dtype="bfloat16"
    )
    (other / "generation_config.json").write_text("{}")
    (other / "chat_template.jinja").write_text("{{ x }}")
    assert (other / INDEX).exists() and fingerprint(other) == first


def test_old_fingerprints_are_compared_by_their_own_rule_and_said_to_be_weak_once(tmp_path, capsys):
    folder = folder_of(tmp_path)
    old, new = sampled_files(folder), fingerprint(folder)
    identity._say_old.cache_clear()
    assert [fingerprint_like(old, folder) for _ in range(3)] == [old] * 3 and fingerprint_like(new, folder) == new
    assert capsys.readouterr().err.count("weaker rule") == 1
    folder_of(tmp_path, TENSORS | {"norm": torch.zeros(8)})
    assert fingerprint_like(old, folder) != old
    with refused("v9:abc", "another version"):
        fingerprint_like("v9:abc", folder)


def test_two_sets_of_weights_beside_each_other_are_refused(tmp_path):
    """transformers reads model.safetensors, MegaKD read what the index names."""
    folder_of(tmp_path, limit=1000)
    save_file(TENSORS, tmp_path / WEIGHTS)
    with refused(WEIGHTS, INDEX, "delete one"):
        stored_tensors(tmp_path)


def test_an_index_that_names_model_safetensors_alone_is_read(tmp_path):
    folder_of(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, WEIGHTS)}))
    assert stored_tensors(tmp_path).keys() == TENSORS.keys()


@pytest.mark.parametrize("fault", ["another file", "not there", "outside"])
def test_an_index_that_does_not_fit_its_files_is_refused(fault, tmp_path):
    folder_of(tmp_path, limit=1000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["norm"] = {"another file": files[-1], "not there": "no.safetensors", "outside": "../x"}[fault]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with refused(index["weight_map"]["norm"]):
        stored_tensors(tmp_path)


def test_tensors_that_the_index_leaves_out_are_there_as_for_transformers(tmp_path):
    folder_of(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "model-1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"norm": "model-1.safetensors"}}))
    assert stored_tensors(tmp_path).keys() == TENSORS.keys()


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder_of(tmp_path, limit=1000)
    files = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(files[1]) | load_file(files[0]), files[1])
    with refused(files[0].name, files[1].name):
        stored_tensors(tmp_path)


def test_an_adapter_in_the_folder_is_refused(teacher, tmp_path):
    folder = Path(shutil.copytree(teacher, tmp_path / "model"))
    (folder / "adapter_config.json").write_text("{}")
    with refused("adapter_config.json"):
        load_model(folder, torch.float32)


def test_identities_differ_by_weights_or_else_by_commit(tmp_path):
    weights, tokenizer = folder_of(tmp_path / "snapshots" / "c1"), tmp_path / "snapshots" / "c2"
    tokenizer.mkdir()
    before, now = identify("a/b", None, weights), identify("a/b", None, tokenizer)
    assert (before.commit, now.commit, now.weights) == ("c1", "c2", None)
    assert "c2" in str(before.difference(now)) and before.difference(before) is None
    same = replace(before, commit="c3")
    assert before.difference(same) is None  # another commit with the same weights and config
    assert "v2:0" in str(before.difference(replace(same, weights="v2:0")))


TOKENIZER = {"vocab_size": 400, "eos": 2, "hash": "abc"}
TEACHER = {"id": "a/b", "revision": None, "weights": "v2:1"}
FACTS: dict[str, Any] = {
    "teacher": TEACHER,
    "tokens": {"tokenizer": TOKENIZER, "sequence_length": 32, "packing": "documents"},
}


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        (ModelIdentity, {"id": "a", "revision": "r", "commit": None, "weights": "v2:1"}),
        (TeacherIdentity, TEACHER),
        (TokenizerIdentity, TOKENIZER),
    ],
)
def test_records_keep_their_bytes_when_read_and_written(kind, record):
    """Facts of manifests are compared for equality: a key more, or another order, would make shards again."""
    assert json.dumps(kind.of(record).record()) == json.dumps(record)
    assert kind.of({**record, "later": 1}) == kind.of(record)
    assert kind.of({}) != kind.of(record)  # a record that lacks what is compared is of something else


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 401}, "a vocabulary of 401 entries instead of 400"),
        ({"eos": 3}, "end token 3 instead of 2"),
        ({"hash": "abd"}, "other tokens or merges, hash abd instead of abc"),
    ],
)
def test_tokenizers_say_what_differs(change, said):
    before = TokenizerIdentity.of(TOKENIZER)
    assert before.difference(TokenizerIdentity.of(TOKENIZER)) is None
    assert before.difference(TokenizerIdentity.of(TOKENIZER | change)) == said


def test_teachers_differ_by_each_field():
    before = TeacherIdentity.of(TEACHER)
    assert before.difference(TeacherIdentity.of(TEACHER)) is None
    for change in ({"id": "c/d"}, {"revision": "main"}, {"weights": "v2:2"}, {"weights": "unknown"}):
        now = TeacherIdentity.of(TEACHER | change)
        assert before.difference(now) == f"{now} instead of {before}" and str(*change.values()) in str(now)


def test_teachers_of_two_versions_are_compared_by_their_folder(tmp_path, capsys):
    folder = folder_of(tmp_path / "teacher")
    old, new = sampled_files(folder), fingerprint(folder)

    def teacher(weights: str, place: Path = folder) -> TeacherIdentity:
        return TeacherIdentity(str(place), None, weights)

    assert teacher(old).difference(teacher(new)) is None and teacher(new).difference(teacher(old)) is None
    assert teacher(old).difference(teacher("v2:0")) and teacher("0" * 16).difference(teacher(new))
    assert teacher(old).difference(teacher("0" * 16)) and teacher(old).difference(teacher("unknown"))
    assert "without it" not in capsys.readouterr().err
    gone = tmp_path / "gone"
    assert teacher(old, gone).difference(teacher(new, gone)) is None
    assert "cannot be checked without it" in capsys.readouterr().err
    assert changed_fingerprint(old, folder) is None and changed_fingerprint("v2:0", folder) == new


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": TEACHER | {"weights": "v2:2"}}, "another teacher: a/b (weights v2:2) instead of"),
        ({"tokens": FACTS["tokens"] | {"tokenizer": TOKENIZER | {"eos": 3}}}, "another tokenizer: end token 3"),
        ({"tokens": FACTS["tokens"] | {"packing": "packed"}}, "another packing: packed instead of documents"),
        ({"tokens": FACTS["tokens"] | {"sequence_length": 64}}, "another sequence length: 64 instead of 32"),
    ],
)
def test_data_sets_say_what_differs(change, said):
    before = DataIdentity.of(FACTS)
    assert before.difference(DataIdentity.of(FACTS)) is None
    assert str(before.difference(DataIdentity.of(FACTS | change))).startswith(said)


def test_data_sets_are_read_with_and_without_targets_and_from_before_packing_was_a_fact():
    tokens = DataIdentity.of(FACTS["tokens"])
    assert tokens.teacher is None and tokens.difference(DataIdentity.of(FACTS)) is None
    older = {key: value for key, value in FACTS["tokens"].items() if key != "packing"}
    assert DataIdentity.of(older).packing == "packed"
