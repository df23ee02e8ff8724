import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from megakd.errors import UserError
from megakd.models.loading import load_model
from megakd.models.router_update import TeacherRouters, moved, read_facts, read_update, write_update
from megakd.system.files import read_json, write_json
from tests.models.students import EXPERTS, FAMILIES, HIDDEN, make_model

FACTS = {"teacher": {"id": "teacher", "revision": None, "weights": "0" * 16}}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    make_model("qwen3_moe").save_pretrained(path)
    return path


def learned(teacher: TeacherRouters) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: teacher.tensor(name) + 0.1 * torch.randn(teacher.tensor(name).shape) for name in teacher.stored}


def test_every_family_is_read_by_the_names_of_its_modules(folder):
    """Whatever its files call them; what does not learn, such as a correction bias, is skipped."""
    teacher, model = TeacherRouters(folder), load_model(folder, torch.float32)
    parameters = dict(model.named_parameters())
    gates = [name for name in parameters if name.endswith(".mlp.gate.weight")]
    assert list(teacher.stored) == gates and len(gates) == 2
    assert all(torch.equal(teacher.tensor(name), parameters[name]) for name in gates)
    if model.config.model_type == "mixtral":
        assert teacher.stored[gates[0]] == "model.layers.0.block_sparse_moe.gate.weight"


def test_a_family_without_a_spec_is_read_too(tmp_path):
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = GraniteMoeConfig(vocab_size=61, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2, **sizes)
    GraniteMoeForCausalLM(config).save_pretrained(tmp_path)
    layer = "model.layers.0.block_sparse_moe.router"
    assert TeacherRouters(tmp_path).stored == {f"{layer}.weight": f"{layer}.layer.weight"}


def test_what_is_written_is_read_again(folder, tmp_path):
    teacher = TeacherRouters(folder)
    tensors = learned(teacher)
    write_update(tmp_path, {**tensors, "lm_head.weight": torch.ones(3)}, teacher, FACTS)
    for kind in ("safetensors", "pt"):
        found = read_update(tmp_path / f"router_update.{kind}")
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
        assert (tmp_path / f"router_update.{kind}").stat().st_mode & 0o044 == 0o044
    facts: Any = read_facts(tmp_path / "router_update.pt")
    assert facts == read_json(tmp_path / "router_update.json") and facts["teacher"] == FACTS["teacher"]
    for name, tensor in tensors.items():
        about, before = facts["routers"][name.removesuffix(".weight")], teacher.tensor(name)
        assert (about["experts"], about["top_k"]) == (EXPERTS, 2)
        assert about["change"] == pytest.approx(((tensor - before).norm() / before.norm()).item(), rel=1e-5)
        assert about["cosine"] == pytest.approx(((tensor * before).sum() / tensor.norm() / before.norm()).item())


def test_a_router_that_did_not_move_has_cosine_1(qwen):
    teacher = TeacherRouters(qwen)
    name = next(iter(teacher.stored))
    assert moved({name: teacher.tensor(name)}, teacher) == {"change": 0.0, "cosine": pytest.approx(1.0)}
    opposite = moved({name: -teacher.tensor(name)}, teacher)
    assert opposite == {"change": pytest.approx(2.0), "cosine": pytest.approx(-1.0)}


def test_names_of_the_files_are_taken_too(folder):
    teacher = TeacherRouters(folder)
    tensors = learned(teacher)
    by_file = {teacher.stored[name]: tensor for name, tensor in tensors.items()}
    for given in (tensors, by_file):
        found = teacher.check(given, "update")
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize(
    "name, tensor, said",
    [
        (
            "model.layers.7.mlp.gate.weight",
            torch.ones(EXPERTS, HIDDEN),
            r"update: model.layers.7.mlp.gate.weight is no",
        ),
        (
            "model.embed_tokens.weight",
            torch.ones(61, HIDDEN),
            r"those are model.layers.0.mlp.gate.weight, model.layers.1",
        ),
        ("model.layers.1.mlp.gate.weight", torch.ones(HIDDEN, EXPERTS), r"has shape \(32, 4\), .* has \(4, 32\)"),
        ("model.layers.1.mlp.gate.weight", torch.full((EXPERTS, HIDDEN), torch.nan), r"holds NaN"),
        ("model.layers.1.mlp.gate.weight", torch.ones(EXPERTS, HIDDEN, dtype=torch.int64), r"or integers"),
    ],
)
def test_what_is_not_this_teachers_is_refused(qwen, name, tensor, said):
    with pytest.raises(UserError, match=said):
        TeacherRouters(qwen).check({name: tensor}, "update")


def test_a_teacher_without_experts_or_without_its_routers_is_refused(qwen, tmp_path):
    with pytest.raises(UserError, match=r"objective.router_patterns: 'odd' find no matrix"):
        TeacherRouters(qwen, ["odd"])
    shutil.copytree(qwen, tmp_path / "teacher")
    file, name = tmp_path / "teacher" / "model.safetensors", "model.layers.1.mlp.gate.weight"
    save_file({n: t for n, t in load_file(file).items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"no tensor of its files is {name}"):
        TeacherRouters(tmp_path / "teacher")
    with pytest.raises(UserError, match=f"{name} was not trained; this is another teacher"):
        teacher = TeacherRouters(qwen)
        write_update(tmp_path, {n: t for n, t in learned(teacher).items() if n != name}, teacher, FACTS)


class Foreign:
    pass


def test_files_that_are_no_update_are_refused_in_one_line(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "other.txt").write_text("")
    torch.save({"model.layers.0.mlp.gate.weight": Foreign()}, tmp_path / "code.pt")
    torch.save({"step": 3}, tmp_path / "number.pt")
    torch.save({}, tmp_path / "empty.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    save_file({}, tmp_path / "empty.safetensors")
    for file, said in {
        "none.pt": "no router update here",
        "other.txt": "ends in .safetensors or .pt",
        "cut.safetensors": "cannot be read as safetensors of tensors",
        "cut.pt": "cannot be read as pt of tensors",
        "code.pt": "cannot be read as pt of tensors",
        "number.pt": "holds no plain dictionary of tensors",
        "list.pt": "holds no plain dictionary of tensors",
        "empty.pt": "holds no tensor",
        "empty.safetensors": "holds no tensor",
    }.items():
        with pytest.raises(UserError, match=said) as refused:
            read_update(tmp_path / file)
        assert str(refused.value).startswith(str(tmp_path / file)) and "\n" not in str(refused.value)


def test_facts_without_a_teacher_are_refused(tmp_path):
    assert read_facts(tmp_path / "update.pt") is None
    for value in ([], {}, {"teacher": "qwen"}, {"teacher": {"id": "qwen"}}):
        write_json(tmp_path / "router_update.json", value)
        with pytest.raises(UserError, match="does not name its teacher by id, revision and weights"):
            read_facts(tmp_path / "update.pt")
