"""Draw a run: losses per stage, learning rates, errors per layer, evaluations over tokens, the configuration.

The page needs nothing beside it. --baseline draws the evaluations of another run in the same plots.

examples:
  megakd report runs/a
  megakd report runs/a --baseline runs/b
"""

import argparse
from pathlib import Path

from megakd.evals.report import render_report
from megakd.files import publishing, read_json, read_json_lines
from megakd.log import say
from megakd.run import Run


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", type=Path, metavar="RUN2", help="another run to draw beside this one")


def main(run: Run, args: argparse.Namespace) -> None:
    compressed = run.path("student-0", "compress.json")
    baseline = None
    if args.baseline:
        other = Run.open(args.baseline)
        baseline = (
            other.config.name,
            [r for r in read_json_lines(other.path("evals.jsonl")) if r["model"] != "teacher"],
        )
    page = render_report(
        run.config.model_dump(mode="json"),
        read_json_lines(run.path("metrics.jsonl")),
        read_json_lines(run.path("evals.jsonl")),
        read_json(compressed) if compressed.exists() else None,
        baseline,
    )
    with publishing(run.path("report.html")) as temporary:
        temporary.write_text(page, encoding="utf-8")
    say(f"report: {run.path('report.html')}")
