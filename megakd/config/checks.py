"""What a configuration alone can tell: stages that cannot train as asked, and what is done otherwise than expected.

`megakd new` refuses these and fields without effect (`config.effects`), naming the field. A run that an older version
made is opened all the same; `train` says what has no effect in it, and refuses what cannot train.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from megakd.config.effects import idle_fields
from megakd.config.objective import CachedConfig
from megakd.config.run import RunConfig
from megakd.config.tails import DEFAULT, reaches_all
from megakd.config.train import HIGHER_IS_BETTER, EvalConfig
from megakd.errors import UserError


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


def notices(config: RunConfig, windows: int | None = None, begun: int = 0) -> list[str]:
    """A line for each thing that is done otherwise than the configuration may lead to expect.

    windows: those of the training shards, which say how long a stage of epochs is; None where there are none yet.
    begun: stages that have begun, of which nothing is said again.
    """
    found = [*config.dropped, *(str(each) for each in idle_fields(config))]
    for stage in config.stages[begun:]:
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
    yield from (("objective.router_patterns", each) for each in getattr(config.objective, "router_patterns", ()))


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
