"""The name in 0.1 of what is in `megakd.system.logging`, `megakd.system.text` and `megakd.tracking` now."""

from megakd.system.logging import Progress, say
from megakd.system.text import cell, clock, finite, short, table
from megakd.tracking import MetricLog, log_evaluation, wandb_id

__all__ = ["MetricLog", "Progress", "cell", "clock", "finite", "log_evaluation", "say", "short", "table", "wandb_id"]
