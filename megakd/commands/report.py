"""Draw a run: losses per stage, learning rates, errors per layer, evaluations over tokens, the configuration.

The page needs nothing next to it. --baseline draws the evaluations of another run in the same plots; --png makes one
picture of all curves, too.

examples:
  megakd report runs/a
  megakd report runs/a --png a.png
  megakd report runs/a --baseline runs/b
"""

import argparse

from megakd.errors import UserError
from megakd.names import expand
from megakd.outputs import check_file
from megakd.report.html import PNG_MARK, evaluation_panels, render_report, training_panels, write_png
from megakd.run import Run
from megakd.system.files import publishing, read_json, read_json_lines
from megakd.system.logging import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", type=expand, metavar="RUN2", help="another run to draw next to this one")
    parser.add_argument("--png", type=expand, metavar="FILE", help="write all curves there as one picture")


def missing(run: Run) -> str | None:
    """What RUN/report.html does not show yet; None where nothing came after it."""
    page = run.path("report.html")
    if not page.exists():
        return f"no {page}"
    drawn = [run.path(name) for name in ("metrics.jsonl", "evals.jsonl", "student-0/compress.json")]
    newer = [path for path in drawn if path.exists() and path.stat().st_mtime_ns > page.stat().st_mtime_ns]
    return f"{newer[0]} came after {page}" if newer else None


def main(run: Run, args: argparse.Namespace) -> None:
    png = args.png and check_file(args.png, PNG_MARK)
    compressed = run.path("student-0", "compress.json")
    baseline = None
    if args.baseline:
        other = Run.open(args.baseline)
        baseline = (
            other.config.name,
            [r for r in read_json_lines(other.path("evals.jsonl"), "model", "step") if r["model"] != "teacher"],
        )
    metrics = read_json_lines(run.path("metrics.jsonl"), "step", "stage")
    evals = read_json_lines(run.path("evals.jsonl"), "model", "step")
    page = render_report(
        run.config.model_dump(mode="json"),
        metrics,
        evals,
        read_json(compressed) if compressed.exists() else None,
        baseline,
    )
    with publishing(run.path("report.html")) as temporary:
        temporary.write_text(page, encoding="utf-8")
    say(f"report: {run.path('report.html')}")
    if png:
        curves = {"this run": evals, **dict([baseline] if baseline else [])}
        panels = [*training_panels(metrics), *evaluation_panels({name: rows for name, rows in curves.items() if rows})]
        if not panels:
            raise UserError(f"{run.folder}: no training step was recorded yet, so there are no curves")
        write_png(png, panels)
        say(f"report: {args.png}")
