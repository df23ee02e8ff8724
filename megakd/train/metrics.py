"""Time the steps of a stage; log their metrics and print a progress line."""

import resource
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from megakd.measured import Stopwatch
from megakd.system.logging import say
from megakd.system.text import clock, short
from megakd.tracking import MetricLog


class StepRecord(NamedTuple):
    """What is logged of a step.

    stage_step, step: those done in the stage, in all. seen: tokens in all. tokens: the step's counted ones.
    norm: of the gradient. damaged: samples that the step skipped. left_out: updates that were skipped so far.
    norms, validation: more of them, measures of the validation set, by their names in the log.
    competence: the curriculum's at the step's first sample, if there is one.
    """

    stage_step: int
    step: int
    seen: int
    tokens: int
    sums: Mapping[str, float]
    lr: float
    norm: float
    damaged: int = 0
    left_out: int = 0
    norms: Mapping[str, float] = MappingProxyType({})
    validation: Mapping[str, float] = MappingProxyType({})
    competence: float | None = None


class StageWatch:
    """Times the steps of a stage; hands their metrics to a MetricLog and a line to the terminal (on the first rank)."""

    def __init__(self, stage: str, steps: int, first_step: int, every_steps: int, log: MetricLog | None):
        self.stage, self.steps, self.first_step, self.every_steps, self.log = stage, steps, first_step, every_steps, log
        self.start = self.asked = time.perf_counter()
        self.waited = self.seconds = 0.0
        self.damaged = 0
        self.measured = Stopwatch()

    def data_ready(self) -> None:
        """The step's data is here; what passed since the last step was waiting."""
        self.waited = time.perf_counter() - self.asked

    def resume_clock(self) -> None:
        """Skip what passed since the last step, such as saving a checkpoint."""
        self.asked = time.perf_counter()

    def step_done(self) -> None:
        """The step is made; what comes now is not of its time."""
        now = time.perf_counter()
        self.seconds = now - self.asked
        self.asked = now

    def write(self, record: StepRecord) -> None:
        """Log a step's metrics; the number of damaged samples since this process began the stage."""
        if self.log is None:
            return
        self.measured.add(record.tokens, self.seconds)
        self.damaged += record.damaged
        means = {
            "loss" if name == "total" else name: value / max(record.tokens, 1) for name, value in record.sums.items()
        }
        counts = {"damaged_samples": self.damaged, "left_out_updates": record.left_out}
        timing = {
            "tokens_per_second": record.tokens / self.seconds,
            "data_wait_share": self.waited / self.seconds,
            "memory_gb": peak_memory_gb(),
        }
        numbers: dict[str, Any] = {"stage": self.stage, "tokens": record.seen}
        numbers |= {**means, "lr": record.lr, "grad_norm": record.norm, **record.norms, **record.validation}
        numbers |= {} if record.competence is None else {"competence": record.competence}
        numbers |= {name: count for name, count in counts.items() if count}
        numbers |= timing
        self.log.write(record.step, numbers)
        if record.stage_step % self.every_steps == 0 or record.stage_step == self.steps:
            seconds_per_step = (time.perf_counter() - self.start) / (record.stage_step - self.first_step)
            eta = seconds_per_step * (self.steps - record.stage_step)
            say(progress_line(record, self.stage, self.steps, means, timing, eta))


def progress_line(
    record: StepRecord, stage: str, steps: int, means: Mapping[str, float], timing: Mapping[str, float], eta: float
) -> str:
    """all 30/60 50% | loss 1.2346 … | … | ETA 0:12"""
    done = record.stage_step
    losses = " ".join(f"{name} {value:.4f}" for name, value in means.items())
    parts = [f"{stage} {done}/{steps} {done / steps:.0%}", losses or "nothing to learn from"]
    parts += [f"lr {record.lr:.2e}", f"grad {record.norm:.2f}"]
    parts += [f"{short(timing['tokens_per_second'])} tokens/s", f"wait {timing['data_wait_share']:.1%}"]
    parts += [f"{timing['memory_gb']:.2f} GB", f"ETA {clock(eta)}"]
    return " | ".join(parts)


def peak_memory_gb() -> float:
    """Peak memory of this process: of its GPU where it has one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
