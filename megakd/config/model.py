"""Which models a run is about, and how the teacher is compressed."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from megakd.config.base import Count, Section


class ModelConfig(Section):
    """teacher and student: a folder, a hub id, or `demo` (shipped). student None: made by `megakd compress`.

    revision, student_revision: branch, tag or commit of a hub's model; a commit cannot change later.
    """

    teacher: str = "demo"
    revision: str | None = None
    student: str | None = None
    student_revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class CompressConfig(Section):
    """How the teacher's experts become shared cores and small factors (docs/compression.md).

    rank: of both wrappers of every expert; split: free divides their parameters unequally where that fits better.
    budget: instead of rank, the share of the teacher's expert parameters to keep, spent by a planner over all layers on
    any of `shapes`; flops: at most this share of the experts' FLOPs a token too.
    solver: als, at most `sweeps` rounds until one gains less than `tolerance`; adam, `steps` at rate `lr`.
    calibration_tokens: tokens of the run's training shards that measure what the experts' inputs are, 0: weights alone
    count; damping: candidates for the share of the identity in these measurements, the best on held-out tokens is kept;
    sequential: measured behind the layers that are compressed already.
    align: permute hidden units first where experts are copies of each other. super_experts: keep those dense that make
    the massive activations (auto finds them, needs calibration).
    """

    rank: int = Field(64, ge=1)
    split: Literal["equal", "free"] = "equal"
    budget: float | None = Field(None, gt=0, lt=1)
    flops: float | None = Field(None, gt=0, le=1)
    shapes: tuple[Literal["wrappers", "additive", "basis"], ...] = Field(
        ("wrappers", "additive", "basis"), min_length=1
    )
    solver: Literal["als", "adam"] = "als"
    sweeps: int = Field(20, ge=0)
    tolerance: float = Field(1e-4, ge=0)
    steps: int = Field(1000, ge=1)
    lr: float = Field(1e-2, gt=0)
    calibration_tokens: Count = Field(32768, ge=0)
    damping: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.1,), min_length=1)
    sequential: bool = False
    align: Literal["auto", "off"] = "auto"
    super_experts: Literal["auto", "off"] = "off"

    @model_validator(mode="after")
    def _needs(self) -> "CompressConfig":
        if self.super_experts == "auto" and not self.calibration_tokens:
            raise ValueError("super_experts=auto finds them by running tokens: set calibration_tokens, like 32768")
        if self.sequential and self.budget is not None:
            raise ValueError("the planner wants all layers measured before one is fitted: set sequential=false")
        if self.flops is not None and self.budget is None:
            raise ValueError("flops bounds what the planner chooses: set budget too, like 0.25")
        return self
