"""What vLLM's plugin says and refuses, without vLLM: the rest is in test_vllm.py."""

import pickle
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megakd.errors import UserError
from megakd.models.student import SUFFIX
from megakd.serve import vllm_plugin
from megakd.serve.vllm_plugin import FAMILIES, Checks, ServedStudents, architecture_of
from tests.serve.serving import CHECKOUT, student_of_all_forms


@pytest.fixture
def known(monkeypatch):
    """transformers' table of configs as `register` leaves it, beside a supported vLLM."""
    monkeypatch.setattr(vllm_plugin, "unsupported_version", lambda: None)
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", ServedStudents(CONFIG_MAPPING._extra_content))


def test_entry_point_names_a_function_of_the_plugin():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["vllm.general_plugins"]["megakd"]
    assert EntryPoint("megakd", named, "vllm.general_plugins").load() is vllm_plugin.register


def test_students_are_read_with_the_model_type_of_their_family(tmp_path, known):
    """vLLM chooses by it; and configs are sent to other processes."""
    for family in FAMILIES:
        folder = student_of_all_forms(family, tmp_path / family)
        config = AutoConfig.from_pretrained(folder)
        assert config.model_type == family and config.architectures == [architecture_of(family)]
        again = pickle.loads(pickle.dumps(config))
        assert type(again) is type(config) and again.forms(0) == config.forms(0) and again.model_type == family


def test_family_without_a_served_class_is_refused_by_name(known):
    with pytest.raises(UserError, match=r"gpt_oss_shared_core: MegaKD does not serve students of gpt_oss .*--dense"):
        CONFIG_MAPPING["gpt_oss" + SUFFIX]


def test_other_models_keep_their_configs(known):
    assert CONFIG_MAPPING["qwen3_moe"].model_type == "qwen3_moe"
    with pytest.raises(KeyError):
        CONFIG_MAPPING["no_model"]


@pytest.mark.parametrize("installed, refused", [("0.32.0+cpu", None), ("0.32.1", None), ("0.33.0", "0.33.0")])
def test_version_of_vllm_is_read(monkeypatch, installed, refused):
    monkeypatch.setattr(vllm_plugin, "version", lambda _: installed)
    assert vllm_plugin.unsupported_version() == refused


def test_unknown_version_of_vllm_is_refused_when_a_student_is_read(known, monkeypatch):
    monkeypatch.setattr(vllm_plugin, "unsupported_version", lambda: "0.33.0")
    with pytest.raises(UserError, match=r"vLLM 0\.33\.0: MegaKD serves students with vLLM 0\.32"):
        CONFIG_MAPPING["qwen3_moe" + SUFFIX]
    assert CONFIG_MAPPING["qwen3_moe"].model_type == "qwen3_moe"


PARALLEL = {
    "tensor_parallel_size": 1,
    "enable_expert_parallel": False,
    "data_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "enable_eplb": False,
}


@pytest.mark.parametrize(
    "changes, others, message",
    [
        ({"tensor_parallel_size": 2}, {}, "--tensor-parallel-size 2 .* add --enable-expert-parallel"),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, {}, None),
        ({"data_parallel_size": 2}, {}, "--data-parallel-size is not supported"),
        ({"pipeline_parallel_size": 2}, {}, "--pipeline-parallel-size is not supported"),
        ({"enable_eplb": True}, {}, "--enable-eplb is not supported"),
        ({}, {"lora_config": object()}, "--enable-lora is not supported"),
        ({}, {"quantization": "fp8"}, "--quantization is not supported"),
        ({}, {"hf_text_config": SimpleNamespace(model_type="olmoe", norm_topk_prob=True)}, "norm_topk_prob"),
        ({}, {}, None),
    ],
)
def test_settings_that_are_not_supported_are_refused(changes, others, message):
    model = {"model": "runs/a/export", "quantization": None, "hf_text_config": SimpleNamespace(model_type="qwen3_moe")}
    model |= {name: value for name, value in others.items() if name in model}
    settings = SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(**PARALLEL | changes),
        lora_config=others.get("lora_config"),
    )
    if message is None:
        Checks.verify_and_update_config(settings)
    else:
        with pytest.raises(UserError, match=f"runs/a/export: .*{message}"):
            Checks.verify_and_update_config(settings)


def test_nothing_imports_vllm_but_what_vllm_loads():
    code = "import sys, megakd.serve.vllm_plugin, megakd.serve.export; print([m for m in sys.modules if 'vllm' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['megakd.serve.vllm_plugin']", done.stderr
