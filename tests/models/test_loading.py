"""A model read in parts is the one that transformers loads, whole or in rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.errors import UserError
from megakd.models.hub import write_config, write_weights
from megakd.models.loading import fill, hollow_model, load_model, placed_on
from tests.conftest import for_each
from tests.models.students import FULL, make_model, make_student

CPU = torch.device("cpu")
# fields that a config has of these, so that a model of any family is small
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "vocab_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def small_model(family: str, **fields: Any) -> Any:
    """A causal LM of a family, of two small layers, with random weights."""
    config = AutoConfig.for_model(family)
    for name, value in {**SMALL, **fields}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def same_model(folder: Path, dtype: torch.dtype) -> None:
    """Parameters and buffers are those of `load_model`, bit by bit and in its types; rows are rows."""
    whole, (model, sources) = load_model(folder, dtype), hollow_model(folder, dtype)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    fill(model, sources, placed_on(CPU))
    expected = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for name, tensor in model.state_dict().items():
        if tensor.ndim and len(tensor) > 2:
            assert torch.equal(sources.read(name, slice(1, len(tensor) - 1)), tensor[1:-1]), name


FAMILIES = "qwen3_moe qwen2_moe mixtral olmoe deepseek_v2 deepseek_v3 glm4_moe granitemoe phimoe ernie4_5_moe"
FAMILIES += " minimax_m2 qwen3_next hunyuan_v1_moe gpt_oss llama gemma2 phi3"


@pytest.mark.filterwarnings("ignore")  # of families about the sizes above
def test_every_family_in_parts_is_the_one_loaded_whole(tmp_path):
    for family in FAMILIES.split():
        small_model(family).save_pretrained(tmp_path / family)
        for dtype in (torch.float32, torch.bfloat16):
            try:
                same_model(tmp_path / family, dtype)
            except BaseException as error:
                error.add_note(f"where {family} in {dtype}")
                raise


def test_experts_that_are_stored_fused(tmp_path):
    stock = make_model("mixtral")
    write_weights(tmp_path, stock.state_dict().items())
    write_config(tmp_path, stock.config)
    same_model(tmp_path, torch.float32)


@for_each("shape", list(FULL))
def test_students_in_parts(shape, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    make_model("deepseek_v3").save_pretrained(folder / "stock")
    student = make_student(folder / "stock", folder / "student", FULL[shape])
    same_model(student, torch.bfloat16)


def test_rows_of_experts_are_read_alone(tmp_path):
    small_model("qwen3_moe").save_pretrained(tmp_path)
    _, sources = hollow_model(tmp_path, torch.float32)
    asked = []
    stored = type(sources)._stored
    sources._stored = lambda name, rows, dtype: (asked.append(name), stored(sources, name, rows, dtype))[1]
    assert sources.read("model.layers.1.mlp.experts.gate_up_proj", slice(2, 3)).shape == (1, 48, 32)
    assert asked == [f"model.layers.1.mlp.experts.2.{p}_proj.weight" for p in ("gate", "up")]


@for_each(
    "change,words",
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "1 tensors of the model are missing.*model.norm.weight"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight has shape \(31,\), config.json says \(32,\)",
        ),
        (
            lambda tensors: tensors.update(_one_expert_fewer(tensors)),
            "no tensor model.layers.0.mlp.experts.3.down_proj.weight",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.float8_e4m3fn)}),
            "model.norm.weight is stored as F8_E4M3",
        ),
    ],
)
def test_refusals_name_folder_and_tensor(change, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    small_model("qwen3_moe").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=words):
        model, sources = hollow_model(folder, torch.float32)
        fill(model, sources, placed_on(CPU))


def _one_expert_fewer(tensors: dict[str, Any]) -> dict[str, Any]:
    for name in [name for name in tensors if ".experts.3." in name]:
        tensors.pop(name)
    return {}


def test_tensors_without_a_place_are_said(tmp_path, capsys):
    small_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.more": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    hollow_model(tmp_path, torch.float32)
    assert "1 tensors of its files are skipped" in capsys.readouterr().err


def test_a_file_that_ends_early(tmp_path):
    small_model("qwen3_moe").save_pretrained(tmp_path)
    model, sources = hollow_model(tmp_path, torch.float32)
    with (tmp_path / "model.safetensors").open("rb+") as file:
        file.truncate(20_000)
    with pytest.raises(UserError, match=r"ends within"):
        fill(model, sources, placed_on(CPU))
