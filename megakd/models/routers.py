"""Routers of a Hugging Face MoE, found by role and shape.

A router is a module with a matrix [E, D] next to the E experts of its block, or the one such module inside what
transformers declares as the family's router (`router_logits`; AFMoE, HunYuan, Gemma 4). Names say nothing: `gate` is a
router in most families and `gate_proj` a projection in all. How many experts a token takes is `top_k` of the router or
of its block, or a field of the configuration that the router reads.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from megakd.errors import UserError
from megakd.models.spec import ACTIVE, experts_of

PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")


class Router(NamedTuple):
    """A matrix [experts, D] that gives logits, and what uses them.

    name: of the module with the matrix. gate: the module that gives the choices: the same, or one around it.
    block: the module that calls the gate; `path` leads from it to the matrix's module.
    experts: to choose from. active: experts a token, as trained. holder: whose field says how many a token takes.
    """

    name: str
    module: Any
    gate: Any
    block: nn.Module
    path: str
    holder: Any
    field: str
    experts: int
    active: int

    def take(self, active: int) -> None:
        """Let a token take so many experts from now on."""
        setattr(self.holder, self.field, active)

    @property
    def taken(self) -> int:
        """How many experts a token takes now."""
        return getattr(self.holder, self.field)


def find_routers(model: nn.Module, place: str, patterns: Sequence[str] = ()) -> list[Router]:
    """All routers of a model in the order of its modules; UserError naming `place` when there is none.

    patterns: regular expressions that find the names of routers where role and shape do not; then nothing else counts.
    A projection of an expert is none, whatever they say.
    """
    modules = dict(model.named_modules())
    declared = _declared(modules)
    inside: dict[str, list[str]] = {gate: [] for gate in declared}
    found = []
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or name.rpartition(".")[2] in PROJECTIONS:
            continue
        gate = next((gate for gate in declared if name.startswith(f"{gate}.")), name)
        block = modules[gate.rpartition(".")[0]]
        experts = weight.shape[0]
        if patterns:
            # one row chooses nothing: Qwen2's gate of its shared expert
            if experts == 1 or not any(re.search(pattern, name) for pattern in patterns):
                continue
        elif isinstance(module, nn.Embedding) or experts != _experts_beside(block):
            continue
        found.append(_router(name, module, gate, modules[gate], block, experts, place))
        inside.setdefault(gate, []).append(name)
    if declared and not patterns:
        for gate, names in inside.items():
            if reason := _refusal(names, declared.get(gate)):
                kind = type(modules[gate]).__name__
                raise UserError(f"{place}: the router {gate} ({kind}) cannot be trained alone: {reason}")
    if not found:
        names = ", ".join(repr(p) for p in patterns)
        raise UserError(
            f"objective.router_patterns: {names} find no matrix in {place} but projections of experts, which are no "
            "routers"
            if any(re.search(p, name) for p in patterns for name in modules if name.endswith(PROJECTIONS))
            else f"objective.router_patterns: {names} find no matrix in {place}"
            if patterns
            else f"{place}: no module with a matrix [experts, hidden] next to the experts of its block; a model "
            "without experts has no router to train, and odd names are found by objective.router_patterns"
        )
    return found


def _declared(modules: dict[str, nn.Module]) -> dict[str, int]:
    """{name: place of the logits in its output} of modules next to experts that transformers declares as routers."""
    indices = {}
    for module in modules.values():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorded if isinstance(recorded, list | tuple) else [recorded]:
            indices[recorder.target_class] = recorder.index
    return {
        name: indices[type(module)]
        for name, module in modules.items()
        if type(module) in indices and experts_of(modules[name.rpartition(".")[0]]) is not None
    }


def _refusal(matrices: list[str], index: int | None) -> str | None:
    """Why a router is not one matrix whose logits choose experts; index: of the logits in its output, as declared."""
    if index is None:
        return "transformers does not declare it as a router: its logits do not choose experts"
    if index:
        return "it does not give (logits, weights, experts)"
    if not matrices:
        return "no matrix in it has one row for each expert: it also chooses what is no expert"
    if len(matrices) > 1:
        return f"{' and '.join(matrices)} are matrices [experts, hidden]; one of them gives the logits"
    return None


def _experts_beside(block: nn.Module) -> int:
    """How many experts a block has as a child: a list of alike modules, or a module of stacked matrices. 0: none."""
    for child in block.children():
        if isinstance(child, nn.ModuleList) and len({type(each) for each in child}) == 1 and len(child) > 1:
            return len(child)
        stacked = [p for p in child.parameters(recurse=False) if p.ndim == 3]
        if stacked and not isinstance(child, nn.Conv1d) and len({p.shape[0] for p in stacked}) == 1:
            return stacked[0].shape[0]
    return 0


def _router(name: str, module: Any, gate: str, choosing: Any, block: Any, experts: int, place: str) -> Router:
    parent, _, _ = gate.rpartition(".")
    path = name.removeprefix(f"{parent}.")
    for holder, field in [(choosing, "top_k"), (block, "top_k"), *_read_from_config(choosing)]:
        active = getattr(holder, field, None)
        if isinstance(active, int):
            return Router(name, module, choosing, block, path, holder, field, experts, active)
    raise UserError(f"{place}: neither {gate} nor the module around it says in top_k how many experts a token takes")


def _read_from_config(gate: Any) -> list[tuple[Any, str]]:
    """The configuration and its field of experts a token, where the router's own forward reads it there (Gemma 4)."""
    names = getattr(getattr(type(gate).forward, "__code__", None), "co_names", ())
    return [(gate.config, field) for field in ACTIVE if field in names and hasattr(gate, "config")]


def describe(routers: Sequence[Router]) -> str:
    """One line: how many, which, and what they choose from."""
    sizes = sorted({(r.active, r.experts) for r in routers})
    chosen = ", ".join(f"{active} of {experts} experts" for active, experts in sizes)
    return f"{len(routers)} routers, {chosen}: {routers[0].name}" + (f" … {routers[-1].name}" if routers[1:] else "")
