import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megakd.commands import compress
from megakd.models.hub import Checkpoint, load_config
from megakd.models.shared_core import SharedCoreMoeBlock, dense_weight
from megakd.models.spec import spec_for
from megakd.models.student import SharedCoreQwen3MoeForCausalLM, student_config
from megakd.run import Run
from tests.conftest import make_teacher


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


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def test_auto_class_loads_the_compressed_folder(prepared, student):
    assert type(student) is SharedCoreQwen3MoeForCausalLM
    assert student.config.shared_core_rank == 4 and student.dtype == torch.float32
    assert all(isinstance(layer.mlp, SharedCoreMoeBlock) for layer in student.model.layers)
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
    config = load_config(teacher)
    checkpoint, tensors = Checkpoint(teacher), dict(student.named_parameters())
    assert len(report["parts"]) == 2 * 3
    for part in report["parts"]:
        prefix = f"model.layers.{part['layer']}.mlp."
        own = {name.removeprefix(prefix): p for name, p in tensors.items() if name.startswith(prefix)}
        weights = checkpoint.experts(spec_for(config, "here"), config, part["layer"], part["projection"])
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
    assert again.config.shared_core_rank == 4


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
    assert [isinstance(layer.mlp, SharedCoreMoeBlock) for layer in found.model.layers] == [False, True, True]
    original = AutoModelForCausalLM.from_pretrained(teacher).eval()
    assert torch.equal(found.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    expected = logits(original, tokens)
    assert (logits(found, tokens) - expected).norm() <= 1e-4 * expected.norm()
    assert len(found(tokens, output_router_logits=True).router_logits) == 2


def test_config_goes_to_the_student_and_back(teacher):
    config = AutoConfig.from_pretrained(teacher)
    made = student_config(config, 5)
    assert (made.model_type, made.shared_core_rank) == ("qwen3_moe_shared_core", 5)
    before, after = (
        {k: v for k, v in c.to_dict().items() if k != "transformers_version"} for c in (config, made.dense())
    )
    assert after == before


def test_a_fresh_student_starts_as_its_core(teacher):
    """Left factors are zero, right ones are not: gradients reach the left factors in the first step."""
    torch.manual_seed(0)
    fresh = SharedCoreQwen3MoeForCausalLM(student_config(AutoConfig.from_pretrained(teacher), 3))
    for name, parameter in fresh.named_parameters():
        if "_wrapper_" in name:
            assert parameter.shape[-1] == 3
            spread = 0.0 if name.endswith("_left") else parameter.shape[1] ** -0.5
            assert parameter.std().item() == pytest.approx(spread, rel=0.3), name
    fresh(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), labels=torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])).loss.backward()
    for name, parameter in fresh.named_parameters():
        if "_wrapper_" in name:
            assert parameter.grad.any() == name.endswith("_left"), name


def test_names_are_those_that_rules_are_written_for(student):
    names = [name for name, _ in student.named_parameters()]
    for layer in range(2):
        assert f"model.layers.{layer}.mlp.shared_core.gate_proj.weight" in names
        assert f"model.layers.{layer}.mlp.experts.input_wrapper_gate_left" in names
        assert f"model.layers.{layer}.mlp.experts.output_wrapper_down_right" in names
        assert f"model.layers.{layer}.mlp.gate.weight" in names
