"""How training runs: optimizer, stages, engine, checkpoints, evaluation, logs."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from megakd.config.base import Count, Section, live


class OptimConfig(Section):
    """AdamW. batch_tokens: positions a step over all ranks; micro_batch: windows a rank runs at once."""

    lr: float = Field(5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    final_lr_ratio: float = Field(0.1, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)
    batch_tokens: Count = Field(1048576, ge=1)
    micro_batch: int = live(1, ge=1)


class LrRule(Section):
    """Parameters whose name `pattern` (a regex, searched) finds train at lr * lr_multiplier; 0 freezes them."""

    pattern: str
    lr_multiplier: float = Field(ge=0)


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
    """A stretch of training with its own length and rules; the first rule that matches a parameter counts.

    Exactly one of tokens (positions), steps and epochs (passes over the run's training samples) says how long it is.
    lr, objective, optim: what differs from the run's sections, like {"alpha": 0.9} or {"batch_tokens": 524288}.
    config: a DeepSpeed file of its own, copied into `deepspeed`.
    Adam's moments and fp32 masters of parameters that a stage goes on training come from the stage before.
    """

    name: Annotated[str, AfterValidator(_folder_name)] = Field(pattern=r"^[\w.-]+$")
    tokens: Count | None = Field(None, ge=1)
    steps: Count | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    lr: float | None = Field(None, gt=0)
    lr_multipliers: tuple[LrRule, ...] = ()
    objective: dict[str, Any] = Field(default={})
    optim: dict[str, Any] = Field(default={})
    config: str | None = None
    deepspeed: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        given = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of tokens, steps and epochs, not {' and '.join(given) or 'none of them'}")
        if self.lr is not None and "lr" in self.optim:
            raise ValueError("lr is there twice, in optim too; delete one")
        return self


class GuardConfig(Section):
    """What happens to a step whose loss or gradient is not finite, or whose loss jumps.

    nonfinite: stop ends the run, weights as they were; skip leaves out the update and goes on with the next data.
    spike: skip updates whose loss per token is more than so many times the median of the last `window` steps; losses
    below and near 0 are measured as `engine/guard.py` says.
    rollback: after so many updates left out in a row weights and moments go back to the stage's last checkpoint, while
    step, schedule and data go on; 0 never does. float16's loss scaler leaves out updates of its own.
    """

    nonfinite: Literal["stop", "skip"] = live("stop")
    spike: float | None = live(None, gt=1)
    window: int = live(64, ge=8)
    rollback: int = live(0, ge=0)


class EngineConfig(Section):
    """local: one process. deepspeed: `config` names a file of ds_configs/ or a path, copied into `deepspeed`.

    expert_parallel: how many neighbouring ranks share the experts, each keeping its part of them (deepspeed alone);
    tokens travel to their experts. 1: every rank keeps or partitions all of them. May change with `ranks`.
    activation_checkpointing: forget what layers computed, and compute it again in the backward pass.
    offload_teacher: the layers of a teacher that is asked while training lie in CPU memory, and come to the device one
    at a time; where its routers train they are computed again in the backward pass.
    """

    kind: Literal["local", "deepspeed"] = "deepspeed"
    config: str = "zero3"
    deepspeed: dict[str, Any] | None = None
    ranks: int = live(1, ge=1)
    expert_parallel: int = live(1, ge=1)
    activation_checkpointing: bool = live(False)
    offload_teacher: bool = live(False)


class CheckpointConfig(Section):
    """every_steps: besides the end of each stage. keep: how many of the newest stay, 0 keeps all."""

    every_steps: int = live(500, ge=1)
    keep: int = live(0, ge=0)


# Measures of the hold-out by which a checkpoint can be the best, and whether higher is better.
HIGHER_IS_BETTER = {"kl": False, "perplexity": False, "bits_per_byte": False, "nll": False, "top1": True, "topk": True}


class EvalConfig(Section):
    """What `evaluate` and `watch` measure beside the hold-out, and how (docs/evaluation.md).

    batch_size: windows of the hold-out at once. tasks: of lm-eval, its own or those of YAML files below task_folder.
    limit: questions of each task, the first ones, null: all. few_shot: examples before a question, null: as each task
    says. task_batch_size: requests of lm-eval at once.
    attention: windows of the hold-out, the first ones, on which attention is compared with the teacher's; 0: none.
    best: the measure by which `watch` keeps a checkpoint from rotation: kl, perplexity, bits_per_byte, nll, top1, topk,
    or TASK/METRIC like hellaswag/acc_norm; auto: kl where held-out teacher targets are stored, else perplexity.
    poll_seconds: how often it looks for new ones.
    """

    batch_size: int = live(8, ge=1)
    tasks: tuple[str, ...] = live(())
    task_folder: str | None = live(None)
    limit: int | None = live(None, ge=1)
    few_shot: int | None = live(None, ge=0)
    task_batch_size: int = live(8, ge=1)
    attention: int = live(0, ge=0)
    best: str = live("auto")
    poll_seconds: float = live(5.0, gt=0)


class LogConfig(Section):
    every_steps: int = live(10, ge=1)
    tensorboard: bool = live(True)
    wandb: Literal["offline", "online", "disabled"] = live("offline")
    wandb_project: str = live("megakd", pattern=r"^[^/\\#?%:]{1,128}$")
