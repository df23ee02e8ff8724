"""Measure the models of a run that have no line in evals.jsonl yet."""

from collections.abc import Sequence
from typing import Any

from megakd.config.precisions import Quantize, label
from megakd.data.tokenizers import load_tokenizer
from megakd.engine.checkpoint import Progress, best_weights, published
from megakd.errors import UserError, reason
from megakd.evals.endpoint import check_tokens, connect, quality
from megakd.evals.measure import (
    Meter,
    Subject,
    Unmeasured,
    Unusable,
    checkpoint_subject,
    failures,
    raise_failures,
)
from megakd.evals.tasks import served_model
from megakd.evals.watcher import Follower
from megakd.identity import text_facts
from megakd.names import resolve
from megakd.run import Run
from megakd.system.files import append_json, read_json_lines
from megakd.system.logging import say


def evaluate(
    run: Run, only: str | None = None, tasks: Sequence[str] | None = None, quantize: Quantize | None = None
) -> list[dict[str, Any]]:
    """The lines of all models, or of `only`, those that are missing measured; UserError when a number could not be."""
    rows, failed = measure(run, only, tasks, quantize)
    raise_failures(failed)
    return rows


def measure(
    run: Run, only: str | None = None, tasks: Sequence[str] | None = None, quantize: Quantize | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure what has no line yet (or `only`), each model on its own, and append to evals.jsonl.

    quantize: precisions to which the weights of `only` are rounded first; its line is named MODEL@PRECISION.
    The lines of all that were asked for and have one, and what could not be measured, with the reason.
    """
    chosen = None if only is None else named(run, only)
    if chosen and quantize is not None:
        chosen = chosen._replace(name=f"{chosen.name}@{label(quantize)}", stage=None, quantize=quantize)
    meter = Meter(run, tasks)
    lines = run.path("evals.jsonl")
    known = {row["model"]: row for row in read_json_lines(lines, "model")}
    rows, failed = [], []
    for name in ["teacher", "student-0"] if only is None else [only]:
        if only is None and name in known and not meter.lacks(known[name]):
            rows.append(known[name])
            continue
        try:
            rows.append(meter.row(chosen or named(run, name)))
        except (Unusable, Unmeasured) as error:
            failed.append(f"{name}: {error}")
            say(f"{name} cannot be evaluated: {error}")
            continue
        append_json(lines, rows[-1])
    failed += [reason for row in rows for reason in failures(row)]
    if only is not None:
        return rows, failed
    follower = Follower(run, meter, watching=False)
    follower.scan()
    for name in follower.pending():
        if not follower.take(name):
            say(f"evaluate: {name} is being evaluated by another process")
    found = follower.lines()
    return rows + [found[name] for name in follower.published() if name in found], failed + follower.failures()


def measure_endpoint(
    run: Run, url: str, model: str | None, tasks: Sequence[str] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure the model that a server answers for, and append its line; the line, and what could not be measured.

    UserError where the server gives no log-probabilities of prompts, or has another tokenizer.
    """
    endpoint, meter = connect(url, model), Meter(run, tasks)
    folder, holdout = run.student_folder, meter.holdout
    size = text_facts(holdout.facts)["tokenizer"]["vocab_size"]
    check_tokens(endpoint, load_tokenizer(folder), size, holdout[0].tokens.tolist())
    say(f"evaluate: {endpoint.model} by {endpoint.engine}; no KL, top-1 and top-k, which need whole distributions")
    name = f"{endpoint.model} ({endpoint.engine})"
    facts = {"url": endpoint.url, "model": endpoint.model, "engine": endpoint.engine}
    row: dict[str, Any] = {"model": name, "step": 0, "tokens": 0, "stage": None, "endpoint": facts}
    row |= quality(endpoint, holdout, meter.tokens_per_byte, run.config.eval.batch_size)
    batch_size, failed = run.config.eval.task_batch_size, {}

    def served() -> Any:
        return served_model(endpoint.url, endpoint.model, folder, batch_size, endpoint.context)

    for task in meter.tasks:
        assert meter.harness is not None
        try:
            row.setdefault("tasks", {}).update(meter.harness.measure_with(task, served))
        except UserError:
            raise
        except Exception as error:  # code of tasks, their metrics and clients of servers fails in its own ways
            row.setdefault("tasks", {})[task] = None
            failed[task] = reason(error)
            say(f"{task} on {name}: {failed[task]}; the other tasks go on")
    row |= {"failed": failed} if failed else {}
    append_json(run.path("evals.jsonl"), row)
    return [row], failures(row)


def unmeasured(run: Run) -> list[str]:
    """The models that `measure` would measure: those that have no line yet, or one that lacks what can be measured."""
    meter = Meter(run)
    known = {row["model"]: row for row in read_json_lines(run.path("evals.jsonl"), "model")}
    names = [name for name in ("teacher", "student-0") if name not in known or meter.lacks(known[name])]
    follower = Follower(run, meter, watching=False)
    lines, published = follower.lines(), follower.published()
    names += [name for name, path in published.items() if name not in lines and not follower.is_bad(name, path)]
    return names + [name for name in follower.pending() if name not in published]


def named(run: Run, name: str) -> Subject:
    """The model that --model means."""
    checkpoints = run.path("checkpoints")
    if name == "teacher":
        try:
            folder = resolve(run.config.model.teacher, run.config.model.revision)
        except UserError as error:  # what it answered is stored: the students need it not
            raise Unusable(str(error)) from error
        return Subject(name, folder, Progress())
    if name == "student-0":
        return Subject(name, run.student_folder, Progress())
    if name == "best":
        return checkpoint_subject(run, best_weights(checkpoints).parent)
    if name == "last":
        saved = next(reversed(published(checkpoints)), None)
        if saved is None:
            raise UserError(f"{run.folder}: no checkpoint yet; run: megakd train {run.folder}")
        return checkpoint_subject(run, saved.folder)
    if (checkpoints / name / "progress.json").exists():
        return checkpoint_subject(run, checkpoints / name)
    return Subject(name, resolve(name), Progress())
