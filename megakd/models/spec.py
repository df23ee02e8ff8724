"""Where a mixture-of-experts model keeps its experts: found in its modules, never in fields of its configuration."""

import json
import re
from typing import Any, NamedTuple

from megakd.errors import UserError

# What transformers says of experts modules whose forward is experts(x, ids, weights) = sum of w down(act(gate x) up x),
# with gate_up_proj [E, 2F, D], gate above up, and down_proj [E, D, F] (integrations/moe.py).
COMMON = {
    "has_gate": (True, "two projections without a gate"),
    "has_bias": (False, "biases"),
    "is_transposed": (False, "transposed matrices"),
    "is_concatenated": (True, "rows of gate and up in turns"),
    "has_post_expert_norm": (False, "a norm behind each expert"),
}

# names of the field that says how many experts a token uses
ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")


class MoESpec(NamedTuple):
    """One model's experts, E of them with D hidden and F inner sizes in each of `layers`.

    block: the module around the experts within a layer, such as mlp; empty where it is the layer itself.
    activation: what is applied to gate x.
    """

    model_type: str
    layers: tuple[int, ...]
    block: str
    experts: int
    hidden: int
    expert_hidden: int
    activation: Any

    @property
    def sizes(self) -> tuple[int, int]:
        """(D, F)."""
        return self.hidden, self.expert_hidden

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each projection."""
        d, f = self.sizes
        return {"gate": (f, d), "up": (f, d), "down": (d, f)}

    def place(self, layer: int) -> str:
        """The block's name in the model."""
        return ".".join(filter(None, ("model.layers", str(layer), self.block)))

    def fused(self, layer: int) -> dict[str, str]:
        """The names of the two stacked tensors of a layer."""
        return {part: f"{self.place(layer)}.experts.{part}" for part in ("gate_up_proj", "down_proj")}

    def is_expert(self, name: str) -> bool:
        """Whether a tensor of the model is a routed expert's."""
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        inside = ".".join(filter(None, (self.block, "experts.")))
        return found is not None and int(found[1]) in self.layers and found[2].startswith(inside)


def spec_for(config: Any, place: str) -> MoESpec:
    """The experts of a model's config, or of a student's; UserError naming `place` where they cannot be compressed."""
    spec = find_experts(config, place)
    if isinstance(spec, str):
        raise UserError(f"{place}: {spec}")
    return spec


_found: dict[str, "MoESpec | str"] = {}  # by what a config says


def find_experts(config: Any, place: str) -> "MoESpec | str":
    """The same, or why there is none."""
    key = json.dumps({**config.to_dict(), "class": str(type(config))}, default=str, sort_keys=True)
    if key not in _found:
        _found[key] = _find(config, place)
    return _found[key]


def _find(config: Any, place: str) -> "MoESpec | str":
    from megakd.models.hub import model_of
    from megakd.models.student import stock_config

    if hasattr(config, "shared_core"):
        config = stock_config(config)
    family = config.model_type
    model = model_of(config, place)
    blocks = [(name, module) for name, module in model.named_modules() if experts_of(module) is not None]
    if not blocks:
        return f"no layer of this {family} has experts; there is nothing to compress"
    places = [re.fullmatch(r"model\.layers\.(\d+)(?:\.(.+))?", name) for name, _ in blocks]
    if not all(places) or len({place[2] for place in places if place}) > 1:
        names = ", ".join(name for name, _ in blocks[:2])
        return f"{family} keeps experts in {names}, not in one place of its layers"
    modules = [experts_of(module) for _, module in blocks]
    for experts in modules:
        if reason := refusal(experts):
            return f"{family} cannot be compressed: its experts ({type(experts).__name__}) have {reason}"
    sizes = {tuple(experts.down_proj.shape) for experts in modules}
    if len(sizes) > 1:
        return f"{family} has experts of different sizes in its layers: {', '.join(map(str, sorted(sizes)))}"
    count, hidden, inner = sizes.pop()
    layers = tuple(int(place[1]) for place in places if place)
    return MoESpec(family, layers, (places[0] or "")[2] or "", count, hidden, inner, activation_of(modules[0]))


def active_experts(config: Any) -> int:
    """How many experts a token uses."""
    return next(getattr(config, name) for name in ACTIVE if getattr(config, name, None) is not None)


def experts_of(module: Any) -> Any:
    """The experts of a block, whatever they are; None where it has none."""
    return module._modules.get("experts")


def activation_of(experts: Any) -> Any:
    """What is applied to gate x, as a function without weights."""
    return getattr(experts.act_fn, "forward", experts.act_fn)


def refusal(experts: Any) -> str | None:
    """Why an experts module is not the sum of w down(act(gate x) up x), by what it says of itself; None where it is."""
    if any(not hasattr(experts, flag) for flag in COMMON):
        return "no interface that transformers describes"
    for flag, (expected, words) in COMMON.items():
        if getattr(experts, flag) != expected:
            return words
    if type(experts)._apply_gate.__module__ != "transformers.integrations.moe":
        return "an activation of their own (_apply_gate)"
    if unknown := {name for name, _ in experts.named_parameters()} - {"gate_up_proj", "down_proj"}:
        return f"tensors besides gate_up_proj and down_proj: {', '.join(sorted(unknown))}"
    if not callable(getattr(experts, "act_fn", None)):
        return "no act_fn"
    return None
