"""Measure one model as a run's `eval` section says: the hold-out, then each lm-eval task; what is finished is kept."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megakd.data.shards import ShardSet, read_manifest
from megakd.data.tokens import load_tokenizer
from megakd.dist import read_world
from megakd.engine.checkpoint import Progress
from megakd.errors import UserError
from megakd.evals.harness import Harness, flat, metric_value
from megakd.evals.quality import Quality, evaluate_model
from megakd.files import digest, read_json, write_json
from megakd.models.hub import load_model
from megakd.run import Run

# measures of the hold-out by which a checkpoint can be the best, and whether higher is better
HIGHER_IS_BETTER = {"kl": False, "perplexity": False, "bits_per_byte": False, "nll": False, "top1": True, "topk": True}


class Subject(NamedTuple):
    """A model to measure: how reports name it, its folder, and how far it was trained."""

    name: str
    folder: Path
    progress: Progress
    stage: str | None = None


class Unusable(UserError):
    """A model that cannot be measured, today or any other day: it does not load, or answers with NaN."""


def checkpoint_subject(run: Run, folder: Path, name: str | None = None) -> Subject:
    """A checkpoint, or what `watch` keeps of one: a folder with weights/ and progress.json.

    name: STAGE/step-N, if the folder's own place does not say it.
    """
    file = folder / "progress.json"
    try:
        fields = read_json(file)
        progress = Progress(**{name: fields[name] for name in ("stage", "stage_step", "step", "samples", "tokens")})
        stage = run.config.stages[progress.stage].name
    except (UserError, TypeError, KeyError, IndexError) as error:
        raise Unusable(f"{file}: does not say where training stood: {error}") from error
    return Subject(name or f"{folder.parent.name}/{folder.name}", folder / "weights", progress, stage)


class Meter:
    """What a run measures its models with, opened once.

    tasks: of lm-eval, instead of those of eval.tasks.
    """

    def __init__(self, run: Run, tasks: Sequence[str] | None = None):
        self.config = run.config
        self.holdout = ShardSet(run.path("data", "logits", "holdout"))
        text = read_manifest(run.path("data", "tokens", "holdout"))
        self.tokens_per_byte = text["text_tokens"] / text["text_bytes"]
        self.tasks = list(run.config.eval.tasks if tasks is None else tasks)
        self.harness = Harness(self.tasks, run.config.eval) if self.tasks else None
        self.device = read_world().device

    def row(self, subject: Subject, pieces: Path | None = None) -> dict[str, Any]:
        """A model's line of evals.jsonl.

        pieces: a folder that keeps what is finished, for a process that takes over from one that was killed.
        """
        model = functools.cache(lambda: self._load(subject))
        quality = _piece(pieces, "holdout", {}, lambda: self._quality(subject, model())._asdict())
        row = {
            "model": subject.name,
            "step": subject.progress.step,
            "tokens": subject.progress.tokens,
            "stage": subject.stage,
            **quality,
        }
        if self.harness is None:
            return row
        harness, config, tokenizer = self.harness, self.config.eval, functools.cache(lambda: _tokenizer(subject.folder))
        tasks: dict[str, Any] = {}
        for name in self.tasks:
            settings = {"task": name, "limit": config.limit, "few_shot": config.few_shot}
            title = f"{name} on {subject.name}"
            tasks |= _piece(pieces, "task", settings, lambda: harness.measure(name, model(), tokenizer(), title))  # noqa: B023 (called at once)
        return {**row, "tasks": tasks}

    def _load(self, subject: Subject) -> Any:
        try:
            model = load_model(subject.folder, getattr(torch, self.config.model.dtype))
        except UserError as error:
            raise Unusable(str(error)) from error
        except MemoryError:  # not the model's fault
            raise
        except Exception as error:  # what is wrong inside a config or a file of weights has no kind of its own
            raise Unusable(f"{subject.folder}: cannot be loaded: {type(error).__name__}: {error}") from error
        return model.eval().to(self.device)

    def _quality(self, subject: Subject, model: Any) -> Quality:
        batch_size = self.config.eval.batch_size
        try:
            quality = evaluate_model(model, self.holdout, self.tokens_per_byte, batch_size, self.device, subject.name)
        except OverflowError as error:  # exp of an NLL beyond 709
            raise Unusable(f"{subject.folder}: its perplexity on the hold-out is infinite") from error
        if not all(map(math.isfinite, quality)):
            raise Unusable(f"{subject.folder}: its NLL on the hold-out is {quality.nll}, its KL {quality.kl}")
        return quality


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except UserError as error:
        raise Unusable(str(error)) from error


def _piece(
    folder: Path | None, kind: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `measure` gives, or what it gave under these settings before the process was killed."""
    if folder is None:
        return measure()
    path = folder / (f"{kind}-{digest(settings)}.json" if settings else f"{kind}.json")
    if not path.exists():
        write_json(path, {**settings, "found": measure()})
    return read_json(path)["found"]


def check_best(name: str, tasks: Sequence[str]) -> None:
    """UserError when `eval.best` can be no measure of a run with these tasks."""
    if name in HIGHER_IS_BETTER or ("/" in name and name.partition("/")[0] in tasks):
        return
    known = ", ".join(HIGHER_IS_BETTER)
    raise UserError(f"eval.best: {name!r} is not measured; give one of {known}, or TASK/METRIC of a task in eval.tasks")


def measure_of(row: dict[str, Any], name: str) -> tuple[float | None, bool]:
    """A measure of a line (None: not measured), and whether higher is better."""
    return metric_value(row.get("tasks", {}), name) if "/" in name else (row.get(name), HIGHER_IS_BETTER[name])


def rank(row: dict[str, Any], name: str) -> tuple[float] | None:
    """A key that sorts the best line first; None where it was not measured."""
    value, higher = measure_of(row, name)
    return None if value is None or not math.isfinite(value) else (-value if higher else value,)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What curves are drawn of: the measures of the hold-out, and those of tasks under TASK/METRIC."""
    return {**{name: row[name] for name in HIGHER_IS_BETTER}, **flat(row.get("tasks", {}))}
