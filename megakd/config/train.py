"""How training runs: optimizer, stages, engine, checkpoints, evaluation, logs."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from megakd.config.base import Count, Section, mutable
from megakd.config.precisions import QuantizeField


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(5e-5, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of AdamW's two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.1, ge=0, description="of matrices; vectors and routers have none")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate over a stage")
    warmup_steps: int = Field(100, ge=0, description="linear warmup of each stage, at most half of its steps")
    final_lr_ratio: float = Field(0.1, ge=0, le=1, description="learning rate at a stage's end, relative to lr")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the gradient")
    batch_tokens: Count = Field(1048576, ge=1, description="positions per optimizer step over all ranks")
    micro_batch: int = mutable(1, ge=1, description="sequences per forward pass on each rank")


class LrRule(Section):
    """Parameters whose name `pattern` (a regex, searched) finds train at lr * lr_multiplier; 0 freezes them."""

    pattern: str = Field(description="regular expression, searched in the parameter's name")
    lr_multiplier: float = Field(ge=0, description="learning rate relative to lr; 0 freezes")


LONGEST_NAME = 200  # bytes; file systems take 255, and names of files get endings


def _folder_name(name: str) -> str:
    """A stage's name, which is that of the folder of its checkpoints; ValueError for one that would be lost there."""
    if name.startswith("."):
        raise ValueError("a stage is a folder of checkpoints, whose name must not begin with a dot; try all")
    if ".tmp-" in name or name == "best.json":  # of folders half written, and of the best checkpoint
        raise ValueError("this name has a meaning of its own among the checkpoints; give another, like all")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"too long for a folder: {len(name.encode())} bytes, at most {LONGEST_NAME}")
    return name


class StageConfig(Section):
    """A stretch of training with its own length and rules; exactly one of tokens, steps and epochs is its length.

    Adam's moments and fp32 masters of parameters that a stage goes on training come from the stage before.
    """

    name: Annotated[str, AfterValidator(_folder_name)] = Field(
        pattern=r"^[\w.-]+$", description="its folder of checkpoints"
    )
    tokens: Count | None = Field(None, ge=1, description="length in positions, rounded up to whole steps")
    steps: Count | None = Field(None, ge=1, description="length in optimizer steps")
    epochs: float | None = Field(None, gt=0, description="length in passes over the run's training samples")
    lr: float | None = Field(None, gt=0, description="instead of optim.lr")
    lr_multipliers: tuple[LrRule, ...] = Field(
        (), description="learning rates by parameter name; the first rule that matches counts"
    )
    objective: dict[str, Any] = Field(
        default={}, description='fields of the run\'s objective that differ, {"alpha": 0.9}'
    )
    optim: dict[str, Any] = Field(default={}, description="fields of the run's optim that differ")
    quantize: QuantizeField = Field(
        None,
        description="every forward pass rounds the student's weights to these precisions, gradients pass straight "
        'through: int8, fp8, int4, int3, or {"core": "int4", "factors": "int8"} of parts; null: weights as they are',
    )
    config: str | None = Field(None, description="a DeepSpeed file of its own")
    deepspeed: dict[str, Any] | None = Field(None, description="the content of that file, copied when a run is made")

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        given = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of tokens, steps and epochs, not {' and '.join(given) or 'none of them'}")
        if self.lr is not None and "lr" in self.optim:
            raise ValueError("lr is there twice, in optim too; delete one")
        return self


class GuardConfig(Section):
    """What happens at steps whose loss or gradient is not finite, or whose loss jumps.

    float16's loss scaler skips updates of its own, besides.
    """

    nonfinite: Literal["stop", "skip"] = mutable(
        "stop", description="stop: end the run, weights as they were; skip the update and go on with the next data"
    )
    spike: float | None = mutable(
        None,
        gt=1,
        description="skip updates whose loss per token is more than so many times the median of the last `window` "
        "steps; "
        "null: never",
    )
    window: int = mutable(64, ge=8, description="steps of that median")
    rollback: int = mutable(
        0,
        ge=0,
        description="after so many skipped updates in a row weights and moments go back to the stage's last "
        "checkpoint, "
        "while step, schedule and data go on; 0: never",
    )


class EngineConfig(Section):
    """What executes a step: one process, or DeepSpeed on any number of ranks."""

    kind: Literal["local", "deepspeed"] = Field("deepspeed", description="local: one process, no DeepSpeed")
    config: str = Field("zero3", description="a DeepSpeed file: a name in ds_configs/, or a path")
    deepspeed: dict[str, Any] | None = Field(None, description="the content of that file, copied when a run is made")
    ranks: int = mutable(1, ge=1, description="processes on this machine, one per GPU")
    expert_parallel: int = mutable(
        1,
        ge=1,
        description="neighbouring ranks that share the experts, each keeping its part of them (all-to-all dispatch); "
        "1: "
        "every rank keeps or partitions all of them",
    )
    activation_checkpointing: bool = mutable(
        False, description="recompute each layer's activations in the backward pass instead of keeping them"
    )
    offload_teacher: bool = mutable(
        False,
        description="keep the layers of a live teacher in CPU memory and copy them to the device one at a time; where "
        "its "
        "routers train, they are computed again in the backward pass",
    )
    teacher_parallel: Literal["replica", "zero3"] = mutable(
        "replica",
        description="replica: a live teacher lies whole on every rank; zero3: cut into pieces over all ranks, gathered "
        "layer by layer (engine.kind=deepspeed, objective.kind=online)",
    )


class CheckpointConfig(Section):
    """When checkpoints are written, and how many stay."""

    every_steps: int = mutable(500, ge=1, description="steps between checkpoints, besides the end of each stage")
    every_epochs: int = mutable(
        0, ge=0, description="epochs between further checkpoints, in stages whose length is epochs; 0: none"
    )
    keep: int = mutable(0, ge=0, description="how many of the newest stay; 0: all")


# Measures of the validation set by which a checkpoint can be the best, and whether higher is better.
HIGHER_IS_BETTER = {"kl": False, "perplexity": False, "bits_per_byte": False, "nll": False, "top1": True, "topk": True}


class EvalConfig(Section):
    """What is measured of a model besides the validation set, when and how (docs/evaluation.md)."""

    every_steps: int = mutable(
        0,
        ge=0,
        description="optimizer steps between two measurements of the student's perplexity on the validation set by the "
        "training itself, and at the end of each stage; 0: none. `evaluate` and `watch` measure checkpoints",
    )
    batch_size: int = mutable(8, ge=1, description="sequences of the validation set per forward pass")
    tasks: tuple[str, ...] = mutable((), description="tasks of lm-eval, its own or those below task_folder")
    task_folder: str | None = mutable(None, description="a folder of lm-eval task files (YAML)")
    limit: int | None = mutable(None, ge=1, description="questions of each task, the first ones; null: all")
    few_shot: int | None = mutable(None, ge=0, description="examples before a question; null: as each task says")
    task_batch_size: int = mutable(8, ge=1, description="requests of lm-eval per forward pass")
    attention: int = mutable(
        0, ge=0, description="sequences on which attention is compared with the teacher's; 0: none"
    )
    best: str = mutable(
        "auto",
        description="the measure whose best checkpoint `watch` keeps from rotation: kl, perplexity, bits_per_byte, "
        "nll, "
        "top1, topk, or TASK/METRIC like hellaswag/acc_norm; auto: kl where teacher logits of the validation set are "
        "cached, else perplexity",
    )
    poll_seconds: float = mutable(5.0, gt=0, description="seconds between looks for new checkpoints")


class LogConfig(Section):
    """Where metrics go besides RUN/metrics.jsonl."""

    every_steps: int = mutable(10, ge=1, description="steps between lines at the terminal")
    tensorboard: bool = mutable(True, description="write RUN/tensorboard")
    wandb: Literal["offline", "online", "disabled"] = mutable(
        "offline", description="Weights & Biases; the variable WANDB_MODE counts instead where it is set"
    )
    wandb_project: str = mutable("megakd", pattern=r"^[^/\\#?%:]{1,128}$", description="project in W&B")
