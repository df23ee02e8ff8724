"""Distillation from cached teacher targets: the student's forward and the loss, inside one module."""

from typing import Any

from torch import nn

from megakd.config import ObjectiveConfig
from megakd.data.records import IGNORED, Batch
from megakd.errors import UserError
from megakd.losses.distill import distill_loss
from megakd.objectives.base import LossReport


class CachedDistillation(nn.Module):
    """forward(batch) = sums of (1 - alpha) CE + alpha T^2 KL over the labelled positions of a batch.

    The loss sits inside forward because ZeRO-3 gathers a module's weights only while it runs.
    vocab_size: real entries, without the padding of the embedding; both distributions are cut to them.
    temperatures: those the targets carry tails for; with a ghost tail the objective's own must be among them.
    """

    def __init__(self, student: Any, config: ObjectiveConfig, vocab_size: int, temperatures: list[float]):
        super().__init__()
        if config.tail == "ghost" and config.temperature not in temperatures:
            raise UserError(
                f"objective.temperature: the logits carry tails for T = {', '.join(f'{t:g}' for t in temperatures)}, "
                f"not {config.temperature:g}; add it to logits.temperatures in a new run, "
                "or set objective.tail=truncated"
            )
        self.student = student
        self.config = config
        self.vocab_size = vocab_size
        self.column = temperatures.index(config.temperature) if config.temperature in temperatures else 0

    def forward(self, batch: Batch) -> LossReport:
        logits = self.student(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits[
            ..., : self.vocab_size
        ]
        if batch.targets is None:
            raise UserError("the samples carry no teacher targets; run: megakd generate-logits RUN")
        counted = batch.labels != IGNORED
        if not counted.any():
            zero = logits.sum() * 0.0  # a live graph, so that every rank takes part in the backward
            return LossReport(zero, {name: zero.detach() for name in ("ce", "kl", "kl_t1")})
        targets = batch.targets
        terms = distill_loss(
            logits[counted],
            batch.labels[counted],
            targets.ids[counted],
            targets.logprobs[counted],
            targets.log_tails[..., self.column][counted],
            targets.log_tails[..., 0][counted],
            self.config.alpha,
            self.config.temperature,
            self.config.tail,
        )
        return LossReport(terms.total, {"ce": terms.ce, "kl": terms.kl, "kl_t1": terms.kl_t1})
