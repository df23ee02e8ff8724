"""What tests of the student share: one tiny model a family, and students of it without a solver."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megakd.models.hub import copy_side_files, load_config, model_of, write_config, write_weights
from megakd.models.shared_core import PROJECTIONS, Form, free_and_core_rank, make_form
from megakd.models.sources import Sources
from megakd.models.spec import spec_for
from megakd.models.student import student_config

HIDDEN, EXPERT_HIDDEN, EXPERTS = 32, 24, 4
COMMON = {"vocab_size": 61, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64}
COMMON |= {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
ATTENTION = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"head_dim": 8, "moe_intermediate_size": EXPERT_HIDDEN, "intermediate_size": 40, "num_experts": EXPERTS}
        | {"norm_topk_prob": True},
    ),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {"moe_intermediate_size": EXPERT_HIDDEN, "intermediate_size": 40, "num_experts": EXPERTS}
        | {"shared_expert_intermediate_size": 20, "num_hidden_layers": 3, "mlp_only_layers": [0]},
    ),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {"intermediate_size": EXPERT_HIDDEN, "num_local_experts": EXPERTS},
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"intermediate_size": EXPERT_HIDDEN, "num_experts": EXPERTS}),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {"moe_intermediate_size": EXPERT_HIDDEN, "intermediate_size": 40, "n_routed_experts": EXPERTS}
        | {"n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3, "n_group": 2, "topk_group": 1}
        | {"num_key_value_heads": 4, **ATTENTION},
    ),
}
# every matrix of the tiny models exactly
FULL = {
    "additive": {p: make_form("additive", p, EXPERT_HIDDEN, 0) for p in PROJECTIONS},
    "wrappers": {p: make_form("wrappers", p, EXPERT_HIDDEN, 3) for p in PROJECTIONS},
    "two bases": {p: make_form("basis", p, 0, HIDDEN, 2) for p in PROJECTIONS},
    "mixture of two": {p: make_form("mixture", p, 0, HIDDEN, 2) for p in PROJECTIONS},
    "mixed": {
        "gate": make_form("wrappers", "gate", EXPERT_HIDDEN, 1),
        "up": make_form("basis", "up", 0, HIDDEN),
        "down": make_form("additive", "down", EXPERT_HIDDEN, 0),
    },
}


def make_model(family: str) -> Any:
    """The stock model with random weights, norms and biases among them."""
    config, model, fields = FAMILIES[family]
    torch.manual_seed(0)
    made = model(config(**{**COMMON, **fields})).eval()
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        if "inv_freq" not in name:
            with torch.no_grad():
                tensor.normal_(mean=float("norm" in name), std=0.2)
    return made


def factors(weights: Tensor, projection: str, form: Form) -> dict[str, Tensor]:
    """Tensors of one projection by their names in a block: the best free wrapper next to random others."""
    generator = torch.Generator().manual_seed(1)
    w = (weights.mT if projection == "down" else weights).double()  # [E, F, D]
    experts, f, d = w.shape
    free, rank = free_and_core_rank(form, projection)
    found: dict[str, Tensor] = {}
    if form.shape == "basis":
        group = torch.randint(form.groups, (experts,), generator=generator)
        bases = []
        for g in range(form.groups):
            rows = torch.cat([torch.eye(d).double(), w[group == g].flatten(0, 1)])
            bases.append(torch.linalg.svd(rows, full_matrices=False)[2][:rank])
        core = torch.cat(bases)
        found["output_left"] = torch.stack([w[e] @ bases[int(group[e])].T for e in range(experts)])
        if form.groups > 1:
            found["group"] = group
    elif form.shape == "mixture":
        bases = torch.randn(form.groups, rank, d, generator=generator).double()
        found["output_mix"] = torch.randn(experts, form.groups, 1, generator=generator).double()
        mixed = (found["output_mix"][:, :, 0] @ bases.flatten(1)).unflatten(1, (rank, d))
        core, found["output_left"] = bases.flatten(0, 1), w @ torch.linalg.pinv(mixed)
    else:
        core = w.mean(0)
        residual = w - core
        if rank:
            found["output_left"], found["output_right"] = torch.randn(2, experts, f, rank, generator=generator).double()
            residual = residual - found["output_left"] @ found["output_right"].mT @ core
        if free:
            left, sigma, right = torch.linalg.svd(residual, full_matrices=False)
            found["input_left"], found["input_right"] = left[..., :free] * sigma[:, None, :free], right[:, :free].mT
    if projection == "down":  # (L C + Q V^T)^T = C^T (I + S U^T) + V Q^T: wrappers change places, and their sides
        swapped = {"output_left": "input_right", "output_right": "input_left", "output_mix": "input_mix"}
        swapped |= {new: old for old, new in swapped.items()}
        found = {swapped.get(name, name): tensor for name, tensor in found.items()}
        core = core.T
    named = {f"shared_core.{projection}_proj.weight": core}
    for name, tensor in found.items():
        wrapper, _, side = name.partition("_")
        place = f"experts.{wrapper}_wrapper_{projection}_{side}" if side else f"experts.basis_group_{projection}"
        named[place] = tensor.mT if side == "left" else tensor
    return {n: t.float().contiguous() if t.is_floating_point() else t for n, t in named.items()}


def sources_of(folder: Path) -> Sources:
    """The tensors of a stock model's folder."""
    return Sources(folder, model_of(load_config(folder), str(folder)))


def experts_in(folder: Path, layer: int, projection: str) -> Tensor:
    """All experts' matrices of one projection as a folder stores them."""
    return sources_of(folder).experts(spec_for(load_config(folder), str(folder)), layer, projection)


def expert_name(layer: int, expert: int, projection: str) -> str:
    """Of one matrix in files of Qwen's families."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"


def make_student(
    teacher: Path,
    folder: Path,
    forms: Mapping[str, Form],
    exempt: Mapping[int, tuple[int, ...]] | None = None,
) -> Path:
    """A student's folder with these forms in every layer."""
    config, sources, exempt = load_config(teacher), sources_of(teacher), exempt or {}
    spec = spec_for(config, str(teacher))
    tensors = {name: sources.raw(name) for name in sources.made_by if not spec.is_expert(name)}
    for layer in spec.layers:
        prefix = f"{spec.place(layer)}."
        stacks = {p: sources.experts(spec, layer, p) for p in PROJECTIONS}
        for projection, weights in stacks.items():
            tensors |= {prefix + n: t for n, t in factors(weights, projection, forms[projection]).items()}
        if layer in exempt:
            ids = list(exempt[layer])
            tensors[f"{prefix}dense_experts.gate_up_proj"] = torch.cat([stacks["gate"], stacks["up"]], 1)[ids]
            tensors[f"{prefix}dense_experts.down_proj"] = stacks["down"][ids]
    write_weights(folder, tensors.items())
    student = student_config(config, dict.fromkeys(spec.layers, forms), exempt)
    student.dtype = torch.float32
    write_config(folder, student)
    copy_side_files(teacher, folder)
    return folder


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
