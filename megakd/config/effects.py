"""Fields that have no effect under a configuration, each with the reason: one table of rules."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megakd.config.base import Section
from megakd.config.data import SourceFields
from megakd.config.run import RunConfig
from megakd.config.source_effects import SOURCE_RULES, SourceRule, names_files


class Rule(NamedTuple):
    """`fields` (paths, or a whole section) have no effect where `when` holds of a stage's configuration, because `why`.

    replaced: something else takes their place, as recipes may well say it, or a mutable field may bring them into force
    later; that is said, not refused.
    """

    fields: tuple[str, ...]
    when: Callable[[RunConfig], bool]
    why: str
    replaced: bool = False


class Idle(NamedTuple):
    """A field that has no effect and is not its default: its path, as in stages.1.objective.mix, value and reason.

    remedy: the override that takes it back.
    """

    path: str
    value: Any
    default: Any
    why: str
    replaced: bool
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}={json.dumps(self.value, default=str)} has no effect: {self.why}"


def _live(config: RunConfig) -> bool:
    return config.objective.live


def _of(config: RunConfig, field: str) -> Any:
    """A field of the objective; None where its kind has no such field."""
    return getattr(config.objective, field, None)


def _keeps_matrices(config: RunConfig) -> bool:
    """Whether the experts of the student are whole matrices."""
    return config.compress.method != "shared_core"


def _is_folder(model: str) -> bool:
    return model == "demo" or (Path(model) / "config.json").exists()


def _of_source(rule: SourceRule) -> Rule:
    """The rule for the one source of `data`."""
    fields = tuple(f"data.{field}" for field in rule.fields)
    return Rule(fields, lambda c: not c.data.sources and rule.when(c.data), f"data.{rule.reason}", rule.replaced)


RULES: tuple[Rule, ...] = (
    Rule(
        ("objective.mix",),
        lambda c: c.objective.divergence not in ("jsd", "skew_kl"),
        "objective.divergence=jsd and skew_kl alone mix teacher and student",
    ),
    Rule(
        ("objective.initial_top_k", "objective.final_top_k"),
        lambda c: _of(c, "routing") not in ("top_m", "capacity", "learned"),
        "objective.routing=top_m, capacity and learned alone change the number of experts per token",
    ),
    Rule(
        ("objective.router_lr", "objective.router_balance"),
        lambda c: _of(c, "routing") != "learned",
        "objective.routing=learned alone has heads that learn",
    ),
    Rule(
        ("objective.router_patterns",),
        lambda c: not c.objective.trains_routers and _of(c, "routing") == "trained" and not _of(c, "importance"),
        "with objective.routing=trained and objective.importance=0 the teacher's routers are not touched",
    ),
    Rule(
        ("objective.contrastive_temperature",),
        lambda c: not _of(c, "contrastive"),
        "objective.contrastive=0 switches it off",
    ),
    Rule(("objective.progressive_layers",), lambda c: not _of(c, "layers"), "objective.layers=0 switches it off"),
    Rule(
        ("objective.gap",),
        lambda c: not _of(c, "kl"),
        "it weighs positions of the divergence, which objective.kl=0 drops",
    ),
    Rule(
        ("logits.profile", "logits.draws", "logits.draw_temperature"),
        _live,
        "with a live teacher generate-logits captures the validation set alone, always as topk",
    ),
    Rule(
        ("logits.draws", "logits.draw_temperature"),
        lambda c: c.logits.profile == "topk",
        "logits.profile=topk stores no draws",
    ),
    Rule(
        ("stream.curriculum", "stream.curriculum_start", "stream.curriculum_epochs"),
        _live,
        "with a live teacher no cached logits say how hard a sequence is; objective.kind=cached has them",
    ),
    Rule(
        ("stream.curriculum_start", "stream.curriculum_epochs"),
        lambda c: c.stream.curriculum == "off",
        "it needs stream.curriculum=nll or entropy",
    ),
    Rule(
        ("stream.group_by_length",),
        lambda c: c.data.packing == "packed",
        "packed sequences are of about one length; data.packing=documents makes others",
    ),
    Rule(("stream.follow", "stream.scratch"), lambda c: not c.stream.lanes, "it needs stream.lanes, like 8"),
    Rule(
        ("compress",),
        lambda c: c.model.student is not None,
        "model.student names the student, so that compress makes none",
        replaced=True,
    ),
    Rule(
        ("compress.rank", "compress.sweeps", "compress.damping"),
        _keeps_matrices,
        "compress.method=prune and merge fit no factors",
        replaced=True,  # recipes set them
    ),
    Rule(
        tuple(f"compress.{field}" for field in ("split", "flops", "shapes", "solver", "tolerance", "steps", "lr")),
        _keeps_matrices,
        "compress.method=prune and merge fit no factors",
    ),
    Rule(
        ("compress.sequential", "compress.super_experts"),
        _keeps_matrices,
        "compress.method=prune and merge choose experts in the teacher as it is",
    ),
    Rule(
        ("compress.align",),
        lambda c: c.compress.method == "prune",
        "compress.method=prune changes no expert",
    ),
    Rule(
        ("compress.criterion",),
        lambda c: c.compress.method == "merge" or (c.compress.method == "shared_core" and not c.compress.experts),
        "compress.method=prune, and shared_core with compress.experts, alone prune",
    ),
    Rule(("compress.rank",), lambda c: c.compress.budget is not None, "compress.budget chooses ranks", replaced=True),
    Rule(("compress.shapes",), lambda c: c.compress.budget is None, "compress.budget alone chooses among shapes"),
    Rule(("compress.split",), lambda c: c.compress.budget is not None, "compress.budget chooses both ranks of each"),
    Rule(
        ("compress.steps", "compress.lr"), lambda c: c.compress.solver == "als", "compress.solver=adam alone reads it"
    ),
    Rule(
        ("compress.sweeps", "compress.tolerance"),
        lambda c: c.compress.solver == "adam",
        "compress.solver=als alone reads it",
    ),
    Rule(
        ("compress.damping", "compress.sequential"),
        lambda c: not c.compress.calibration_tokens,
        "compress.calibration_tokens=0 measures no inputs",
    ),
    Rule(
        ("optim.final_lr_ratio",),
        lambda c: c.optim.schedule == "constant",
        "optim.schedule=constant keeps the rate to the end",
    ),
    Rule(
        ("engine.expert_parallel",),
        lambda c: c.engine.kind == "local",
        "engine.kind=local is one process; engine.kind=deepspeed shares experts among ranks",
    ),
    Rule(
        ("engine.ranks",),
        lambda c: c.engine.kind == "local",
        "engine.kind=local is one process; engine.kind=deepspeed starts the ranks",
    ),
    Rule(
        ("engine.config", "engine.deepspeed"),
        lambda c: c.engine.kind == "local",
        "engine.kind=local is one process without DeepSpeed",
        replaced=True,
    ),
    Rule(
        ("stages.config", "stages.deepspeed"),
        lambda c: c.engine.kind == "local",
        "engine.kind=local reads no DeepSpeed file",
    ),
    Rule(
        ("checkpoint.every_epochs",),
        lambda c: not any(stage.epochs for stage in c.stages),
        "no stage has epochs as its length: stages.0.epochs",
    ),
    Rule(("guard.window",), lambda c: c.guard.spike is None, "guard.spike is off", replaced=True),
    Rule(
        ("guard.rollback",),
        lambda c: c.guard.spike is None and c.guard.nonfinite == "stop" and c.model.dtype != "float16",
        "no update is ever skipped: guard.spike is off, and guard.nonfinite=stop ends the run",
        replaced=True,
    ),
    Rule(
        ("eval.task_folder", "eval.limit", "eval.few_shot", "eval.task_batch_size"),
        lambda c: not c.eval.tasks,
        "eval.tasks names no tasks; evaluate --tasks may",
        replaced=True,
    ),
    Rule(("log.wandb_project",), lambda c: c.log.wandb == "disabled", "log.wandb=disabled", replaced=True),
    Rule(
        tuple(f"data.{name}" for name in SourceFields.model_fields),
        lambda c: bool(c.data.sources),
        "data.sources has fields of its own for each source",
        replaced=True,
    ),
    Rule(
        ("data.streaming",),
        lambda c: all(names_files(origin) for origin in c.data.origins),
        "data.source names files; data sets of the hub alone are streamed",
        replaced=True,
    ),
    Rule(
        ("data.bos",),
        lambda c: all(origin.format != "text" for origin in c.data.origins),
        "data.format reads conversations, whose chat template begins them",
        replaced=True,
    ),
    Rule(("data.chat_template",), lambda c: not c.data.has_chats, "data.format=text has no conversations"),
    *map(_of_source, SOURCE_RULES),
    Rule(
        ("model.revision",),
        lambda c: _is_folder(c.model.teacher),
        "the teacher is a folder; hub ids alone have revisions",
    ),
    Rule(
        ("model.student_revision",),
        lambda c: c.model.student is None or _is_folder(c.model.student),
        "model.student is no hub id, which alone has revisions",
    ),
)


def idle_fields(config: RunConfig) -> list[Idle]:
    """Every field that is not its default and has no effect in any stage, or was given to a stage in which it has none.

    The first rule that names a field counts.
    """
    found: dict[str, Idle] = {}
    for rule in RULES:
        for idle in _broken(rule, config):
            found.setdefault(idle.path, idle)
    for index, source in enumerate(config.data.sources):
        for idle in _broken_of(source, f"data.sources.{index}"):
            found.setdefault(idle.path, idle)
    return list(found.values())


def _broken_of(source: SourceFields, place: str) -> Iterator[Idle]:
    """What has no effect in one of data.sources."""
    for rule in SOURCE_RULES:
        if rule.when(source):
            for field in rule.fields:
                own = Rule((f"{place}.{field}",), lambda c: True, f"{place}.{rule.reason}")
                yield from _differs(source, field, f"{place}.{field}", own)


def _broken(rule: Rule, config: RunConfig) -> Iterator[Idle]:
    stages = [(stage, rule.when(config.at(stage))) for stage in config.stages]
    for section, key in _paths(rule.fields):
        for index, (stage, idle) in enumerate(stages):
            if not idle:
                continue
            if section == "stages":
                yield from _differs(stage, key, f"stages.{index}.{key}", rule)
            elif key in getattr(stage, section, {}):
                yield from _differs(getattr(config.at(stage), section), key, f"stages.{index}.{section}.{key}", rule)
        if section != "stages" and all(idle for _, idle in stages):
            yield from _differs(getattr(config, section), key, f"{section}.{key}", rule)


def _paths(fields: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(section, key) of each field; a section alone stands for all its keys."""
    for field in fields:
        section, _, key = field.partition(".")
        kind: Any = RunConfig.model_fields[section].annotation
        yield from (
            (section, name) for name in ([key] if key else kind.model_fields)
        )  # no rule is for a whole objective


def _differs(section: Section, key: str, path: str, rule: Rule) -> Iterator[Idle]:
    if key not in type(section).model_fields:  # of another kind of objective
        return
    value, default = getattr(section, key), type(section).model_fields[key].default
    if value != default:
        whole = path.rpartition(".")[0] in rule.fields  # a section of another kind
        remedy = f"{rule.fields[0]}={{}}" if whole else f"{path}={json.dumps(default, default=str)}"
        yield Idle(path, value, default, rule.why, rule.replaced, remedy)
