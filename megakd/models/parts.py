"""The parts of a model that may be stored in few bits, each with a precision of its own.

    core       what experts of a layer share
    factors    an expert's own matrices left and right of it
    experts    dense experts: of a stock model, of layers left stock, and those that are kept dense
    linear     every other matrix that multiplies: attention, shared experts, dense layers
    embedding  of tokens, and the head

Routers, norms, biases, the coefficients of mixtures, and other matrices of fewer than 16 rows or columns keep their
type: they are small, and a router's choices are all or nothing.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import nn

from megakd.errors import UserError
from megakd.models.rounding import PRECISIONS, Precision
from megakd.models.routers import find_routers
from megakd.models.shared_core import SharedCoreExperts

Part = Literal["core", "factors", "experts", "linear", "embedding"]
PARTS: tuple[str, ...] = get_args(Part)
LEAST = 16  # rows and columns, but of factors
# `int4` and so on, for the whole model. Nothing that serves reads embeddings in few bits; factors are few and inner.
WHOLE: dict[str, dict[str, str]] = {
    "int8": dict.fromkeys(("core", "factors", "experts", "linear"), "int8"),
    "fp8": dict.fromkeys(("core", "factors", "experts", "linear"), "fp8"),
    "int4": dict.fromkeys(("core", "experts", "linear"), "int4") | {"factors": "int8"},
}


def precisions(said: Mapping[str, str]) -> dict[str, Precision]:
    """{part: precision} from {part: name}; UserError for names that are not known."""
    for part, name in said.items():
        if part not in PARTS:
            raise UserError(f"{part}: no part of a model; there are {', '.join(PARTS)}")
        if name not in PRECISIONS:
            raise UserError(f"{part}={name}: unknown precision; there are {', '.join(PRECISIONS)}")
    return {part: PRECISIONS[name] for part, name in said.items()}


def weight_parts(model: nn.Module, place: str) -> dict[str, str]:
    """{name of a parameter: part} of what may be stored in few bits; UserError naming `place` by find_routers."""
    routers = {f"{router.name}.weight" for router in find_routers(model, place)} if _has_experts(model) else set()
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            part = _part(prefix, module, name, parameter)
            if part and name not in routers and (part == "factors" or min(_sizes(parameter)[-2:]) >= LEAST):
                found[name] = part
    # a tied head is the embedding; named_parameters has it once, under the embedding's name
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        found |= {name: "embedding" for name, p in model.named_parameters() if p is head.weight}
    return found


def _part(prefix: str, module: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
    if isinstance(module, SharedCoreExperts):
        return None if name.endswith("_mix") else "factors"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if parameter.ndim == 3:
        return "experts"
    if not isinstance(module, nn.Linear) or not name.endswith(".weight"):
        return None
    return "core" if ".shared_core." in f".{prefix}." else "linear"


def _sizes(parameter: Any) -> tuple[int, ...]:
    """Of a parameter, also where ZeRO-3 has cut it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _has_experts(model: nn.Module) -> bool:
    return any(p.ndim == 3 for p in model.parameters()) or any(
        isinstance(module, SharedCoreExperts) for module in model.modules()
    )
