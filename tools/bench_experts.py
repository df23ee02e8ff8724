"""A layer of experts at Qwen3-30B-A3B's sizes: shared core and wrappers against the naive form and dense experts."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_rows import Row
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from megakd.models.shared_core import PROJECTIONS, SharedCoreExperts

HIDDEN, EXPERT_HIDDEN, EXPERTS, ACTIVE = 2048, 768, 128, 8


class SharedCore(nn.Module):
    """The layer's experts as MegaKD runs them: the core once a token."""

    def __init__(self, rank: int):
        super().__init__()
        self.wrappers = SharedCoreExperts(EXPERTS, HIDDEN, EXPERT_HIDDEN, rank, nn.functional.silu)
        shapes = {p: (HIDDEN, EXPERT_HIDDEN) if p == "down" else (EXPERT_HIDDEN, HIDDEN) for p in PROJECTIONS}
        self.core = nn.ParameterDict({p: torch.randn(s) * s[1] ** -0.5 for p, s in shapes.items()})
        for name, factor in self.wrappers.named_parameters():
            nn.init.normal_(factor, std=0.05 if name.endswith("_left") else factor.shape[1] ** -0.5)

    def forward(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
        gate_NF, up_NF = x_ND @ self.core["gate"].T, x_ND @ self.core["up"].T
        inner_NF, outer_ND = self.wrappers(x_ND, gate_NF, up_NF, expert_NA, weight_NA)
        return outer_ND + inner_NF @ self.core["down"].T


class Naive(nn.Module):
    """The same function as its formula reads: every routed row goes through wrapper, core, wrapper; rows by expert."""

    def __init__(self, shared: SharedCore):
        super().__init__()
        self.shared = shared

    def forward(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
        core, out_ND = self.shared.core, torch.zeros_like(x_ND)
        factors = {
            name: factor.unbind() for name, factor in self.shared.wrappers.named_parameters()
        }  # an index's gradient would be a whole stack

        def pair(wrapper: str, projection: str, expert: int) -> tuple[Tensor, Tensor]:
            left, right = (f"{wrapper}_wrapper_{projection}_{side}" for side in ("left", "right"))
            return factors[left][expert], factors[right][expert]

        def gate_or_up(projection: str, expert: int, x: Tensor) -> Tensor:
            (q, v), (u, s) = pair("input", projection, expert), pair("output", projection, expert)
            y = x @ core[projection].T
            return y + (y @ s) @ u.T + (x @ v) @ q.T

        for expert in range(EXPERTS):
            token, place = torch.where(expert_NA == expert)
            if len(token):
                x = x_ND[token]
                h = nn.functional.silu(gate_or_up("gate", expert, x)) * gate_or_up("up", expert, x)
                (u, v), (u_out, p) = pair("input", "down", expert), pair("output", "down", expert)
                y = (h + (h @ v) @ u.T) @ core["down"].T + (h @ p) @ u_out.T
                out_ND = out_ND.index_add(0, token, y * weight_NA[token, place, None])
        return out_ND


def dense(implementation: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """transformers' own experts of the same sizes, by its loop (eager) or its grouped kernels (grouped_mm)."""
    config: Any = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=EXPERT_HIDDEN, num_experts=EXPERTS, num_experts_per_tok=ACTIVE
    )
    config._experts_implementation = implementation
    experts = Qwen3MoeExperts(config)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
    return experts


def bench_experts(quick: bool) -> list[Row]:
    """Medians of ratios over rounds in which all forms take turns."""
    torch.manual_seed(0)
    ranks, sizes, rounds = ([64], [256], 2) if quick else ([16, 64, 128], [256, 1024], 5)
    rows = []
    eager, grouped = dense("eager"), dense("grouped_mm")
    for rank in ranks:
        shared = SharedCore(rank)
        forms = {"megakd": shared, "naive": Naive(shared), "dense": eager, "dense_grouped_mm": grouped}
        for tokens in sizes:
            x = torch.randn(tokens, HIDDEN)
            weight, expert = torch.rand(tokens, EXPERTS).softmax(-1).topk(ACTIVE)
            with torch.no_grad():
                found, expected = (forms[name](x, expert, weight) for name in ("megakd", "naive"))
            case = f"R {rank}, {tokens} tokens"
            difference = (found - expected).abs().max() / expected.abs().max()
            rows.append(Row("experts", case, "max_rel_diff", difference.item(), "of the largest"))
            for passes, action in (("forward", forward), ("forward_backward", forward_backward)):
                # the loop of "dense" takes minutes backward: each expert's gradient is that of the whole stack
                timed = [name for name in forms if action is forward or name != "dense"]
                taken: dict[str, list[float]] = {name: [] for name in timed}
                for turn in range(1 + rounds):
                    for name in timed:
                        start = time.perf_counter()
                        action(forms[name], x, expert, weight)
                        if turn:  # the first is a warm-up
                            taken[name].append(time.perf_counter() - start)
                rows += speeds(case, passes, {name: np.array(each) for name, each in taken.items()})
    return rows


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
    """Gradients of all parameters and of the input, which are let go at once."""
    x = x.detach().requires_grad_()
    torch.autograd.grad(form(x, expert, weight).square().sum(), [x, *form.parameters()])
