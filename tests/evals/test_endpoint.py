"""`megakd evaluate --endpoint`: the numbers of `megakd evaluate`, and one line for each fault of a server."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoTokenizer

from megakd.models.loading import load_model
from megakd.system.files import read_json_lines
from tests.conftest import in_process
from tests.evals.test_tasks import write_tasks
from tests.serve.servers import SMALL, serving

NAME = "runs/a/export"


class Model:
    """Answers as vLLM does; `answer` may be replaced."""

    def __init__(self, folder):
        self.model = load_model(folder, torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def choice(self, index, prompt):
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        log_p = self.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        chosen = [None, *(log_p[t, i].item() for t, i in enumerate(ids[1:])), log_p[-1].max().item()]
        top = [None, *({"x": row.max().item()} for row in log_p)]
        return {"index": index, "text": "", "logprobs": {"token_logprobs": chosen, "top_logprobs": top}}

    def answer(self, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": NAME, "owned_by": "vllm", "max_model_len": 64}]}
        if path == "/version":
            return 200, {"version": "0.32.0"}
        assert path == "/v1/completions" and body["echo"] and body["model"] == NAME and body["logprobs"] == 1
        return 200, {"choices": [self.choice(i, prompt) for i, prompt in enumerate(body["prompt"])][::-1]}


@contextmanager
def served(answer):
    """The URL of a server whose answers are answer(path, body) -> (status, JSON or text)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            status, found = answer(self.path, json.loads(self.rfile.read(length)) if length else None)
            data = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_):
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def model(prepared):
    return Model(prepared / "student-0")


def line(run, *argv):
    in_process("evaluate", run.folder, *argv)
    return read_json_lines(run.path("evals.jsonl"), "model")[-1]


def test_numbers_are_those_of_the_model_that_is_loaded(sibling, model):
    run = sibling()
    loaded = line(run, "--model", "student-0")
    with served(model.answer) as url:
        found = line(run, "--endpoint", url)
    assert found["endpoint"] == {"url": f"{url}/v1", "model": NAME, "engine": "vLLM 0.32.0"}
    assert found["positions"] == loaded["positions"]
    for name in ("nll", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(loaded[name], rel=1e-5)
    assert "kl" not in found and NAME in found["model"]
    in_process("report", run.folder)
    assert found["model"] in run.path("report.html").read_text()


def test_tasks_are_those_of_the_model_that_is_loaded(sibling, model, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    settings = ("--tasks", "tiny_choice,tiny_last,tiny_rolling", f"eval.task_folder={folder}", "eval.task_batch_size=2")
    run = sibling()
    loaded = line(run, "--model", "student-0", *settings)["tasks"]
    with served(model.answer) as url:
        found = line(run, "--endpoint", f"{url}/v1/", "--endpoint-model", NAME, *settings)["tasks"]
    assert found.keys() == loaded.keys()
    for task, metrics in loaded.items():
        for key, value in metrics.items():
            assert found[task][key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key


def refusal(run, url, *argv):
    said = in_process("evaluate", run.folder, "--endpoint", url, *argv, code=2)
    last = said.splitlines()[-1]
    assert last.startswith("megakd: ") and not run.path("evals.jsonl").exists()
    return last


def without_logprobs(model):
    def answer(path, body):
        status, found = model.answer(path, body)
        return status, {"choices": [{**each, "logprobs": None} for each in found["choices"]]} if body else found

    return answer


def with_one_more(model):
    def answer(path, body):
        status, found = model.answer(path, body)
        for choice in found.get("choices", ()):
            choice["logprobs"]["token_logprobs"].append(-1.0)
        return status, found

    return answer


def with_another_tokenizer(model, change):
    def answer(path, body):
        if body:
            body["prompt"] = [change(each) if isinstance(each, str) else each for each in body["prompt"]]
        return model.answer(path, body)

    return answer


def refusing(model, status, text):
    return lambda path, body: (status, text) if body else model.answer(path, body)


@pytest.mark.parametrize(
    "made, words",
    [
        (without_logprobs, "gives no log-probabilities of prompts (echo, logprobs), as vLLM gives them"),
        (with_one_more, "log-probabilities for the"),
        (lambda m: with_another_tokenizer(m, lambda text: text[: len(text) // 2]), "another tokenizer than the run's"),
        (lambda m: with_another_tokenizer(m, lambda text: m.tokenizer(text[::-1])["input_ids"]), "another tokenizer"),
        (lambda m: refusing(m, 400, '{"detail": "prompt must be a string."}'), 'refuses (400): {"detail": "prompt'),
        (lambda m: refusing(m, 200, "<html>"), "the answer is no JSON"),
        (lambda m: lambda path, body: (404, "no"), "the server refuses (404): no"),
        (lambda m: lambda path, body: (200, {"models": []}), "/v1/models is no list of models"),
        (lambda m: lambda path, body: (200, {"data": [{"id": "a"}, {"id": "b"}]}), "lists 2 models: a, b; give --end"),
    ],
)
def test_fault_of_a_server_is_one_line(sibling, model, made, words):
    with served(made(model)) as url:
        assert words in refusal(sibling(), url)


def test_model_or_server_that_is_not_there_is_one_line(sibling, model):
    run = sibling()
    with served(model.answer) as url:
        said = refusal(run, url, "--endpoint-model", "other")
        assert f"has no model 'other'; --endpoint-model may be {NAME}" in said
    assert "no server answers" in refusal(run, url)
    assert "is no address of a server; write http://" in refusal(run, "localhost:8000")
    for argv in (("--model", "teacher", "--endpoint", url), ("--endpoint-model", "a")):
        assert "--endpoint" in in_process("evaluate", run.folder, *argv, code=2)


@pytest.mark.vllm
def test_vllm_gives_the_perplexity_of_the_model_that_is_loaded(vllm_python, tmp_path):
    run = tmp_path / "run"
    small = ["data.tokens=4096", "data.holdout_tokens=2000", "data.sequence_length=32"]
    in_process("new", run, "--from", "demo", "compress.calibration_tokens=0", "model.dtype=float32", *small)
    for verb in ("compress", "tokenize", "generate-logits", "export"):
        in_process(verb, run)
    in_process("evaluate", run, "--model", run / "export")
    with serving(tmp_path, run, "--python", vllm_python, further=SMALL) as url:
        in_process("evaluate", run, "--endpoint", url)
    loaded, found = read_json_lines(run / "evals.jsonl", "model")
    assert found["positions"] == loaded["positions"]
    assert found["perplexity"] == pytest.approx(loaded["perplexity"], rel=1e-3)
