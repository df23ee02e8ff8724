"""A layer of experts at Qwen3-30B-A3B's sizes: shared core and wrappers against the naive form and dense experts."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bench.rows import Row
from megakd.models.shared_core import PROJECTIONS, Form, SharedCoreExperts, core_shape

HIDDEN, EXPERT_HIDDEN, EXPERTS, ACTIVE = 2048, 768, 128, 8


class SharedCore(nn.Module):
    """The layer's experts as MegaKD runs them: the core once a token."""

    def __init__(self, rank: int):
        super().__init__()
        forms = {p: Form("wrappers", rank, rank) for p in PROJECTIONS}
        shapes = {p: core_shape(form, p, HIDDEN, EXPERT_HIDDEN) for p, form in forms.items()}
        self.core = nn.ModuleDict({f"{p}_proj": nn.Linear(i, o, bias=False) for p, (o, i) in shapes.items()})
        self.wrappers = SharedCoreExperts(EXPERTS, HIDDEN, EXPERT_HIDDEN, forms, nn.functional.silu, self.core)
        for weight in self.core.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for name, factor in self.wrappers.named_parameters():
            nn.init.normal_(factor, std=0.05 if name.endswith("_left") else factor.shape[1] ** -0.5)

    def forward(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
        return self.wrappers(x_ND, expert_NA, weight_NA)


class Naive(nn.Module):
    """The same function as its formula reads: every routed row goes through wrapper, core, wrapper; rows by expert."""

    def __init__(self, shared: SharedCore):
        super().__init__()
        self.shared = shared

    def forward(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
        core = {p: self.shared.get_parameter(f"core.{p}_proj.weight") for p in PROJECTIONS}
        out_ND = torch.zeros_like(x_ND)
        factors = {
            name: factor.unbind() for name, factor in self.shared.wrappers.named_parameters()
        }  # an index's gradient would be a whole stack

        def pair(wrapper: str, projection: str, expert: int) -> tuple[Tensor, Tensor]:
            left, right = (f"{wrapper}_wrapper_{projection}_{side}" for side in ("left", "right"))
            return factors[left][expert], factors[right][expert]

        def gate_or_up(projection: str, expert: int, x: Tensor) -> Tensor:
            (q, v), (u, s) = pair("input", projection, expert), pair("output", projection, expert)
            y = x @ core[projection].T
            return y + (y @ s) @ u + (x @ v) @ q

        for expert in range(EXPERTS):
            token, place = torch.where(expert_NA == expert)
            if len(token):
                x = x_ND[token]
                h = nn.functional.silu(gate_or_up("gate", expert, x)) * gate_or_up("up", expert, x)
                (u, v), (u_out, p) = pair("input", "down", expert), pair("output", "down", expert)
                y = (h + (h @ v) @ u) @ core["down"].T + (h @ p) @ u_out
                out_ND = out_ND.index_add(0, token, y * weight_NA[token, place, None])
        return out_ND


def dense(implementation: str) -> nn.Module:
    """transformers' own experts of the same sizes, by its loop (eager) or its grouped kernels (grouped_mm)."""
    config: Any = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=EXPERT_HIDDEN, num_experts=EXPERTS, num_experts_per_tok=ACTIVE
    )
    config._experts_implementation = implementation
    experts = Qwen3MoeExperts(config)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
    return experts


def bench_experts(quick: bool, device: str = "cpu") -> list[Row]:
    """Medians of ratios over rounds in which all forms take turns; float32 on a CPU, bfloat16 on a GPU."""
    torch.manual_seed(0)
    gpu = device != "cpu"
    ranks, sizes, rounds = ([64], [256], 2) if quick else ([16, 64, 128], [1, 64, 4096] if gpu else [256, 1024], 5)
    dtype, rounds = (torch.bfloat16, 4 * rounds) if gpu else (torch.float32, rounds)
    rows = []
    eager, grouped = (dense(kind).to(device, dtype) for kind in ("eager", "grouped_mm"))
    for rank in ranks:
        shared = SharedCore(rank).to(device, dtype)
        forms = {"megakd": shared, "naive": Naive(shared), "dense": eager, "dense_grouped_mm": grouped}
        for tokens in sizes:
            x = torch.randn(tokens, HIDDEN).to(device, dtype)
            weight, expert = (part.to(device) for part in torch.rand(tokens, EXPERTS).softmax(-1).topk(ACTIVE))
            weight = weight.to(dtype)
            with torch.no_grad():
                found, expected = (forms[name](x, expert, weight).float() for name in ("megakd", "naive"))
            case = f"R {rank}, {tokens} tokens"
            difference = (found - expected).abs().max() / expected.abs().max()
            rows.append(Row("experts", case, "max_rel_diff", difference.item(), "of the largest"))
            for passes, action in (("forward", forward), ("forward_backward", forward_backward)):
                # the loop of "dense" takes minutes backward: each expert's gradient is that of the whole stack
                timed = [name for name in forms if action is forward or name != "dense"]
                taken: dict[str, list[float]] = {name: [] for name in timed}
                for turn in range(1 + rounds):
                    for name in timed:
                        seconds = clocked(gpu, action, forms[name], x, expert, weight)
                        if turn:  # the first is a warm-up
                            taken[name].append(seconds)
                rows += speeds(case, passes, {name: np.array(each) for name, each in taken.items()})
    return rows


def clocked(gpu: bool, action: Callable[..., None], *arguments: Any) -> float:
    """Seconds that an action takes, with all that it started on the device."""
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    action(*arguments)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speeds(case: str, passes: str, taken: dict[str, np.ndarray]) -> list[Row]:
    own, suffix = taken["megakd"], "" if passes == "forward" else f"_{passes}"
    rows = [Row("experts", case, f"milliseconds{suffix}", float(np.median(own)) * 1e3, "ms")]
    for name, each in taken.items():
        if name != "megakd":
            rows.append(Row("experts", case, f"speedup_vs_{name}{suffix}", float(np.median(each / own)), "x"))
    return rows


def forward(form: Callable[..., Tensor], x: Tensor, expert: Tensor, weight: Tensor) -> None:
    with torch.no_grad():
        form(x, expert, weight)


def forward_backward(form: Any, x: Tensor, expert: Tensor, weight: Tensor) -> None:
    """Gradients of all parameters and of the input, which are freed at once."""
    x = x.detach().requires_grad_()
    torch.autograd.grad(form(x, expert, weight).square().sum(), [x, *form.parameters()])
