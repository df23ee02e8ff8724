"""The compressed student as a Hugging Face model: the family's own, with shared-core MoE blocks."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from megakd.models.shared_core import SharedCoreMoeBlock


class SharedCoreQwen3MoeConfig(Qwen3MoeConfig):
    """Qwen3MoeConfig plus the wrapper rank."""

    model_type = "qwen3_moe_shared_core"

    shared_core_rank: int = 64

    def dense(self) -> Qwen3MoeConfig:
        """The config of the stock model that the student expands to."""
        fields = self.to_dict()
        for name in ("shared_core_rank", "model_type", "architectures", "transformers_version"):
            fields.pop(name, None)
        return Qwen3MoeConfig(**fields, architectures=["Qwen3MoeForCausalLM"])


class SharedCoreQwen3MoeForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3-MoE whose expert matrices are a shared core with low-rank wrappers; all else is the family's.

    `from_pretrained`, `save_pretrained` and `generate` work as for any transformers model.
    """

    config_class = SharedCoreQwen3MoeConfig

    def __init__(self, config: SharedCoreQwen3MoeConfig):
        super().__init__(config)
        for layer in self.model.layers:
            if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                layer.mlp = SharedCoreMoeBlock(
                    layer.mlp.gate,
                    config.num_experts,
                    config.hidden_size,
                    config.moe_intermediate_size,
                    config.shared_core_rank,
                    config.hidden_act,
                )
        self.post_init()


AutoConfig.register(SharedCoreQwen3MoeConfig.model_type, SharedCoreQwen3MoeConfig)
AutoModelForCausalLM.register(SharedCoreQwen3MoeConfig, SharedCoreQwen3MoeForCausalLM)


def student_config(teacher: Any, rank: int) -> SharedCoreQwen3MoeConfig:
    """The student's config for a teacher's: the same shape, with wrappers of `rank`."""
    fields = teacher.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    return SharedCoreQwen3MoeConfig(**fields, shared_core_rank=rank, architectures=["SharedCoreQwen3MoeForCausalLM"])
