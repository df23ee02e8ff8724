"""Weights in few bits against slow formulas, and which part of a model each parameter is."""

import pytest
import torch

from megakd.errors import UserError
from megakd.models.loading import load_model
from megakd.models.parts import WHOLE, precisions, weight_parts
from megakd.models.rounding import PRECISIONS, SHRINKS, dequantize, group_size, quantize, rounded, stored_bytes
from megakd.models.shared_core import Form
from tests.conftest import for_each
from tests.models.students import make_model, make_student


def nearest(line: torch.Tensor, bits: int) -> torch.Tensor:
    """One group, number by number: the best of the scales tried."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    tried = []
    for shrink in SHRINKS if bits <= 4 else SHRINKS[:1]:
        scale = float((line.abs().max() * shrink / (high + 0.5)).to(torch.bfloat16)) or 1.0
        tried.append(torch.tensor([max(low, min(high, round(float(x) / scale))) * scale for x in line]))
    return min(tried, key=lambda made: float((made - line).square().sum()))


@for_each("name", ["int8", "int4", "int3"])
@for_each("shape", [(3, 96), (2, 3, 70), (1, 128)])
def test_integers_are_the_nearest_of_each_group(name, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    precision = PRECISIONS[name]
    size = group_size(shape[-1], precision)
    groups = weight.reshape(-1, size)
    expected = torch.stack([nearest(line, precision.bits) for line in groups]).view(shape)
    assert torch.equal(rounded(weight, precision), expected)


def test_fp8_is_torch_float8_with_a_scale_a_row():
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    for row, made in zip(weight, rounded(weight, PRECISIONS["fp8"]), strict=True):
        scale = (row.abs().max() / 448).to(torch.bfloat16).float()
        assert torch.equal(made, (row / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)


@for_each("name", PRECISIONS)
def test_lines_may_lie_along_the_other_axis(name):
    weight = torch.randn(2, 64, 7, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(weight, PRECISIONS[name], axis=-2)
    assert codes.shape == weight.shape and scales.shape == (2, 1, 7)
    assert torch.equal(dequantize(codes, scales, torch.float32, axis=-2), rounded(weight.mT, PRECISIONS[name]).mT)


@for_each("name", PRECISIONS)
def test_zeros_stay_zeros_and_gradients_pass(name):
    weight = torch.zeros(3, 32, requires_grad=True)
    made = rounded(weight, PRECISIONS[name])
    made.backward(torch.arange(96.0).view(3, 32))
    assert torch.equal(made.detach(), torch.zeros(3, 32))
    assert weight.grad is not None and torch.equal(weight.grad, torch.arange(96.0).view(3, 32))


def test_bytes_are_those_of_codes_and_scales():
    assert stored_bytes((10, 256), PRECISIONS["int4"]) == 10 * (128 + 2 * 2)
    assert stored_bytes((2, 10, 96), PRECISIONS["int3"]) == 20 * (36 + 3 * 2)
    assert stored_bytes((2, 96, 5), PRECISIONS["int8"], axis=-2) == 10 * (96 + 2)
    assert stored_bytes((7, 33), PRECISIONS["fp8"]) == 7 * (33 + 2)


def test_every_parameter_has_its_part(tmp_path):
    model = make_model("qwen3_moe")
    model.save_pretrained(tmp_path / "teacher")
    stock = weight_parts(model, "m")
    assert stock["model.embed_tokens.weight"] == stock["lm_head.weight"] == "embedding"
    assert stock["model.layers.0.mlp.experts.down_proj"] == "experts"
    assert stock["model.layers.1.self_attn.q_proj.weight"] == "linear"
    forms = dict.fromkeys(("gate", "up", "down"), Form("wrappers", 3, 3))
    folder = make_student(tmp_path / "teacher", tmp_path / "student", forms, {1: (2,)})
    student = weight_parts(load_model(folder, torch.float32), "m")
    assert student["model.layers.0.mlp.experts.input_wrapper_gate_left"] == "factors"
    assert student["model.layers.1.mlp.dense_experts.down_proj"] == "experts"
    for found in (stock, student):
        assert not [name for name in found if "mlp.gate." in name or "norm" in name]


def test_unknown_parts_and_precisions_are_refused():
    assert precisions(WHOLE["int4"])["core"].bits == 4
    for said, message in (({"cores": "int8"}, "cores: no part of a model; there are core"), ({"core": "int5"}, "int5")):
        with pytest.raises(UserError, match=message):
            precisions(said)
