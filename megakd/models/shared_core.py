"""The factored expert layer: one dense core a projection, low-rank wrappers an expert.

Every expert matrix is W_e = L_e C + Q_e V_e^T with L_e = I + U_e S_e^T (gate, up), or its mirror
W_e = C (I + U_e V_e^T) + U'_e P_e^T (down): docs/compression.md. The core runs once a token, not once a routed row.

N tokens, D hidden, F expert hidden, E experts, A active experts, P = N*A routed rows, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

PROJECTIONS = ("gate", "up", "down")


def wrapper_shapes(
    projection: str, experts: int, hidden: int, expert_hidden: int, rank: int
) -> dict[str, tuple[int, ...]]:
    """Shapes [E, rows, R] of the four factors of one projection, by parameter name."""
    d, f = hidden, expert_hidden
    # (input left, input right, output left, output right)
    rows = (f, f, d, f) if projection == "down" else (f, d, f, f)
    names = [f"{wrapper}_wrapper_{projection}_{side}" for wrapper in ("input", "output") for side in ("left", "right")]
    return {name: (experts, count, rank) for name, count in zip(names, rows, strict=True)}


class SharedCoreExperts(nn.Module):
    """The wrappers of all experts of one layer. They are direct parameters, so that ZeRO-3 gathers them together."""

    def __init__(self, experts: int, hidden: int, expert_hidden: int, rank: int, act_fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.num_experts = experts
        # a plain function, not a child module: experts without tokens skip it, and ZeRO-3 ends the run when ranks
        # call different numbers of modules
        self.act_fn = act_fn
        for projection in PROJECTIONS:
            for name, shape in wrapper_shapes(projection, experts, hidden, expert_hidden, rank).items():
                # zero left factors: a new layer starts as its core, and gradients reach the left factors at once
                factor = torch.zeros(shape) if name.endswith("_left") else torch.randn(shape) * shape[1] ** -0.5
                self.register_parameter(name, nn.Parameter(factor))

    def forward(
        self, x_ND: Tensor, gate_NF: Tensor, up_NF: Tensor, expert_NA: Tensor, weight_NA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From tokens and core(tokens) to (sum w (I + U V^T) h, sum w U' P^T h), both summed over a token's experts.

        The caller applies the core of down_proj to the first, [N, F], and adds the second, [N, D].
        """
        order_P = torch.argsort(expert_NA.flatten(), stable=True)
        counts = torch.bincount(expert_NA.flatten(), minlength=self.num_experts).tolist()
        tokens = (order_P // expert_NA.shape[1]).split(counts)
        weights = weight_NA.flatten()[order_P, None].split(counts)
        gate_in, gate_out = self._factors("input", "gate"), self._factors("output", "gate")
        up_in, up_out = self._factors("input", "up"), self._factors("output", "up")
        down_in, down_out = self._factors("input", "down"), self._factors("output", "down")
        inner_NF, outer_ND = torch.zeros_like(gate_NF), torch.zeros_like(x_ND)
        # rows are gathered and added up expert by expert, while they are in the cache: [P, D] is never written
        for expert, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
            if len(token) > 0:
                x = x_ND[token]
                gate = _gate_or_up(x, gate_NF[token], gate_in[expert], gate_out[expert])
                up = _gate_or_up(x, up_NF[token], up_in[expert], up_out[expert])
                h = self.act_fn(gate) * up * weight
                (u, v), (u_out, p) = down_in[expert], down_out[expert]
                # under autocast the products are of another type than the sums
                inner_NF.index_add_(0, token, torch.addmm(h, h @ v, u.T).to(inner_NF.dtype))
                outer_ND.index_add_(0, token, ((h @ p) @ u_out.T).to(outer_ND.dtype))
        return inner_NF, outer_ND

    def _factors(self, wrapper: str, projection: str) -> list[tuple[Tensor, Tensor]]:
        """(left, right) of every expert; unbound at once, the gradient of a `left[e]` would be a whole `left`."""
        left, right = (getattr(self, f"{wrapper}_wrapper_{projection}_{side}") for side in ("left", "right"))
        return list(zip(left.unbind(), right.unbind(), strict=True))


def _gate_or_up(x: Tensor, core: Tensor, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor]) -> Tensor:
    """L C x + Q V^T x from core = C x, for one expert's rows."""
    (q, v), (u, s) = inner, outer
    return torch.addmm(torch.addmm(core, core @ s, u.T), x @ v, q.T)


class SharedCoreMoeBlock(nn.Module):
    """A family's MoE block with shared-core experts; the router is the family's own and stays named `gate`."""

    def __init__(self, router: nn.Module, experts: int, hidden: int, expert_hidden: int, rank: int, activation: str):
        super().__init__()
        self.gate = router
        self.shared_core = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, expert_hidden, bias=False),
                "up_proj": nn.Linear(hidden, expert_hidden, bias=False),
                "down_proj": nn.Linear(expert_hidden, hidden, bias=False),
            }
        )
        self.experts = SharedCoreExperts(experts, hidden, expert_hidden, rank, ACT2FN[activation].forward)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weight_NA, expert_NA = self.gate(x_ND)
        core: Any = self.shared_core
        inner_NF, outer_ND = self.experts(x_ND, core["gate_proj"](x_ND), core["up_proj"](x_ND), expert_NA, weight_NA)
        return (core["down_proj"](inner_NF) + outer_ND).view_as(hidden_states)


def dense_weight(tensors: dict[str, Tensor], projection: str, expert: int) -> Tensor:
    """One expert's matrix [d_out, d_in] expanded, in float32 (float64 stays float64).

    tensors: the layer's factors by name (`shared_core.gate_proj.weight`, `experts.input_wrapper_gate_left`, …).
    """

    core = tensors[f"shared_core.{projection}_proj.weight"]
    core = core.to(torch.promote_types(core.dtype, torch.float32))

    def factor(wrapper: str, side: str) -> Tensor:
        return tensors[f"experts.{wrapper}_wrapper_{projection}_{side}"][expert].to(core.dtype)

    inner = factor("input", "left") @ factor("input", "right").T
    outer = factor("output", "left") @ factor("output", "right").T
    # gate, up: L C + Q V^T with outer = U S^T, inner = Q V^T; down: C (I + inner) + outer
    return core + core @ inner + outer if projection == "down" else core + outer @ core + inner


def naive_forward(block: Any, hidden_states: Tensor) -> Tensor:
    """The same function through the expanded matrices, one expert and token at a time: the reference for tests."""
    x_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, weight_NA, expert_NA = block.gate(x_ND)
    tensors = dict(block.named_parameters())
    out = torch.zeros_like(x_ND)
    for token, (weights, experts) in enumerate(zip(weight_NA, expert_NA, strict=True)):
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            gate, up, down = (dense_weight(tensors, p, expert).to(x_ND.dtype) for p in PROJECTIONS)
            out[token] += weight * (down @ (block.experts.act_fn(gate @ x_ND[token]) * (up @ x_ND[token])))
    return out.view_as(hidden_states)
