"""The DeepSpeed configuration of a stage: the user's file plus what the run decides, and nothing decided twice."""

from typing import Any

from megakd.config.run import RunConfig
from megakd.errors import UserError

# DeepSpeed key → the run's field that decides it. A file may say "auto" there, as Hugging Face users write.
OWNED = {
    "train_batch_size": "optim.batch_tokens",
    "train_micro_batch_size_per_gpu": "optim.micro_batch",
    "gradient_accumulation_steps": "optim.batch_tokens and optim.micro_batch",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.clip_norm",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "expert_parallel": "engine.expert_parallel",
}


def deepspeed_config(config: RunConfig, ranks: int, windows: int) -> dict[str, Any]:
    """A complete DeepSpeed configuration; windows: how many make one step over all ranks.

    Raises UserError when the file sets what the run decides, naming both places.
    """
    user = dict(config.engine.deepspeed or {})
    for key, field in OWNED.items():
        if key in user and user[key] != "auto":
            raise UserError(
                f"{config.engine.config} (DeepSpeed file): {key!r} is decided by the run's {field}; delete it there"
            )
        user.pop(key, None)
    micro = config.optim.micro_batch
    zero = {"stage": 0, **user.pop("zero_optimization", {})}
    unset = [key for key, value in zero.items() if value == "auto"]
    if unset:
        raise UserError(
            f'{config.engine.config} (DeepSpeed file): zero_optimization.{unset[0]} is "auto", which MegaKD does not '
            "fill in; give a value, or delete it for DeepSpeed's default"
        )
    return {
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs where the masters are, and compiles nothing
        **user,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": windows // (ranks * micro),
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "fp16": {"enabled": config.model.dtype == "float16"},
    }
