"""Stock models with fewer experts: the config that says so, and the tensors of routers that shrink with the experts.

Found by trial on the meta device, for any family: which field of the config makes the same model with fewer experts,
and which tensors then have another shape.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Size

from megakd.errors import UserError
from megakd.models.hub import model_of
from megakd.models.spec import MoESpec, active_experts, find_experts
from megakd.models.student import stock_with


class Cut(NamedTuple):
    """A family's model with fewer experts.

    config, spec: of that model. axes: the tensors besides the experts that shrink, by name, and the dimension that
    counts experts: routers, their biases.
    """

    config: Any
    spec: MoESpec
    axes: dict[str, int]


def cut_to(config: Any, spec: MoESpec, count: int, place: str) -> Cut:
    """The model of `config` with `count` experts in each layer; UserError, naming `place`, where none is."""
    if count == spec.experts:
        return Cut(config, spec, {})
    family = config.model_type
    expected = spec._replace(experts=count)
    before = _shapes(config, place)
    for changed in _with_fewer(config, spec.experts, count):
        try:
            found = find_experts(changed, place)
        except UserError:  # a field of something else, that this family's model cannot be made with
            continue
        if isinstance(found, str) or found._replace(activation=spec.activation) != expected:
            continue
        axes = _axes(before, _shapes(changed, place), expected, spec.experts)
        if isinstance(axes, str):
            raise UserError(f"{place}: {family} cannot have {count} of its {spec.experts} experts: {axes}")
        return Cut(changed, expected, axes)
    raise UserError(f"{place}: no field of {family}'s config.json makes it a model of {count} experts in each layer")


def possible_counts(config: Any, spec: MoESpec) -> list[int]:
    """How many experts a layer may keep: as many in every group of a grouped router, and enough for each token.

    A group is scored by its two best experts (DeepSeek-V3), so that it keeps two at least.
    """
    groups, active = groups_of(config), active_experts(config)
    chosen = getattr(config, "topk_group", None) or groups
    return [
        count
        for count in range(groups, spec.experts + 1, groups)
        if count // groups >= min(groups, 2) and count // groups * chosen >= active
    ]


def groups_of(config: Any) -> int:
    """Groups of experts, in the order of their numbers, among which a router chooses first; 1 where it has none."""
    return getattr(config, "n_group", None) or 1


def _with_fewer(config: Any, experts: int, count: int) -> Iterator[Any]:
    """Configs that differ in one field that is the number of experts, or a list of it by layer."""
    for name, value in config.to_dict().items():
        if value == experts and isinstance(value, int) and not isinstance(value, bool):
            changed: Any = count
        elif isinstance(value, list) and experts in value and set(value) <= {experts, 0, 1, None}:
            changed = [count if each == experts else each for each in value]
        else:
            continue
        try:
            yield stock_with(config, {name: changed})
        except Exception:  # a config's own checks, of any kind: that field is not the one
            continue


def _shapes(config: Any, place: str) -> dict[str, Size]:
    return {name: tensor.shape for name, tensor in model_of(config, place).state_dict().items()}


def _axes(before: dict[str, Size], after: dict[str, Size], spec: MoESpec, experts: int) -> dict[str, int] | str:
    """The tensors that shrink and where; or what else changes."""
    if before.keys() != after.keys():
        return f"its model then has other tensors, such as {min(before.keys() ^ after.keys())}"
    axes = {}
    inside = tuple(f"{spec.place(layer)}." for layer in spec.layers)
    for name, shape in before.items():
        if shape == after[name] or spec.is_expert(name):
            continue
        where = [axis for axis, (old, new) in enumerate(zip(shape, after[name], strict=True)) if old != new]
        fits = len(where) == 1 and (shape[where[0]], after[name][where[0]]) == (experts, spec.experts)
        if not fits or not name.startswith(inside):
            return f"{name} of shape {tuple(shape)} would have {tuple(after[name])}"
        axes[name] = where[0]
    return axes
