"""Steps that fail: which updates are skipped, and when training goes back to its last checkpoint."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from megakd.config.train import GuardConfig

REJECTED, GRADIENT, SCALE = "rejected", "its gradient is not finite", "its gradient left float16's range"
FEWEST = 8  # losses before one of them can be called a spike


class Health(NamedTuple):
    """recent: losses a token of the last steps that counted; left_out: updates in all, in_a_row: since the last one."""

    recent: tuple[float, ...] = ()
    left_out: int = 0
    in_a_row: int = 0


def wrong_with(loss: float, health: Health, config: GuardConfig) -> str:
    """Why the update of a step with this loss a token should be skipped; "" when it should not.

    A spike: loss - m > (spike - 1) max(|m|, d), with m the median of recent losses and d the median of their distances
    from it. Where no loss is negative d is at most m, and this is loss > spike m. Losses may be negative or near 0 (an
    estimate from draws at alpha = 1), where a multiple of m says nothing.
    """
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if config.spike is not None and len(health.recent) >= FEWEST:
        usual = statistics.median(health.recent)
        scale = max(abs(usual), statistics.median(abs(each - usual) for each in health.recent))
        if loss - usual > (config.spike - 1) * scale:
            return f"its loss is {loss:.4f}, over {usual + (config.spike - 1) * scale:.4f}; usual is {usual:.4f}"
    return ""


def acceptable(sums: Mapping[str, float], tokens: int, health: Health, config: GuardConfig) -> bool:
    """Whether to make the update of a step with these loss sums over `tokens` tokens (`engine.base.Accept`)."""
    return not wrong_with(sums["total"] / tokens, health, config)


def after_step(health: Health, loss: float, left_out: str, config: GuardConfig) -> Health:
    """The health once a step is done; left_out: why its update was not made, or ""."""
    if left_out:
        return health._replace(left_out=health.left_out + 1, in_a_row=health.in_a_row + 1)
    recent = (*health.recent, loss)[-config.window :] if config.spike is not None else ()
    return Health(recent, health.left_out, 0)
