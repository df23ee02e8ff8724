"""The text part of a model for images: read from its checkpoint, compressed to a student of the text family."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megakd.commands import compress
from megakd.errors import UserError
from megakd.identity import WEIGHTS
from megakd.models.hub import load_config
from megakd.models.loading import load_model
from megakd.models.spec import spec_for
from megakd.models.student import student_class
from megakd.run import Run
from megakd.system.files import read_json
from tests.models.families import SMALL, small_model
from tests.models.quantizing import fp8, quantize
from tests.models.students import logits, relative

TOKENS = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}


def model_for_images(family: str, **fields: Any) -> Any:
    ids = {f"{each}_token_id": 3 + i for i, each in enumerate(("image", "video", "vision_start", "vision_end"))}
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**ids, **fields)).float().eval()


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory) -> Path:
    """qwen3_5_moe as hubs have it: experts stacked, an image tower, and tensors for multi-token prediction."""
    folder = tmp_path_factory.mktemp("whole")
    text = small_model("qwen3_5_moe_text", vocab_size=400)
    made = model_for_images("qwen3_5_moe", text_config=text.config.to_dict(), vision_config=VISION)
    made.save_pretrained(folder)
    tensors = {n: t for n, t in load_file(folder / WEIGHTS).items() if ".experts." not in n}
    for name, tensor in text.state_dict().items():
        if name.startswith("model."):  # norms and biases that are not the initial ones, experts in stacks
            tensors[name.replace("model.", "model.language_model.", 1)] = tensor.clone()
    tensors |= {"lm_head.weight": text.lm_head.weight.detach().clone()}
    tensors |= {"mtp.fc.weight": torch.ones(2), "mtp.layers.0.mlp.gate.weight": torch.ones(2)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def test_it_is_the_text_family(whole):
    config = load_config(whole)
    assert config.model_type == "qwen3_5_moe_text" and spec_for(config, "here").layers == (0, 1, 2, 3)
    model, text = (load_model(folder, torch.float32) for folder in (whole, whole / "text"))
    assert relative(logits(model, TOKENS), logits(text, TOKENS)) <= 1e-6


@pytest.mark.filterwarnings("ignore")
def test_a_student_of_it_answers_as_its_text_part(whole, recipe, tmp_path, capsys):
    run = Run.create(recipe, [f"model.teacher={whole}", "compress.rank=32"], tmp_path / "run")
    compress.main(run, Namespace())
    said = capsys.readouterr().err
    assert "of model.visual" in said and "2 of mtp" in said
    folder = run.path("student-0")
    student = load_model(folder, torch.float32)
    assert type(student) is student_class("qwen3_5_moe_text")
    assert relative(logits(student, TOKENS), logits(load_model(whole / "text", torch.float32), TOKENS)) <= 1e-5
    assert "vision_config" not in read_json(folder / "config.json")
    assert not (folder / "preprocessor_config.json").exists()


def test_it_is_read_in_fp8_too(whole, tmp_path):
    """Whose quantization_config is that of the whole model."""
    quantize(whole, tmp_path / "quantized", tmp_path / "twin", fp8((16, 16)), ("lm_head", "mtp", "visual", "conv1d"))
    one, two = (load_model(tmp_path / name, torch.bfloat16) for name in ("quantized", "twin"))
    assert torch.equal(logits(one, TOKENS), logits(two, TOKENS)) and not hasattr(one.config, "quantization_config")


@pytest.mark.parametrize("family, message", [("gemma4", "gemma4 keeps experts in"), ("glm4v_moe", "config.json")])
def test_others_are_refused_by_name(family, message, tmp_path):
    """Where transformers has no causal LM of the text part alone."""
    fields = {name: value for name, value in SMALL.items() if name != "num_layers"}
    config = CONFIG_MAPPING[family](text_config=fields)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}.*{message}"):
        spec_for(load_config(tmp_path), str(tmp_path))
