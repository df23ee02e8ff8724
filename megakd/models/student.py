"""The compressed student as a Hugging Face model: the family's own, with shared-core experts in its MoE blocks.

Router, auxiliary loss, shared experts, attention: all else is the family's. `from_pretrained`, `save_pretrained` and
`generate` work as for any transformers model. This file and shared_core.py are in every model folder, so that
`trust_remote_code=True` loads it where MegaKD is not installed: hence the relative import.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.activations import ACT2FN

from .shared_core import PROJECTIONS, DenseExperts, Form, SharedCoreExperts, core_shape

SUFFIX = "_shared_core"


class SharedCoreConfig:
    """What a student's config adds to its family's.

    shared_core: {"layers": {"0": {"gate": {"shape", "input_rank", "output_rank", "groups"}, "up": …, "down": …}, …},
    "dense_experts": {"0": [17, …], …}}; layers that are not named stay the family's.
    """

    shared_core: dict[str, Any] | None = None

    def forms(self, layer: int) -> dict[str, Form] | None:
        """The form of each projection of a layer; None where the layer has no shared core."""
        layers = (self.shared_core or {}).get("layers", {})
        found = layers.get(str(layer))
        return None if found is None else {p: Form(**found[p]) for p in PROJECTIONS}

    def dense_experts(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that are kept as they are."""
        return tuple((self.shared_core or {}).get("dense_experts", {}).get(str(layer), ()))


class SharedCoreModel:
    """Puts the shared-core experts of the config into the family's blocks."""

    def __init__(self, config: Any):
        super().__init__(config)
        model: Any = self
        for index, layer in enumerate(model.model.layers):
            forms = config.forms(index)
            if forms is not None:
                share_core(layer.mlp, forms, config.dense_experts(index), config.hidden_act)
        model.post_init()


def share_core(block: Any, forms: Mapping[str, Form], exempt: tuple[int, ...], activation: str) -> None:
    """Replace a family block's experts by shared-core ones, in place."""
    stock = block.experts.down_proj
    experts, hidden, expert_hidden = getattr(stock, "ds_shape", stock.shape)  # ZeRO-3 has cut it already
    act_fn = ACT2FN[activation].forward
    shapes = {p: core_shape(form, p, hidden, expert_hidden) for p, form in forms.items()}
    core = nn.ModuleDict({f"{p}_proj": nn.Linear(d_in, d_out, bias=False) for p, (d_out, d_in) in shapes.items()})
    kept = DenseExperts(exempt, hidden, expert_hidden, act_fn) if exempt else None
    block.shared_core = core
    block.experts = SharedCoreExperts(experts, hidden, expert_hidden, forms, act_fn, core, kept)
    if kept is not None:
        block.dense_experts = kept


class SharedCoreQwen3MoeConfig(SharedCoreConfig, Qwen3MoeConfig):
    model_type = "qwen3_moe" + SUFFIX


class SharedCoreQwen3MoeForCausalLM(SharedCoreModel, Qwen3MoeForCausalLM):
    config_class = SharedCoreQwen3MoeConfig


class SharedCoreQwen2MoeConfig(SharedCoreConfig, Qwen2MoeConfig):
    model_type = "qwen2_moe" + SUFFIX


class SharedCoreQwen2MoeForCausalLM(SharedCoreModel, Qwen2MoeForCausalLM):
    config_class = SharedCoreQwen2MoeConfig


class SharedCoreMixtralConfig(SharedCoreConfig, MixtralConfig):
    model_type = "mixtral" + SUFFIX


class SharedCoreMixtralForCausalLM(SharedCoreModel, MixtralForCausalLM):
    config_class = SharedCoreMixtralConfig


class SharedCoreOlmoeConfig(SharedCoreConfig, OlmoeConfig):
    model_type = "olmoe" + SUFFIX


class SharedCoreOlmoeForCausalLM(SharedCoreModel, OlmoeForCausalLM):
    config_class = SharedCoreOlmoeConfig


class SharedCoreDeepseekV3Config(SharedCoreConfig, DeepseekV3Config):
    model_type = "deepseek_v3" + SUFFIX


class SharedCoreDeepseekV3ForCausalLM(SharedCoreModel, DeepseekV3ForCausalLM):
    config_class = SharedCoreDeepseekV3Config


STUDENTS: dict[str, type[Any]] = {
    "qwen3_moe": SharedCoreQwen3MoeForCausalLM,
    "qwen2_moe": SharedCoreQwen2MoeForCausalLM,
    "mixtral": SharedCoreMixtralForCausalLM,
    "olmoe": SharedCoreOlmoeForCausalLM,
    "deepseek_v3": SharedCoreDeepseekV3ForCausalLM,
}
for _model in STUDENTS.values():
    # save_pretrained writes this code next to the weights
    _model.config_class.register_for_auto_class("AutoConfig")
    _model.register_for_auto_class("AutoModelForCausalLM")
    if __package__ == "megakd.models":  # not for the copy in a model's folder, next to which MegaKD may be installed
        AutoConfig.register(_model.config_class.model_type, _model.config_class)
        AutoModelForCausalLM.register(_model.config_class, _model)


def student_config(
    teacher: Any, layers: Mapping[int, Mapping[str, Form]], exempt: Mapping[int, tuple[int, ...]] | None = None
) -> Any:
    """The student's config for a teacher's: the same model, with shared-core experts in these layers."""
    model = STUDENTS[teacher.model_type]
    shared: dict[str, Any] = {
        "layers": {str(i): {p: form._asdict() for p, form in forms.items()} for i, forms in layers.items()}
    }
    kept = {str(i): list(ids) for i, ids in (exempt or {}).items() if ids}
    if kept:
        shared["dense_experts"] = kept
    return model.config_class(**_fields(teacher), shared_core=shared, architectures=[model.__name__])


def stock_config(student: Any) -> Any:
    """The config of the stock model that a student expands to."""
    family: Any = type(student).__mro__[2]
    fields = {name: value for name, value in _fields(student).items() if name != "shared_core"}
    return family(**fields, architectures=[STUDENTS[family.model_type].__mro__[2].__name__])


def _fields(config: Any) -> dict[str, Any]:
    fields = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(name, None)
    return fields
