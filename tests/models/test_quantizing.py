"""Training that rounds its weights: the same forward as rounded weights, gradients of the identity, names as before."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.config.precisions import label, parse_quantize
from megakd.errors import UserError
from megakd.models.loading import load_model
from megakd.models.parts import weight_parts
from megakd.models.quantizing import fake_quantize, round_weights, stored_as
from megakd.models.rounding import PRECISIONS, line_axis, rounded
from megakd.models.shared_core import Form
from tests.conftest import for_each
from tests.models.students import logits, make_model, make_student

TOKENS = torch.randint(1, 61, (2, 13), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "wrappers": Form("wrappers", 3, 3),
    "additive": Form("additive", 3, 3),
    "basis": Form("basis", 5, 5, 2),
    "mixture": Form("mixture", 5, 5, 3),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    make_model("qwen3_moe").save_pretrained(folder)
    return folder


def model_of(kind: str, teacher: Path, folder: Path) -> Any:
    if kind == "stock":
        return load_model(teacher, torch.float32)
    forms = dict.fromkeys(("gate", "up", "down"), SHAPES[kind])
    return load_model(make_student(teacher, folder, forms, {1: (2,)}), torch.float32)


def said_of(model: Any) -> dict[str, str]:
    """int4 for every part that it has, the embedding too."""
    return dict.fromkeys(set(weight_parts(model, "m").values()), "int4")


@for_each("kind", ["stock", *SHAPES])
def test_a_forward_that_rounds_is_that_of_rounded_weights(kind, teacher, tmp_path):
    model = model_of(kind, teacher, tmp_path)
    said, plain, kept = said_of(model), logits(model, TOKENS), copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)
    round_weights(expected, said, "m")
    # the slow way: each parameter by hand
    for name, part in weight_parts(model, "m").items():
        weight = model.get_parameter(name)
        by_hand = rounded(weight, PRECISIONS["int4"], line_axis(part, tuple(weight.shape)))
        assert torch.equal(expected.get_parameter(name), by_hand), name
    fake_quantize(model, said, "m")
    found = logits(model, TOKENS)
    assert torch.equal(found, logits(expected, TOKENS)) and not torch.allclose(found, plain, atol=1e-3)
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@for_each("kind", ["stock", "wrappers"])
def test_gradients_are_those_at_the_rounded_weights(kind, teacher, tmp_path):
    model = model_of(kind, teacher, tmp_path)
    said, expected = said_of(model), copy.deepcopy(model)
    round_weights(expected, said, "m")
    fake_quantize(model, said, "m")
    for each in (model, expected):
        each.train()
        each(TOKENS, use_cache=False).logits.square().mean().backward()
    for (name, found), (_, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert found.grad is not None and wanted.grad is not None, name
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-5, atol=1e-8), name


def test_what_is_stored_is_counted(teacher, tmp_path):
    model = model_of("wrappers", teacher, tmp_path)
    stored = stored_as(model, {"core": "int8", "factors": "int4"}, "m")
    assert stored.counts == {"core": 6, "factors": 24} and stored.quantized == {"core": "int8", "factors": "int4"}
    assert stored.bytes < 2 * sum(p.numel() for p in model.parameters())
    whole = stored_as(model, "int4", "m")
    assert whole.quantized["factors"] == "int4" and "embedding" not in whole.quantized


def test_what_cannot_be_rounded_is_refused(teacher):
    model = load_model(teacher, torch.float32)
    with pytest.raises(
        UserError, match=r"stages\.0: there is no core to round; its parts are embedding, experts, linear"
    ):
        fake_quantize(model, {"core": "int4"}, "stages.0")
    for said, message in (
        ("int5", "--quantize int5: unknown precision 'int5'; there are int8, fp8, int4, int3"),
        ("cores=int4", "cores: no part of a model; there are core, factors"),
        ("core=int9", "core=int9: unknown precision"),
    ):
        with pytest.raises(UserError, match=message):
            parse_quantize(said)
    assert label(parse_quantize("core=int4, factors=int8")) == "core=int4,factors=int8"
