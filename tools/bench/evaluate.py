"""Evaluation on a validation set against a plain forward pass of the same model: memory, wall clock, processor time.

`stored logits` is how `megakd evaluate` worked before: logits of the whole batch, copied to the CPU, compared there.
`chunked head` is `evaluate_model`. Weights, tokens and targets are random: what an evaluation takes does not depend on
them. float32 on one core of a CPU, 16 bits on a GPU.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from bench.loss import peak_bytes
from bench.rows import Row
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch, Sample, TeacherTargets
from megakd.evals.holdout import evaluate_model
from megakd.losses.reference import topk_kl

VOCABULARY, TOP_K = 151936, 64


class Case(NamedTuple):
    hidden: int
    layers: int
    heads: int
    windows: int
    length: int


CASES = {
    "D 256, 8 layers, quick": Case(256, 8, 4, 2, 256),
    "SmolLM2-135M with 152k tokens": Case(576, 30, 9, 4, 256),
    "Qwen3-0.6B": Case(1024, 28, 16, 2, 256),
}


class Windows:
    """A validation set in memory with random targets, as `evaluate_model` reads one."""

    folder, layout = "memory", True

    def __init__(self, case: Case):
        self.facts = {"vocab_size": VOCABULARY, "tokens": {"sequence_length": case.length}}
        generator = np.random.default_rng(0)
        self.samples = [random_sample(generator, case.length) for _ in range(case.windows)]

    def length(self, index: int) -> int:
        return len(self[index].tokens) - 1

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def random_sample(generator: np.random.Generator, length: int) -> Sample:
    tokens = generator.integers(VOCABULARY, size=length + 1, dtype=np.int32)
    ids = np.stack([generator.choice(VOCABULARY, TOP_K, replace=False) for _ in range(length)]).astype(np.int32)
    mass = generator.dirichlet(np.ones(TOP_K + 1), length)
    logs, empty, zero = np.log(mass).astype(np.float32), np.zeros((length, 0)), np.zeros(length, np.float32)
    targets = TeacherTargets(
        ids, logs[:, :-1], logs[:, -1:], empty.astype(np.int32), empty.astype(np.float32), zero, zero
    )
    return Sample("sample", tokens, np.zeros(1, np.int32), targets)


def bench_evaluate(quick: bool, device: str = "cpu") -> list[Row]:
    rows = []
    for name, case in CASES.items():
        if name.endswith("quick") == quick:
            rows += measure(name, case, 2 if quick else 3, torch.device(device))
    return rows


def measure(name: str, case: Case, rounds: int, device: torch.device) -> list[Row]:
    """Medians over rounds in which the three forms take turns; ratios are medians of each round's."""
    model, holdout = random_model(case, device), Windows(case)
    batch = collate(holdout.samples, case.length)
    positions = int((batch.labels != IGNORED).sum())
    forms: dict[str, Callable[[], Any]] = {
        "plain forward": lambda: forward(model, batch),
        "stored logits": lambda: stored_sums(forward(model, batch), batch),
        "chunked head": lambda: evaluate_model(model, holdout, 1.0, case.windows, device, "model"),  # type: ignore[arg-type]
    }
    taken: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
    for turn in range(1 + rounds):
        for form, action in forms.items():
            seconds = clocked(action, device)
            if turn:  # the first is a warm-up
                taken[form].append(seconds)
    rows = []
    for form, action in forms.items():
        where, peak = f"{name}, {form}", peak_bytes(action, device.type != "cpu")
        wall, processor = np.median(np.array(taken[form]), 0)
        ratios = np.median(np.array(taken[form]) / np.array(taken["plain forward"]), 0)
        rows += [
            Row("evaluate", where, "seconds", float(wall), "s"),
            Row("evaluate", where, "processor_seconds", float(processor), "s"),
            Row("evaluate", where, "time_over_forward", float(ratios[0]), "x"),
            Row("evaluate", where, "processor_over_forward", float(ratios[1]), "x"),
            Row("evaluate", where, "peak", peak / 1e6, "MB"),
            Row("evaluate", where, "peak_per_position", peak / positions, "B"),
        ]
    return rows


def random_model(case: Case, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=case.hidden, intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers, num_attention_heads=case.heads, num_key_value_heads=max(case.heads // 3, 1)
        if case.heads % 3 == 0 else case.heads // 2, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


@torch.no_grad()
def forward(model: Any, batch: Batch) -> Tensor:
    tokens, positions = (values.to(model.device) for values in (batch.tokens, batch.position_ids))
    return model(tokens, position_ids=positions, use_cache=False).logits


@torch.no_grad()
def stored_sums(logits: Tensor, batch: Batch) -> list[float]:
    """Sums of (NLL, KL, top-1, top-k overlap) over the labelled positions, of all logits, on the CPU."""
    logits, counted, targets = logits[..., :VOCABULARY].cpu(), batch.labels != IGNORED, batch.targets
    assert targets is not None
    logits_NV, labels_N = logits[counted].float(), batch.labels[counted]
    nll = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    ids_NK, logprobs_NK = targets.ids[counted].long(), targets.logprobs[counted]
    kl = topk_kl(logits_NV, ids_NK, logprobs_NK, targets.log_tails[..., 0][counted], 1.0, "ghost").sum()
    mine_NK = logits_NV.topk(ids_NK.shape[-1]).indices
    first_NK = logprobs_NK == logprobs_NK.amax(1, keepdim=True)
    top1 = ((ids_NK == mine_NK[:, :1]) & first_NK).any(1).sum()
    kept_NK = logprobs_NK > -torch.inf
    kept_N1 = kept_NK.sum(1, keepdim=True)
    counted_NK = (torch.arange(ids_NK.shape[1]) < kept_N1).to(logits_NV.dtype)
    among_NK = torch.zeros_like(logits_NV).scatter(1, mine_NK, counted_NK).gather(1, ids_NK)
    overlap = ((among_NK * kept_NK).sum(1) / kept_N1[:, 0]).sum()
    return [float(each) for each in (nll, kl, top1, overlap)]


def clocked(action: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds by the wall clock, and of all cores of this process: others that want them do not count in these."""
    wall, processor = time.perf_counter(), time.process_time()
    kept = action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - wall, time.process_time() - processor
    del kept
    return seconds
