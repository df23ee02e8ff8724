import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megakd.identity import fingerprint
from megakd.models.hub import CODE, copy_side_files
from megakd.models.loading import load_model
from megakd.system.files import read_json, read_json_lines, write_json
from tests.conftest import files, in_process
from tests.objectives.sar import sar_recipe

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith("megakd") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert type(model).__name__ == "Qwen3MoeForCausalLM", type(model)
ids = torch.load(sys.argv[2], weights_only=True)
torch.save(model(ids, use_cache=False).logits.detach(), sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
out = model.generate(**tokenizer("Return the", return_tensors="pt"), max_new_tokens=5, do_sample=False)
print(tokenizer.decode(out[0]))
assert not any(name.startswith("megakd") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("export") / "run"
    in_process("new", run, "--from", prepared)
    in_process("train", run)
    return run


def test_dense_export_is_the_student_in_plain_transformers(trained, tmp_path):
    """In a process that never imports megakd, to 1e-4 relative in float32."""
    in_process("export", trained, "--dense")
    ids = torch.randint(400, (3, 29), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    paths = [trained / "export-dense", tmp_path / "ids.pt", tmp_path / "out.pt"]
    script = [sys.executable, "-c", STOCK, *map(str, paths)]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stock = torch.load(tmp_path / "out.pt", weights_only=True)
    student = load_model(trained / "checkpoints" / "all" / "step-000010" / "weights", torch.float32)
    with torch.no_grad():
        mine = student(ids, use_cache=False).logits
    assert (stock - mine).norm() / mine.norm() <= 1e-4


def test_compact_export_is_the_last_checkpoint(trained):
    in_process("export", trained)
    exported = AutoModelForCausalLM.from_pretrained(trained / "export")
    last = load_model(trained / "checkpoints" / "all" / "step-000010" / "weights", torch.float32)
    assert type(exported).__name__ == "SharedCoreQwen3MoeForCausalLM"
    for (name, mine), theirs in zip(exported.named_parameters(), last.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_exports_carry_a_model_card_and_the_code(trained, tmp_path):
    """What evaluate measured of this checkpoint and no other; a dense export has neither code nor our architecture."""
    in_process("evaluate", trained, "--model", "last")
    (row,) = read_json_lines(trained / "evals.jsonl")
    for dense, name in (([], "compact"), (["--dense"], "dense")):
        in_process("export", trained, *dense, "--out", tmp_path / name)
        text = (tmp_path / name / "README.md").read_text()
        assert ModelCard(text).data.to_dict()["library_name"] == "transformers"
        assert f"# {read_json(trained / 'config.json')['name']}\n" in text
        assert f"| **this model** | {row['tokens']:,} | {row['perplexity']:.3f} |" in text
        assert ("trust_remote_code=True" in text) == (not dense)
        assert {path.name for path in (tmp_path / name).glob("*.py")} == (set() if dense else set(CODE))
        assert str(trained.parent) not in text
    step = trained / "checkpoints" / "experts" / "step-000003"
    in_process("export", trained, "--checkpoint", step, "--out", tmp_path / "early")
    assert "was not evaluated" in (tmp_path / "early" / "README.md").read_text()


def test_earlier_checkpoint_can_be_named(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "experts" / "step-000003"
    in_process("export", trained, "--checkpoint", checkpoint, "--out", tmp_path / "early")
    early = load_model(tmp_path / "early", torch.float32)
    start = load_model(trained / "student-0", torch.float32)
    frozen = early.model.embed_tokens.weight  # the first stage trains experts alone
    assert torch.equal(frozen, start.model.embed_tokens.weight)
    core = early.model.layers[0].mlp.shared_core["gate_proj"].weight
    assert not torch.equal(core, start.model.layers[0].mlp.shared_core["gate_proj"].weight)


def test_stock_student_is_not_expanded(trained, teacher):
    run = trained.parent / "stock"
    in_process("new", run, "--from", trained, f"model.student={teacher}")
    assert "is stock already" in in_process("export", run, "--dense", code=2)


GATES = [f"model.layers.{i}.mlp.gate" for i in range(2)]


@pytest.fixture(scope="module")
def sar(tmp_path_factory, recipe, tokenizer):
    """A run of SAR-KD with checkpoints after 3 and 7 steps."""
    folder = tmp_path_factory.mktemp("sar")
    in_process("new", folder / "run", "--from", sar_recipe(recipe, folder, tokenizer))
    in_process("tokenize", folder / "run")
    in_process("train", folder / "run")
    return folder / "run"


def test_export_of_sar_holds_the_routers_by_their_names_in_the_teacher(sar, teacher):
    said = in_process("export", sar)
    assert f"{sar / 'export' / 'router_update'}: 2 routers" in said
    folder = sar / "export"
    found = load_file(folder / "router_update" / "router_update.safetensors")
    plain = torch.load(folder / "router_update" / "router_update.pt", weights_only=True)
    beside = load_file(sar / "checkpoints" / "second" / "step-000007" / "auxiliary.safetensors")
    before = load_model(teacher, torch.float32).state_dict()
    assert list(found) == list(plain) == [f"{gate}.weight" for gate in GATES]
    facts = read_json(folder / "router_update" / "router_update.json")
    about = {"id": teacher.name, "revision": None, "weights": fingerprint(teacher)}
    assert facts["teacher"] == about and facts["step"] == 7 and facts["router_patterns"] == []
    assert [facts[key] for key in ("routing", "initial_top_k", "final_top_k")] == ["top_m", 2, 3]
    for gate in GATES:
        name = f"{gate}.weight"
        assert torch.equal(found[name], plain[name]) and not torch.equal(found[name], before[name])
        assert torch.equal(found[name], beside[f"routers.{gate.replace('.', ':')}.weight"])
        now, then = found[name].double(), before[name].double()
        about = facts["routers"][gate]
        assert about["experts"] == 4 and about["top_k"] == 2  # as trained, not as this run let them take
        assert about["change"] == pytest.approx(((now - then).norm() / then.norm()).item()) and about["change"] > 0
        assert about["cosine"] == pytest.approx(((now * then).sum() / now.norm() / then.norm()).item())
    assert str(teacher.parent) not in (folder / "router_update" / "router_update.json").read_text()


def test_routers_beside_the_student_change_nothing_of_it(sar):
    in_process("export", sar)
    exported = AutoModelForCausalLM.from_pretrained(sar / "export")
    last = load_model(sar / "checkpoints" / "second" / "step-000007" / "weights", torch.float32)
    for (name, mine), theirs in zip(exported.named_parameters(), last.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    count = sum(parameter.numel() for parameter in last.parameters())
    assert f"| parameters in the files | {count:,} |" in (sar / "export" / "README.md").read_text()


def test_routers_are_those_of_the_checkpoint_that_is_named(sar, tmp_path):
    checkpoint = sar / "checkpoints" / "first" / "step-000003"
    in_process("export", sar, "--checkpoint", checkpoint, "--out", tmp_path / "early")
    assert read_json(tmp_path / "early" / "router_update" / "router_update.json")["step"] == 3
    found = load_file(tmp_path / "early" / "router_update" / "router_update.safetensors")
    beside = load_file(checkpoint / "auxiliary.safetensors")
    assert torch.equal(found[f"{GATES[0]}.weight"], beside["routers.model:layers:0:mlp:gate.weight"])


def test_the_best_checkpoint_has_its_routers(sar, tmp_path):
    """Those that `watch` holds with it, for rotation may have taken the checkpoint."""
    shutil.copytree(sar, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "first" / "step-000003"
    held = tmp_path / "run" / "watch" / "best" / "first" / "step-000003"
    shutil.copytree(checkpoint, held)
    shutil.rmtree(checkpoint)
    best = {"checkpoint": "checkpoints/first/step-000003", "weights": "watch/best/first/step-000003/weights"}
    write_json(tmp_path / "run" / "checkpoints" / "best.json", best)
    in_process("export", tmp_path / "run", "--checkpoint", "best")
    assert read_json(tmp_path / "run" / "export" / "router_update" / "router_update.json")["step"] == 3
    (held / "auxiliary.safetensors").unlink()
    said = in_process("export", tmp_path / "run", "--checkpoint", "best")
    assert f"no router update: {held / 'auxiliary.safetensors'} is not there" in said
    assert not list((tmp_path / "run" / "export").glob("router_update*"))


def test_nothing_else_beside_the_student_is_exported_as_a_router(sar, tmp_path):
    """A projection that the objective trains too, and a buffer, which does not learn."""
    folder = tmp_path / "step-000007"
    shutil.copytree(sar / "checkpoints" / "second" / "step-000007", folder)
    more = {
        "projector.weight": torch.ones(3, 5),
        "routers.model:layers:0:mlp:gate.e_score_correction_bias": torch.ones(4),
    }
    save_file({**load_file(folder / "auxiliary.safetensors"), **more}, folder / "auxiliary.safetensors")
    in_process("export", sar, "--checkpoint", folder, "--out", tmp_path / "export")
    assert list(load_file(tmp_path / "export" / "router_update" / "router_update.safetensors")) == [
        f"{gate}.weight" for gate in GATES
    ]


def test_without_training_there_is_no_router_update(sar, trained, tmp_path):
    in_process("new", tmp_path / "run", "--from", sar)
    assert "no router update: the student was not trained" in in_process("export", tmp_path / "run")
    in_process("export", trained, "--out", tmp_path / "cached")
    for folder in (tmp_path / "run" / "export", tmp_path / "cached"):
        assert (folder / "model.safetensors").exists() and not list(folder.glob("router_update*"))


def test_routers_of_another_teacher_than_then_are_refused(sar, teacher, tmp_path):
    in_process("new", tmp_path / "run", "--from", sar, f"model.teacher={tmp_path / 'changed'}")
    shutil.copytree(teacher, tmp_path / "changed")
    changed = {**load_file(teacher / "model.safetensors"), f"{GATES[1]}.weight": torch.ones(4, 16)}
    save_file(changed, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(sar / "checkpoints", tmp_path / "run" / "checkpoints")
    said = in_process("export", tmp_path / "run", code=2)
    assert "the trained routers: model.layers.1.mlp.gate.weight has shape (4, 32)" in said
    assert not (tmp_path / "run" / "export").exists()


def test_an_export_never_replaces_a_run_or_foreign_files(trained, tmp_path):
    """Refused before anything is written, whatever the flags, and everything is as it was."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    (tmp_path / "notes.txt").write_text("megakd export")
    weights = trained / "checkpoints" / "all" / "step-000010" / "weights"
    places = [
        trained,
        trained / "student-0",
        trained / "data",
        weights,
        trained / "report.html",
        trained / "export-dense",
    ]
    before = files(trained), files(tmp_path)
    for place in (*places, tmp_path / "precious", tmp_path / "notes.txt", tmp_path):
        for flags in ([], ["--force"]):
            in_process("export", trained, "--out", place, *flags, code=2)
    assert (files(trained), files(tmp_path)) == before


def test_an_export_replaces_its_own_product_and_others_by_force(trained, teacher, tmp_path):
    for place in (tmp_path / "mine", trained / "export"):
        for _ in range(2):
            in_process("export", trained, "--out", place)
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for flags in ([], ["--force"]):
        assert "holds thesis.txt" in in_process("export", trained, "--out", tmp_path / "mine", *flags, code=2)
    shutil.copytree(teacher, tmp_path / "model")
    assert "add --force" in in_process("export", trained, "--out", tmp_path / "model", code=2)
    in_process("export", trained, "--out", tmp_path / "model", "--force")
    assert read_json(tmp_path / "model" / "megakd.json")["made_by"] == "megakd export"
    assert "is made from" in in_process("export", trained, "--out", teacher, "--force", code=2)
    copy_side_files(tmp_path / "model", tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "megakd.json").exists()
