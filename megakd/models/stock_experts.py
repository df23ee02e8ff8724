"""Experts of a stock transformers model distributed over ranks, for inference: each rank keeps E/size of a layer's.

transformers' `use_experts_implementation` wraps the experts module of nearly every family: called as experts(hidden
states [N, D], ids [N, A], weights [N, A]), with stacked weights whose first dimension is the expert. Such a module
stays, with this rank's part of its weights, and is called with pairs (row, expert) as A = 1. Activation, biases, clamps
and implementation (eager, grouped_mm) therefore stay the family's own.
N tokens of this rank, L rows received, P pairs (row, expert) computed here, D hidden size, A active.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megakd.errors import UserError
from megakd.models.expert_parallel import exchange, pairs_of
from megakd.models.loading import Part
from megakd.system.deepspeed_internals import AutoEPMoELayer, place_layer, tag_expert


def spread_stock_experts(model: nn.Module, size: int, rank: int) -> None:
    """Replace every experts module by the share of place `rank` among `size` ranks, in place.

    Works on the meta device too. UserError when the experts cannot be divided (`stock_experts`).
    """
    for name, experts in stock_experts(model, size).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SpreadStockExperts(experts, size, rank, name))


def stock_experts(model: Any, size: int) -> dict[str, Any]:
    """The experts modules of a causal LM by name; UserError where they cannot be divided among `size` ranks."""
    found = {name: module for name, module in model.named_modules() if _has_interface(module)}
    if obstacle := next(_obstacles(model, found, size), None):
        place = getattr(model.config, "name_or_path", "") or model.config.model_type
        raise UserError(f"{place}: logits.parallel=autoep: {obstacle}; set logits.parallel=zero3")
    return found


def _has_interface(module: Any) -> bool:
    """Whether `use_experts_implementation` wrapped the module's class: it sets these on every instance."""
    return all(hasattr(module, field) for field in ("num_experts", "has_gate", "has_bias", "is_transposed"))


def _obstacles(model: Any, found: dict[str, Any], size: int) -> Iterator[str]:
    family = model.config.model_type
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" and name not in found:
            yield f"{name} is {type(module).__name__} of {family}, which lacks transformers' experts interface"
    if not found:
        yield f"{family} has no experts with transformers' experts interface"
    for name, experts in found.items():
        stacked = {key for key, tensor in experts.named_parameters(recurse=False) if len(tensor) == experts.num_experts}
        for key, _ in (*experts.named_parameters(), *experts.named_buffers()):
            if key not in stacked:
                yield f"{name}.{key} of {family} belongs to no single expert"
        if experts.num_experts % size:
            yield f"{size} ranks do not divide the {experts.num_experts} experts of {name}"


class SpreadStockExperts(AutoEPMoELayer):
    """All experts of a layer, each kept by one rank of a group; called as the family's: experts(x, ids, weights)."""

    def __init__(self, experts: Any, size: int, rank: int, name: str):
        nn.Module.__init__(self)  # AutoEPMoELayer's own takes a block with a router apart
        place_layer(self, experts.num_experts, size, rank)
        self.first = rank * self.num_local_experts
        for key, whole in list(experts.named_parameters(recurse=False)):
            part = whole.detach()[self.first : self.first + self.num_local_experts].clone()
            parameter: Any = nn.Parameter(part, requires_grad=whole.requires_grad)
            parameter.part = Part(f"{name}.{key}", self.first)
            tag_expert(self, parameter)
            setattr(experts, key, parameter)
        experts.num_experts = self.num_local_experts
        # The eager implementation calls the activation once for each expert that has rows. ZeRO-3 needs equally many
        # calls of modules on all ranks, so what has no weights is a module no longer.
        for key, child in list(experts.named_children()):
            delattr(experts, key)
            experts.__dict__[key] = child
        self.experts = experts

    def forward(  # type: ignore[override]
        self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor
    ) -> Tensor:
        return exchange(self, self._compute, [x_ND], expert_NA, weight_NA).to(x_ND.dtype)

    def _compute(self, x_LD: Tensor, expert_LA: Tensor, weight_LA: Tensor) -> Tensor:
        """Weighted sums over the experts kept here, [L, D], in float32 at least.

        Weights are applied here as transformers does it, but rounded to the type of x once all ranks' sums are added.
        In bfloat16 the result is then that of the whole layer.
        """
        chosen = row_P, _ = pairs_of(expert_LA, self.first, self.num_local_experts)
        x_PD, expert_P, weight_P = x_LD[row_P], expert_LA[chosen] - self.first, weight_LA[chosen]
        if len(row_P) == 0:  # the family's forward runs on all ranks equally often, on a row of zeros where none came
            x_PD, expert_P, weight_P = x_LD.new_zeros(1, x_LD.shape[1]), expert_P.new_zeros(1), weight_P.new_zeros(1)
        made_PD = self.experts(x_PD, expert_P[:, None], torch.ones_like(weight_P)[:, None]) * weight_P[:, None]
        wide = torch.promote_types(made_PD.dtype, torch.float32)
        return x_LD.new_zeros(x_LD.shape, dtype=wide).index_add(0, row_P, made_PD[: len(row_P)].to(wide))
