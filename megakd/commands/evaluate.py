"""Measure models on the held-out documents, and on lm-eval tasks, and append a line each to RUN/evals.jsonl.

Without --model: the teacher, the student before training and every published checkpoint, those that have no line yet.
`megakd watch` does the same for checkpoints while they appear. What cannot be measured is null in the line, which says
why, and stops nothing else; the exit code is then 2.

examples:
  megakd evaluate runs/a
  megakd evaluate runs/a --model teacher
  megakd evaluate runs/a --model best --tasks hellaswag,piqa eval.limit=500
  megakd evaluate runs/a --model runs/a/export
"""

import argparse
from collections.abc import Sequence
from typing import Any

from megakd.engine.checkpoint import Progress, best_weights, published
from megakd.errors import UserError
from megakd.evals.follow import Follower
from megakd.evals.harness import flat
from megakd.evals.measure import (
    Meter,
    Subject,
    Unmeasured,
    Unusable,
    checkpoint_subject,
    failures,
    raise_failures,
)
from megakd.files import append_json, read_json_lines, resolve
from megakd.log import cell, finite, say, table
from megakd.run import Run


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="teacher, student-0, last, best, STAGE/step-N, or a model folder; measured again even if it has a line",
    )
    parser.add_argument("--tasks", metavar="A,B", help="lm-eval tasks, instead of those of eval.tasks")


def main(run: Run, args: argparse.Namespace) -> None:
    rows, failed = measure(run, args.model, None if args.tasks is None else [t for t in args.tasks.split(",") if t])
    if rows:
        print(quality_table(rows))
    if rows and rows[0]["model"] == "teacher" and rows[1:]:
        print("\n" + ratio_table(rows[0], rows[1:]))
    if any("teacher_nll" in row for row in rows):
        print("\n" + teacher_table([row for row in rows if "teacher_nll" in row or row["model"] == "teacher"]))
    if any(row.get("tasks") for row in rows):
        print("\n" + task_table(rows))
    raise_failures(failed)


def evaluate(run: Run, only: str | None = None, tasks: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The lines of all models, or of `only`, those that are missing measured; UserError when a number could not be."""
    rows, failed = measure(run, only, tasks)
    raise_failures(failed)
    return rows


def measure(
    run: Run, only: str | None = None, tasks: Sequence[str] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure what has no line yet (or `only`), each model on its own, and append to evals.jsonl.

    The lines of all that were asked for and have one, and what could not be measured, with the reason.
    """
    chosen = None if only is None else named(run, only)
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


def task_table(rows: list[dict[str, Any]]) -> str:
    """The tasks of rows of evals.jsonl as text, a model a line."""
    found = [flat(row.get("tasks", {})) for row in rows]
    names = list(dict.fromkeys(name for numbers in found for name in numbers))
    cells = [[f"{numbers[name]:.4g}" if name in numbers else "-" for name in names] for numbers in found]
    return table(["tasks", *names], [[row["model"], *line] for row, line in zip(rows, cells, strict=True)])


def quality_table(rows: list[dict[str, Any]], names: list[str] | None = None) -> str:
    """Rows of evals.jsonl as text, a model a line."""
    headers = ["held out", "perplexity", "bits/byte", "KL to teacher", "top-1", "top-k"]
    attends = any("attention" in row for row in rows)
    headers += [*(["attention"] if attends else []), "parameters", "MB", "tokens/s"]
    lines = []
    for name, row in zip(names or [row["model"] for row in rows], rows, strict=True):
        numbers = [cell(row, "perplexity", ".2f"), cell(row, "bits_per_byte", ".3f"), cell(row, "kl", ".4f")]
        numbers += [cell(row, "top1", ".1%"), cell(row, "topk", ".1%")]
        if attends:
            numbers.append(cell(row, "attention", ".4f"))
        size = [cell(row, "parameters", ","), cell(row, "bytes", ".1f", 1e-6), cell(row, "tokens_per_second", ",.0f")]
        lines.append([name, *numbers, *size])
    return table(headers, lines)


def ratio_table(teacher: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Size and speed of models as parts and multiples of the teacher's."""
    lines = []
    for row in rows:
        ratios = {
            name: value / of
            for name in ("parameters", "bytes", "tokens_per_second")
            if (value := finite(row.get(name))) is not None and (of := finite(teacher.get(name)))
        }
        speed = cell(ratios, "tokens_per_second", ".2f")
        lines.append([row["model"], cell(ratios, "parameters", ".1%"), cell(ratios, "bytes", ".1%"), f"{speed}x"])
    return table(["of the teacher's", "parameters", "MB", "tokens/s"], lines)


def teacher_table(rows: list[dict[str, Any]]) -> str:
    """What the teacher has become with the routers of each checkpoint, behind what it was."""
    lines = []
    for row in rows:
        own = row["model"] == "teacher"
        prefix = "" if own else "teacher_"
        routers = row.get("teacher_routers", {}).values()
        chosen = ["-"] * 3
        if routers and all(None not in each.values() for each in routers):
            entropy = sum(each["entropy"] for each in routers) / len(routers)
            idle = sum(each["idle"] for each in routers)
            chosen = [f"{entropy:.1%}", f"{max(each['busiest'] for each in routers):.2f}x", str(idle)]
        name = "its own" if own else row["model"]
        lines.append([name, cell(row, f"{prefix}perplexity", ".2f"), cell(row, f"{prefix}kl", ".4f"), *chosen])
    headers = [
        "teacher with the routers of",
        "perplexity",
        "KL to teacher",
        "entropy",
        "busiest expert",
        "idle experts",
    ]
    return table(headers, lines)
