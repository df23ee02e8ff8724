"""Which models a run is about, and how the teacher is compressed."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megakd.config.base import Count, Section


class ModelConfig(Section):
    """Teacher and student."""

    teacher: str = Field("demo", description="a model folder, a hub id, or demo, which ships with MegaKD")
    revision: str | None = Field(
        None, description="branch, tag or commit of a teacher on the hub; a commit cannot change later"
    )
    student: str | None = Field(
        None, description="a model folder or hub id to train; null: the student that `megakd compress` makes"
    )
    student_revision: str | None = Field(None, description="branch, tag or commit of a student on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="of weights and arithmetic in training, and of exports"
    )


class CompressConfig(Section):
    """How the teacher's experts become fewer parameters (docs/compression.md)."""

    method: Literal["shared_core", "prune", "merge"] = Field(
        "shared_core",
        description="shared_core: experts become shared cores and low-rank factors; prune: keep the best experts; "
        "merge: put similar experts together; students of prune and merge are stock architectures",
    )
    rank: int = Field(64, ge=1, description="rank of the input and of the output wrapper of every expert")
    split: Literal["equal", "free"] = Field(
        "equal", description="free: divide a matrix's rank unequally between its two wrappers where that fits better"
    )
    budget: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the teacher's expert parameters to keep; shared_core: instead of rank, spent by the "
        "planner over all layers and any of `shapes`; prune and merge: that share of each layer's experts",
    )
    experts: int | None = Field(
        None,
        ge=1,
        description="prune and merge, instead of budget: experts kept in each layer; shared_core: prune to so many "
        "first",
    )
    criterion: Literal["reap", "frequency"] = Field(
        "reap",
        description="which experts pruning keeps; reap: those with the largest mean routing weight times norm of the "
        "output; frequency: those with the most tokens",
    )
    flops: float | None = Field(
        None, gt=0, le=1, description="with budget: at most this share of the experts' FLOPs per token"
    )
    shapes: tuple[Literal["wrappers", "additive", "basis", "mixture"], ...] = Field(
        ("wrappers", "additive", "basis"), min_length=1, description="with budget: the shapes the planner chooses from"
    )
    solver: Literal["als", "adam"] = Field(
        "als", description="als: alternating least squares, closed form; adam: gradient descent"
    )
    sweeps: int = Field(20, ge=0, description="solver=als: at most so many rounds")
    tolerance: float = Field(1e-4, ge=0, description="solver=als: stop when a round gains less, relative")
    steps: int = Field(1000, ge=1, description="solver=adam: gradient steps")
    lr: float = Field(1e-2, gt=0, description="solver=adam: learning rate")
    calibration_tokens: Count = Field(
        32768,
        ge=0,
        description="tokens of the run's training shards on which the experts' inputs are measured; 0: only the "
        "weights "
        "count",
    )
    damping: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.1,),
        min_length=1,
        description="candidates for the share of the identity in these measurements; the best on held-out tokens is "
        "kept",
    )
    sequential: bool = Field(False, description="measure behind the layers that are compressed already")
    align: Literal["auto", "off"] = Field(
        "auto", description="auto: permute hidden units first where experts are copies of each other"
    )
    super_experts: Literal["auto", "off"] = Field(
        "off", description="auto: keep those experts dense that make the massive activations (needs calibration)"
    )

    @model_validator(mode="after")
    def _needs(self) -> "CompressConfig":
        if (self.method != "shared_core" or self.experts) and not self.calibration_tokens:
            what = f"method={self.method}" if self.method != "shared_core" else f"experts={self.experts}"
            raise ValueError(f"{what} chooses experts by running tokens: set calibration_tokens, like 32768")
        if self.method != "shared_core" and (self.budget is None) == (self.experts is None):
            raise ValueError(f"method={self.method} needs either budget, like 0.5, or experts, a number per layer")
        if self.super_experts == "auto" and not self.calibration_tokens:
            raise ValueError("super_experts=auto finds them by running tokens: set calibration_tokens, like 32768")
        if self.sequential and self.budget is not None:
            raise ValueError("the planner wants all layers measured before one is fitted: set sequential=false")
        if self.flops is not None and self.budget is None:
            raise ValueError("flops bounds what the planner chooses: set budget too, like 0.25")
        return self
