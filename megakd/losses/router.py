"""What keeps a router that learns a good one: near where it began, undecided enough, its experts used alike.

N tokens, E experts, k experts a token. Every term is a sum over tokens or windows that does not depend on what else is
in the batch, so ranks and accumulation change nothing.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megakd.losses.hidden import wide


def anchor(
    weights: Sequence[Tensor], initial: Sequence[Tensor], form: Literal["relative", "absolute"] = "relative"
) -> Tensor:
    """The drift of routers W from their initial weights W0; 0 at the start.

    relative: mean over routers of |W - W0|^2 / |W0|^2, a number without unit.
    absolute: sum over routers of |W - W0|^2, in the weights' own unit (L2-SP: Li, Grandvalet, Davoine 2018).
    """
    pairs = [(wide(now), wide(then)) for now, then in zip(weights, initial, strict=True)]
    moved = torch.stack([(now - then).square().sum() for now, then in pairs])
    if form == "absolute":
        return moved.sum()
    return (moved / torch.stack([then.square().sum() for _, then in pairs])).mean()


def routing_entropy(logits_NE: Tensor) -> Tensor:
    """-sum p log p over log E of each token, [N]: 0 where one expert is certain, 1 where all are alike."""
    log_p = wide(logits_NE).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(logits_NE.shape[-1])


def load_balance(logits_BTE: Tensor, experts_BTk: Tensor, counted_BT: Tensor) -> Tensor:
    """E * sum over e of f_e P_e of each window, [B]; 1 where experts are used alike, E / k where k take all.

    f_e: the share of the window's routed rows that expert e gets, P_e: its mean probability (Fedus et al. 2021, section
    2.2; by window as in DeepSeek-V3, section 2.1.2, but with softmax), both over counted positions: padding is ignored.
    0 without any.
    """
    experts = logits_BTE.shape[-1]
    counted = counted_BT[:, :, None]
    count = counted.sum(1).clamp(min=1)
    p_BTE = torch.where(counted, wide(logits_BTE), 0.0).softmax(-1)
    mean_BE = (p_BTE * counted).sum(1) / count
    chosen_BTE = torch.zeros_like(p_BTE).scatter_(-1, experts_BTk, 1.0)
    share_BE = (chosen_BTE * counted).sum(1) / (count * experts_BTk.shape[-1])
    return experts * (share_BE * mean_BE).sum(-1)
