import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from megakd.models.hub import Checkpoint, load_config, write_config, write_weights
from megakd.models.shared_core import PROJECTIONS, Form, make_form
from megakd.models.student import stock_config
from megakd.report.model_card import CARD, license_of, model_card, write_card
from tests.models.students import make_model, make_student

FORMS = {"gate": Form("wrappers", 3, 2), "up": Form("wrappers", 5, 2), "down": make_form("basis", "down", 0, 9)}
ROW = {
    "tokens": 0,
    "perplexity": 9.5,
    "bits_per_byte": 0.91234,
    "kl": 0.5,
    "top1": 0.5,
    "topk": 0.25,
    "positions": 1234,
}
EVALS = [
    {**ROW, "model": "teacher"},
    {**ROW, "model": "student-0", "perplexity": 77.0},
    {**ROW, "model": "all/step-000010", "perplexity": 1e9},
    {**ROW, "model": "all/step-000010", "perplexity": 12.3456, "tokens": 5000},
    {**ROW, "model": "all/step-000020", "perplexity": 555.0},
]


def report(teacher: str, weighted: bool = False) -> dict[str, Any]:
    parts = []
    for layer in range(2):
        for number, projection in enumerate(PROJECTIONS):
            errors = [0.1 * (number + 1), 0.1, 0.1, 0.1 + 0.2 * layer]
            parts.append({"layer": layer, "projection": projection, "errors": errors})
            if weighted:
                parts[-1]["weighted_errors"] = [error / 10 for error in errors]
    return {"teacher": {"id": teacher}, "expert_parameters": 123456, "parts": parts}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("card")
    make_model("qwen3_moe").save_pretrained(place / "stock")
    return make_student(place / "stock", place / "student", FORMS, {1: (2, 0)})


def test_a_card_holds_what_was_measured(folder):
    text = model_card(folder, "tiny", report("Qwen/Qwen3-30B-A3B"), EVALS, "all/step-000010", {"license": "apache-2.0"})
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "Qwen/Qwen3-30B-A3B" and data["license"] == "apache-2.0"
    assert {"custom_code", "mixture-of-experts"} <= set(data["tags"])
    assert "# tiny" in text and "2 of 2 layers" in text and "2 experts are kept" in text
    assert "`basis` of rank 9, `wrappers` of ranks 3 – 5 (input) and 2 (output)" in text
    stored = Checkpoint(folder)
    parameters = sum(stored.tensor(name).numel() for name in stored.files)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert f"{parameters:,}" in text and f"{size:,}" in text and "123,456" in text and "float32" in text
    assert "| teacher | 0 | 9.500 | 0.9123 | 0.5000 | 50.0% | 25.0% |" in text
    assert "| student before training | 0 | 77.000 |" in text and "| **this model** | 5,000 | 12.346 |" in text
    assert "555" not in text and "1,234 held-out tokens" in text
    assert "| gate_proj | 0.1250 | 0.3000 (layer 1, expert 3) |" in text
    assert "| down_proj | 0.1750 | 0.3000 (layer 0, expert 0) |" in text
    assert "import megakd\nfrom transformers" in text and "trust_remote_code=True" in text and "--dense" in text


def test_attention_is_in_a_card_where_it_was_measured(folder):
    measured = [*EVALS[:2], {**EVALS[3], "attention": 0.71875}]
    text = model_card(folder, "tiny", None, measured, "all/step-000010")
    assert "| top-k | attention |" in text and "| 12.346 | 0.9123 | 0.5000 | 50.0% | 25.0% | 0.7188 |" in text
    assert "| 25.0% | - |" in text and "Attention: overlap" in text
    assert "ttention" not in model_card(folder, "tiny", None, EVALS, "all/step-000010").split("## Quality")[1]


def test_what_is_not_finite_is_a_dash_in_a_card(folder):
    broken = {**EVALS[1], "perplexity": None, "kl": None, "failed": {"perplexity": "infinite"}}
    text = model_card(folder, "tiny", None, [broken, EVALS[3]], "all/step-000010")
    assert (
        "| student before training | 0 | - | 0.9123 | - | 50.0% |" in text and "-: not measured, or not finite" in text
    )


def test_errors_of_outputs_where_there_are(folder):
    text = model_card(folder, "tiny", report("a/b", weighted=True), EVALS, "student-0")
    assert "| gate_proj | 0.1250 | 0.3000 (layer 1, expert 3) | 0.0125 | 0.0300 (layer 1, expert 3) |" in text
    assert "| **this model** | 0 | 77.000 |" in text and "student before" not in text


@pytest.mark.parametrize("teacher", ["/home/somebody/models/qwen", "demo", "./models/qwen", "../a/b", "a/b/c"])
def test_nothing_that_was_not_measured_and_no_path_is_in_a_card(folder, teacher):
    text = model_card(folder, "tiny", report(teacher), [], "student-0")
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and "license" not in data
    assert teacher not in text.replace("--dense", "") and str(folder) not in text
    assert "This model was not evaluated." in text and "perplexity" not in text


@pytest.mark.parametrize("compressed", [True, False])
def test_stock_models(folder, compressed, tmp_path):
    """An expanded student, and one that never was compressed."""
    config = stock_config(load_config(folder))
    write_config(tmp_path, config)
    write_weights(tmp_path, [("x", torch.zeros(3, 5))])
    text = model_card(tmp_path, "tiny", report("a/b") if compressed else None, EVALS, "student-0")
    assert "custom_code" not in ModelCard(text).data.to_dict()["tags"]
    assert "`Qwen3MoeForCausalLM`" in text and "| 15 |" in text and "import megakd" not in text
    assert ("multiplied out again" in text) == compressed == ("## Error of compressing" in text)
    assert ("before the experts were multiplied out" in text) == compressed


def test_python_of_a_card_runs(folder, monkeypatch):
    text = model_card(folder, "tiny", report("a/b"), [])
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done: dict[str, Any] = {"AutoModelForCausalLM": AutoModelForCausalLM}
    for code in (re.sub(r"tokenizer = .*", "", each) for each in (first, second)):
        exec(code.replace("path/to/this/folder", str(folder)), done)
        assert type(done["model"]).__name__ == "SharedCoreQwen3MoeForCausalLM"


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ('---\r\ntags:\r\n- a\r\nlicense: "mit" \r\n---\r\ntext', {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://example.org/a#b\n---",
            {"license": "other", "license_name": "own", "license_link": "https://example.org/a#b"},
        ),
        ("license: mit\n", {}),
        ("---\ntags:\n- license: x\n---\nlicense: mit", {}),
        (None, {}),
    ],
)
def test_license_of_a_folder(card, expected, tmp_path):
    if card is not None:
        (tmp_path / CARD).write_text(card)
    assert license_of(tmp_path) == expected


def test_the_license_goes_from_card_to_card(folder, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / CARD).write_text("---\nlicense: other\nlicense_name: own\n---\n")
    places = (tmp_path / "nothing", tmp_path / "teacher")
    write_card(folder, "tiny", report("a/b"), license_from=places)
    assert license_of(folder) == license_of(tmp_path / "teacher") == {"license": "other", "license_name": "own"}
    assert ModelCard.load(folder / CARD).data.to_dict()["license_name"] == "own"
