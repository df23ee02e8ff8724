"""How a configuration names the precisions of a model's parts: one for the whole model, or one for each part."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from megakd.errors import UserError

Part = Literal["core", "factors", "experts", "linear", "embedding"]  # megakd/models/parts.py says what they are
Name = Literal["int8", "fp8", "int4", "int3"]
PARTS: tuple[str, ...] = get_args(Part)
NAMES: tuple[str, ...] = get_args(Name)
MATRICES: tuple[str, ...] = ("core", "factors", "experts", "linear")
# `int4` and so on, for the whole model; nothing that serves reads embeddings in few bits
WHOLE: dict[str, dict[str, str]] = {name: dict.fromkeys(MATRICES, name) for name in ("int8", "fp8", "int4")}
# those that a model can be measured and trained with; no file format has the others
MEASURED = WHOLE | {"int3": dict.fromkeys(MATRICES, "int3")}

Quantize = str | dict[str, str]


def fault(said: Any) -> str | None:
    """What is wrong with a precision of a whole model, or {part: precision}; None where nothing is."""
    if isinstance(said, str):
        return None if said in MEASURED else f"unknown precision {said!r}; there are {', '.join(MEASURED)}"
    if not isinstance(said, Mapping) or not said:
        return f'give one of {", ".join(MEASURED)}, or precisions of parts: {{"core": "int4"}}'
    for part, name in said.items():
        if part not in PARTS:
            return f"{part}: no part of a model; there are {', '.join(PARTS)}"
        if name not in NAMES:
            return f"{part}={name}: unknown precision; there are {', '.join(NAMES)}"
    return None


def parse_quantize(said: str) -> Quantize:
    """What --quantize says: int4, or core=int4,factors=int8. UserError for what is not known."""
    words = [word.strip().partition("=") for word in said.split(",") if word.strip()]
    parts = {part: name for part, _, name in words}
    found: Quantize = parts if "=" in said else said.strip()
    if reason := fault(found):
        raise UserError(f"--quantize {said}: {reason}")
    return found


def label(said: Quantize) -> str:
    """The same in a word, as names of models have it."""
    return said if isinstance(said, str) else ",".join(f"{part}={name}" for part, name in said.items())


def _checked(said: Any) -> Any:
    if said is not None and (reason := fault(said)):
        raise ValueError(reason)
    return said


QuantizeField = Annotated[Quantize | None, BeforeValidator(_checked)]
