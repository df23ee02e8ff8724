"""Every family that MoESpec describes: read, made a student of, loaded, saved, expanded to the stock model again."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megakd.commands import compress
from megakd.models.hub import Checkpoint, load_config, model_of, write_config, write_weights
from megakd.models.loading import load_model
from megakd.models.shared_core import PROJECTIONS, SharedCoreExperts, make_form
from megakd.models.sources import as_stored
from megakd.models.spec import spec_for
from megakd.models.student import stock_config, student_class
from megakd.run import Run
from megakd.serve.export import dense_tensors
from tests.models.students import EXPERTS, FAMILIES, FULL, logits, make_model, make_student, relative, sources_of

TOKENS = torch.randint(1, 61, (3, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(family) -> Any:
    return make_model(family)


@pytest.fixture(scope="module")
def folders(family, stock, tmp_path_factory) -> dict[str, Path]:
    """The model in the hub's layout, as save_pretrained writes it, and with experts fused and modules' names."""
    folder = tmp_path_factory.mktemp(family)
    stock.save_pretrained(folder / "hub")
    write_weights(folder / "fused", stock.state_dict().items())
    write_config(folder / "fused", stock.config)
    return {"hub": folder / "hub", "fused": folder / "fused"}


@pytest.fixture(scope="module")
def student(folders, tmp_path_factory) -> Path:
    return make_student(folders["hub"], tmp_path_factory.mktemp("student"), FULL["additive"])


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_experts_of_either_layout_are_the_modules(stock, folders, layout):
    config, sources = load_config(folders[layout]), sources_of(folders[layout])
    spec = spec_for(config, "here")
    assert list(spec.layers) == [i for i, layer in enumerate(stock.model.layers) if hasattr(layer.mlp, "experts")]
    assert len(spec.layers) == 2 and spec.experts == EXPERTS
    for layer in spec.layers:
        experts = stock.model.layers[layer].mlp.experts
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        for projection, expected in zip(PROJECTIONS, (gate, up, experts.down_proj), strict=True):
            found = sources.experts(spec, layer, projection)
            assert torch.equal(found, expected), (layer, projection)
            assert tuple(found.shape[1:]) == spec.shapes[projection]


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_all_tensors_have_the_modules_names_and_the_hubs_again(stock, folders, layout):
    """Buffers among them."""
    sources, expected = sources_of(folders[layout]), stock.state_dict()
    found = {name: sources.raw(name) for name in sources.made_by}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert as_stored(model_of(stock.config, "here"), found).keys() == Checkpoint(folders["hub"]).files.keys()


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("shape", FULL)
def test_a_student_of_full_rank_is_the_stock_model(family, stock, folders, shape, layout, tmp_path):
    spec = spec_for(stock.config, "here")
    exempt = {spec.layers[-1]: (1,)} if shape == "mixed" else None
    model = load_model(make_student(folders[layout], tmp_path, FULL[shape], exempt), torch.float32)
    assert type(model) is student_class(family)
    found = [isinstance(getattr(layer.mlp, "experts", None), SharedCoreExperts) for layer in model.model.layers]
    assert [i for i, shared in enumerate(found) if shared] == list(spec.layers)
    assert relative(logits(model, TOKENS), logits(stock, TOKENS)) <= 1e-4


def test_a_student_of_half_the_rank_is_not(stock, folders, tmp_path):
    """So that the tests above compare what compressing changes."""
    half = {p: make_form("additive", p, 12, 0) for p in PROJECTIONS}
    model = load_model(make_student(folders["hub"], tmp_path, half), torch.float32)
    assert relative(logits(model, TOKENS), logits(stock, TOKENS)) > 1e-3


def test_megakd_compress_at_full_rank_gives_the_stock_model(family, stock, folders, recipe, tokenizer, tmp_path):
    """Through the verb: buffers, shared experts and dense layers among what it carries over."""
    shutil.copytree(folders["hub"], tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    run = Run.create(recipe, [f"model.teacher={tmp_path / 'teacher'}", "compress.rank=24"], tmp_path / "run")
    compress.main(run, Namespace())
    model = load_model(run.path("student-0"), torch.float32)
    assert type(model) is student_class(family)
    assert relative(logits(model, TOKENS), logits(stock, TOKENS)) <= 1e-4
    theirs = stock.state_dict()
    own = {n: t for n, t in model.state_dict().items() if "_wrapper_" not in n and ".shared_core." not in n}
    assert own.keys() == {name for name in theirs if not spec_for(stock.config, "here").is_expert(name)}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())


@pytest.mark.parametrize("shape", ["additive", "mixed"])
def test_saved_and_loaded_again(student, folders, stock, shape, tmp_path):
    source = make_student(folders["hub"], tmp_path / "a", FULL[shape], {1: (0, 2)})
    model = load_model(source, torch.float32)
    model.save_pretrained(tmp_path / "b")
    again = load_model(tmp_path / "b", torch.float32)
    assert type(again) is type(model) and torch.equal(logits(again, TOKENS), logits(model, TOKENS))
    assert Checkpoint(tmp_path / "b").files.keys() == Checkpoint(source).files.keys() == model.state_dict().keys()
    before, after = ({**c.to_dict(), "_name_or_path": ""} for c in (model.config, again.config))
    assert before == after


@pytest.mark.parametrize("shape", FULL)
def test_expanded_it_is_the_stock_model(family, stock, folders, shape, tmp_path):
    """In the hub's names, read by the stock class; config.json as it was."""
    exempt = {spec_for(stock.config, "here").layers[0]: (3, 0)} if shape == "mixed" else None
    source = make_student(folders["hub"], tmp_path / "student", FULL[shape], exempt)
    config = load_config(source)
    write_weights(tmp_path / "dense", dense_tensors(Checkpoint(source), config, torch.float32))
    write_config(tmp_path / "dense", stock_config(config))
    assert Checkpoint(tmp_path / "dense").files.keys() == Checkpoint(folders["hub"]).files.keys()
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense) is type(stock)
    assert relative(logits(dense.eval(), TOKENS), logits(stock, TOKENS)) <= 1e-4
    before, after = (
        {**load_config(folder).to_dict(), "_name_or_path": ""} for folder in (folders["hub"], tmp_path / "dense")
    )
    assert before == after


@torch.no_grad()
def test_gradients_reach_every_factor(student, stock):
    """And the loss is the stock model's, the auxiliary loss among it where the family has one."""
    model = load_model(student, torch.float32)
    extra = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    expected = stock(TOKENS, labels=TOKENS, **extra)
    with torch.enable_grad():
        found = model(TOKENS, labels=TOKENS, **extra)
        found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_bfloat16_runs(student, stock):
    """Also where the router weighs in float32."""
    found: Tensor = logits(load_model(student, torch.bfloat16), TOKENS)
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), logits(stock, TOKENS)) < 0.2  # some tokens go to other experts


def test_layers_beyond_the_models_are_left_out_aloud(folders, stock, tmp_path, capsys):
    """DeepSeek's layer for multi-token prediction, which transformers' model does not have."""
    source = Checkpoint(folders["hub"])
    last = stock.config.num_hidden_layers
    extra = {f"model.layers.{last}.eh_proj.weight": torch.ones(2), f"model.layers.{last}.mlp.x": torch.ones(2)}
    write_weights(tmp_path, [*((n, source.tensor(n)) for n in source.files), *extra.items()])
    write_config(tmp_path, stock.config)
    assert sources_of(tmp_path).made_by.keys() == sources_of(folders["hub"]).made_by.keys()
    assert "2 tensors of its files are skipped" in (said := capsys.readouterr().err) and said.count("skipped") == 1
