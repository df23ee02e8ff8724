"""The name in 0.1 of `megakd.integrations.hf_trainer`."""

from megakd.integrations.hf_trainer import DistillationTrainer, DistillationTrainingArguments

__all__ = ["DistillationTrainer", "DistillationTrainingArguments"]
