import pytest
from transformers import LlamaConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megakd.errors import UserError
from megakd.models.spec import SPECS, outside, spec_for
from megakd.models.tiny import tiny_moe_config


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"mlp_only_layers": [0, 3]}, [1, 2, 4]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1]),
        ({"mlp_only_layers": [0, 1, 2, 3, 4]}, []),
    ],
)
def test_moe_layers_are_those_that_transformers_builds(changes, expected):
    config = tiny_moe_config(
        16, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=5, **changes
    )
    model = Qwen3MoeForCausalLM(config)
    built = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert spec_for(config, "here").moe_layers(config) == built == expected


def test_names_and_shapes_are_those_that_transformers_builds():
    config = tiny_moe_config(
        16, hidden_size=10, intermediate_size=14, moe_intermediate_size=6, num_hidden_layers=2, mlp_only_layers=[0]
    )
    spec = spec_for(config, "here")
    tensors = Qwen3MoeForCausalLM(config).state_dict()
    gate, up, down = (spec.shapes(config)[p] for p in ("gate", "up", "down"))
    assert (gate, up, down) == ((6, 10), (6, 10), (10, 6))
    assert tensors[spec.fused_gate_up.format(i=1)].shape == (8, gate[0] + up[0], gate[1])
    assert tensors[spec.fused_down.format(i=1)].shape == (8, *down)
    experts = {name for name in tensors if spec.is_expert(name)}
    assert experts == {spec.fused_gate_up.format(i=1), spec.fused_down.format(i=1)}  # no router, no dense MLP
    assert spec.is_expert(spec.per_expert.format(i=1, e=0, p="up"))
    assert any(name.startswith(spec.block.format(i=1) + ".gate.") for name in tensors)


def test_an_unknown_family_is_refused_with_its_place():
    with pytest.raises(UserError, match=r"some/folder: model type 'llama'.*qwen3_moe"):
        spec_for(LlamaConfig(), "some/folder")
    assert spec_for(Qwen3MoeConfig(), "here").model_type == "qwen3_moe"


def test_a_students_config_has_its_familys_spec():
    for family in SPECS:
        config = Qwen3MoeConfig()
        config.model_type = f"{family}_shared_core"
        assert spec_for(config, "here").model_type == family


@pytest.mark.parametrize(
    "hub, module",
    [
        ("model.layers.3.block_sparse_moe.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_the_hub_and_of_modules(hub, module):
    assert SPECS["mixtral"].module_name(hub) == module and SPECS["mixtral"].hub_name(module) == hub
    assert SPECS["qwen3_moe"].module_name(hub) == hub == SPECS["qwen3_moe"].hub_name(hub)
    assert SPECS["mixtral"].expert_name(2, 7, "up") == "model.layers.2.block_sparse_moe.experts.7.w3.weight"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.4.mlp.gate.weight", False),
        ("model.layers.5.mlp.gate.weight", True),
        ("model.layers.61.shared_head.norm.weight", True),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_what_is_outside_the_model(name, expected):
    assert outside(tiny_moe_config(16, num_hidden_layers=5), name) == expected
