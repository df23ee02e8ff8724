"""RunConfig: everything a run is, in typed, frozen sections."""

import difflib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, get_args

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from megakd.config.base import Section
from megakd.config.data import DataConfig, LogitsConfig, StreamConfig
from megakd.config.model import CompressConfig, ModelConfig
from megakd.config.objective import ObjectiveConfig, OnlineConfig, SarConfig
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
    name: str = "run"
    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    compress: CompressConfig = CompressConfig()
    data: DataConfig = DataConfig()
    logits: LogitsConfig = LogitsConfig()
    stream: StreamConfig = StreamConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sar: SarConfig = SarConfig()
    online: OnlineConfig = OnlineConfig()
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
            for name in ("objective", "optim"):
                try:
                    _changed(getattr(self, name), getattr(stage, name))
                except ValidationError as error:
                    first = error.errors()[0]
                    place = (name, *first["loc"])
                    what = _nearest(place) if first["type"] == "extra_forbidden" else ""
                    path = ".".join(map(str, place))
                    raise ValueError(f"stages.{index}.{path}: {first['msg']}{what}") from error
            live = [key for key in stage.optim if is_live(f"optim.{key}")]
            if live:
                raise ValueError(f"stages.{index}.optim.{live[0]} is one for all stages; set it in the run's optim")
        return self

    @model_validator(mode="after")
    def _teacher_is_there(self) -> "RunConfig":
        if self.engine.offload_teacher and self.objective.kind == "cached":
            raise ValueError("engine.offload_teacher is for objective.kind sar and online; cached asks no teacher")
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
                "objective": _changed(self.objective, stage.objective),
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

    @cached_property
    def mark(self) -> str:
        """Tells runs of one recipe apart: `Run` sets it to what its folder's history holds. No part of a recipe."""
        return ""

    def fingerprint(self, *sections: str) -> str:
        """A hash of the named sections without their live fields; of the whole run when none is named."""
        frozen = {path: v for path, v in flatten(self.model_dump(mode="json")) if not is_live(path)}
        return digest({k: v for k, v in frozen.items() if not sections or k.split(".")[0] in sections})


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of nested dicts; lists are leaves."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def is_live(path: str) -> bool:
    """Whether the field at a dotted path may change after the run was made."""
    section, _, key = path.partition(".")
    model = RunConfig.model_fields[section].annotation
    if not (isinstance(model, type) and issubclass(model, Section)) or key not in model.model_fields:
        return False
    return bool((model.model_fields[key].json_schema_extra or {}).get("live"))  # type: ignore[union-attr]


def _nearest(location: tuple[int | str, ...]) -> str:
    model: Any = RunConfig
    for part in location[:-1]:
        if isinstance(part, str):
            model = model.model_fields[part].annotation
            inner = [a for a in get_args(model) if isinstance(a, type) and issubclass(a, Section)]
            model = inner[0] if inner else model
    names = list(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys are {', '.join(names)}"


def _changed(section: Section, changes: dict[str, Any]) -> Any:
    """A section with changes, validated."""
    return type(section).model_validate({**section.model_dump(), **changes}) if changes else section
