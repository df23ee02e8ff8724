"""What the routers of a MoE model choose on the validation set: how undecided they are, how evenly they use experts.

N tokens, E experts, k experts a token.
"""

from collections.abc import Sequence

import torch

from megakd.data.records import IGNORED, Batch
from megakd.losses.router import routing_entropy
from megakd.models.routers import Router
from megakd.models.routing import Choice


class RouterStatistics:
    """Adds up what `routers` chose for the labelled positions of each batch; chosen: the list of `choices`."""

    def __init__(self, routers: Sequence[Router], chosen: list[Choice]):
        self.routers, self.chosen = routers, chosen
        self.tokens = 0
        devices = [router.module.weight.device for router in routers]
        self.entropy = [torch.zeros((), dtype=torch.float64, device=device) for device in devices]
        self.rows_E = [
            torch.zeros(router.experts, dtype=torch.int64, device=device)
            for router, device in zip(routers, devices, strict=True)
        ]

    def add(self, batch: Batch) -> None:
        """What was chosen in the last forward pass, which was of this batch; nothing waits for a GPU."""
        rows_N = (batch.labels.flatten() != IGNORED).nonzero()[:, 0]
        self.tokens += len(rows_N)
        last = self.chosen[-len(self.routers) :] if self.routers else []
        for (logits_NE, experts_Nk), entropy, rows_E in zip(last, self.entropy, self.rows_E, strict=True):
            own_N = rows_N.to(logits_NE.device)
            entropy += routing_entropy(logits_NE[own_N]).double().sum()
            experts = experts_Nk[own_N].flatten().long()
            rows_E.scatter_add_(0, experts, torch.ones_like(experts))
        self.chosen.clear()

    def found(self) -> dict[str, dict[str, float]]:
        """By a router's name: entropy over log E, E times the share of the busiest expert, and how many get nothing."""
        return {
            router.name: {
                "entropy": entropy.item() / self.tokens,
                "busiest": (rows_E.max() / rows_E.sum()).item() * router.experts,
                "idle": int((rows_E == 0).sum()),
            }
            for router, entropy, rows_E in zip(self.routers, self.entropy, self.rows_E, strict=True)
        }
