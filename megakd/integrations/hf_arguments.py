"""The loss and the parameter groups as arguments of Hugging Face's Trainer."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from megakd.config.objective import CachedConfig
from megakd.config.train import LrRule
from megakd.errors import UserError


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """TrainingArguments and the loss: (1 - alpha) CE + alpha T^2 divergence, as in megakd.config.objective."""

    distillation_alpha: float = field(default=0.5, metadata={"help": "Share of the teacher in the loss, 0 to 1."})
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Of both softmaxes; ghost and hybrid need a tail at it in the targets."}
    )
    distillation_tail: str = field(
        default="ghost", metadata={"help": "What stands for unstored tokens: ghost, truncated, sampled or hybrid."}
    )
    distillation_divergence: str = field(default="kl", metadata={"help": "kl, reverse_kl, jsd, skew_kl or tvd."})
    distillation_mix: float = field(
        default=0.5, metadata={"help": "The teacher's share in jsd's and skew_kl's mixture."}
    )
    lr_multipliers: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={"help": 'JSON list of {"pattern": REGEX, "lr_multiplier": NUMBER}; first match counts, 0 freezes.'},
    )

    def __post_init__(self) -> None:
        if isinstance(self.lr_multipliers, str):
            try:
                self.lr_multipliers = json.loads(self.lr_multipliers)
            except json.JSONDecodeError as error:
                raise UserError(f"lr_multipliers: {self.lr_multipliers!r} is not JSON: {error}") from error
        self.objective_config()
        self.lr_rules()
        super().__post_init__()

    def objective_config(self) -> CachedConfig:
        names = ("alpha", "temperature", "tail", "divergence", "mix")
        values = {name: getattr(self, f"distillation_{name}") for name in names}
        return checked(lambda: CachedConfig.model_validate(values), "distillation_")

    def lr_rules(self) -> tuple[LrRule, ...]:
        rules = TypeAdapter(tuple[LrRule, ...])
        return checked(lambda: rules.validate_python(self.lr_multipliers or []), "lr_multipliers.")


def check_arguments(args: Any, lr_multipliers: list[dict[str, Any]] | None) -> DistillationTrainingArguments:
    """With the trainer's own `lr_multipliers`; UserError for settings that would change the loss, or have no effect."""
    if not isinstance(args, DistillationTrainingArguments):
        raise UserError(f"args: DistillationTrainingArguments, not {type(args).__name__}")
    if args.n_gpu > 1:
        raise UserError(
            f"DistillationTrainer: one process for {args.n_gpu} GPUs; start one for each: torchrun, accelerate launch"
        )
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise UserError("average_tokens_across_devices=False: the loss is a mean over all ranks' labels; leave it out")
    if args.label_smoothing_factor:
        raise UserError("label_smoothing_factor: the loss knows no label smoothing; leave it out")
    if lr_multipliers is None:
        return args
    if args.lr_multipliers and args.lr_multipliers != lr_multipliers:
        raise UserError("lr_multipliers: the trainer's and those of args differ; leave one of both out")
    args = copy.copy(args)  # the caller's stay as they are
    args.lr_multipliers = lr_multipliers
    args.lr_rules()
    return args


def checked(make: Callable[[], Any], prefix: str) -> Any:
    """What `make` gives; pydantic's first complaint as a UserError that names the argument."""
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{prefix}{'.'.join(map(str, first['loc']))}".rstrip("._")
        raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ')}, got {first['input']!r}") from None
