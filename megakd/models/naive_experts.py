"""Shared-core experts through expanded matrices, one routed row at a time: the slow, obvious reference.

N tokens, D hidden, A active experts.
"""

from typing import Any

import torch
from torch import Tensor

from megakd.models.shared_core import PROJECTIONS, dense_weight


def naive_experts(experts: Any, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
    """What `SharedCoreExperts` gives, [N, D], in the type of x."""
    core, exempt = experts.held
    tensors = {f"shared_core.{name}": p for name, p in core.named_parameters()}
    tensors |= {f"experts.{name}": p for name, p in (*experts.named_parameters(), *experts.named_buffers())}
    out = torch.zeros_like(x_ND)
    for token, (weights, chosen) in enumerate(zip(weight_NA, expert_NA, strict=True)):
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            if exempt is not None and expert in exempt.ids:
                slot = exempt.ids.index(expert)
                (gate, up), down = exempt.gate_up_proj[slot].chunk(2), exempt.down_proj[slot]
            else:
                gate, up, down = (dense_weight(tensors, p, expert).to(x_ND.dtype) for p in PROJECTIONS)
            out[token] += weight * (down @ (experts.act_fn(gate @ x_ND[token]) * (up @ x_ND[token])))
    return out
