"""What a configuration alone can tell: fields that have no effect under it, and stages that cannot train as asked.

`megakd new` refuses both, naming the field. A run that an older version made is opened all the same; `train` says what
has no effect in it, and refuses what cannot train.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megakd.config.base import Section
from megakd.config.objective import CachedConfig
from megakd.config.run import RunConfig
from megakd.config.tails import DEFAULT, reaches_all
from megakd.config.train import HIGHER_IS_BETTER, EvalConfig
from megakd.errors import UserError


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


def _is_folder(model: str) -> bool:
    return model == "demo" or (Path(model) / "config.json").exists()


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
    Rule(("stream.follow", "stream.scratch"), lambda c: not c.stream.lanes, "it needs stream.lanes, like 8"),
    Rule(
        ("compress",),
        lambda c: c.model.student is not None,
        "model.student names the student, so that compress makes none",
        replaced=True,
    ),
    Rule(("compress.rank",), lambda c: c.compress.budget is not None, "compress.budget chooses ranks", replaced=True),
    Rule(("compress.shapes",), lambda c: c.compress.budget is None, "compress.budget alone chooses among shapes"),
    Rule(("compress.split",), lambda c: c.compress.budget is not None, "compress.budget chooses both ranks of each"),
    Rule(
        ("compress.steps", "compress.lr"), lambda c: c.compress.solver == "als", "compress.solver=adam alone reads it"
    ),
    Rule(("compress.tolerance",), lambda c: c.compress.solver == "adam", "compress.solver=als alone reads it"),
    Rule(
        ("compress.sweeps",),
        lambda c: c.compress.solver == "adam" and not (c.compress.budget and "basis" in c.compress.shapes),
        "compress.solver=als, and the shape basis under a budget, alone read it",
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
        ("data.subset", "data.split", "data.streaming"),
        lambda c: c.data.source == "python-docs" or Path(c.data.source).expanduser().exists(),
        "data.source names files; data sets of the hub alone have it",
        replaced=True,
    ),
    Rule(
        ("data.revision",),
        lambda c: c.data.source == "python-docs" or Path(c.data.source).expanduser().exists(),
        "data.source names files; data sets of the hub alone have revisions",
    ),
    Rule(
        ("data.text_field",),
        lambda c: c.data.source == "python-docs" or c.data.source.endswith(".txt"),
        "data.source is plain text, without fields",
        replaced=True,
    ),
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
    return list(found.values())


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


def check(config: RunConfig, source: str) -> None:
    """UserError for the first thing of a new run's configuration that has no effect, or cannot train."""
    idle = [each for each in idle_fields(config) if not each.replaced]
    if idle:
        first, more = idle[0], f" (and {len(idle) - 1} more)" if idle[1:] else ""
        raise UserError(f"{source}: {first}; leave it out, or set {first.remedy}{more}")
    check_stages(config, source)
    try:
        check_evaluation(config.eval)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    for place, pattern in _patterns(config):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{source}: {place}: {pattern!r} is not a regular expression: {error}") from error
    for index, stage in enumerate(config.stages):
        try:
            objective = config.at(stage).objective
            if isinstance(objective, CachedConfig):
                check_targets(objective, *_captured(config))
        except UserError as error:
            raise UserError(f"{source}: stages.{index} ({stage.name}): {error}") from error


def check_stages(config: RunConfig, source: str) -> None:
    """UserError where a stage wants another objective than the run's: models and data are those of one kind."""
    for index, stage in enumerate(config.stages):
        kind = stage.objective.get("kind", config.objective.kind)
        if kind != config.objective.kind:
            raise UserError(
                f"{source}: stages.{index}.objective.kind: {kind}, but objective.kind is {config.objective.kind}; all "
                "stages of a run have one kind: train the later one in a new run, from this run's export"
            )


def check_evaluation(config: EvalConfig) -> None:
    """UserError where `eval.best` can be no measure of a run with these tasks, or their folder is none."""
    best, tasks = config.best, config.tasks
    if best != "auto" and best not in HIGHER_IS_BETTER and not ("/" in best and best.partition("/")[0] in tasks):
        known = ", ".join(["auto", *HIGHER_IS_BETTER])
        raise UserError(
            f"eval.best: {best!r} is not measured; give one of {known}, or TASK/METRIC of a task in eval.tasks"
        )
    if config.tasks and config.task_folder is not None and not Path(config.task_folder).is_dir():
        raise UserError(f"eval.task_folder: {config.task_folder} is no folder")


def notices(config: RunConfig, windows: int | None = None) -> list[str]:
    """A line for each thing that is done otherwise than the configuration may lead to expect.

    windows: those of the training shards, which say how long a stage of epochs is; None where there are none yet.
    """
    found = [*config.dropped, *(str(each) for each in idle_fields(config))]
    for stage in config.stages:
        if config.objective.trains_routers and config.at(stage).objective.alpha == 0:
            found.append(
                f"stage {stage.name}: objective.alpha=0: the student learns from cross entropy alone, the routers from "
                "objective.anchor, entropy and balance; the teacher runs all the same"
            )
        unknown = stage.epochs is not None and windows is None
        optim, steps = config.at(stage).optim, config.steps_of(stage, windows)
        if not unknown and optim.warmup_steps > steps // 2:
            found.append(
                f"stage {stage.name}: optim.warmup_steps={optim.warmup_steps} is more than half of its {steps} steps; "
                f"warmup takes {steps // 2}"
            )
    return found


def _patterns(config: RunConfig) -> Iterator[tuple[str, str]]:
    for index, stage in enumerate(config.stages):
        yield from ((f"stages.{index}.lr_multipliers", rule.pattern) for rule in stage.lr_multipliers)
    yield from (("objective.router_patterns", each) for each in _of(config, "router_patterns") or ())


def _captured(config: RunConfig) -> tuple[bool, tuple[float, ...], float | None]:
    """What generate-logits stores of the training set, as `check_targets` takes it."""
    logits = config.logits
    head = logits.profile != "sampled"
    draws = logits.draw_temperature if logits.profile != "topk" else None
    return head, logits.declared_temperatures if head else (), draws


def check_targets(
    config: CachedConfig, head: bool, temperatures: tuple[float, ...], draw_temperature: float | None
) -> None:
    """UserError when cached targets do not hold what the loss needs.

    head: whether they have the teacher's most probable tokens. temperatures: those with a tail. draw_temperature: of
    the draws, None where there are none.
    """
    tail = config.tail
    ramp = isinstance(config.temperature, tuple) and config.temperature[0] != config.temperature[1]
    temperature = config.temperature[0] if isinstance(config.temperature, tuple) else config.temperature
    if tail in ("ghost", "truncated", "hybrid") and not head:
        raise UserError(
            f"objective.tail: {tail} needs the teacher's most probable tokens, these logits hold draws alone; set "
            "objective.tail=sampled, or capture with logits.profile=topk or hybrid in a new run"
        )
    if ramp and tail in ("sampled", "hybrid"):
        raise UserError(
            f"objective.temperature: a ramp passes through temperatures that {tail} has no draws for; give one "
            "temperature (other stages may have another), or set objective.tail=ghost over logits with a head"
        )
    _check_divergence(config)
    if tail in ("ghost", "hybrid"):
        start, end = config.temperature if isinstance(config.temperature, tuple) else (temperature, temperature)
        if not reaches_all(temperatures, start, end):
            raise UserError(_out_of_reach(temperatures, start, end))
    if tail in ("sampled", "hybrid"):
        profile = "sampled" if tail == "sampled" else "hybrid"
        if draw_temperature is None:
            raise UserError(
                f"objective.tail: {tail} needs draws, these logits hold none; set objective.tail=ghost, or capture "
                f"with logits.profile={profile} in a new run"
            )
        if draw_temperature != temperature:
            raise UserError(
                f"objective.temperature: the draws were made at T = {draw_temperature:g}, not {temperature:g}; "
                f"capture with logits.draw_temperature={temperature:g} in a new run"
            )
        if tail == "sampled" and head:
            raise UserError(
                "objective.tail: these draws are from what is outside the head; set objective.tail=hybrid, or capture "
                "with logits.profile=sampled in a new run"
            )


def _out_of_reach(temperatures: tuple[float, ...], start: float, end: float) -> str:
    """One line: what tails there are, what was asked for, and what to do."""
    known, own = (", ".join(f"{t:g}" for t in each) for each in (temperatures, DEFAULT))
    asked = f"{start:g}" if start == end else f"{start:g} to {end:g}"
    if reaches_all(DEFAULT, start, end):
        remedy = f"capture with logits.temperatures=[{own}], for every T from 1 to {max(DEFAULT):g}, in a new run"
    elif start == end:
        remedy = "add it to logits.temperatures in a new run"
    else:
        remedy = f"stay within 1 to {max(DEFAULT):g} with logits.temperatures=[{own}] in a new run"
    return (
        f"objective.temperature: the logits carry tails for T = {known or 'none'}, not {asked}, too far from them to "
        f"interpolate; {remedy}, or set objective.tail=truncated"
    )


def _check_divergence(config: CachedConfig) -> None:
    """UserError when the divergence is infinite, or no sum over what is stored."""
    if config.divergence != "kl" and config.tail in ("sampled", "hybrid"):
        raise UserError(
            f"objective.divergence: {config.divergence} cannot be estimated from draws, kl alone can; set "
            "objective.divergence=kl, or objective.tail=ghost over logits with a head"
        )
    if config.divergence == "reverse_kl" and config.tail == "truncated":
        raise UserError(
            "objective.divergence: reverse_kl is infinite where the teacher is cut to 0; set objective.tail=ghost, or "
            "objective.divergence=jsd or skew_kl"
        )


def check_batches(config: RunConfig) -> None:
    """UserError when a stage's batch is no whole number of sequences: what the configuration alone can tell."""
    length = config.data.sequence_length
    for stage in config.stages:
        batch = config.at(stage).optim.batch_tokens
        if batch % length:
            own = f"stages: {stage.name}: " if "batch_tokens" in stage.optim else ""
            near = max(round(batch / length), 1) * length
            raise UserError(
                f"{own}optim.batch_tokens: {batch} is no multiple of data.sequence_length {length}; set {near} in a "
                "new run"
            )
