"""MoESpec: where a Hugging Face family keeps its experts, in the hub's files and in transformers' modules."""

from dataclasses import dataclass
from typing import Any

from megakd.errors import UserError


@dataclass(frozen=True)
class MoESpec:
    """One family. Names are those of checkpoint files; `{i}` layer, `{e}` expert, `{p}` gate, up or down.

    Hubs store experts one by one (per_expert); some checkpoints fuse them (gate_up [E, 2F, D], down [E, D, F]).
    """

    model_type: str
    block: str = "model.layers.{i}.mlp"
    per_expert: str = "model.layers.{i}.mlp.experts.{e}.{p}_proj.weight"
    fused_gate_up: str = "model.layers.{i}.mlp.experts.gate_up_proj"
    fused_down: str = "model.layers.{i}.mlp.experts.down_proj"

    def moe_layers(self, config: Any) -> list[int]:
        """Indices of the layers whose MLP is a mixture of experts."""
        step = config.decoder_sparse_step
        return [i for i in range(config.num_hidden_layers) if i not in config.mlp_only_layers and (i + 1) % step == 0]

    def is_expert(self, name: str) -> bool:
        return ".mlp.experts." in name

    def shapes(self, config: Any) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each projection."""
        d, f = config.hidden_size, config.moe_intermediate_size
        return {"gate": (f, d), "up": (f, d), "down": (d, f)}


SPECS = {spec.model_type: spec for spec in (MoESpec("qwen3_moe"),)}


def spec_for(config: Any, place: str) -> MoESpec:
    """The MoESpec of a model's config; UserError naming `place` when the family is not known."""
    if config.model_type not in SPECS:
        raise UserError(f"{place}: model type {config.model_type!r} is not a family compress knows: {', '.join(SPECS)}")
    return SPECS[config.model_type]
