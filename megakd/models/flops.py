"""FLOPs per token of a forward pass and of a training step, from a model's config alone.

A forward pass takes 2 for each number of a matrix that the token is multiplied by (of its A experts alone, the shared
core once), and 2 L H d per layer for attention over a sequence of L tokens with H heads of d (half of the keys are
masked; Q·K and the weighted sum take 2 each). A training step takes three forward passes, four with activation
checkpointing (Kaplan et al. 2020, section 2.1); a live teacher adds one of its own.
"""

from typing import Any

from megakd.config.run import RunConfig
from megakd.models.hub import model_of
from megakd.models.shared_core import SharedCoreExperts, stored_parameters


def step_flops(config: RunConfig, student: Any, teacher: Any | None) -> float:
    """Of a training step per token. student, teacher: configs of models; teacher: None with cached logits."""
    length = config.data.sequence_length
    passes = 4 if config.engine.activation_checkpointing else 3
    live = 0.0 if teacher is None else forward_flops(teacher, length, "the teacher")
    return passes * forward_flops(student, length, "the student") + live


def forward_flops(config: Any, length: int, place: str) -> float:
    """Of a forward pass per token, in sequences of `length`; UserError naming `place` where config is of no model."""
    model, text = model_of(config, place), config.get_text_config()
    active = getattr(text, "num_experts_per_tok", 0) or 0
    table, head = (getattr(of(), "weight", None) for of in (model.get_input_embeddings, model.get_output_embeddings))
    shared = [module for module in model.modules() if isinstance(module, SharedCoreExperts)]
    total = 0.0
    for experts in shared:
        core: Any = experts.held[0]
        sizes = active, core["gate_proj"].in_features, experts.expert_hidden
        total += sum(2.0 * stored_parameters(form, projection, *sizes) for projection, form in experts.forms.items())
    counted = {id(p) for experts in shared for p in experts.parameters()}
    for name, parameter in model.named_parameters():
        looked_up = parameter is table and table is not head
        of_experts = id(parameter) in counted or ".shared_core." in name or ".dense_experts." in name
        if parameter.ndim < 2 or looked_up or of_experts:
            continue
        share = active / parameter.shape[0] if ".experts." in name and parameter.ndim == 3 else 1.0
        total += 2 * parameter.numel() * share
    heads = getattr(text, "num_attention_heads", 0)
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1))
    return total + 2.0 * length * width * text.num_hidden_layers
