"""From a run's configuration to its objective."""

from typing import Any

from megakd.config.objective import CachedConfig, OnlineConfig
from megakd.config.run import RunConfig
from megakd.objectives.base import Objective
from megakd.objectives.cached import CachedDistillation
from megakd.objectives.online import OnlineDistillation
from megakd.objectives.sar import SarDistillation


def build(
    config: RunConfig, student: Any, teacher: Any, facts: dict[str, Any], teacher_vocab_size: int | None = None
) -> Objective:
    """The objective of a stage (`RunConfig.at`) around loaded models, or empty ones on the meta device.

    teacher: None where targets are stored. facts: those of the data's manifest. teacher_vocab_size: of a teacher with
    another tokenizer than the student's, which is the data's.
    """
    objective = config.objective
    if isinstance(objective, CachedConfig):
        return CachedDistillation(student, objective, facts)
    size = facts["tokenizer"]["vocab_size"]
    if isinstance(objective, OnlineConfig):
        return OnlineDistillation(student, teacher, objective, size, teacher_vocab_size)
    return SarDistillation(student, teacher, objective, size, teacher_vocab_size)
