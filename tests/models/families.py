"""A small model of every family with experts, and what it says of itself: the rows of docs/families.md.

`python -m tests.models.families` prints the table.
"""

import inspect
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megakd.compress.calibrate import LayerRunner
from megakd.errors import UserError
from megakd.models.hub import model_of
from megakd.models.isolation import ALONE, FLOAT32, measure
from megakd.models.loading import load_model
from megakd.models.routers import Router, find_routers
from megakd.models.routing import choices, learns_nothing
from megakd.models.sources import Sources, as_stored
from megakd.models.spec import MoESpec, find_experts

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
    "zaya": {"num_experts_per_tok": 1, "num_experts": 8},
    "bailing_hybrid": {"num_hidden_layers": 8, "head_dim": 16},
    "kimi_linear": {"num_hidden_layers": 8},
    "hunyuan_v1_moe": {"head_dim": 16},
    "deepseek_v4": {"head_dim": 128, "index_head_dim": 16},
    "longcat_flash": {"head_dim": 8},
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
TOKENS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))


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


HEAD = ["family", "experts in", "in hub files", "student", "calibrated", "routers for SAR", "packed documents"]


def row(family: str) -> list[str]:
    """The cells of a family, each measured on its small model; `student` is what tests of its name show."""
    model = small_model(family)
    spec = find_experts(model.config, "here")
    cells = [routers(model), documents(model)]
    if not isinstance(spec, MoESpec):
        return [family, "-", "-", f"refused: experts with {REFUSED[family]}", "-", *cells]
    first = {name: model.state_dict()[name] for name in spec.fused(spec.layers[0]).values()}
    stored = sorted({re.sub(r"\.\d+\.", ".N.", name).removesuffix(".weight") for name in as_stored(model, first)})
    parts = ", ".join(f"`{name.rpartition('.')[2]}`" for name in stored)
    kind = "one by one" if ".experts.N." in stored[0] else "stacked"
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        exact = calibrated(model, Path(folder))
    return [family, f"`{spec.block}`" if spec.block else "the layer", f"{kind}: {parts}", "works", exact, *cells]


def routers(model: Any) -> str:
    """Whether its routers are found, one for each block with experts, and are what SAR trains and listens to."""
    try:
        found = find_routers(model, "here")
    except UserError as error:
        why = re.search(r"here: the router .* cannot be trained alone: (.*)", str(error))
        assert why, error
        return f"refused: {why[1]}"
    blocks = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".experts")}
    assert {router.name.removesuffix(f".{router.path}") for router in found} == blocks and len(found) == len(blocks)
    if all(map(learns_nothing, found)):
        return "refused: outside training its weights do not depend on its logits"
    check_routers(model, found, 3)
    check_one_expert(model, found)
    return "found"


def check_routers(model: Any, found: list[Router], active: int) -> None:
    """Logits are the matrix times what goes into it, and `active` experts are taken; the output depends on both."""
    inputs: dict[str, Tensor] = {}
    for router in found:
        router.take(active)
        router.module.weight.grad = None
    handles = [
        router.module.register_forward_pre_hook(lambda _, args, name=router.name: inputs.update({name: args[0]}))
        for router in found
    ]
    with choices(found) as chosen:
        out = model(TOKENS, use_cache=False).logits
    out.square().sum().backward()
    for handle, router, choice in zip(handles, found, chosen, strict=True):
        handle.remove()
        linear = router.module
        expected = inputs[router.name].double().flatten(0, -2) @ linear.weight.double().T
        if getattr(linear, "bias", None) is not None:
            expected += linear.bias.double()
        assert float((choice.logits - expected).norm() / expected.norm()) <= 1e-5, router.name
        assert choice.experts.shape == (TOKENS.numel(), active) and int(choice.experts.max()) < router.experts
        assert linear.weight.grad is not None and linear.weight.grad.any(), router.name


def check_one_expert(model: Any, found: list[Router]) -> None:
    """Whether one expert a token leaves a router without a gradient is what the whole model shows."""
    for router in found:
        router.take(1)
        router.module.weight.grad = None
    out = model(TOKENS, use_cache=False).logits.square().sum()
    last = found[-1]  # no later layer chooses by what it changed
    (gradient,) = torch.autograd.grad(out, last.module.weight)
    assert learns_nothing(last) == (float(gradient.abs().max()) <= 1e-6 * float(out.detach())), last.name
    for router in found:
        router.take(router.active)


def documents(model: Any) -> str:
    """Whether documents packed into one sequence change each other."""
    try:
        leak = measure(model, rows=1)
    except Exception:  # what small sizes do to a family's own code
        return "-"
    return "separate" if leak.packed <= FLOAT32 and leak.alone <= ALONE else "leak"


def calibrated(model: Any, folder: Path) -> str:
    """Whether its layers give one at a time what they give in the whole model; folder: of its weights."""
    tokens = torch.randint(3, 120, (4, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).expand(4, -1)
    spec = find_experts(model.config, "here")
    assert isinstance(spec, MoESpec), spec
    runner = LayerRunner(
        Sources(folder, model_of(model.config, "here")), spec, model.config, tokens, positions, batch=3
    )
    try:
        found = [runner.embed()]
        for index in range(len(runner.layers)):
            found.append(runner.layer(index, found[-1], measure=index in spec.layers)[0])
    except UserError as error:
        why = re.search(r"cannot be run one layer at a time, as calibration does \((.*)\); set", str(error))
        assert why, error
        return f"refused: {why[1]}"
    expected = states(load_model(folder, torch.float32), tokens, positions)
    moved = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    return "exact" if moved <= 1e-5 else f"differs by {moved:.1e}"


@torch.no_grad()
def states(model: Any, tokens: Tensor, positions: Tensor) -> list[Tensor]:
    """Hidden states before the first layer and behind every layer, the last before the norm."""
    found: list[Tensor] = []

    def note(output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [model.model.layers[0].register_forward_pre_hook(lambda _, args: note(args))]
    handles += [layer.register_forward_hook(lambda *called: note(called[2])) for layer in model.model.layers]
    model(tokens, position_ids=positions, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def table() -> str:
    rows = [HEAD, ["---"] * len(HEAD), *map(row, sorted([*WORKS, *REFUSED]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(table())
