import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megakd.commands import compress
from megakd.models.hub import CODE, Checkpoint, cast, exact_names, load_config, write_config
from megakd.models.loading import load_model
from megakd.models.shared_core import PROJECTIONS, DenseExperts, Form, SharedCoreExperts, dense_weight
from megakd.models.student import SharedCoreQwen3MoeForCausalLM, stock_config, student_config
from megakd.run import Run
from megakd.system.files import read_json
from megakd.system.version import VERSION
from tests.conftest import ROOT, VOCABULARY, make_teacher
from tests.forks import Forked
from tests.models.students import FULL, experts_in, logits, make_model, make_student

RANK_3 = {p: Form("wrappers", 3, 3) for p in PROJECTIONS}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 400, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def student(prepared) -> Any:
    return AutoModelForCausalLM.from_pretrained(prepared / "student-0").eval()


def compressed(recipe: Path, folder: Path, *overrides: str) -> Any:
    """The student that `megakd compress` makes from the recipe with these overrides."""
    run = Run.create(recipe, overrides, folder)
    compress.main(run, Namespace())
    return AutoModelForCausalLM.from_pretrained(run.path("student-0")).eval()


def test_auto_class_loads_the_compressed_folder(prepared, student):
    assert type(student) is SharedCoreQwen3MoeForCausalLM
    assert student.dtype == torch.float32
    form = {"shape": "wrappers", "input_rank": 4, "output_rank": 4, "groups": 1}
    assert student.config.shared_core == {"layers": {str(i): dict.fromkeys(PROJECTIONS, form) for i in range(2)}}
    assert all(isinstance(layer.mlp.experts, SharedCoreExperts) for layer in student.model.layers)
    _, info = AutoModelForCausalLM.from_pretrained(prepared / "student-0", output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or mismatched
    stored = Checkpoint(prepared / "student-0")
    named = dict(student.named_parameters())
    assert stored.files.keys() == named.keys()
    assert all(torch.equal(stored.tensor(name), p) for name, p in named.items())


def test_the_rest_is_the_teachers(student, teacher):
    theirs = dict(AutoModelForCausalLM.from_pretrained(teacher).named_parameters())
    shared = {
        name: p for name, p in student.named_parameters() if ".shared_core." not in name and ".experts." not in name
    }
    assert shared.keys() == {name for name in theirs if ".experts." not in name}
    assert all(torch.equal(p, theirs[name]) for name, p in shared.items())


def test_expanded_experts_miss_the_teachers_by_the_reported_errors(prepared, student, teacher):
    report = json.loads((prepared / "student-0" / "compress.json").read_text())
    tensors = dict(student.named_parameters())
    assert len(report["parts"]) == 2 * 3
    for part in report["parts"]:
        prefix = f"model.layers.{part['layer']}.mlp."
        own = {name.removeprefix(prefix): p for name, p in tensors.items() if name.startswith(prefix)}
        weights = experts_in(teacher, part["layer"], part["projection"])
        with torch.no_grad():
            fits = torch.stack([dense_weight(own, part["projection"], e) for e in range(4)])
        errors = (weights - fits).flatten(1).norm(dim=1) / weights.flatten(1).norm(dim=1)
        assert errors.tolist() == pytest.approx(part["errors"], abs=2e-6)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_round_trip_gives_equal_logits(student, tokens, tmp_path, shard_size):
    student.save_pretrained(tmp_path, max_shard_size=shard_size)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard_size == "20KB"
    assert type(again) is type(student)
    assert torch.equal(logits(again, tokens), logits(student, tokens))
    assert again.config.shared_core == student.config.shared_core


@torch.no_grad()
def test_generate_with_a_cache_is_greedy_decoding_without(student, tokens):
    settings = GenerationConfig(
        max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=None, return_dict_in_generate=True
    )
    found = student.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    expected = tokens
    for _ in range(12):
        expected = torch.cat([expected, logits(student, expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.sequences, expected)
    assert found.past_key_values.get_seq_length() == tokens.shape[1] + 11


@torch.no_grad()
def test_router_logits_and_auxiliary_loss(student, tokens):
    inputs: list[Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        for layer in student.model.layers
    ]
    out = student(tokens, labels=tokens, output_router_logits=True, use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(out.router_logits) == 2
    for layer, x, found in zip(student.model.layers, inputs, out.router_logits, strict=True):
        assert torch.allclose(found, x @ layer.mlp.gate.weight.T, atol=1e-6)
    # Switch Transformer (Fedus et al. 2021), equations 4-6, over all layers' rows
    probabilities = torch.cat(out.router_logits).softmax(-1)
    share = nn.functional.one_hot(probabilities.topk(2).indices, 4).sum(1).float().mean(0)
    assert out.aux_loss.item() == pytest.approx(4 * (share @ probabilities.mean(0)).item(), rel=1e-5)
    plain = student(tokens, labels=tokens, use_cache=False)
    assert plain.aux_loss is None
    assert out.loss.item() == pytest.approx(
        plain.loss.item() + student.config.router_aux_loss_coef * out.aux_loss.item(), rel=1e-6
    )


def test_full_rank_student_is_the_teacher(recipe, teacher, tokens, tmp_path):
    """24 is the short side of the experts: the wrappers alone hold any matrix."""
    full = compressed(recipe, tmp_path / "full", "compress.rank=24")
    expected = logits(AutoModelForCausalLM.from_pretrained(teacher).eval(), tokens)
    assert (logits(full, tokens) - expected).norm() <= 1e-4 * expected.norm()


def test_a_small_rank_is_worse_than_a_large_one(recipe, student, teacher, tokens, tmp_path):
    expected = logits(AutoModelForCausalLM.from_pretrained(teacher).eval(), tokens)
    distances = [
        (logits(s, tokens) - expected).norm().item()
        for s in (student, compressed(recipe, tmp_path / "a", "compress.rank=16"))
    ]
    assert distances[1] < 0.8 * distances[0]


def test_dense_layers_stay_dense(recipe, tokenizer, documents, tokens, tmp_path):
    """mlp_only_layers: the family's MLP there, untouched, and a full-rank student still is the teacher."""
    teacher = make_teacher(
        tmp_path / "teacher", tokenizer, documents, seed=1, steps=0, mlp_only_layers=[0], num_hidden_layers=3
    )
    found = compressed(recipe, tmp_path / "run", f"model.teacher={teacher}", "compress.rank=24")
    assert [found.config.forms(i) is not None for i in range(3)] == [False, True, True]
    original = AutoModelForCausalLM.from_pretrained(teacher).eval()
    assert torch.equal(found.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    expected = logits(original, tokens)
    assert (logits(found, tokens) - expected).norm() <= 1e-4 * expected.norm()
    assert len(found(tokens, output_router_logits=True).router_logits) == 2


def test_config_goes_to_the_student_and_back(teacher):
    """What a teacher's folder says of its own code is not the student's."""
    config = AutoConfig.from_pretrained(teacher)
    made = student_config(config, {0: RANK_3, 1: FULL["mixed"]}, {0: (), 1: (3, 1)})
    assert made.model_type == "qwen3_moe_shared_core" and made.architectures == ["SharedCoreQwen3MoeForCausalLM"]
    again = type(made).from_dict(json.loads(made.to_json_string()))
    for found in (made, again):
        assert [found.forms(i) for i in range(3)] == [RANK_3, FULL["mixed"], None]
        assert [found.dense_experts(i) for i in range(3)] == [(), (3, 1), ()]
    config.auto_map = {"AutoConfig": "theirs.Config"}
    made = student_config(config, {0: RANK_3})
    assert getattr(made, "auto_map", None) is None
    before, after = (
        {k: v for k, v in c.to_dict().items() if k not in ("transformers_version", "auto_map", "_name_or_path")}
        for c in (config, stock_config(made))
    )
    assert after == before


def test_a_fresh_student_starts_as_its_core(teacher):
    """Left factors are zero, right ones are not: gradients reach the left factors in the first step."""
    torch.manual_seed(0)
    fresh = SharedCoreQwen3MoeForCausalLM(student_config(AutoConfig.from_pretrained(teacher), {0: RANK_3, 1: RANK_3}))
    for name, parameter in fresh.named_parameters():
        if "_wrapper_" in name:
            left = name.endswith("_left")
            assert parameter.shape[1 if left else 2] == 3
            spread = 0.0 if left else parameter.shape[1] ** -0.5
            assert parameter.std().item() == pytest.approx(spread, rel=0.3), name
    fresh(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), labels=torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])).loss.backward()
    for name, parameter in fresh.named_parameters():
        if "_wrapper_" in name:
            assert parameter.grad.any() == name.endswith("_left"), name


def test_layers_may_differ(teacher, tokens):
    """Each in its own forms and kept experts, one left as the family has it."""
    config = student_config(AutoConfig.from_pretrained(teacher), {1: FULL["mixed"]}, {1: (2,)})
    model = SharedCoreQwen3MoeForCausalLM(config)
    first, second = (layer.mlp for layer in model.model.layers)
    assert not isinstance(first.experts, SharedCoreExperts) and not hasattr(first, "shared_core")
    assert isinstance(second.experts, SharedCoreExperts) and isinstance(second.dense_experts, DenseExperts)
    assert second.experts.forms == FULL["mixed"] and second.dense_experts.ids == (2,)
    assert torch.isfinite(logits(model, tokens)).all()


def test_names_are_those_that_rules_are_written_for(student):
    names = [name for name, _ in student.named_parameters()]
    for layer in range(2):
        assert f"model.layers.{layer}.mlp.shared_core.gate_proj.weight" in names
        assert f"model.layers.{layer}.mlp.experts.input_wrapper_gate_left" in names
        assert f"model.layers.{layer}.mlp.experts.output_wrapper_down_right" in names
        assert f"model.layers.{layer}.mlp.gate.weight" in names


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A DeepSeek student: buffers, groups, kept experts, and a family whose own code differs most."""
    folder = tmp_path_factory.mktemp("mixed")
    make_model("deepseek_v3").save_pretrained(folder / "stock")
    return make_student(
        folder / "stock", folder / "student", FULL["mixed"] | {"gate": FULL["two bases"]["gate"]}, {1: (2,)}
    )


def in_a_process(script: str, tmp_path: Path, *argv: object, installed: bool) -> str:
    """What the script prints; MegaKD is importable only if `installed`, and nothing is trusted that was cached.

    Forked from a process with torch, which takes most of the time that importing transformers takes.
    """
    blocker = """
class Blocker:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "megakd":
            raise ModuleNotFoundError("megakd is not installed here")
sys.meta_path.insert(0, Blocker)
"""
    place = f"sys.path.insert(0, {str(ROOT)!r})" if installed else blocker
    file, out = tmp_path / "script.py", tmp_path / "output"
    fresh = "assert not {'megakd', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    file.write_text(f"import sys\n{fresh}\n{place}\n{script}")
    with out.open("w") as stream:
        code = Forked(file, *argv, stdout=stream, env={"HF_HOME": str(tmp_path / "home")}, bare=True).wait()
    assert code == 0, out.read_text()
    return out.read_text()


USE = """
import torch
tokens = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model.eval()(tokens, use_cache=False).logits, sys.argv[3])
    model.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=True, eos_token_id=None)
"""
TRUSTED = f"""
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
{USE}
model.save_pretrained(sys.argv[4])
assert len(AutoTokenizer.from_pretrained(sys.argv[4], trust_remote_code=False)) == {VOCABULARY}  # asks nothing
config = AutoConfig.from_pretrained(sys.argv[4], trust_remote_code=True)
again = AutoModelForCausalLM.from_pretrained(sys.argv[4], trust_remote_code=True)
# transformers prefers classes that somebody registered to a folder's
origin = "megakd.models." if "megakd" in sys.modules else "transformers_modules."
assert all(type(found).__module__.startswith(origin) for found in (model, again, config))
assert type(again).__name__ == type(model).__name__
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
"""


@pytest.mark.parametrize("installed", [False, True], ids=["alone", "next to megakd"])
def test_the_folder_alone_is_enough_for_those_who_trust_it(mixed, tokens, tokenizer, tmp_path, installed):
    """Also saved again from there, and next to an installed MegaKD; its tokenizer needs no trust."""
    tokenizer.save_pretrained(tmp_path / "b")
    tokens = tokens % 61
    torch.save(tokens, tmp_path / "tokens")
    script = ("import megakd\n" if installed else "") + TRUSTED
    in_a_process(script, tmp_path, mixed, tmp_path / "tokens", tmp_path / "logits", tmp_path / "b", installed=installed)
    found, model = torch.load(tmp_path / "logits", weights_only=True), load_model(mixed, torch.float32)
    assert torch.equal(found, logits(model, tokens))
    for folder in (mixed, tmp_path / "b"):
        for name in CODE:
            assert (folder / name).read_bytes() == (ROOT / "megakd" / "models" / name).read_bytes()
    assert torch.equal(logits(load_model(tmp_path / "b", torch.float32), tokens), found)


@pytest.mark.parametrize(
    "order",
    [
        "import megakd\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM\nimport megakd",
        "import megakd, transformers\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        # the family's module is half there while it imports the Auto classes
        "import megakd\nfrom transformers import DeepseekV3ForCausalLM, AutoConfig, AutoModelForCausalLM",
        "import megakd.models.student\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    ],
)
def test_importing_megakd_is_enough(mixed, tokens, tmp_path, order):
    torch.save(tokens % 61, tmp_path / "tokens")
    script = f"""
{order}
assert type(AutoConfig.from_pretrained(sys.argv[1])).__name__ == "SharedCoreDeepseekV3Config"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "megakd.models.student"
{USE}
"""
    in_a_process(script, tmp_path, mixed, tmp_path / "tokens", tmp_path / "logits", installed=True)
    found = torch.load(tmp_path / "logits", weights_only=True)
    assert torch.equal(found, logits(load_model(mixed, torch.float32), tokens % 61))


def test_importing_megakd_imports_neither_torch_nor_transformers():
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import megakd; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "megakd" in modules and not {"torch", "transformers"} & set(modules)


def test_the_import_hook_is_gone_once_transformers_has_its_auto_classes(tmp_path):
    script = """
import megakd
def ours():
    return sum(getattr(finder, "__module__", "") == "megakd" for finder in sys.meta_path)
before = ours()
from transformers import AutoConfig
print(before, ours())
"""
    assert in_a_process(script, tmp_path, installed=True).split() == ["1", "0"]


def test_register_makes_students_known_at_once(mixed, tmp_path):
    script = """
import megakd
megakd.register()
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(megakd.__version__, "deepseek_v3_shared_core" in CONFIG_MAPPING)
"""
    assert in_a_process(script, tmp_path, installed=True).split() == [VERSION, "True"]


def test_our_loaders_run_no_code_of_a_folder(mixed, tmp_path):
    """Whatever stands in it."""
    for path in mixed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in CODE:
        (tmp_path / name).write_text("raise SystemExit('run')")
    assert type(load_model(tmp_path, torch.float32)).__module__ == "megakd.models.student"
    assert type(load_config(tmp_path)).__module__ == "megakd.models.student"


def test_saved_from_a_live_model_it_carries_its_code(mixed, tmp_path):
    model = load_model(mixed, torch.float32)
    model.config.auto_map = None
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["auto_map"] == read_json(mixed / "config.json")["auto_map"]
    assert all((tmp_path / name).exists() for name in CODE)


def test_buffers_are_loaded_as_they_were_stored(mixed):
    """Groups of bases as integers, the bias of the router in float32, also in a model of bfloat16."""
    stored, model = Checkpoint(mixed), load_model(mixed, torch.bfloat16)
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in stored.files}
    assert {name.rpartition(".")[2] for name in buffers} == {"basis_group_gate", "e_score_correction_bias"}
    for name, tensor in buffers.items():
        assert torch.equal(tensor, stored.tensor(name)), name
        assert cast(name, tensor, torch.bfloat16, exact_names(model)) is tensor
    assert cast("model.norm.weight", torch.ones(2), torch.bfloat16, exact_names(model)).dtype == torch.bfloat16


def test_a_stock_config_is_written_without_code(teacher, tmp_path):
    write_config(tmp_path, load_config(teacher))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
