"""RunConfig: everything a run is, in typed, frozen sections."""

import difflib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, get_args

from pydantic import Field, ValidationError, model_validator

from megakd.config.base import Section
from megakd.config.data import DataConfig, LogitsConfig, StreamConfig
from megakd.config.model import CompressConfig, ModelConfig
from megakd.config.objective import KINDS, CachedConfig, LossConfig, ObjectiveConfig
from megakd.config.original_keys import old_words, successors
from megakd.config.train import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    OptimConfig,
    StageConfig,
)
from megakd.system.files import digest


class RunConfig(Section):
    """Everything a run is."""

    name: str = Field("run", description="its name in W&B and in model cards")
    seed: int = Field(0, ge=0, description="of the order of samples, of draws, and of everything else that is random")
    model: ModelConfig = ModelConfig()
    compress: CompressConfig = CompressConfig()
    data: DataConfig = DataConfig()
    logits: LogitsConfig = LogitsConfig()
    stream: StreamConfig = StreamConfig()
    objective: ObjectiveConfig = CachedConfig()
    optim: OptimConfig = OptimConfig()
    stages: tuple[StageConfig, ...] = Field((StageConfig(name="all", tokens=int(1e9)),), min_length=1)
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _stages_fit(self) -> "RunConfig":
        for index, stage in enumerate(self.stages):
            for name, changes in (("objective", _same_kind(stage.objective)), ("optim", stage.optim)):
                try:
                    _changed(getattr(self, name), changes)
                except ValidationError as error:
                    first = error.errors()[0]
                    unknown = first["type"] == "extra_forbidden"
                    what = nearest((name, *first["loc"]), self.objective.kind) if unknown else ""
                    path = ".".join(map(str, (name, *first["loc"])))
                    raise ValueError(f"stages.{index}.{path}: {first['msg']}{what}") from error
            fixed = [key for key in stage.optim if is_mutable(f"optim.{key}")]
            if fixed:
                raise ValueError(f"stages.{index}.optim.{fixed[0]} is one for all stages; set it in the run's optim")
        return self

    @model_validator(mode="after")
    def _teacher_is_there(self) -> "RunConfig":
        if self.engine.offload_teacher and not self.objective.live:
            raise ValueError("engine.offload_teacher is for objective.kind sar and online; cached asks no teacher")
        if self.engine.teacher_parallel == "zero3":
            if self.objective.kind != "online" or self.engine.kind != "deepspeed":
                raise ValueError(
                    "engine.teacher_parallel=zero3 divides a frozen live teacher: it needs objective.kind=online and "
                    "engine.kind=deepspeed"
                )
            if self.engine.offload_teacher:
                raise ValueError("engine.teacher_parallel=zero3 and engine.offload_teacher exclude each other")
        return self

    @model_validator(mode="after")
    def _rounds_whole_factors(self) -> "RunConfig":
        rounding = next((index for index, stage in enumerate(self.stages) if stage.quantize is not None), None)
        if rounding is not None and self.engine.expert_parallel > 1:
            raise ValueError(
                f"stages.{rounding}.quantize rounds whole factors, which engine.expert_parallel packs into one tensor; "
                "set engine.expert_parallel=1"
            )
        return self

    @property
    def windows_per_step(self) -> int:
        """Windows of one optimizer step over all ranks."""
        return self.optim.batch_tokens // self.data.sequence_length

    def at(self, stage: StageConfig) -> "RunConfig":
        """The configuration in force during a stage."""
        optim = {**stage.optim, **({} if stage.lr is None else {"lr": stage.lr})}
        engine = {} if stage.config is None else {"config": stage.config, "deepspeed": stage.deepspeed}
        return self.model_copy(
            update={
                "objective": _changed(self.objective, _same_kind(stage.objective)),
                "optim": _changed(self.optim, optim),
                "engine": self.engine.model_copy(update=engine),
            }
        )

    def steps_of(self, stage: StageConfig, windows: int | None = None) -> int:
        """Optimizer steps of a stage: its tokens, or its passes over so many windows, over its batch, rounded up.

        windows: those of the training shards; without them as many as `data` asks for.
        """
        if stage.steps is not None:
            return stage.steps
        config = self.at(stage)
        if stage.tokens is not None:
            return -(-stage.tokens // config.optim.batch_tokens)
        assert stage.epochs is not None
        if windows is None:
            windows = max(self.data.tokens // self.data.sequence_length, 1)
        return max(math.ceil(stage.epochs * windows / max(config.windows_per_step, 1)), 1)

    def epoch_ends(self, stage: StageConfig, windows: int) -> list[int]:
        """The step of the stage with which each of its whole epochs ends; none where epochs are not its length."""
        epochs = range(1, int(stage.epochs or 0) + 1)
        return [self.steps_of(stage.model_copy(update={"epochs": float(epoch)}), windows) for epoch in epochs]

    @cached_property
    def dropped(self) -> tuple[str, ...]:
        """What an older version's config.json held without effect (`megakd.config.migration`)."""
        return ()

    @cached_property
    def mark(self) -> str:
        """Tells runs of one recipe apart: `Run` sets it to what its folder's history holds. No part of a recipe."""
        return ""

    def fingerprint(self, *sections: str) -> str:
        """A hash of the named sections without their mutable fields; of the whole run when none is named."""
        frozen = {path: v for path, v in flatten(self.model_dump(mode="json")) if not is_mutable(path)}
        return digest({k: v for k, v in frozen.items() if not sections or k.split(".")[0] in sections})


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of nested dicts; lists are leaves."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def is_mutable(path: str) -> bool:
    """Whether the field at a dotted path may change after the run was made."""
    section, _, key = path.partition(".")
    extras = [kind.model_fields[key].json_schema_extra or {} for kind in kinds_of(section) if key in kind.model_fields]
    return any(extra.get("mutable") for extra in extras)  # type: ignore[union-attr]


def kinds_of(section: str) -> list[type[Section]]:
    """The classes that a section may have: one, but for the objective; none for a plain field."""
    if section == "objective":
        return list(KINDS.values())
    kind = RunConfig.model_fields[section].annotation if section in RunConfig.model_fields else None
    return [kind] if isinstance(kind, type) and issubclass(kind, Section) else []


def nearest(location: tuple[int | str, ...], objective: str = "cached") -> str:
    """What may have been meant by an unknown key: a similar name next to it, or another kind of objective."""
    model: Any = RunConfig
    for part in location[:-1]:
        if part == "objective":
            model = KINDS[objective]
        elif isinstance(part, str):
            model = model.model_fields[part].annotation
            inner = [a for a in get_args(model) if isinstance(a, type) and issubclass(a, Section)]
            model = inner[0] if inner else model
    key, names = str(location[-1]), list(getattr(model, "model_fields", {}))
    owners = [name for name, kind in KINDS.items() if issubclass(model, LossConfig) and key in kind.model_fields]
    if owners:
        return f": it is a field of objective.kind={' and '.join(owners)}, and the kind is {objective}"
    if elsewhere := [f"{name}.{key}" for name in RunConfig.model_fields for kind in kinds_of(name)[:1]
                     if key in kind.model_fields and kind is not model]:  # fmt: skip
        return f"; did you mean {elsewhere[0]!r}?"
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if not close and (old := difflib.get_close_matches(key, old_words(), n=1, cutoff=0.8)):
        return f"; did you mean {successors(old[0])[0]!r}?"
    return f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(names)}"


def _same_kind(objective: dict[str, Any]) -> dict[str, Any]:
    """A stage's changes of the objective but for its kind, which `config.checks.check_stages` looks at."""
    return {key: value for key, value in objective.items() if key != "kind"}


def _changed(section: Section, changes: dict[str, Any]) -> Any:
    """A section with changes, validated."""
    return type(section).model_validate({**section.model_dump(), **changes}) if changes else section
