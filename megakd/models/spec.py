"""MoESpec: where a Hugging Face family keeps its experts, in the hub's files and in transformers' modules."""

import re
from dataclasses import dataclass
from typing import Any

from megakd.errors import UserError


@dataclass(frozen=True)
class MoESpec:
    """One family. Names are those of checkpoint files; `{i}` layer, `{e}` expert, `{p}` the projection's name there.

    Hubs store experts one by one (per_expert); some checkpoints fuse them (gate_up [E, 2F, D], down [E, D, F]).
    experts, expert_hidden: the config's fields for E and F. renamed: (in the hub's files, in transformers' modules).
    """

    model_type: str
    block: str = "model.layers.{i}.mlp"
    per_expert: str = "model.layers.{i}.mlp.experts.{e}.{p}.weight"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_gate_up: str = "model.layers.{i}.mlp.experts.gate_up_proj"
    fused_down: str = "model.layers.{i}.mlp.experts.down_proj"
    experts: str = "num_experts"
    expert_hidden: str = "moe_intermediate_size"
    renamed: tuple[str, str] | None = None

    def moe_layers(self, config: Any) -> list[int]:
        """Indices of the layers whose MLP is a mixture of experts."""
        layers = range(config.num_hidden_layers)
        if hasattr(config, "decoder_sparse_step"):
            step = config.decoder_sparse_step
            return [i for i in layers if i not in config.mlp_only_layers and (i + 1) % step == 0]
        return list(layers[getattr(config, "first_k_dense_replace", 0) :])

    def num_experts(self, config: Any) -> int:
        return getattr(config, self.experts)

    def sizes(self, config: Any) -> tuple[int, int]:
        """(D, F)."""
        return config.hidden_size, getattr(config, self.expert_hidden)

    def shapes(self, config: Any) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each projection."""
        d, f = self.sizes(config)
        return {"gate": (f, d), "up": (f, d), "down": (d, f)}

    def expert_name(self, layer: int, expert: int, projection: str) -> str:
        """The name of one expert's matrix in the hub's layout."""
        return self.per_expert.format(i=layer, e=expert, p=getattr(self, projection))

    def is_expert(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is a routed expert's, in either layout."""
        return re.search(r"\.experts\.(\d+\.|gate_up_proj$|down_proj$)", name) is not None

    def module_name(self, name: str) -> str:
        """The name of a checkpoint's tensor in transformers' modules."""
        return name.replace(*self.renamed) if self.renamed else name

    def hub_name(self, name: str) -> str:
        """The name of a module's tensor in the hub's files."""
        return name.replace(self.renamed[1], self.renamed[0]) if self.renamed else name


SPECS = {
    spec.model_type: spec
    for spec in (
        MoESpec("qwen3_moe"),
        MoESpec("qwen2_moe"),
        MoESpec(
            "mixtral",
            per_expert="model.layers.{i}.block_sparse_moe.experts.{e}.{p}.weight",
            gate="w1",
            up="w3",
            down="w2",
            experts="num_local_experts",
            expert_hidden="intermediate_size",
            renamed=(".block_sparse_moe.", ".mlp."),
        ),
        MoESpec("olmoe", expert_hidden="intermediate_size"),
        MoESpec("deepseek_v3", experts="n_routed_experts"),
    )
}


def spec_for(config: Any, place: str) -> MoESpec:
    """The MoESpec of a teacher's or student's config; UserError naming `place` when the family is not known."""
    family = config.model_type.removesuffix("_shared_core")
    if family not in SPECS:
        raise UserError(f"{place}: model type {config.model_type!r} is not a family compress knows: {', '.join(SPECS)}")
    return SPECS[family]


def outside(config: Any, name: str) -> bool:
    """Whether a checkpoint's tensor belongs to a layer beyond the model's, as DeepSeek's for multi-token prediction."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= config.num_hidden_layers
