"""Shared-core experts distributed over expert-parallel ranks: as DeepSpeed's AutoEP spreads experts.

Every rank of a group keeps E/size of the experts. A token's core runs once, on the rank that has the token; its row
(x, core(x) of gate and up) goes to each rank that keeps some of its experts, once, however many those are, and what
comes back is already their weighted sum (docs/scaling.md). Router, shared experts and auxiliary loss stay the family's.

DeepSpeed 0.19.8 recognises subclasses of AutoEPMoELayer, and in checkpoints their `experts.w1`, `w2` and `w3` of three
dimensions. Hence a projection's factors lie packed in one parameter [E_local, n, 1]: w1 gate, w2 down, w3 up.
N tokens of this rank, M rows sent (token, rank), L rows received, P pairs (row, expert) computed here, A active.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megakd.errors import UserError
from megakd.models.shared_core import PROJECTIONS, SharedCoreExperts, factor_shapes, free_and_core_rank, mix_name
from megakd.system.deepspeed_internals import (
    AutoEPMoELayer,
    all_to_all,
    expert_group,
    place_layer,
    tag_expert,
    universal_expert,
)

PACKED = {"gate": "w1", "up": "w3", "down": "w2"}


def spread_experts(student: nn.Module, size: int, rank: int) -> None:
    """Replace every SharedCoreExperts by the share of place `rank` among `size` ranks, in place.

    From whole weights, the same on all ranks, or on the meta device, to be filled later (models/loading.py). UserError
    when they cannot be divided.
    """
    blocks = [
        (name, module)
        for name, module in student.named_modules()
        if isinstance(getattr(module, "experts", None), SharedCoreExperts)
    ]
    if not blocks:
        raise UserError(
            f"engine.expert_parallel: {size}, but the student has no shared-core experts to spread; set it to 1"
        )
    for name, block in blocks:
        experts: Any = block.experts
        if experts.num_experts % size:
            raise UserError(
                f"engine.expert_parallel: {size} does not divide the {experts.num_experts} experts of {name}"
            )
        block.experts = SpreadExperts(experts, size, rank, name)


class Packed:
    """What lies in a packed parameter [E_local, n, 1]; hangs on it as `parameter.packed`.

    The engine asks it for canonical names and whole tensors, and knows nothing else of expert parallelism.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], first: int, group: str):
        """shapes: [rows, R] of an expert's factors by name, in the order in which they lie; first: expert kept here."""
        self.shapes, self.first, self.group = shapes, first, group
        self.frozen = False  # by a rate of 0: DeepSpeed cannot save experts that require no gradient

    def names(self, name: str) -> list[str]:
        """Canonical names of the factors in the parameter `name`."""
        experts = name.rsplit(".", 2)[0]
        return [f"{experts}.{factor}" for factor in self.shapes]

    def split(self, packed: Tensor) -> list[Tensor]:
        """The factors [E, ., .] in a packed tensor [E, n, 1], as views."""
        sizes = [rows * rank for rows, rank in self.shapes.values()]
        parts = packed.squeeze(2).split(sizes, dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]

    def whole(self, name: str, local: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, factor of all experts), on the first rank; called by all ranks, `local` of this one."""
        group = expert_group(self.group)
        if torch.distributed.get_global_rank(group, 0) != 0:
            return  # another group keeps the same
        first = torch.distributed.get_rank() == 0
        local = local.detach().contiguous()
        parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size(group))] if first else None
        torch.distributed.gather(local, parts, dst=0, group=group)
        if parts is not None:
            yield from zip(self.names(name), self.split(torch.cat(parts)), strict=True)

    def universal(self, factors: list[Tensor]) -> dict[str, Any]:
        """What a universal checkpoint holds of the parameter; factors: of all experts, in order, flat or not."""
        sizes = [rows * rank for rows, rank in self.shapes.values()]
        parts = [factor.reshape(-1, size) for factor, size in zip(factors, sizes, strict=True)]
        return universal_expert(torch.cat(parts, dim=1)[..., None])


class LocalExperts(SharedCoreExperts):
    """This rank's experts: their factors packed, called with rows that came from all ranks of the group."""

    def __init__(self, source: SharedCoreExperts, first: int, count: int, group: str, place: str):
        nn.Module.__init__(self)
        self.num_experts, self.expert_hidden = count, source.expert_hidden
        self.first, self.forms, self.act_fn = first, source.forms, source.act_fn
        self.hidden = _core(source)["gate_proj"].in_features
        for projection, form in self.forms.items():
            shapes = factor_shapes(form, projection, count, self.hidden, self.expert_hidden)
            if not shapes:
                raise UserError(
                    f"engine.expert_parallel: the experts of {place} have no factors for {projection}, only a core; "
                    "set engine.expert_parallel=1"
                )
            own = [getattr(source, name).detach()[first : first + count].reshape(count, -1) for name in shapes]
            parameter: Any = nn.Parameter(torch.cat(own, dim=1)[..., None])
            parameter.packed = Packed({name: shape[1:] for name, shape in shapes.items()}, first, group)
            self.register_parameter(PACKED[projection], parameter)
            if form.shape == "basis" and form.groups > 1:
                found = source._groups(projection)[first : first + count].clone()
                self.register_buffer(f"basis_group_{projection}", found, persistent=False)
        # a row carries x only where a free wrapper of gate or up reads it, and brings back D numbers only where one of
        # down writes them
        self.reads_x = any(self._free(p) for p in ("gate", "up"))
        self.writes_outer = self._free("down")

    def forward(self, rows: Tensor, expert_LA: Tensor, weight_LA: Tensor) -> Tensor:  # type: ignore[override]
        """rows [L, (D) + core gate + core up] -> [L, core of down takes + (D)], summed over the experts kept here."""
        widths = [self.hidden * self.reads_x, self.core_width("gate"), self.core_width("up")]
        x, gate, up = rows.split(widths, dim=1)
        chosen = row_P, _ = pairs_of(expert_LA, self.first, self.num_experts)
        out_width = self.core_width("down") + self.hidden * self.writes_outer
        if len(row_P) == 0:
            # nothing came: the backward must still meet the other ranks, in the exchange and in the reduction
            own = sum(p.sum() for p in self.parameters() if not _frozen(p))
            return rows.new_zeros(len(rows), out_width) + 0.0 * (rows.sum() + weight_LA.sum() + own)
        x = x[row_P] if self.reads_x else rows.new_zeros(1, 1).expand(len(row_P), self.hidden)
        local_P = expert_LA[chosen] - self.first
        made = self.factors(x, gate[row_P], up[row_P], local_P[:, None], weight_LA[chosen][:, None])
        wide = torch.promote_types(rows.dtype, torch.float32)
        sums = [rows.new_zeros(len(rows), y.shape[1], dtype=wide).index_add(0, row_P, y.to(wide)) for y in made]
        return torch.cat(sums if self.writes_outer else sums[:1], dim=1).to(rows.dtype)

    def core_width(self, projection: str) -> int:
        """Numbers per token that the core of gate or up gives, or that of down takes, all groups together."""
        form = self.forms[projection]
        rank = free_and_core_rank(form, projection)[1]
        return form.groups * rank if form.based else self.expert_hidden

    def _free(self, projection: str) -> bool:
        form = self.forms[projection]
        return not form.based and free_and_core_rank(form, projection)[0] > 0

    def _aligned(self) -> bool:
        shapes = [pair for p in PROJECTIONS for pair in self._packed(p).packed.shapes.items()]
        sizes = {n for name, shape in shapes if not name.endswith("_mix") for n in shape}
        return hasattr(nn.functional, "grouped_mm") and all(size % 8 == 0 for size in sizes)

    def _width(self) -> int:
        return self.core_width("down") // self._slots("down")

    def _packed(self, projection: str) -> Any:
        return getattr(self, PACKED[projection])

    def _factors(self, projection: str) -> dict[str, Tensor]:
        packed = self._packed(projection)
        tensor = packed.detach() if _frozen(packed) else packed
        return dict(zip(packed.packed.shapes, packed.packed.split(tensor), strict=True))

    def _mix(self, projection: str) -> Tensor | None:
        found = self._factors(projection).get(mix_name(projection))
        return None if found is None else found.squeeze(2)

    def _stacked(self, projection: str) -> tuple[Tensor | None, ...]:
        found = self._factors(projection)
        near, far = ("input", "output") if projection == "down" else ("output", "input")
        names = [f"{wrapper}_wrapper_{projection}_{side}" for wrapper in (near, far) for side in ("left", "right")]
        return tuple(found.get(name) for name in names)


class SpreadExperts(AutoEPMoELayer):
    """All experts of a layer, each kept by one rank of a group; called as the family's: experts(x, ids, weights)."""

    def __init__(self, source: SharedCoreExperts, size: int, rank: int, place: str):
        nn.Module.__init__(self)  # AutoEPMoELayer's own takes a block with a router apart
        place_layer(self, source.num_experts, size, rank)
        self.held = source.held  # not owned: replicated, ordinary parameters of the block
        for name, buffer in source.named_buffers():
            self.register_buffer(name, buffer)  # of all experts: what a checkpoint's weights hold
        first = rank * self.num_local_experts
        self.experts = LocalExperts(source, first, self.num_local_experts, self.ep_group_name, place)
        for parameter in self.experts.parameters():
            tag_expert(self, parameter)

    def forward(  # type: ignore[override]
        self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor
    ) -> Tensor:
        core: Any
        core, exempt = self.held
        gate_N, up_N = core["gate_proj"](x_ND), core["up_proj"](x_ND)
        dense_ND = None
        if exempt is not None:
            dense_ND = exempt(x_ND, expert_NA, weight_NA)
            for expert in exempt.ids:
                expert_NA = expert_NA.masked_fill(expert_NA == expert, -1)  # goes nowhere
        parts = [x_ND, gate_N, up_N] if self.experts.reads_x else [gate_N, up_N]
        sum_N = exchange(self, self.experts, parts, expert_NA, weight_NA)
        inner_N = sum_N[:, : self.experts.core_width("down")]
        out_ND = core["down_proj"](inner_N)
        if self.experts.writes_outer:
            out_ND = out_ND + sum_N[:, inner_N.shape[1] :]
        return out_ND if dense_ND is None else out_ND + dense_ND


def exchange(
    layer: Any, compute: Callable[..., Tensor], parts: list[Tensor], expert_NA: Tensor, weight_NA: Tensor
) -> Tensor:
    """Each token's row to the ranks that keep its experts, and the sums of what they make of it, [N, ..].

    layer: as `place_layer` makes it. parts: what a row consists of, [N, ..] each. compute(rows [L, ..], ids [L, A],
    weights [L, A]): the weighted sums over the experts of this rank, [L, ..].
    """
    rank_NA = torch.div(expert_NA, layer.num_local_experts, rounding_mode="floor")
    ranks = torch.arange(layer.ep_size, device=rank_NA.device)
    goes = (rank_NA == ranks[:, None, None]).any(dim=-1)
    token_M = goes.nonzero()[:, 1]
    sent = goes.sum(dim=1)
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=layer.ep_group)
    out, back = torch.stack([sent, received]).tolist()

    def send(rows_M: Tensor) -> Tensor:
        return all_to_all(layer.ep_group, rows_M, out, back)

    weight_LA, expert_LA = send(weight_NA[token_M]), send(expert_NA[token_M])
    rows_L = send(torch.cat([part[token_M] for part in parts], dim=1))
    made_M = all_to_all(layer.ep_group, compute(rows_L, expert_LA, weight_LA), back, out)
    wide = torch.promote_types(made_M.dtype, torch.float32)
    sums = made_M.new_zeros(len(expert_NA), made_M.shape[1], dtype=wide).index_add(0, token_M, made_M.to(wide))
    return sums.to(made_M.dtype)


def pairs_of(expert_LA: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """(row, place) of every id in `expert_LA` that is one of `count` experts from number `first` on, [P] each."""
    row_P, place_P = ((expert_LA >= first) & (expert_LA < first + count)).nonzero(as_tuple=True)
    return row_P, place_P


def _core(experts: SharedCoreExperts) -> Any:
    return experts.held[0]


def _frozen(parameter: Any) -> bool:
    return parameter.packed.frozen
