"""Models with weights rounded to few bits: in memory, to measure them, or in every forward pass, to train them.

Both round the same parameters with the same function (rounding.py), so a model that was trained is the one that is
measured, exported and served. In training parameters, moments and checkpoints stay as they are, under their names: a
module's forward sees rounded copies of its parameters, and gradients pass to the parameters as if nothing were rounded.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megakd.config.precisions import Quantize
from megakd.models.parts import precisions, precisions_for, weight_parts
from megakd.models.rounding import Precision, line_axis, rounded, stored_bytes

PLAIN_BYTES = 2  # of a number that is stored as it is, in bfloat16
PIECE = 1 << 24  # numbers that are rounded at a time: some 400 MB of temporary tensors


class Rule(NamedTuple):
    """How one parameter is rounded."""

    part: str
    precision: Precision

    def __call__(self, weight: Tensor) -> Tensor:
        return rounded(weight, self.precision, self.axis(weight))

    def axis(self, weight: Tensor) -> int:
        return line_axis(self.part, tuple(weight.shape))


class Stored(NamedTuple):
    """What was rounded: {part: name of its precision}, how many parameters of each part, bytes of the whole model.

    bytes: codes and scales of what was rounded, 2 bytes a number of the rest, tied weights once.
    """

    quantized: dict[str, str]
    counts: dict[str, int]
    bytes: int


@torch.no_grad()
def round_weights(model: nn.Module, said: Quantize, place: str) -> None:
    """Round a model's weights in place; UserError naming `place` for a part that it lacks."""
    _, rules = _rules(model, said, place)
    for name, parameter in model.named_parameters():
        if name in rules:
            for piece in _pieces(parameter):
                piece.copy_(rules[name](piece))


def stored_as(model: nn.Module, said: Quantize, place: str) -> Stored:
    """What a model's files hold when it is stored with these precisions; UserError as of `round_weights`."""
    quantized, rules = _rules(model, said, place)
    counts, size = dict.fromkeys(quantized, 0), 0
    for name, parameter in model.named_parameters():
        rule = rules.get(name)
        if rule is None:
            size += PLAIN_BYTES * parameter.numel()
        else:
            counts[rule.part] += 1
            size += stored_bytes(tuple(parameter.shape), rule.precision, rule.axis(parameter))
    return Stored(quantized, counts, size)


def fake_quantize(model: nn.Module, said: Quantize, place: str) -> dict[int, Rule]:
    """Let every module of a model see its weights rounded in its forward; the rules by id of the parameters.

    UserError naming `place` for a part that the model lacks. Under autocast the weight is cast before it is rounded:
    what is rounded has the type that the model is exported in. Costs a rounding of each weight per forward pass, and
    until the backward a copy of each, where activations are not computed again.
    """
    _, named = _rules(model, said, place)
    rules = {id(parameter): named[name] for name, parameter in model.named_parameters() if name in named}
    for module in model.modules():
        own = {name: rules[id(p)] for name, p in module.named_parameters(recurse=False) if id(p) in rules}
        if own:
            see_rounded(module, module, own)
    return rules


def see_rounded(runs: Any, owner: nn.Module, rules: Mapping[str, Rule]) -> None:
    """While the forward of `runs` runs, parameters of `owner` are rounded ones, by name."""
    forward: Callable[..., Any] = runs.forward

    def with_rounded(*args: Any, **kwargs: Any) -> Any:
        with _shadowed(owner, rules):
            return forward(*args, **kwargs)

    runs.forward = with_rounded


def check_parts(model: nn.Module, said: Quantize, place: str) -> dict[str, str]:
    """{part: name of its precision} of what would be rounded; UserError as of the others."""
    return _rules(model, said, place)[0]


def _rules(model: nn.Module, said: Quantize, place: str) -> tuple[dict[str, str], dict[str, Rule]]:
    """{part: name of its precision}, and the rule of each parameter that is rounded."""
    parts = weight_parts(model, place)
    quantized = precisions_for(said, set(parts.values()), place)
    chosen = precisions(quantized)
    return quantized, {name: Rule(part, chosen[part]) for name, part in parts.items() if part in chosen}


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    """Views of a weight along its first dimension, which no line that shares a scale lies along."""
    rows = max(PIECE // max(weight[0].numel(), 1), 1)
    yield from weight.split(rows)


@contextmanager
def _shadowed(owner: nn.Module, rules: Mapping[str, Rule]) -> Iterator[None]:
    """An attribute of the instance hides the parameter of its name, which stays registered."""
    for name, rule in rules.items():
        vars(owner)[name] = _in_type_of_compute(owner._parameters[name], rule)
    try:
        yield
    finally:
        for name in rules:
            vars(owner).pop(name, None)


def _in_type_of_compute(weight: Any, rule: Rule) -> Tensor:
    device = weight.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return rule(weight)
    return rule(weight.to(torch.get_autocast_dtype(device))).to(weight.dtype)
