"""Distillation from cached teacher targets: the student's forward and the loss, inside one module."""

from typing import Any

from torch import nn

from megakd.config import ObjectiveConfig
from megakd.data.records import IGNORED, Batch, TeacherTargets
from megakd.errors import UserError
from megakd.losses.distill import Stored, distill_loss
from megakd.objectives.base import LossReport


class CachedDistillation(nn.Module):
    """forward(batch) = sums of (1 - alpha) CE + alpha T^2 KL over the labelled positions of a batch.

    The loss sits inside forward because ZeRO-3 gathers a module's weights only while it runs.
    facts: those of the targets' manifest; a loss that they do not support is refused, saying what to capture instead.
    Both distributions are cut to the real entries of the vocabulary, without the padding of the embedding.
    """

    def __init__(self, student: Any, config: ObjectiveConfig, facts: dict[str, Any]):
        super().__init__()
        self.student = student
        self.config = config
        self.stored = stored_in(facts)
        self.vocab_size: int = facts["vocab_size"]
        check_support(config, self.stored)

    def forward(self, batch: Batch) -> LossReport:
        logits = self.student(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits[
            ..., : self.vocab_size
        ]
        if batch.targets is None:
            raise UserError("the samples carry no teacher targets; run: megakd generate-logits RUN")
        counted = batch.labels != IGNORED
        if not counted.any():
            zero = logits.sum() * 0.0  # a live graph, so that every rank takes part in the backward
            names = ("ce", "kl", "kl_t1") if knows_kl_t1(self.config, self.stored) else ("ce", "kl")
            return LossReport(zero, {name: zero.detach() for name in names})
        targets = TeacherTargets(*(field[counted] for field in batch.targets))
        config = self.config
        terms = distill_loss(
            logits[counted], batch.labels[counted], targets, self.stored, config.alpha, config.temperature, config.tail
        )
        named = {"ce": terms.ce, "kl": terms.kl, "kl_t1": terms.kl_t1}
        return LossReport(terms.total, {name: value for name, value in named.items() if value is not None})


def stored_in(facts: dict[str, Any]) -> Stored:
    """What a manifest's facts say about its targets."""
    tails = tuple(facts["temperatures"]) if facts["tails"] else ()
    return Stored(facts["top_k"] > 0, tails, facts["draw_temperature"] if facts["draws"] else None)


def knows_kl_t1(config: ObjectiveConfig, stored: Stored) -> bool:
    """Whether `distill_loss` can tell the KL at T = 1."""
    return (config.temperature == 1.0 and config.tail != "truncated") or (stored.head and 1.0 in stored.temperatures)


def check_support(config: ObjectiveConfig, stored: Stored) -> None:
    """UserError when the targets do not hold what the loss needs."""
    tail, temperature = config.tail, config.temperature
    if tail in ("ghost", "truncated", "hybrid") and not stored.head:
        raise UserError(
            f"objective.tail: {tail} needs the teacher's most probable tokens, these logits hold draws alone; set "
            "objective.tail=sampled, or capture with logits.profile=topk or hybrid in a new run"
        )
    if tail in ("ghost", "hybrid") and temperature not in stored.temperatures:
        known = ", ".join(f"{t:g}" for t in stored.temperatures)
        raise UserError(
            f"objective.temperature: the logits carry tails for T = {known or 'none'}, not {temperature:g}; "
            "add it to logits.temperatures in a new run, or set objective.tail=truncated"
        )
    if tail in ("sampled", "hybrid"):
        profile = "sampled" if tail == "sampled" else "hybrid"
        if stored.draw_temperature is None:
            raise UserError(
                f"objective.tail: {tail} needs draws, these logits hold none; set objective.tail=ghost, or capture "
                f"with logits.profile={profile} in a new run"
            )
        if stored.draw_temperature != temperature:
            raise UserError(
                f"objective.temperature: the draws were made at T = {stored.draw_temperature:g}, not {temperature:g}; "
                f"capture with logits.draw_temperature={temperature:g} in a new run"
            )
        if tail == "sampled" and stored.head:
            raise UserError(
                "objective.tail: these draws are from what is outside the head; set objective.tail=hybrid, or capture "
                "with logits.profile=sampled in a new run"
            )
