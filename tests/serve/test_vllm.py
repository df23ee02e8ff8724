"""Exports in vLLM: the tokens and log-probabilities of transformers, and no answers where they would be wrong.

vLLM has an environment of its own (tools/make/vllm_env.sh DIR); MEGAKD_VLLM_PYTHON=DIR/bin/python names it.
"""

import re

import pytest
from transformers import AutoTokenizer

from megakd.system.files import read_json, write_json
from megakd.system.launcher import free_port
from tests.conftest import in_process
from tests.serve.servers import SMALL, post, started
from tests.serve.serving import (
    TOKENS,
    answers,
    ask,
    assert_same,
    expected,
    options_of,
    prompts,
    refusals,
    student_of_all_forms,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def demo_export(tmp_path_factory):
    run = tmp_path_factory.mktemp("demo") / "run"
    in_process("new", run, "--from", "demo", "compress.calibration_tokens=0")
    in_process("compress", run)
    in_process("export", run)
    return run / "export"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_all_forms_answer_as_in_transformers(vllm_python, tmp_path, family):
    """Wrappers, additive, two bases, mixtures, experts kept dense, and a stock layer in one model."""
    folder, asked = student_of_all_forms(family, tmp_path / "student"), prompts(128)
    assert_same(answers(vllm_python, folder, asked, tmp_path), expected(folder, asked))


def test_all_forms_answer_alike_under_torch_compile(vllm_python, tmp_path):
    folder, asked = student_of_all_forms("qwen3_moe", tmp_path / "student"), prompts(128)
    assert_same(answers(vllm_python, folder, asked, tmp_path, enforce_eager=False), expected(folder, asked))


def test_all_forms_answer_alike_with_experts_on_two_ranks(vllm_python, tmp_path):
    folder, asked = student_of_all_forms("qwen3_moe", tmp_path / "student"), prompts(128)
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert_same(answers(vllm_python, folder, asked, tmp_path, **ranks), expected(folder, asked))


def test_exported_student_of_the_demo_answers_as_in_transformers(vllm_python, demo_export, tmp_path):
    asked = prompts(2048)
    assert_same(answers(vllm_python, demo_export, asked, tmp_path), expected(demo_export, asked))


def test_a_student_in_few_bits_answers_as_in_transformers(vllm_python, demo_export, tmp_path):
    in_process("export", demo_export.parent, "--quantize", "core=int4,factors=int8,linear=fp8")
    folder, asked = demo_export.parent / "export-core=int4,factors=int8,linear=fp8", prompts(2048)
    found = expected(folder, asked)
    assert found != expected(demo_export, asked)
    assert_same(answers(vllm_python, folder, asked, tmp_path), found)


@pytest.mark.parametrize("method", ["prune", "merge"])
def test_exported_student_of_stock_shape_answers_as_in_transformers(vllm_python, tmp_path, method):
    """It needs no plugin."""
    run = tmp_path / "run"
    settings = [f"compress.method={method}", "compress.budget=0.7", "compress.calibration_tokens=2048"]
    in_process("new", run, "--from", "demo", *settings)
    in_process("tokenize", run)
    in_process("compress", run)
    in_process("export", run)
    request = {"prompts": prompts(2048), "tokens": TOKENS, "options": options_of(run / "export")}
    served = ask(vllm_python, request, tmp_path, 1, VLLM_PLUGINS="")
    assert_same(served, expected(run / "export", request["prompts"]))


def test_what_cannot_be_served_is_refused_in_one_line(vllm_python, tmp_path):
    student = student_of_all_forms("qwen3_moe", tmp_path / "student")
    other = student_of_all_forms("ernie4_5_moe", tmp_path / "other")
    models = [options_of(student, tensor_parallel_size=2), options_of(other)]
    expected_words = [
        f"{student}: --tensor-parallel-size 2 would cut the factors",
        "ernie4_5_moe_shared_core: MegaKD does not serve students of ernie4_5_moe",
    ]
    for raised, words in zip(refusals(vllm_python, models, tmp_path), expected_words, strict=True):
        assert raised is not None and raised[0] == "UserError" and raised[1].startswith(words), raised
        assert len(raised[1].splitlines()) == 1


def test_backend_that_would_replace_the_experts_refuses_students(vllm_python, tmp_path):
    """vLLM's backend for transformers models takes factors for dense experts' matrices: wrong tokens, no error.

    Of an export, and of one whose config.json gives that backend what exports do not: a class for AutoModel. With the
    plugin and without it. (Without trust_remote_code vLLM loads no class of an export.)
    """
    export, mapped = (student_of_all_forms("qwen3_moe", tmp_path / name) for name in ("export", "mapped"))
    config = read_json(mapped / "config.json")
    assert sorted(config["auto_map"]) == ["AutoConfig", "AutoModelForCausalLM"]
    config["auto_map"]["AutoModel"] = config["auto_map"]["AutoModelForCausalLM"]
    write_json(mapped / "config.json", config)
    no_class = r"Unrecognized configuration class <class '.+'> for this kind of AutoModel"
    our_words = "vLLM's backend for transformers models would take the factors"
    cases = {
        "megakd": [
            (export, "transformers", no_class),
            (mapped, "transformers", "`config_class`.+ not consistent"),
        ],
        "": [(export, "auto", no_class), (mapped, "auto", our_words), (mapped, "transformers", our_words)],
    }
    for plugins, rows in cases.items():
        models = [options_of(folder, trust_remote_code=True, model_impl=choice) for folder, choice, _ in rows]
        raised = refusals(vllm_python, models, tmp_path, VLLM_PLUGINS=plugins)
        for found, (_, _, words) in zip(raised, rows, strict=True):
            assert found is not None and found[0] == "ValueError" and re.search(words, found[1]), (
                plugins,
                words,
                found,
            )


TEXTS = ["Return the", "def", "for i in range(", "Once", "The list of", "x = 1\n", "import os", "if not path:\n    "]


def test_vllm_serve_answers_text_as_transformers(vllm_python, demo_export, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo_export)
    body = {"model": str(demo_export), "prompt": TEXTS, "max_tokens": TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    port = free_port()
    line = [vllm_python.parent / "vllm", "serve", demo_export, "--host", "127.0.0.1", "--port", port]
    with started([*map(str, [*line, "--dtype", "float32", *SMALL])], port, tmp_path) as url:
        choices = sorted(post(url, **body)["choices"], key=lambda choice: choice["index"])
    reference = expected(demo_export, [tokenizer(text)["input_ids"] for text in TEXTS])
    assert [choice["token_ids"] for choice in choices] == [row["tokens"] for row in reference]
