import pytest
from transformers import LlamaConfig, Qwen3MoeForCausalLM

from megakd.errors import UserError
from megakd.models.shared_core import PROJECTIONS, Form
from megakd.models.spec import spec_for
from megakd.models.student import student_config
from megakd.models.tiny import tiny_moe_config

SMALL = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 6}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (0, 1, 2, 3, 4)),
        ({"mlp_only_layers": [0, 3]}, (1, 2, 4)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
    ],
)
def test_moe_layers_are_those_that_transformers_builds(changes, expected):
    assert spec_for(tiny_moe_config(16, **SMALL, num_hidden_layers=5, **changes), "here").layers == expected


def test_names_and_shapes_are_those_that_transformers_builds():
    config = tiny_moe_config(16, **SMALL, num_hidden_layers=2, mlp_only_layers=[0])
    spec, tensors = spec_for(config, "here"), Qwen3MoeForCausalLM(config).state_dict()
    assert [spec.shapes[p] for p in PROJECTIONS] == [(6, 8), (6, 8), (8, 6)]
    names = spec.fused(1)
    assert tensors[names["gate_up_proj"]].shape == (8, 12, 8) and tensors[names["down_proj"]].shape == (8, 8, 6)
    assert {name for name in tensors if spec.is_expert(name)} == set(names.values())  # no router, no dense MLP
    assert f"{spec.place(1)}.gate.weight" in tensors


def test_a_students_config_has_its_familys_spec():
    teacher = tiny_moe_config(16, **SMALL)
    student = student_config(teacher, {0: dict.fromkeys(PROJECTIONS, Form("wrappers", 2, 2))})
    assert spec_for(student, "here")._replace(activation=None) == spec_for(teacher, "here")._replace(activation=None)


@pytest.mark.parametrize(
    "config, words",
    [
        (LlamaConfig(), "some/folder: no layer of this llama has experts; there is nothing to compress"),
        (tiny_moe_config(16, mlp_only_layers=[0, 1, 2, 3]), "no layer of this qwen3_moe has experts"),
    ],
)
def test_models_without_experts_are_refused_with_their_place(config, words):
    with pytest.raises(UserError, match=words):
        spec_for(config, "some/folder")
