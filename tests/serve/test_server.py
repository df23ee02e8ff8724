"""`megakd serve`: the command that it prints and becomes, what it refuses, and the answers of both servers."""

import socket
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.names import expand
from megakd.serve import server
from megakd.serve.server import PYTHON, server_for
from megakd.system.files import read_json, write_json
from tests.conftest import in_process
from tests.serve.servers import SMALL, post, serving

PROMPT, TOKENS = "Return the", 12


@pytest.fixture(autouse=True)
def stay(monkeypatch):
    """No test becomes a server, which would end its process."""

    def start(self):
        raise AssertionError(f"would become: {self}")

    monkeypatch.setattr(server.Server, "start", start)


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setattr(server, "installed_in", lambda python, named_by: (None, []))


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """A run with a compact and a dense export, of the student that training would begin with."""
    folder = tmp_path_factory.mktemp("served") / "run"
    in_process("new", folder, "--from", prepared)
    in_process("export", folder)
    in_process("export", folder, "--dense")
    return folder


@pytest.fixture
def python(tmp_path):
    """python(version, plugins): an interpreter that says so of its environment."""

    def make(version='"0.32.0"', plugins='["megakd"]') -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\necho '[{version}, {plugins}]'\n")
        path.chmod(0o755)
        return path

    return make


def printed(*argv, code=0):
    return in_process("serve", *argv, *([] if code else ["--print"]), code=code).strip()


def test_vllm_serves_in_the_type_of_the_export(run, python):
    place, options = python(), "--host 127.0.0.1 --port 8000 --dtype float32"
    module = f"{place} -m vllm.entrypoints.openai.api_server"
    assert printed(run, "--python", place) == f"{module} --model {run}/export {options}"
    assert printed(run, "--python", place, "--dense") == f"{module} --model {run}/export-dense {options}"


def test_interpreter_of_vllm_is_taken_from_the_environment(run, python, monkeypatch):
    monkeypatch.setenv(PYTHON, str(python()))
    assert printed(run).startswith(f"{python()} -m vllm.")


def test_transformers_serves_where_vllm_is_not(run, no_vllm):
    options = "--host 0.0.0.0 --port 8001 --dtype bfloat16"
    argv = ("--host", "0.0.0.0", "--port", "8001", "--dtype", "bfloat16")
    own = f"{sys.executable} -m megakd.serve.transformers_server serve {run}/export {options}"
    assert printed(run, *argv) == own
    stock = f"{sys.executable} -m transformers.cli.transformers serve {run}/export-dense {options}"
    assert printed(run, "--dense", *argv) == stock
    assert printed(run, "--model", run / "export-dense", *argv) == stock


def test_further_arguments_reach_the_server_unchanged(run, python):
    line = in_process("serve", run, "--python", python(), "--print", "--", "--seed=1", "--x", "a b", "--").strip()
    assert line.endswith("--dtype float32 --seed=1 --x 'a b' --")


def test_what_is_missing_is_named_with_the_command_that_makes_it(prepared, run, no_vllm, tmp_path):
    folder = tmp_path / "run"
    in_process("new", folder, "--from", prepared)
    assert f"{folder}/export: no export here; run: megakd export {folder}\n" in in_process("serve", folder, code=2)
    dense = in_process("serve", folder, "--dense", code=2)
    assert f"{folder}/export-dense: no export here; run: megakd export {folder} --dense\n" in dense
    assert "nowhere: no model here" in printed(run, "--model", tmp_path / "nowhere", code=2)


def test_interpreter_without_vllm_is_refused_by_name(run, python, no_vllm):
    assert "has no vLLM; name an interpreter" in printed(run, "--engine", "vllm", code=2)
    assert f"{python()}: has no vLLM" in printed(run, "--python", python(), code=2)
    refused = printed(run, "--python", python(), "--engine", "transformers", code=2)
    assert "--python: names the interpreter of vLLM" in refused


@pytest.mark.parametrize("program", ["#!/bin/sh\nexit 3\n", "#!/bin/sh\necho no\n", None])
def test_what_is_no_interpreter_is_refused(run, tmp_path, program):
    place = tmp_path / "program"
    if program:
        place.write_text(program)
        place.chmod(0o755)
    assert f"--python: {place} is no Python interpreter" in printed(run, "--python", place, code=2)


@pytest.mark.parametrize(
    "version, plugins, changes, words",
    [
        ('"0.33.1"', '["megakd"]', {}, "vLLM 0.33.1: MegaKD serves students with vLLM 0.32"),
        ('"0.32.0"', "[]", {}, "vLLM needs MegaKD to serve"),
        ('"0.32.0"', '["megakd"]', {"model_type": "gpt_oss_shared_core"}, "does not serve students of gpt_oss"),
        ('"0.32.0"', '["megakd"]', {"model_type": "olmoe_shared_core", "norm_topk_prob": True}, "norm_topk_prob"),
    ],
)
def test_students_that_vllm_would_refuse_are_refused_before_it_starts(
    run, python, tmp_path, version, plugins, changes, words
):
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {**read_json(run / "export/config.json"), **changes})
    line = printed(run, "--model", folder, "--python", python(version, plugins), code=2)
    assert words in line and len(line.splitlines()) == 1
    write_json(folder / "config.json", {"model_type": "qwen3_moe", "dtype": "bfloat16"})  # a stock model is served
    assert "--dtype bfloat16" in printed(run, "--model", folder, "--python", python(version, plugins))


def test_plugin_that_the_environment_leaves_out_is_said(run, python, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS=other: does not name megakd" in printed(run, "--python", python(), code=2)


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "openai"])
def test_missing_library_of_transformers_server_is_named(run, no_vllm, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    line = printed(run, code=2)
    assert f"transformers' server: needs {module}: pip install 'megakd[serve]', or name an interpreter" in line


def test_folder_whose_name_would_be_a_revision_is_refused(tmp_path, no_vllm):
    write_json(tmp_path / "config.json", {})
    (tmp_path / "a@b").symlink_to(tmp_path)
    with pytest.raises(server.UserError, match="behind @ for a revision"):
        server_for(expand(tmp_path / "a@b"), "auto", None, "127.0.0.1", 8000, "auto")


def test_port_in_use_is_refused_before_a_model_is_loaded(run, no_vllm):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port}: [Errno 98]" in printed(run, "--port", port, code=2)
    for port in ("70000", "0"):
        assert f"--port {port}: give one from 1 to 65535" in printed(run, "--port", port, code=2)


def greedy(folder):
    """What transformers goes on with, as text, without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def completion(url, folder):
    answer = post(url, model=str(folder), prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    return answer["choices"][0]["text"]


def test_transformers_server_answers_as_the_exported_student(run, tmp_path):
    with serving(tmp_path, run, "--engine", "transformers") as url:
        assert completion(url, run / "export") == greedy(run / "export")


@pytest.mark.vllm
def test_vllm_answers_as_the_exported_student(vllm_python, tmp_path):
    run = tmp_path / "run"
    in_process("new", run, "--from", "demo", "compress.calibration_tokens=0")
    in_process("compress", run)
    in_process("export", run)
    with serving(tmp_path, run, "--python", vllm_python, further=SMALL) as url:
        assert completion(url, run / "export") == greedy(run / "export")
