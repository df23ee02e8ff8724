import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from megakd.files import read_json, read_json_lines
from megakd.models.hub import CODE, load_model
from tests.conftest import in_process

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
