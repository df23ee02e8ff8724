"""One self-contained HTML page for a run: summary, interactive figures, tables, history, the frozen configuration."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakd.evals.tasks import flat
from megakd.report.figures import figure, label, plain, timeline
from megakd.report.series import (
    OF_OUTPUT,
    RELATIVE,
    STRETCHES,
    Chart,
    Recorded,
    borders,
    compression_charts,
    quality_charts,
    router_charts,
    training_charts,
    unit_of,
    with_names,
)
from megakd.report.summary import facts, shared_words, tiles
from megakd.report.tables import COLUMNS, TEACHER_COLUMNS, quality_cells, quality_columns, stored_text
from megakd.system.machine import why_shared
from megakd.system.text import cell

ASSETS = Path(__file__).parents[1] / "assets"
SHOWN_EVENTS = 300  # in the history's table, the newest ones

Section = tuple[str, str, str]  # title, anchor, content


def render_report(run: Recorded, others: Sequence[Recorded] = (), samples: Sequence[dict[str, Any]] = ()) -> str:
    """The page; parts for which nothing was recorded say so. others: runs that are drawn in the same figures.

    Equal inputs make equal pages. Everything that a user could have named is escaped.
    """
    run, *others = with_names([run, *others])
    runs, figures = [run, *others], Figures()
    sections: list[Section] = [
        ("Summary", "summary", _summary(run)),
        ("Held-out quality", "quality", _quality(runs, figures)),
        ("Tasks", "tasks", _tasks(runs, figures)),
        ("Training", "training", _training(runs, figures)),
        ("Compression", "compression", _compression(run, figures)),
        ("Teacher's experts", "experts", figures.grid(router_charts(run))),
        ("Text samples", "samples", _samples(samples)),
        ("History", "history", _history(run, figures)),
        ("Configuration", "configuration", _configuration(runs)),
    ]
    sections = [section for section in sections if section[2]]
    title = f"MegaKD run: {run.config['name']}"
    links = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor, _ in sections)
    body = "\n".join(f'<section id="{anchor}"><h2>{name}</h2>\n{part}</section>' for name, anchor, part in sections)
    versus = f'<p class="note">next to {html.escape(", ".join(r.name for r in others))}</p>' if others else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_asset('report.css')}</style><body>"
        f'<div class="frame"><nav><strong>{html.escape(run.config["name"])}</strong>{links}</nav>'
        f"<main><h1>{html.escape(title)}</h1>{versus}{BAR if figures.made else ''}\n{body}</main></div>\n"
        f"{figures.scripts(run)}</body></html>\n"
    )


BAR = """<div class="bar">
<span>x axis <span class="pick" data-kind="x"><button value="step" aria-pressed="true">steps</button><button value="tokens" aria-pressed="false">tokens</button></span></span>
<span>y axis <span class="pick" data-kind="y"><button value="auto" aria-pressed="true">auto</button><button value="linear" aria-pressed="false">linear</button><button value="log" aria-pressed="false">log</button></span></span>
<span>mean <span class="pick" data-kind="mean"><button value="on" aria-pressed="true">on</button><button value="off" aria-pressed="false">off</button></span></span>
</div>"""  # noqa: E501

BUTTONS = (
    '<button class="log" aria-pressed="false" title="logarithmic y axis">log</button>'
    '<button class="enlarge" aria-pressed="false" title="full width">⤢</button>'
)
WIDE = ' class="wide"'


class Figures:
    """The figures of a page, each with a number; their data is one JSON object behind the page's text."""

    def __init__(self) -> None:
        self.made: dict[str, dict[str, Any]] = {}

    def grid(self, charts: Sequence[Chart]) -> str:
        """The places of charts, side by side; nothing where there is no chart."""
        if not charts:
            return ""
        return '<div class="grid">' + "".join(self.place(c.title, figure(c), c.note) for c in charts) + "</div>"

    def place(self, title: str, made: dict[str, Any], note: str = "", wide: bool = False) -> str:
        """A `<figure>` with title, buttons and an empty place that the page's script draws in."""
        name = f"figure-{len(self.made)}"
        self.made[name] = made
        lost = f" <small>({html.escape(note)})</small>" if note else ""
        place = f'<div class="plot" id="{name}" style="height:{made["height"]}px"></div>'
        return (
            f"<figure{WIDE if wide else ''}><figcaption><span>{html.escape(title)}{lost}</span>"
            f"{'' if wide else BUTTONS}</figcaption>{place}</figure>"
        )

    def scripts(self, run: Recorded) -> str:
        """The figures' data, the plotting library and the page's own script; nothing without figures."""
        if not self.made:
            return ""
        from plotly.offline import get_plotlyjs

        marks = [
            {"stage": plain(border.stage), "step": border.step, "tokens": border.tokens}
            for border in borders(run.metrics)
        ]
        data = json.dumps({"borders": marks, "figures": self.made}, allow_nan=False, separators=(",", ":"))
        data = data.replace("<", "\\u003c")  # no text of it ends the script element
        return (
            f'<script type="application/json" id="figures">{data}</script>\n'
            f"<script>{get_plotlyjs()}</script>\n<script>{_asset('report.js')}</script>\n"
        )


def _summary(run: Recorded) -> str:
    shown = "".join(
        f'<div class="tile"><b>{html.escape(tile.value)}</b><span>{html.escape(tile.label)}</span>'
        f"<small>{html.escape(tile.detail)}</small></div>"
        for tile in tiles(run)
    )
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts(run))
    return f'<div class="tiles">{shown}</div><dl>{listed}</dl>'


def _quality(runs: Sequence[Recorded], figures: Figures) -> str:
    rows = [(run, row) for run in runs for row in sorted(run.evals, key=lambda row: row["step"])]
    if not rows:
        return _note("Nothing was evaluated yet: megakd evaluate RUN.")
    charts = [chart for chart in quality_charts(runs) if "/" not in chart.title]
    columns = quality_columns([row for _, row in rows], [*COLUMNS, *TEACHER_COLUMNS])
    busy = [row for _, row in rows if why_shared(row.get("machine_load"))]
    busiest = max((row["machine_load"] for row in busy), key=lambda each: each.get("load") or 0, default=None)
    lines = []
    for run, row in rows:
        cells = dict(zip([column.name for column in columns], quality_cells(row, columns), strict=True))
        cells["tokens_per_second"] += "*" if row in busy else ""
        lines.append([_model(runs, run, row), cell(row, "tokens", ","), *cells.values()])
    shared = f"* The machine was shared while this was measured: {why_shared(busiest)}, where it was most."
    shared = _note(shared) if busiest else ""
    return _table(["model", "tokens", *(column.title for column in columns)], lines) + shared + figures.grid(charts)


def _model(runs: Sequence[Recorded], run: Recorded, row: dict[str, Any]) -> str:
    return row["model"] if len(runs) == 1 else f"{run.name}: {row['model']}"


def _tasks(runs: Sequence[Recorded], figures: Figures) -> str:
    """lm-eval's numbers of every model that has some, with the standard errors that lm-eval gives."""
    found = {_model(runs, run, row): row["tasks"] for run in runs for row in run.evals if row.get("tasks")}
    names = list(dict.fromkeys(name for tasks in found.values() for name in flat(tasks)))
    if not names:
        return ""
    rows = []
    for model, tasks in found.items():
        values, errors = flat(tasks), flat(tasks, "_stderr")
        cells = []
        for name in names:
            form, precision = (".1%", ".1%") if unit_of(name) == "%" else (".4g", ".2g")
            error = f" ± {errors[name]:{precision}}" if name in errors else ""
            cells.append(f"{values[name]:{form}}{error}" if name in values else "-")
        rows.append([model, *cells])
    charts = [chart for chart in quality_charts(runs) if "/" in chart.title]
    note = _note("As lm-eval measures them; ± and bars: its standard errors.")
    return note + _table(["model", *names], rows) + figures.grid(charts)


def _training(runs: Sequence[Recorded], figures: Figures) -> str:
    charts = training_charts(runs)
    if not charts:
        return _note("No training step was recorded yet.")
    if shared := shared_words(runs[0]):
        charts = [c._replace(note=c.note or shared) if c.unit == "tokens/s" else c for c in charts]
    parts = []
    for section in dict.fromkeys(chart.section for chart in charts):
        own = [chart for chart in charts if chart.section == section]
        parts.append(f"<h3>{section}</h3>{figures.grid(own)}")
    longest = max(len(run.metrics) for run in runs)
    thin = (
        f" Of a line of more than {2 * STRETCHES:,} steps the smallest and the largest value of each of {STRETCHES:,} "
        "stretches are drawn."
        if longest > 2 * STRETCHES
        else ""
    )
    names = " Dotted: where a stage of this run begins." if len(borders(runs[0].metrics)) > 1 else ""
    text = f"Every number that a step logged; thick: its mean over a tenth of the stage.{names}{thin}"
    return _note(f"{text} Drag to zoom, double-click to go back, click a name to hide its line.") + "".join(parts)


def _compression(run: Recorded, figures: Figures) -> str:
    if run.compress is None:
        return _note("The student was not made by compress.")
    charts = compression_charts(run.compress, run.sizes)
    tables = [chart for chart in charts if chart.unit == RELATIVE]
    kinds = ("weighted ", "weights ") if len(tables) > 1 else ("",)
    columns = dict(zip(("MoE output",), [c.lines[0] for c in charts if c.unit == OF_OUTPUT], strict=False))
    for kind, chart in zip(kinds, tables, strict=False):
        columns |= {f"{kind}{line.name}": line for line in chart.lines}
    layers = sorted({x for line in columns.values() for x in line.x})
    found = [dict(zip(line.x, line.y, strict=True)) for line in columns.values()]
    rows = []
    for layer in layers:
        values = [numbers.get(layer) for numbers in found]
        rows.append([f"{layer:g}", *("-" if value is None else f"{value:.4f}" for value in values)])
    stored = _note(stored_text(run.compress)) if "expert_parameters" in run.compress else ""
    return figures.grid(charts) + stored + _fold(f"Errors of {len(layers)} layers", _table(["layer", *columns], rows))


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    """Each prompt, and how teacher and student go on, side by side."""
    parts = []
    for sample in samples:
        columns = "".join(
            f"<div><b>{html.escape(name)}</b><p>{html.escape(text)}</p></div>"
            for name, text in sample["continuations"].items()
        )
        prompt = f"<b>prompt</b><p>{html.escape(sample['prompt'])}</p>"
        parts.append(f'<div class="sample">{prompt}<div class="pair">{columns}</div></div>')
    return _note("Greedy continuations of held-out documents.") + "".join(parts) if parts else ""


def _history(run: Recorded, figures: Figures) -> str:
    events = [event for event in run.history if event.get("time")]
    if not events:
        return ""
    shown = figures.place("events over time", timeline(events), wide=True)
    rows = []
    for event in events[-SHOWN_EVENTS:]:
        rest = {key: value for key, value in event.items() if key not in ("time", "event")}
        rows.append([str(event["time"]), label(event), json.dumps(rest, ensure_ascii=False)])
    title = f"{len(events):,} events" + (f", the last {SHOWN_EVENTS}" if len(events) > SHOWN_EVENTS else "")
    return shown + _fold(title, _table(["time", "event", "recorded"], rows, "text"))


def _configuration(runs: Sequence[Recorded]) -> str:
    return "".join(
        _fold(
            f"config.json of {run.name}",
            f"<pre>{html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))}</pre>",
        )
        for run in runs
    )


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _asset(name: str) -> str:
    return (ASSETS / name).read_text("utf-8")


def _table(headers: list[str], rows: list[list[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    style = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{style}><tr>{head}</tr>{body}</table></div>'
