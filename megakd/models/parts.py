"""The parts of a model that may be stored in few bits, each with a precision of its own.

    core       what experts of a layer share
    factors    an expert's own matrices left and right of it
    experts    dense experts: of a stock model, of layers left stock, and those that are kept dense
    linear     every other matrix that multiplies: attention, shared experts, dense layers
    embedding  of tokens, and the head

Routers, norms, biases, the coefficients of mixtures, and other matrices of fewer than 16 rows or columns keep their
type: they are small, and a router's choices are all or nothing.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from megakd.config.precisions import MEASURED, WHOLE, Quantize, fault
from megakd.errors import UserError
from megakd.models.hub import model_of
from megakd.models.rounding import PRECISIONS, Precision
from megakd.models.routers import find_routers
from megakd.models.shared_core import SharedCoreExperts

__all__ = ["WHOLE", "precisions", "precisions_for", "weight_parts"]
LEAST = 16  # rows and columns, but of factors


def precisions(said: Mapping[str, str]) -> dict[str, Precision]:
    """{part: precision} from {part: name}; UserError for names that are not known."""
    if said and (reason := fault(said)):
        raise UserError(reason)
    return {part: PRECISIONS[name] for part, name in said.items()}


def precisions_for(said: Quantize, there: Collection[str], place: str) -> dict[str, str]:
    """{part: name of its precision} of a model with the parts `there`.

    said: a precision of the whole model, which skips parts that it lacks, or {part: name}. UserError for
    names that are not known, and for a part that the model lacks.
    """
    if reason := fault(said):
        raise UserError(f"{place}: {reason}")
    if isinstance(said, str):
        return {part: name for part, name in MEASURED[said].items() if part in there}
    if lacking := [part for part in said if part not in there]:
        raise UserError(f"{place}: there is no {lacking[0]} to round; its parts are {', '.join(sorted(there))}")
    return dict(said)


def weight_parts(model: nn.Module, place: str) -> dict[str, str]:
    """{name of a parameter: part} of what may be stored in few bits; UserError naming `place` by find_routers."""
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):  # ZeRO-3 has cut them: flat and empty
        model = model_of(model.config, place)  # type: ignore[arg-type]
    routers = {f"{router.name}.weight" for router in find_routers(model, place)} if _has_experts(model) else set()
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            part = _part(prefix, module, name, parameter)
            if part and name not in routers and (part == "factors" or min(parameter.shape[-2:]) >= LEAST):
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


def _has_experts(model: nn.Module) -> bool:
    return any(p.ndim == 3 for p in model.parameters()) or any(
        isinstance(module, SharedCoreExperts) for module in model.modules()
    )
