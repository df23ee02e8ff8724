"""Measure models on the held-out documents and append a line each to RUN/evals.jsonl.

Without --model: the teacher, the student before training and every published checkpoint, those that have no line yet.

examples:
  megakd evaluate runs/a
  megakd evaluate runs/a --model teacher
  megakd evaluate runs/a --model runs/a/export
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megakd.data.shards import ShardSet, read_manifest
from megakd.dist import read_world
from megakd.engine.checkpoint import Progress, published
from megakd.errors import UserError
from megakd.evals.quality import Quality, evaluate_model
from megakd.files import append_json, read_json_lines
from megakd.log import table
from megakd.models.hub import load_model, resolve
from megakd.run import Run


class Subject(NamedTuple):
    """A model to measure: how reports name it, its folder, and how far it was trained."""

    name: str
    folder: Path
    progress: Progress
    stage: str | None = None


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="teacher, student-0, last, or a model folder; measured again even if it has a line"
    )


def main(run: Run, args: argparse.Namespace) -> None:
    rows = evaluate(run, args.model)
    print(quality_table(rows))


def evaluate(run: Run, only: str | None = None) -> list[dict[str, Any]]:
    """Measure what has no line yet (or `only`), append to evals.jsonl, return the lines of all that were asked for."""
    holdout = ShardSet(run.path("data", "logits", "holdout"))
    text = read_manifest(run.path("data", "tokens", "holdout"))
    known = {row["model"]: row for row in read_json_lines(run.path("evals.jsonl"))}
    rows = []
    for subject in subjects(run, only):
        if only is None and subject.name in known:
            rows.append(known[subject.name])
            continue
        model = load_model(subject.folder, getattr(torch, run.config.model.dtype))
        tokens_per_byte = text["text_tokens"] / text["text_bytes"]
        quality = evaluate_model(
            model, holdout, tokens_per_byte, run.config.eval.batch_size, read_world().device, subject.name
        )
        row = {
            "model": subject.name,
            "step": subject.progress.step,
            "tokens": subject.progress.tokens,
            "stage": subject.stage,
        }
        rows.append({**row, **quality._asdict()})
        append_json(run.path("evals.jsonl"), rows[-1])
    return rows


def subjects(run: Run, only: str | None) -> Iterator[Subject]:
    """The models to measure, in the order a report shows them."""
    config, checkpoints = run.config, published(run.path("checkpoints"))
    if only not in (None, "teacher", "student-0", "last"):
        yield Subject(str(only), resolve(str(only)), Progress())
        return
    if only in (None, "teacher"):
        yield Subject("teacher", resolve(config.model.teacher, config.model.revision), Progress())
    if only in (None, "student-0"):
        yield Subject("student-0", run.student_folder, Progress())
    if only == "last" and not checkpoints:
        raise UserError(f"{run.folder}: no checkpoint yet; run: megakd train {run.folder}")
    for saved in checkpoints[-1:] if only == "last" else checkpoints if only is None else []:
        stage = config.stages[saved.progress.stage].name
        yield Subject(f"{stage}/{saved.folder.name}", saved.weights, saved.progress, stage)


def quality_table(rows: list[dict[str, Any]], names: list[str] | None = None) -> str:
    """Rows of evals.jsonl as text, a model a line."""
    headers = ["held out", "perplexity", "bits/byte", "KL to teacher", "top-1", "top-k", "parameters", "MB", "tokens/s"]
    lines = []
    for name, row in zip(names or [row["model"] for row in rows], rows, strict=True):
        quality = Quality(**{field: row[field] for field in Quality._fields})
        numbers = [
            f"{quality.perplexity:.2f}",
            f"{quality.bits_per_byte:.3f}",
            f"{quality.kl:.4f}",
            f"{quality.top1:.1%}",
            f"{quality.topk:.1%}",
        ]
        lines.append(
            [
                name,
                *numbers,
                f"{quality.parameters:,}",
                f"{quality.bytes / 1e6:.1f}",
                f"{quality.tokens_per_second:,.0f}",
            ]
        )
    return table(headers, lines)
