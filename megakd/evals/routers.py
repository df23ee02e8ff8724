"""What a MoE model's routers choose on the hold-out: how undecided they are, and how alike they use their experts.

N tokens, E experts, k experts a token.
"""

from collections.abc import Sequence

import torch

from megakd.data.records import IGNORED, Batch
from megakd.losses.router import routing_entropy
from megakd.models.routing import Choice, Router


class RouterStatistics:
    """Adds up what `routers` chose for the labelled positions of each batch; chosen: the list of `choices`."""

    def __init__(self, routers: Sequence[Router], chosen: list[Choice]):
        self.routers, self.chosen = routers, chosen
        self.entropy, self.tokens = [0.0] * len(routers), 0
        self.rows_E = [torch.zeros(router.experts, dtype=torch.int64) for router in routers]

    def add(self, batch: Batch) -> None:
        """What was chosen in the forward pass of this batch."""
        counted_N = (batch.labels != IGNORED).flatten()
        self.tokens += int(counted_N.sum())
        for index, (logits_NE, experts_Nk) in enumerate(self.chosen):
            own_N = counted_N.to(logits_NE.device)
            self.entropy[index] += routing_entropy(logits_NE[own_N]).sum().item()
            rows = experts_Nk[own_N].flatten().cpu()
            self.rows_E[index] += torch.bincount(rows, minlength=len(self.rows_E[index]))
        self.chosen.clear()

    def found(self) -> dict[str, dict[str, float]]:
        """By a router's name: entropy over log E, E times the share of the busiest expert, and how many get nothing."""
        return {
            router.name: {
                "entropy": entropy / self.tokens,
                "busiest": (rows_E.max() / rows_E.sum()).item() * router.experts,
                "idle": int((rows_E == 0).sum()),
            }
            for router, entropy, rows_E in zip(self.routers, self.entropy, self.rows_E, strict=True)
        }
