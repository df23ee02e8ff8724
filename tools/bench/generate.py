"""transformers' `generate` at batch 1: a compact student by each path of its experts, next to the stock model."""

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from bench.rows import Row
from megakd.models.shared_core import PROJECTIONS, Form
from megakd.models.student import student_config

# the demo's student, and a layer of a real one
SIZES: dict[str, tuple[int, dict[str, int]]] = {
    "D 192, F 192, 2 of 8 experts, R 16": (
        16,
        {"hidden_size": 192, "moe_intermediate_size": 192, "num_experts": 8, "num_experts_per_tok": 2}
        | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32},
    ),
    "D 1024, F 512, 8 of 64 experts, R 32": (
        32,
        {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8}
        | {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
    ),
}
PROMPT = torch.arange(1, 9)[None]
PATHS = ("chosen", "loop", "gathered")  # of the student's experts; chosen: what its rule takes


def bench_generate(quick: bool) -> list[Row]:
    """Medians over rounds in which all models take turns: tokens/s of greedy decoding with a cache, 4 layers."""
    rows = []
    sizes = dict(list(SIZES.items())[:1]) if quick else SIZES
    new, rounds = (8, 2) if quick else (32, 9)
    for case, (rank, fields) in sizes.items():
        for dtype in (torch.float32, torch.bfloat16):
            student, dense = (model.to(dtype) for model in models(rank, fields))
            named = f"{case}, {str(dtype).removeprefix('torch.')}"
            rows.append(Row("generate", named, "max_diff_to_loop", difference(student), "logits"))
            taken: dict[str, list[float]] = {name: [] for name in (*PATHS, "dense")}
            for turn in range(1 + rounds):
                for name in taken:
                    model = dense if name == "dense" else by_path(student, name)
                    seconds = decode(model, new)
                    if turn:  # the first is a warm-up
                        taken[name].append(seconds)
            seconds_of = {name: np.array(each) for name, each in taken.items()}
            rows.append(Row("generate", named, "tokens_per_second", new / np.median(seconds_of["chosen"]), "tokens/s"))
            for name in ("loop", "gathered", "dense"):
                ratio = float(np.median(seconds_of[name] / seconds_of["chosen"]))
                rows.append(Row("generate", named, f"speedup_vs_{name}", ratio, "x"))
    return rows


def models(rank: int, fields: dict[str, Any]) -> tuple[Any, Any]:
    """A student with wrappers of a rank in each of 4 layers, and the stock model of the same sizes; random weights."""
    config: Any = Qwen3MoeConfig(vocab_size=2048, num_hidden_layers=4, norm_topk_prob=True, eos_token_id=None, **fields)
    config.architectures = ["Qwen3MoeForCausalLM"]
    forms = {projection: Form("wrappers", rank, rank) for projection in PROJECTIONS}
    torch.manual_seed(0)
    student, dense = (
        AutoModelForCausalLM.from_config(each).eval()
        for each in (student_config(config, dict.fromkeys(range(4), forms)), config)
    )
    for name, parameter in student.named_parameters():
        if "wrapper" in name:
            torch.nn.init.normal_(parameter, std=0.05 if name.endswith("_left") else parameter.shape[1] ** -0.5)
    return student, dense


def by_path(student: Any, path: str) -> Any:
    """The same student, its experts computed by one path."""
    for layer in student.model.layers:
        layer.mlp.experts.__dict__.pop("factors", None)
        if path != "chosen":
            layer.mlp.experts.factors = getattr(layer.mlp.experts, path)
    return student


@torch.no_grad()
def difference(student: Any) -> float:
    """Largest difference of one token's logits between the path chosen and the loop, of the largest logit."""
    found, expected = (by_path(student, path)(PROMPT[:, :1]).logits.float() for path in ("chosen", "loop"))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def decode(model: Any, new: int) -> float:
    """Seconds that greedy decoding takes, the prompt of 8 tokens among them."""
    start = time.perf_counter()
    length = {"max_new_tokens": new, "min_new_tokens": new}
    model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, pad_token_id=0, **length)
    return time.perf_counter() - start
