import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.config.objective import SarConfig
from megakd.models.hub import Checkpoint, load_config
from megakd.models.loading import load_model
from megakd.models.router_update import TeacherRouters, write_update
from megakd.objectives.sar import SarDistillation
from megakd.system.files import read_json, write_json
from tests.conftest import VOCABULARY, in_process
from tests.models.students import FAMILIES, make_model
from tests.objectives.sar import dense_student, sar_recipe
from tests.tools.examples import refused, tool

module = tool("compat/apply_router_update")
TOKENS = torch.randint(1, 61, (3, 13), generator=torch.Generator().manual_seed(0))
FACTS = {"teacher": {"id": "teacher", "revision": None, "weights": "0" * 16}}


@pytest.fixture(scope="module")
def run(tmp_path_factory, recipe, tokenizer) -> Path:
    """A run of SAR-KD after 7 steps, exported."""
    folder = tmp_path_factory.mktemp("sar")
    in_process("new", folder / "run", "--from", sar_recipe(recipe, folder, tokenizer))
    for verb in ("tokenize", "train", "export"):
        in_process(verb, folder / "run")
    return folder / "run"


@pytest.fixture
def update(run, tmp_path) -> Path:
    """The files of the update in a folder of their own."""
    folder = tmp_path / "update"
    folder.mkdir()
    for path in (run / "export" / "router_update").glob("router_update.*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def apply(*argv: object) -> None:
    module.main([str(arg) for arg in argv])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("given", ["router_update.safetensors", "router_update.pt", ""])
def test_the_teacher_that_is_written_is_the_one_that_learned(run, teacher, update, given, tmp_path, capsys):
    """To the last bit: the teacher inside the objective of the last checkpoint, with as many experts as it had."""
    apply(teacher, update / given, tmp_path / "out")
    said = capsys.readouterr().out
    assert "2 of 2 tensors of 2 routers replaced" in said and "0.0% of what they learned is rounded away" in said
    whole = load_model(teacher, torch.float32)
    objective = SarDistillation(dense_student(), whole, SarConfig(), VOCABULARY)
    objective.restore(load_file(run / "checkpoints" / "second" / "step-000007" / "auxiliary.safetensors"))
    expected, found = logits(objective.held[0]), logits(load_model(tmp_path / "out", torch.float32))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, logits(load_model(teacher, torch.float32)), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_routers_change_and_names_types_and_files_stay(family, tmp_path, capsys):
    model = make_model(family).bfloat16()
    model.save_pretrained(tmp_path / "teacher")
    for name in ("LICENSE", "README.md", "tokenizer.json", "pytorch_model.bin", "model.bin.index.json"):
        (tmp_path / "teacher" / name).write_text("{}")
    teacher, before = TeacherRouters(tmp_path / "teacher"), Checkpoint(tmp_path / "teacher")
    torch.manual_seed(0)
    changed = {n: teacher.tensor(n).float() + 0.1 * torch.randn(teacher.tensor(n).shape) for n in teacher.stored}
    write_update(tmp_path, changed, teacher, FACTS)
    (tmp_path / "router_update.json").unlink()  # it may be missing
    apply(tmp_path / "teacher", tmp_path / "router_update.pt", tmp_path / "out")
    lost = float(capsys.readouterr().out.rpartition(": ")[2].partition("%")[0])
    assert 0.2 < lost < 5  # 8 bits
    after = Checkpoint(tmp_path / "out")
    assert list(after.files) == list(before.files)
    by_file = {teacher.stored[name]: tensor.bfloat16() for name, tensor in changed.items()}
    for name in before.files:
        assert after.tensor(name).dtype == before.tensor(name).dtype
        assert torch.equal(after.tensor(name), by_file.get(name, before.tensor(name))), name
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "teacher").iterdir()} - {
        "pytorch_model.bin",
        "model.bin.index.json",
    }
    assert read_json(tmp_path / "out" / "config.json") == read_json(tmp_path / "teacher" / "config.json")
    assert load_config(tmp_path / "out").dtype == torch.bfloat16


def test_a_part_of_the_routers_may_be_replaced(teacher, update, tmp_path, capsys):
    tensors = load_file(update / "router_update.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    save_file({name: tensors[name]}, update / "router_update.safetensors")
    apply(teacher, update, tmp_path / "out")
    assert "1 of 2 tensors of 2 routers replaced" in capsys.readouterr().out
    after, before = Checkpoint(tmp_path / "out"), Checkpoint(teacher)
    assert [n for n in before.files if not torch.equal(after.tensor(n), before.tensor(n))] == [name]


def test_what_does_not_fit_is_refused_in_one_line(run, teacher, update, tmp_path, capsys):
    out, file = tmp_path / "out", update / "router_update.safetensors"
    changed = tmp_path / "changed"
    shutil.copytree(teacher, changed)
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    said = refused(module, capsys, changed, file, out)
    assert f"learned in {teacher.name} (weights " in said and f"{changed} has weights" in said
    gate = "model.layers.0.mlp.gate.weight"
    for name, tensor, expected in (
        (
            "model.layers.5.mlp.gate.weight",
            torch.ones(4, 32),
            "model.layers.5.mlp.gate.weight is no tensor of a router",
        ),
        (gate, torch.ones(5, 32), f"{gate} has shape (5, 32), {teacher / 'model.safetensors'}: {gate} has (4, 32)"),
    ):
        save_file({name: tensor}, file)
        assert expected in refused(module, capsys, teacher, file, out)
    assert "no router update here" in refused(module, capsys, teacher, run, out)
    student = run.parent / "student"
    (update / "router_update.json").unlink()
    assert "no module with a matrix [experts, hidden]" in refused(module, capsys, student, file, out)
    assert "not a model folder" in refused(module, capsys, tmp_path / "nowhere", file, out)
    assert "exists already" in refused(module, capsys, teacher, file, update)
    write_json(update / "router_update.json", {"teacher": "it"})
    assert "does not name its teacher" in refused(module, capsys, teacher, file, out)
    assert not out.exists()
