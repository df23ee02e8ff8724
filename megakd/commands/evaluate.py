"""Measure models on the held-out documents, and on lm-eval tasks, and append a line each to RUN/evals.jsonl.

Without --model: the teacher, the student before training and every published checkpoint, those that have no line yet.
`megakd watch` does the same for checkpoints while they appear. What cannot be measured is null in the line, which says
why, and stops nothing else; the exit code is then 2.

examples:
  megakd evaluate runs/a
  megakd evaluate runs/a --model teacher
  megakd evaluate runs/a --model best --tasks hellaswag,piqa eval.limit=500
  megakd evaluate runs/a --model runs/a/export
  megakd evaluate runs/a --endpoint http://localhost:8000           the model that a server answers for
  megakd evaluate runs/a --model last --quantize int4               its weights rounded to 4 bits, in memory
  megakd evaluate runs/a --model teacher --quantize linear=int8,experts=int4
"""

import argparse

from megakd.config.precisions import PARTS, parse_quantize
from megakd.errors import UserError
from megakd.evals.evaluate import measure, measure_endpoint
from megakd.evals.measure import (
    raise_failures,
)
from megakd.report.tables import quality_table, ratio_table, task_table, teacher_table
from megakd.run import Run

SECTIONS = ("model", "data", "eval")  # of the configuration


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="teacher, student-0, last, best, STAGE/step-N, or a model folder; measured again even if it has a line",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="measure what a server with OpenAI's interface answers: perplexity and tasks, no KL (docs/evaluation.md)",
    )
    parser.add_argument("--endpoint-model", metavar="NAME", help="one of the server's models (default: its only one)")
    parser.add_argument("--tasks", metavar="A,B", help="lm-eval tasks, instead of those of eval.tasks")
    parser.add_argument(
        "--quantize",
        metavar="P",
        help="round the weights of --model first: int8, fp8, int4, int3, or PART=P,PART=P of " + ", ".join(PARTS),
    )


def main(run: Run, args: argparse.Namespace) -> None:
    if args.quantize and not args.model:
        raise UserError("--quantize: says how to round one model; name it with --model")
    tasks = None if args.tasks is None else [t for t in args.tasks.split(",") if t]
    if args.endpoint_model and not args.endpoint:
        raise UserError("--endpoint-model: names a model of a server; give its URL with --endpoint")
    if args.endpoint and args.model:
        raise UserError("--endpoint: measures the server's model, not --model; remove one of them")
    if args.endpoint:
        rows, failed = measure_endpoint(run, args.endpoint, args.endpoint_model, tasks)
    else:
        rows, failed = measure(run, args.model, tasks, args.quantize and parse_quantize(args.quantize))
    if rows:
        print(quality_table(rows))
    if rows and rows[0]["model"] == "teacher" and rows[1:]:
        print("\n" + ratio_table(rows[0], rows[1:]))
    if any("teacher_nll" in row for row in rows):
        print("\n" + teacher_table([row for row in rows if "teacher_nll" in row or row["model"] == "teacher"]))
    if any(row.get("tasks") for row in rows):
        print("\n" + task_table(rows))
    raise_failures(failed)
