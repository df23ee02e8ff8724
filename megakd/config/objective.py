"""What the student learns from: cached teacher logits, or a live teacher (online distillation).

`objective` is one of three sections, told apart by `kind`. Each has the fields that it honours and no others, and
answers what the rest of the code needs to know of the kind.
"""

import math
import operator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PlainSerializer, PlainValidator, Tag, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from megakd.config.base import Section, mutable


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


class LossConfig(Section):
    """What every objective has: loss = (1 - alpha) * CE + alpha * T^2 * D(teacher || student)."""

    live: ClassVar[bool] = False  # whether the teacher runs while the student trains
    trains_routers: ClassVar[bool] = False  # whether the teacher's routers train together with the student
    reads: ClassVar[Literal["logits", "tokens"]] = "logits"  # RUN/data/…: the shards that training reads
    across_tokenizers: ClassVar[tuple[str, ...]] = ()  # fields that have an effect with two tokenizers alone

    kind: Any
    alpha: Share = Field(
        0.5, description="weight of the teacher in the loss, 0 to 1; [start, end]: linear over each stage"
    )
    temperature: Temperature = Field(
        2.0, description="temperature T of both distributions; [start, end]: linear over each stage"
    )
    divergence: Literal["kl", "reverse_kl", "jsd", "skew_kl", "tvd"] = Field(
        "kl", description="D, the divergence from teacher to student"
    )
    mix: float = Field(0.5, description="share of the teacher in the mixture of jsd and skew_kl, between 0 and 1")

    @property
    def patterns(self) -> tuple[str, ...]:
        """Regular expressions for names of routers that are not found by role and shape."""
        return getattr(self, "router_patterns", ())

    @property
    def learns_across_tokenizers(self) -> bool:
        """Whether anything is left to learn from a teacher whose tokenizer is not the student's."""
        return self.live

    @model_validator(mode="after")
    def _mixes(self) -> "LossConfig":
        if self.divergence in ("jsd", "skew_kl") and not 0 < self.mix < 1:
            raise ValueError(f"{self.divergence} mixes teacher and student: mix is between 0 and 1, like 0.1")
        return self


class CachedConfig(LossConfig):
    """Offline distillation: the student learns from cached teacher logits."""

    kind: Literal["cached"] = Field("cached", description="cached teacher logits, made by generate-logits")
    tail: Literal["ghost", "truncated", "sampled", "hybrid"] = Field(
        "ghost",
        description="what stands for tokens that are not among the cached ones: ghost, one bucket on both sides; "
        "truncated, nothing (biased); sampled, draws from the whole distribution; hybrid, draws from the rest",
    )


class SarConfig(LossConfig):
    """SAR-KD: a live teacher whose routers, and nothing else, also learn to be easy to follow."""

    live: ClassVar[bool] = True
    trains_routers: ClassVar[bool] = True
    reads: ClassVar[Literal["logits", "tokens"]] = "tokens"
    across_tokenizers: ClassVar[tuple[str, ...]] = ("likelihood", "features")

    kind: Literal["sar"] = Field("sar", description="a live teacher whose routers learn too")
    routing: Literal["trained", "all", "top_m"] = Field(
        "trained",
        description="experts per token of the teacher: trained, as many as it was trained with; all; top_m, from "
        "initial_top_k to final_top_k in equal steps over each stage",
    )
    initial_top_k: int = Field(1, ge=1, description="routing=top_m: experts per token at the start of a stage")
    final_top_k: int = Field(4, ge=1, description="routing=top_m: experts per token at its end, at most all")
    router_lr_multiplier: float = Field(
        0.1,
        ge=0,
        description="learning rate of routers that no rule of a stage matches, relative to the student's; at 1 "
        "teachers "
        "collapse",
    )
    anchor: float = Field(0.1, ge=0, description="weight per token of the router drift, which anchor_form measures")
    anchor_form: Literal["relative", "absolute"] = Field(
        "relative",
        description="relative: |W - W0|^2 / |W0|^2, mean over routers; absolute: |W - W0|^2, sum over routers, whose "
        "weight depends on the size of the model",
    )
    entropy: float = Field(0.0, ge=0, description="weight per token of 1 - normalised router entropy, 1 - H / log E")
    balance: float = Field(0.0, ge=0, description="weight per token of the load-balancing loss, 1 for equal use")
    likelihood: float = Field(
        1.0, ge=0, description="two tokenizers: weight of the likelihood of text spans, in the place of the KL"
    )
    features: float = Field(
        1.0, ge=0, description="two tokenizers: weight of the last hidden states of text spans behind a projection"
    )
    router_patterns: tuple[str, ...] = Field(
        (), description="regular expressions for names of routers that are not found by role and shape"
    )
    drift_steps: int = mutable(
        10, ge=0, description="every how many steps the KL to the teacher with its original routers is logged; 0: never"
    )

    @property
    def learns_across_tokenizers(self) -> bool:
        return bool(self.likelihood or self.features)


class OnlineConfig(LossConfig):
    """Multi-component distillation from a frozen live teacher.

    loss = (1 - alpha) * CE + alpha * (kl * T^2 * D + feature * F + attention * A + layers * L + contrastive * C);
    a component of weight 0 is not computed.
    """

    live: ClassVar[bool] = True
    reads: ClassVar[Literal["logits", "tokens"]] = "tokens"

    kind: Literal["online"] = Field("online", description="a frozen live teacher, several components")
    kl: float = Field(0.7, ge=0, description="weight of T^2 * D")
    feature: float = Field(0.1, ge=0, description="weight of the last hidden states")
    attention: float = Field(0.1, ge=0, description="weight of the attention maps")
    layers: float = Field(0.05, ge=0, description="weight of every layer's hidden states")
    progressive_layers: bool = Field(
        False,
        description="layers: compare the student's lowest layer alone at the start of each stage, one more in equal "
        "parts of it, all at its end",
    )
    contrastive: float = Field(0.05, ge=0, description="weight of the contrastive loss over a sequence's positions")
    contrastive_temperature: float = Field(0.1, gt=0, description="temperature of the contrastive loss")
    gap: float = Field(0.0, ge=0, description="positions count for D by their KL at T = 1 to this power")
    importance: float = Field(
        0.0, ge=0, description="experts of the teacher count by their share of that KL to this power"
    )
    routing: Literal["trained", "all", "top_m", "capacity", "learned"] = Field(
        "trained",
        description="experts per token of the teacher, as in sar; capacity: from initial_top_k to final_top_k by "
        "exp(-KL), how much of the teacher the student reaches; learned: the same token by token, by heads on the "
        "student's hidden states, whose estimates gap and importance then use too",
    )
    initial_top_k: int = Field(
        1, ge=1, description="routing=top_m, capacity or learned: experts per token at the start, or at capacity 0"
    )
    final_top_k: int = Field(4, ge=1, description="the same at the end, or at capacity 1; at most all")
    router_lr: float = Field(1e-3, gt=0, description="routing=learned: learning rate of the heads, constant")
    router_balance: float = Field(
        0.01, ge=0, description="routing=learned: weight that pulls the expected shares of experts to equal ones"
    )
    router_patterns: tuple[str, ...] = Field(
        (), description="regular expressions for names of routers that are not found by role and shape"
    )


KINDS: dict[str, type[LossConfig]] = {"cached": CachedConfig, "sar": SarConfig, "online": OnlineConfig}


def of_kind(objective: LossConfig, kind: str) -> LossConfig:
    """The objective itself where it is of this kind; else one of that kind with the same loss, and defaults besides."""
    if objective.kind == kind:
        return objective
    return KINDS[kind].model_validate(
        {name: getattr(objective, name) for name in LossConfig.model_fields if name != "kind"}
    )


def _kind(value: Any) -> str | None:
    kind = value.get("kind", "cached") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


ObjectiveConfig = Annotated[
    Annotated[CachedConfig, Tag("cached")] | Annotated[SarConfig, Tag("sar")] | Annotated[OnlineConfig, Tag("online")],
    Discriminator(
        _kind,
        custom_error_type="kind",
        custom_error_message="Input should be 'cached', 'sar' or 'online'",
    ),
]
