"""What tests of serving share: students of all forms, what transformers answers, and what vLLM does."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megakd.models.hub import write_config, write_weights
from megakd.models.shared_core import PROJECTIONS, Form, make_form
from megakd.models.spec import spec_for
from megakd.models.student import student_config
from tests.models.families import small_model

CHECKOUT = Path(__file__).parents[2]
HEADS_OF_32 = {"hidden_size": 128, "num_hidden_layers": 5}  # vLLM's attention for CPUs has no heads of 16 numbers
TOKENS = 12  # generated for each prompt
TOLERANCE = 2e-5  # of log-probabilities in float32
# a layer each; several forms in one layer, two groups, and a layer left stock
FORMS: list[dict[str, Form] | None] = [
    {p: make_form("wrappers", p, 4, 3) for p in PROJECTIONS},
    {**{p: make_form("additive", p, 5, 0) for p in PROJECTIONS}, "down": make_form("mixture", "down", 0, 20, 2)},
    None,
    {
        "gate": make_form("basis", "gate", 0, 24, 2),
        "up": make_form("mixture", "up", 0, 24, 3),
        "down": make_form("basis", "down", 0, 16, 2),
    },
]
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(CHECKOUT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def student_of_all_forms(family: str, folder: Path, **changes: Any) -> Path:
    """A student's folder with random weights; its layers take turns through FORMS, two keep experts dense."""
    teacher = small_model(family, **HEADS_OF_32 | changes).config
    spec = spec_for(teacher, family)
    forms = {layer: found for i, layer in enumerate(spec.layers) if (found := FORMS[i % len(FORMS)])}
    kept = dict(zip(forms, ((1, 3), (2,)), strict=False))
    torch.manual_seed(1)
    student = AutoModelForCausalLM.from_config(student_config(teacher, forms, kept)).float()
    with torch.no_grad():
        for name, tensor in (*student.named_parameters(), *student.named_buffers()):
            if "basis_group" in name:
                tensor.copy_(torch.tensor([1, 0, 0, 1]))
            elif tensor.is_floating_point() and "inv_freq" not in name:
                tensor.normal_(mean=float("norm" in name), std=0.1)
    student.config.dtype = torch.float32
    write_weights(folder, student.state_dict().items())
    write_config(folder, student.config)
    return folder


def prompts(vocabulary: int) -> list[list[int]]:
    """Eight prompts of random tokens, from 3 to 40 long."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in (3, 5, 9, 14, 20, 27, 33, 40)]


@torch.no_grad()
def expected(folder: Path, asked: list[list[int]]) -> list[dict[str, Any]]:
    """What transformers answers: the whole sequence again for each token, without a cache."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logprobs(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits[0].log_softmax(-1)

    rows = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            ids = torch.cat([ids, logprobs(ids)[None, -1:].argmax(-1)], dim=1)
        chosen = logprobs(ids)[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        cut = len(prompt) - 1
        rows.append({"tokens": ids[0, cut + 1 :].tolist(), "logprobs": chosen[cut:], "prompt_logprobs": chosen[:cut]})
    return rows


def answers(python: Path, folder: Path, asked: list[list[int]], work: Path, **options: Any) -> list[dict[str, Any]]:
    """What vLLM answers (tests/serve/answers.py); options: of vllm.LLM."""
    ranks = options.get("tensor_parallel_size", 1)
    return ask(python, {"prompts": asked, "tokens": TOKENS, "options": options_of(folder, **options)}, work, ranks)


def refusals(python: Path, models: list[dict[str, Any]], work: Path, **settings: str) -> list[list[str] | None]:
    """The exception, (class, message), that each vllm.LLM(**options) raises; settings: of the environment."""
    return ask(python, {"refused": models}, work, 1, **settings)


def options_of(folder: Path, **options: Any) -> dict[str, Any]:
    """Options of vllm.LLM for a student on this machine's CPUs."""
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.15,
        "max_model_len": 64,
        "distributed_executor_backend": "uni" if options.get("tensor_parallel_size", 1) == 1 else "mp",
    } | options


def ask(python: Path, request: dict[str, Any], work: Path, ranks: int, **settings: str) -> Any:
    """What tests/serve/answers.py writes; several ranks need processes of their own."""
    (work / "request.json").write_text(json.dumps(request))
    script = [python, CHECKOUT / "tests/serve/answers.py", work / "request.json", work / "answers.json"]
    env = {**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 1)), **settings}
    with shared_memory_removed():
        done = subprocess.run([*map(str, script)], capture_output=True, text=True, cwd=work, env=env, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((work / "answers.json").read_text())


@contextmanager
def shared_memory_removed() -> Iterator[None]:
    """Removes what vLLM leaves: 4 MiB for each of its ranks on CPUs, which the engine kills at its end."""
    folder = Path("/dev/shm")
    before = set(folder.glob("vllm_dist_*"))
    try:
        yield
    finally:
        for path in set(folder.glob("vllm_dist_*")) - before:
            path.unlink(missing_ok=True)


def assert_same(served: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """The same tokens for every prompt, and log-probabilities within TOLERANCE."""
    assert [row["tokens"] for row in served] == [row["tokens"] for row in reference]
    for kind in ("prompt_logprobs", "logprobs"):
        pairs = zip(served, reference, strict=True)
        worst = max(abs(a - b) for x, y in pairs for a, b in zip(x[kind], y[kind], strict=True))
        assert worst <= TOLERANCE, (kind, worst)
