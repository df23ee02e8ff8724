"""What the student learns from: cached teacher logits or a live teacher."""

import math
import operator
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from megakd.config.base import Section, live


def _ramp(**bounds: float) -> PlainValidator:
    """Checks a number, or a pair [start, end] of them; bounds like those of a Field."""
    kinds: dict[str, Any] = {"ge": "greater_than_equal", "gt": "greater_than", "le": "less_than_equal"}
    holds: dict[str, Any] = {"ge": operator.ge, "gt": operator.gt, "le": operator.le}

    def number(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PydanticKnownError("float_type")
        if not math.isfinite(value):
            raise PydanticKnownError("finite_number")
        for key, bound in bounds.items():
            if not holds[key](value, bound):
                raise PydanticKnownError(kinds[key], {key: bound})
        return float(value)

    def check(value: Any) -> float | tuple[float, float]:
        if not isinstance(value, list | tuple):
            return number(value)
        if len(value) != 2:
            raise PydanticCustomError("ramp", "Input should be a number or a pair [start, end]")
        return number(value[0]), number(value[1])

    return PlainValidator(check)


_AS_IT_IS = PlainSerializer(lambda value: value)


# pydantic's own union would name its members in every error
Share = Annotated[float | tuple[float, float], _ramp(ge=0, le=1), _AS_IT_IS]


Temperature = Annotated[float | tuple[float, float], _ramp(gt=0), _AS_IT_IS]


class ObjectiveConfig(Section):
    """(1 - alpha) * CE + alpha * T^2 * KL; tail: what stands for the tokens that are not in the stored head.

    kind: cached learns from stored targets; sar from the teacher itself, whose routers learn too; online from the
    teacher itself, and from what is inside it. Both have sections of their names.

    ghost: one more bucket. truncated: nothing. sampled, hybrid: the stored draws, from everything or from the rest.
    alpha, temperature: a number, or [start, end]: linear over each stage. divergence: instead of the KL; mix: the
    teacher's share of the mixture in jsd and skew_kl.
    """

    kind: Literal["cached", "sar", "online"] = "cached"
    alpha: Share = 0.5
    temperature: Temperature = 2.0
    tail: Literal["ghost", "truncated", "sampled", "hybrid"] = "ghost"
    divergence: Literal["kl", "reverse_kl", "jsd", "skew_kl", "tvd"] = "kl"
    mix: float = 0.5

    @model_validator(mode="after")
    def _mixes(self) -> "ObjectiveConfig":
        if self.divergence in ("jsd", "skew_kl") and not 0 < self.mix < 1:
            raise ValueError(f"{self.divergence} mixes teacher and student: mix is between 0 and 1, like 0.1")
        return self


class SarConfig(Section):
    """The teacher's side of objective.kind=sar: which experts a token takes while distilling, and what holds routers.

    routing: trained takes as many experts as the teacher was trained with, all takes all; top_m goes from initial_top_k
    to final_top_k in equal steps over each stage (at most all experts).
    router_lr_multiplier: of routers that no rule of a stage matches; at the student's rate (1) teachers collapse.
    anchor, entropy, balance: weights a token of |W - W0|^2 / |W0|^2, of the routers' lack of entropy (1 - H / log E)
    and of the load balance (1 where experts are used alike).
    likelihood, features: of a teacher with another tokenizer, in the place of the KL: weights of how likely spans of
    text are that both tokenizers end alike, and of the last hidden states of these spans behind a projection.
    router_patterns: regular expressions for the names of routers that are not found by role and shape.
    drift_steps: every how many steps the teacher as it was is asked too, for the log; 0 never.
    """

    routing: Literal["trained", "all", "top_m"] = "trained"
    initial_top_k: int = Field(1, ge=1)
    final_top_k: int = Field(4, ge=1)
    router_lr_multiplier: float = Field(0.1, ge=0)
    anchor: float = Field(0.1, ge=0)
    entropy: float = Field(0.0, ge=0)
    balance: float = Field(0.0, ge=0)
    likelihood: float = Field(1.0, ge=0)
    features: float = Field(1.0, ge=0)
    router_patterns: tuple[str, ...] = ()
    drift_steps: int = live(10, ge=0)


class OnlineConfig(Section):
    """What objective.kind=online learns from the teacher itself; a part with weight 0 is not computed.

    The loss is (1 - alpha) CE + alpha times the sum of: kl * T^2 KL; feature, of last hidden states; attention, of its
    maps; layers, of every layer's hidden states; contrastive, of a window's positions, at contrastive_temperature.
    gap: positions count for the KL by their KL at T = 1 to this power. importance: experts of the teacher count by
    their share of that KL to this power. routing as in `sar`, or capacity: the way from initial_top_k to final_top_k by
    exp(-KL), how much of the teacher the student reaches.
    """

    kl: float = Field(0.7, ge=0)
    feature: float = Field(0.1, ge=0)
    attention: float = Field(0.1, ge=0)
    layers: float = Field(0.05, ge=0)
    contrastive: float = Field(0.05, ge=0)
    contrastive_temperature: float = Field(0.1, gt=0)
    gap: float = Field(0.0, ge=0)
    importance: float = Field(0.0, ge=0)
    routing: Literal["trained", "all", "top_m", "capacity"] = "trained"
    initial_top_k: int = Field(1, ge=1)
    final_top_k: int = Field(4, ge=1)
    router_patterns: tuple[str, ...] = ()
