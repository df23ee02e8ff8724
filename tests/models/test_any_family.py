"""Every family of transformers with experts: works as a student, or is refused by what its modules say.

The table in docs/families.md is what this file finds: `python -m tests.models.test_any_family` prints it.
"""

import inspect
import re
from argparse import Namespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megakd.commands import compress
from megakd.errors import UserError
from megakd.models.hub import Checkpoint, load_config, write_config, write_weights
from megakd.models.loading import load_model
from megakd.models.shared_core import PROJECTIONS, make_form
from megakd.models.sources import as_stored
from megakd.models.spec import spec_for
from megakd.models.student import stock_config
from megakd.run import Run
from megakd.serve.export import dense_tensors
from tests.conftest import ROOT
from tests.models.students import logits, make_student, relative

# fields that a config has of these
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "moe_intermediate_size": 32, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_topk": 2, "top_k_experts": 2, "shared_expert_intermediate_size": 32, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "qk_head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "sliding_window": 32, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_num_heads": 4,
    "mamba_head_dim": 32, "ssm_state_size": 8, "n_groups": 1, "mamba_n_groups": 1, "chunk_size": 16, "conv_L_cache": 3,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16, "moe_layer_start_index": 1, "moe_layer_interval": 1,
    "enable_moe_block": True, "shared_intermediate_size": 32, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64,
    "num_layers": 2, "zero_expert_num": 2, "router_hidden_size": 16, "moe_shared_expert_intermediate_size": 32,
    "moe_latent_size": None, "block_ff_dim": 64, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 128,
    "num_kv_shared_layers": 0, "mtp_num_hidden_layers": 0, "linear_head_dim": 8, "linear_num_heads": 2,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "granitemoe": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "longcat_flash": {"head_dim": 16},
    "zaya": {"num_experts_per_tok": 1, "num_experts": 8},
    "bailing_hybrid": {"num_hidden_layers": 8, "head_dim": 16},
    "kimi_linear": {"num_hidden_layers": 8},
    "hunyuan_v1_moe": {"head_dim": 16},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
}
WORKS = [
    "afmoe", "axk1", "bailing_hybrid", "cohere2_moe", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "flint", "gemma4_text", "glm4_moe", "glm4_moe_lite",
    "glm_moe_dsa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "kolibri1",
    "laguna", "lfm2_moe", "mellum", "minimax", "minimax_m2",
    "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text",
    "qwen3_moe", "qwen3_next", "solar_open", "zaya",
]  # fmt: skip
REFUSED = {
    "aria_text": "transposed matrices",
    "beam": "an activation of their own",
    "nemotron_h": "two projections without a gate",
    "gpt_oss": "biases",
    "deepseek_v4": "an activation of their own",
    "longcat_flash": "no interface that transformers describes",
    "llama4_text": "no interface that transformers describes",
}


def small_model(family: str, **changes: Any) -> Any:
    """A causal LM of a family with random weights, norms and biases among them."""
    config = CONFIG_MAPPING[family]
    known = {*inspect.signature(config.__init__).parameters, *getattr(config, "__dataclass_fields__", {})}
    known |= set(getattr(config, "attribute_map", {}))
    fields = {name: value for name, value in SMALL.items() if name in known} | MORE.get(family, {}) | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**fields)).float().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            # transformers sets an entry of Zaya's balancing_biases again when it loads
            if tensor.is_floating_point() and not name.endswith(("inv_freq", "balancing_biases")):
                tensor.normal_(mean=float("norm" in name or "scal" in name), std=0.05)
    return model


def table() -> str:
    """docs/families.md's table: what a small model of each family says."""
    rows = ["| family | experts in | in hub files | student |", "|---|---|---|---|"]
    for family in sorted([*WORKS, *REFUSED]):
        if family in REFUSED:
            rows.append(f"| {family} | - | - | refused: experts with {REFUSED[family]} |")
            continue
        model = small_model(family)
        spec = spec_for(model.config, family)
        first = {name: model.state_dict()[name] for name in spec.fused(spec.layers[0]).values()}
        stored = sorted({re.sub(r"\.\d+\.", ".N.", name).removesuffix(".weight") for name in as_stored(model, first)})
        parts = ", ".join(f"`{name.rpartition('.')[2]}`" for name in stored)
        kind = "one by one" if ".experts.N." in stored[0] else "stacked"
        where = f"`{spec.block}`" if spec.block else "the layer"
        rows.append(f"| {family} | {where} | {kind}: {parts} | works |")
    return "\n".join(rows)


def test_the_page_has_every_family():
    page = (ROOT / "docs" / "families.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| .* \| (works|refused: .*) \|$", page, re.MULTILINE))
    assert rows == dict.fromkeys(WORKS, "works") | {
        name: f"refused: experts with {why}" for name, why in REFUSED.items()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", WORKS)
def test_a_student_of_full_rank_answers_as_its_teacher(family, tmp_path):
    """Saved, loaded, trained a step, generating; and as a stock model again in the hub's names."""
    stock = small_model(family)
    stock.save_pretrained(tmp_path / "stock")
    teacher = load_model(tmp_path / "stock", torch.float32).eval()
    spec = spec_for(teacher.config, family)
    full = {p: make_form("wrappers", p, min(spec.sizes), 3) for p in PROJECTIONS}
    student = load_model(make_student(tmp_path / "stock", tmp_path / "student", full), torch.float32).eval()
    tokens = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = logits(teacher, tokens)
    assert relative(logits(student, tokens), expected) <= 1e-5
    assert student.generate(tokens[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
    student.train()
    student(tokens, labels=tokens, use_cache=False).loss.backward()
    factors = {name: p.grad for name, p in student.named_parameters() if "_wrapper_" in name}
    assert factors and all(gradient is not None and gradient.any() for gradient in factors.values())
    config = load_config(tmp_path / "student")
    write_weights(tmp_path / "dense", dense_tensors(Checkpoint(tmp_path / "student"), config, torch.float32))
    write_config(tmp_path / "dense", stock_config(config))
    assert Checkpoint(tmp_path / "dense").files.keys() == Checkpoint(tmp_path / "stock").files.keys()
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert type(dense) is type(teacher) and relative(logits(dense, tokens), expected) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gemma4_text", "granitemoe", "lfm2_moe", "kimi_linear", "flex_olmo"])
def test_compress_at_full_rank_gives_the_teacher(family, recipe, tokenizer, tmp_path):
    """Through the verb: blocks of other names, the layer itself, stacked files, files of other names."""
    stock = small_model(family)
    stock.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    spec = spec_for(stock.config, family)
    settings = [f"model.teacher={tmp_path / 'teacher'}", f"compress.rank={min(spec.sizes)}"]
    run = Run.create(recipe, settings, tmp_path / "run")
    compress.main(run, Namespace())
    teacher, student = (load_model(f, torch.float32).eval() for f in (tmp_path / "teacher", run.path("student-0")))
    tokens = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))
    assert relative(logits(student, tokens), logits(teacher, tokens)) <= 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_by_what_their_modules_say(family):
    with pytest.raises(UserError, match=f"here: {family} cannot be compressed: its experts .* have {REFUSED[family]}"):
        spec_for(small_model(family).config, "here")


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4", "nemotron_h"])
def test_no_family_passes_by_its_shapes(family):
    """D = F makes all matrices square: transposed, interleaved and clamped experts look like any others."""
    equal = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    known = {n: v for n, v in equal.items() if n in inspect.signature(CONFIG_MAPPING[family].__init__).parameters}
    with pytest.raises(UserError, match="cannot be compressed"):
        spec_for(small_model(family, **known).config, "here")


if __name__ == "__main__":
    print(table())
