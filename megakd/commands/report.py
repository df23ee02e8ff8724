"""Draw a run: summary, held-out quality, every logged number, errors per layer, history, the configuration.

The page, RUN/report.html, needs nothing next to it and no network. --baseline draws other runs in the same figures;
--samples lets teacher and student go on with held-out text; --png makes one picture of all curves, too.

examples:
  megakd report runs/a
  megakd report runs/a --baseline runs/b runs/c
  megakd report runs/a --samples 4
  megakd report runs/a --png a.png
"""

import argparse

from megakd.errors import UserError
from megakd.names import expand
from megakd.outputs import check_file
from megakd.report.figures import PNG_MARK, write_png
from megakd.report.html import render_report
from megakd.report.samples import text_samples
from megakd.report.series import Recorded, borders, quality_charts, training_charts, with_names
from megakd.run import Run
from megakd.system.files import publishing
from megakd.system.logging import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", type=expand, nargs="+", default=[], metavar="RUN", help="runs to draw next to it")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="greedy continuations of N held-out texts, kept in the run's folder"
    )
    parser.add_argument("--png", type=expand, metavar="FILE", help="write all curves there as one picture")


def main(run: Run, args: argparse.Namespace) -> None:
    png = args.png and check_file(args.png, PNG_MARK)
    recorded, *others = (Recorded.of(each) for each in [run, *(Run.open(folder) for folder in args.baseline)])
    page = render_report(recorded, others, text_samples(run, args.samples))
    with publishing(run.path("report.html")) as temporary:
        temporary.write_text(page, encoding="utf-8")
    say(f"report: {run.path('report.html')}")
    if png:
        runs = with_names([recorded, *others])
        charts = [*quality_charts(runs), *training_charts(runs)]
        if not charts:
            raise UserError(f"{run.folder}: no training step was recorded yet, so there are no curves")
        write_png(png, charts, borders(recorded.metrics))
        say(f"report: {args.png}")
