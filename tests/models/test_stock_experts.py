"""Experts of stock families distributed over two real ranks against the module that keeps them all.

Started as a script this file is one rank, which runs every family in turn.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.capture.sharded import load_shared
from megakd.errors import UserError
from megakd.models.checks import check_divided
from megakd.models.loading import load_model
from megakd.models.stock_experts import SpreadStockExperts, spread_stock_experts, stock_experts
from megakd.system.deepspeed_internals import join_groups
from megakd.system.dist import World, close_world, join_world
from tests.conftest import run_to_end
from tests.models.students import ATTENTION, COMMON, EXPERT_HIDDEN, EXPERTS, HIDDEN
from tests.models.students import FAMILIES as STUDENT_FAMILIES

SHARED = {"moe_intermediate_size": EXPERT_HIDDEN, "intermediate_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {family: fields for family, (_, _, fields) in STUDENT_FAMILIES.items()} | {
    "deepseek_v2": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2}
    | {"topk_group": 1, "topk_method": "group_limited_greedy", "num_key_value_heads": 4, **ATTENTION, **SHARED},
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1, **SHARED},
    "glm4_moe": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "head_dim": 8, "first_k_dense_replace": 1}
    | {"n_group": 1, "topk_group": 1, **SHARED},
    "gpt_oss": {"num_local_experts": EXPERTS, "intermediate_size": EXPERT_HIDDEN, "head_dim": 8}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granitemoe": {"num_local_experts": EXPERTS, "intermediate_size": EXPERT_HIDDEN},
    "minimax": {"num_local_experts": EXPERTS, "intermediate_size": EXPERT_HIDDEN, "head_dim": 8},
    "nemotron_h": {"n_routed_experts": EXPERTS, "layers_block_type": ["moe", "attention", "moe"], "head_dim": 8}
    | {"moe_shared_expert_intermediate_size": 20, **SHARED},
    "qwen3_next": {"num_experts": EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 20, **SHARED}
    | {"layer_types": ["full_attention", "full_attention"]},
}
# float32 by the implementation that transformers takes by itself, float64 by the one that has every type
PRECISIONS = {"grouped_mm": (torch.float32, 1e-6), "eager": (torch.float64, 1e-12)}


def make(family: str, **changes: Any) -> Any:
    """A random model of a family: two or three layers of EXPERTS experts, two of them active."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" not in name and not tensor.is_meta:
            with torch.no_grad():
                tensor.normal_(mean=float("norm" in name), std=0.2)
    return model


def rank_of_two() -> None:
    """One rank: every family by itself and some under ZeRO-3, each rank with other tokens."""
    world = join_world()
    assert join_groups(2) == world.rank
    tokens = torch.randint(1, 61, (3, 13 - 4 * world.rank), generator=torch.Generator().manual_seed(world.rank))
    for family in FAMILIES:
        for implementation, (dtype, tolerance) in PRECISIONS.items():
            whole = make(family).to(dtype)
            whole.set_experts_implementation(implementation)
            parted = copy.deepcopy(whole)
            spread_stock_experts(parted, 2, world.rank)
            for module in parted.modules():
                if isinstance(module, SpreadStockExperts):
                    module.set_deepspeed_parallelism()
            case = f"{family} {implementation}"
            tolerance = 1e-6 if family == "nemotron_h" else tolerance  # sums its experts in the router's float32
            agree(case, hidden(parted.model, tokens), hidden(whole.model, tokens), tolerance)
            one_sided(case, whole, parted, dtype, tolerance)
    for folder in sys.argv[1:]:
        under_zero(Path(folder), tokens[:, :9], world)
    close_world()


def hidden(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).last_hidden_state


def agree(case: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert actual.dtype == expected.dtype and error <= tolerance, (case, error)


def one_sided(case: str, whole: Any, parted: Any, dtype: torch.dtype, tolerance: float) -> None:
    """All rows of both ranks go to the experts of the first, and none to the second; then there are no rows at all."""
    name, experts = next(iter(stock_experts(whole, 2).items()))
    for rows in (5, 0):
        x, weights = torch.randn(rows, HIDDEN, dtype=dtype), torch.rand(rows, 2, dtype=dtype)
        ids = torch.arange(2).repeat(rows, 1)
        with torch.no_grad():
            made, expected = parted.get_submodule(name)(x, ids, weights), experts(x, ids, weights)
        assert made.shape == expected.shape
        if rows:
            agree(f"{case} {rows} rows", made, expected, tolerance)


def under_zero(folder: Path, tokens: Tensor, world: World) -> None:
    """The engine of a capture, read from the files: experts whole on their rank, everything else in halves."""
    whole = load_model(folder, torch.bfloat16).eval()
    engine = load_shared(folder, lambda model: model, "autoep", torch.bfloat16, world)
    agree(f"{folder.name} bfloat16", hidden(engine.module.model, tokens), hidden(whole.model, tokens), 0.0)
    for name, parameter in engine.module.named_parameters():
        name = parameter.part.name if hasattr(parameter, "part") else name
        assert hasattr(parameter, "part") == (".experts." in name), name
        expected = whole.get_parameter(name)
        assert parameter.dtype == expected.dtype, name
        assert parameter.ds_tensor.numel() == (expected.numel() + 1) // 2, name
    for name, buffer in engine.module.named_buffers():
        assert buffer.dtype == whole.get_buffer(name).dtype, name
    # which calls the activation once per expert that has rows, on each rank another number of times
    engine.module.set_experts_implementation("eager")
    agree(f"{folder.name} eager", hidden(engine.module.model, tokens), hidden(whole.model, tokens), 0.1)


@pytest.mark.ranks
def test_two_ranks_give_the_hidden_states_of_the_whole_model(tmp_path):
    for family in FAMILIES:
        make(family).save_pretrained(tmp_path / family)
    run_to_end(2, __file__, *(tmp_path / family for family in FAMILIES))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_names_its_rows_of_the_whole_tensor(family, device):
    whole = make(family)
    shares = [copy.deepcopy(whole).to(device) for _ in range(2)]
    for rank, share in enumerate(shares):
        spread_stock_experts(share, 2, rank)
    parts = [{p.part.name: p for p in share.parameters() if hasattr(p, "part")} for share in shares]
    experts = {name for name, _ in whole.named_parameters() if name.rpartition(".")[0] in stock_experts(whole, 2)}
    assert experts and parts[0].keys() == parts[1].keys() == experts
    for name in experts:
        tensor = whole.get_parameter(name)
        for rank, part in enumerate(parts):
            assert part[name].part.first == rank * EXPERTS // 2
            expected = tensor[rank * EXPERTS // 2 :][: EXPERTS // 2]
            assert part[name].shape == expected.shape and part[name].device.type == device
            assert device == "meta" or torch.equal(part[name], expected)
    others = {name for name, parameter in shares[0].named_parameters() if not hasattr(parameter, "part")}
    assert others | experts == {name for name, _ in whole.named_parameters()}


def empty(family: str, **fields: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON, **fields))


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: empty("llama"), "llama has no experts with transformers' experts interface"),
        (
            lambda: empty("llama4_text", num_local_experts=4, head_dim=8),
            r"model.layers.\d.feed_forward.experts is Llama4TextExperts of llama4_text, which lacks transformers'",
        ),
        (lambda: empty("jetmoe", num_local_experts=4), ".*experts is JetMoeMoA of jetmoe, which lacks transformers'"),
        (lambda: empty("mixtral", num_local_experts=5), "2 ranks do not divide the 5 experts of model.layers.0.mlp"),
    ],
    ids=["dense", "llama4", "jetmoe", "odd"],
)
def test_experts_that_cannot_be_distributed_are_refused_by_name(model, message):
    with pytest.raises(UserError, match=f"logits.parallel=autoep: {message}.*; set logits.parallel=zero3$"):
        check_divided(model(), "autoep", 2)


def test_experts_with_weights_that_all_of_them_share_are_refused():
    model = make("mixtral")
    model.model.layers[1].mlp.experts.norm = torch.nn.LayerNorm(HIDDEN)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.experts.norm.weight of mixtral belongs to no single"):
        spread_stock_experts(model, 2, 0)


@pytest.mark.parametrize("parallel", ["zero3", "autoep"])
def test_quantized_weights_are_refused(parallel):
    model = empty("mixtral")
    model.config.quantization_config = {"quant_method": "gptq"}
    check_divided(model, "replica", 2)
    with pytest.raises(UserError, match=rf"\(gptq\) .*; logits.parallel={parallel} needs float weights"):
        check_divided(model, parallel, 2)


if __name__ == "__main__":
    rank_of_two()
