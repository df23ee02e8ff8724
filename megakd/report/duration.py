"""How long each verb takes: from measured tokens/s where there are some, else from FLOPs at a stated utilisation.

FLOPs of a forward pass per token: 2 for each number of a matrix that the token is multiplied by (of its A experts
alone, the shared core once), and 2 L H d per layer for attention over a sequence of L tokens with H heads of d (half of
the keys are masked; Q·K and the weighted sum take 2 each). A training step takes three forward passes, four with
activation checkpointing (Kaplan et al. 2020, section 2.1); a live teacher adds one of its own.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from megakd.compress.forms import form_flops
from megakd.config.run import RunConfig
from megakd.models.hub import model_of
from megakd.models.shared_core import SharedCoreExperts
from megakd.report.layouts import Fleet
from megakd.system.text import short

HEADERS = ["verb", "tokens", "tokens/s per GPU", "time", "basis"]


class Work(NamedTuple):
    """tokens that a verb computes at `flops` each; verb: of measured.json. gpus: that share them."""

    name: str
    verb: str
    tokens: float
    flops: float
    gpus: int


def forward_flops(config: Any, length: int, place: str) -> float:
    """FLOPs of a model's forward pass per token, in sequences of `length`."""
    model = model_of(config, place)
    active, total = getattr(config, "num_experts_per_tok", 0) or 0, 0.0
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    shared = [module for module in model.modules() if isinstance(module, SharedCoreExperts)]
    # of shared-core layers the core and the factors of active experts, as compress counts them
    for experts in shared:
        core: Any = experts.held[0]
        sizes = core["gate_proj"].in_features, experts.expert_hidden
        total += sum(form_flops(form, projection, active, *sizes) for projection, form in experts.forms.items())
    counted = {id(p) for experts in shared for p in experts.parameters()}
    for name, parameter in model.named_parameters():
        looked_up = parameter is table and table is not head
        of_experts = id(parameter) in counted or ".shared_core." in name or ".dense_experts." in name
        if parameter.ndim < 2 or looked_up or of_experts:
            continue
        share = active / parameter.shape[0] if ".experts." in name and parameter.ndim == 3 else 1.0
        total += 2 * parameter.numel() * share
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return total + 2.0 * length * width * config.num_hidden_layers


def works(config: RunConfig, student: Any, teacher: Any, fleet: Fleet) -> Iterator[Work]:
    """What runs on GPUs. student, teacher: their configs."""
    length, held_out = config.data.sequence_length, config.data.holdout_tokens
    forward = {name: forward_flops(of, length, name) for name, of in (("student", student), ("teacher", teacher))}
    captured = held_out + (0 if config.objective.live else config.data.tokens)
    yield Work("generate-logits", "generate-logits", captured, forward["teacher"], fleet.gpus)
    passes = 4 if config.engine.activation_checkpointing else 3
    flops = passes * forward["student"] + (forward["teacher"] if config.objective.live else 0.0)
    for stage in config.stages:
        tokens = config.steps_of(stage) * config.at(stage).optim.batch_tokens
        yield Work(f"train, stage {stage.name}", "train", tokens, flops, fleet.gpus)
    yield Work("evaluate, per checkpoint", "evaluate", held_out, forward["student"], 1)


def rows(found: list[Work], fleet: Fleet, rates: list[dict[str, Any]], utilization: float) -> Iterator[list[str]]:
    """The table under HEADERS."""
    for work in found:
        measured = [rate for rate in rates if rate["verb"] == work.verb and on_gpu(rate["device"], fleet)]
        if measured:
            rate = measured[-1]["tokens_per_second"]
            basis = f"measured on {measured[-1].get('ranks', 1)} x {measured[-1]['device']}"
        elif fleet.gpu.flops is None:
            yield [work.name, short(work.tokens), "?", "?", "unknown: no FLOP/s of this GPU, nothing measured"]
            continue
        else:
            rate = utilization * fleet.gpu.flops / work.flops
            basis = (
                f"estimate: {short(work.flops)} FLOPs per token at {utilization:.0%} of {short(fleet.gpu.flops)} FLOP/s"
            )
        yield [work.name, short(work.tokens), short(rate), duration(work.tokens / rate / work.gpus), basis]


def on_gpu(device: str, fleet: Fleet) -> bool:
    """Whether a rate was measured on this kind of GPU."""
    return bool(fleet.gpu.device) and re.search(fleet.gpu.device, device) is not None


def duration(seconds: float) -> str:
    """In the unit that gives two or three digits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
