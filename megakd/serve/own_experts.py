"""The experts that one rank of a server keeps: which they are, and what they compute.

Every rank has all tokens and a copy of the core. It computes what its own experts give; the sum over ranks is the
layer's output, for what stands behind the experts is linear.
N tokens, D hidden, A active experts, P rows of this rank's experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.models.shared_core import SharedCoreExperts


class Share(NamedTuple):
    """What a rank keeps of a layer: rows of the stored tensors, in the rank's own order.

    experts: of the factors. dense: of the experts kept dense, dense_ids: their ids on this rank.
    """

    experts: Tensor
    dense: Tensor
    dense_ids: tuple[int, ...]

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """The rank's part of a stored tensor: `experts.…`, `dense_experts.…`; whole for `shared_core.…`."""
        rows = {"experts": self.experts, "dense_experts": self.dense}.get(name.partition(".")[0])
        return tensor if rows is None else tensor[rows.to(tensor.device)]


def share_of(places: Sequence[int], dense: Sequence[int]) -> Share:
    """places: for each expert its id on this rank, -1 where another rank keeps it. dense: the experts kept dense."""
    own = sorted((expert for expert, place in enumerate(places) if place >= 0), key=places.__getitem__)
    slots = [slot for slot, expert in enumerate(dense) if places[expert] >= 0]
    ids = tuple(places[dense[slot]] for slot in slots)
    return Share(torch.tensor(own, dtype=torch.int64), torch.tensor(slots, dtype=torch.int64), ids)


class OwnExperts(SharedCoreExperts):
    """Shared-core experts of one rank. Rows of other ranks' experts, whose id is -1, are skipped."""

    def factors(
        self, x_ND: Tensor, gate_N: Tensor, up_N: Tensor, expert_NA: Tensor, weight_NA: Tensor
    ) -> tuple[Tensor, Tensor]:
        own_NA = expert_NA >= 0
        if x_ND.device.type == "cuda":  # as many rows in each step, for CUDA graphs
            return super().factors(x_ND, gate_N, up_N, expert_NA.clamp(min=0), weight_NA * own_NA)
        token_P, place_P = torch.where(own_NA)
        expert_P, weight_P = expert_NA[token_P, place_P], weight_NA[token_P, place_P]
        made = super().factors(x_ND[token_P], gate_N[token_P], up_N[token_P], expert_P[:, None], weight_P[:, None])
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        inner_N, outer_ND = (
            y.new_zeros(len(x_ND), y.shape[1], dtype=wide).index_add_(0, token_P, y.to(wide)).to(y.dtype) for y in made
        )
        return inner_N, outer_ND
