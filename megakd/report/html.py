"""One self-contained HTML page for a run: plots inline, tables, the frozen configuration."""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megakd.evals.tasks import flat
from megakd.report.tables import COLUMNS, TEACHER_COLUMNS, quality_cells, quality_columns
from megakd.system.files import publishing
from megakd.system.text import cell, finite

PNG_MARK = "made by megakd report --png"
PANEL = (5.6, 3.2)  # inches
# of metrics.jsonl: what of it is drawn, in this order
TERMS = {
    "loss": "loss",
    "ce": "cross entropy",
    "kl_t1": "KL(teacher || student), T = 1",
    "span_kl": "likelihood of spans: divergence of the student from the teacher",
    "kl_frozen": "KL(teacher as it was || student), T = 1",
    "teacher_ce": "the teacher's cross entropy",
    "teacher_drift": "KL(teacher as it was || teacher), T = 1",
    "features": "features of spans",
    "feature": "features",
    "attention": "attention",
    "layers": "layers",
    "contrastive": "contrast",
    "capacity": "capacity",
    "router_anchor": "router drift (squared relative L2)",
    "router_certainty": "1 − normalised router entropy",
    "router_balance": "load balance of experts",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
}
# of evals.jsonl: what of it is drawn, and the measure of the teacher itself that is drawn as a level
MEASURES = {
    "perplexity": ("held-out perplexity", "perplexity"),
    "kl": ("held-out KL(teacher || student)", None),
    "top1": ("top-1 agreement", None),
    "attention": ("overlap of attention with the teacher's", None),
    "teacher_perplexity": ("held-out perplexity of the teacher with its new routers", "perplexity"),
    "teacher_kl": ("held-out KL(teacher || teacher with its new routers)", "kl"),
}
NOT_NOISY = ("capacity", "router_anchor", "lr")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d0d7de; padding-bottom: .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #d0d7de; }
tr:nth-child(even) { background: #f6f8fa; }
img { max-width: 100%; }
pre { background: #f6f8fa; padding: 1rem; overflow: auto; font-size: 12px; }
.scroll { overflow-x: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
.note { color: #59636e; }
"""


class Panel(NamedTuple):
    title: str
    draw: Callable[[Axes], None]
    xlabel: str


def render_report(
    config: dict[str, Any],
    metrics: list[dict[str, Any]],
    evals: list[dict[str, Any]],
    compress: dict[str, Any] | None,
    baseline: tuple[str, list[dict[str, Any]]] | None = None,
) -> str:
    """The page; parts for which nothing was recorded say so. baseline: a name and evals of a run to draw next to."""
    curves = {name: rows for name, rows in (("this run", evals), *([baseline] if baseline else [])) if rows}
    parts = [f"<h1>MegaKD run: {html.escape(config['name'])}</h1>"]
    drawn = [plot(*panel) for panel in evaluation_panels(curves)]
    parts += ["<h2>Held-out quality</h2>", _quality(curves), '<div class="grid">', *drawn, "</div>"]
    parts += [_tasks(curves), "<h2>Training</h2>"]
    if metrics:
        parts += ['<div class="grid">', *(plot(*panel) for panel in training_panels(metrics)), "</div>"]
    else:
        parts.append('<p class="note">No training step was recorded yet.</p>')
    parts += ["<h2>Compression</h2>", _compression(compress)]
    parts += ["<h2>Configuration</h2>", f"<pre>{html.escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre>"]
    body = "\n".join(parts)
    head = f"<title>MegaKD: {html.escape(config['name'])}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{head}<body>{body}</body></html>\n'


def plot(title: str, draw: Callable[[Axes], None], xlabel: str) -> str:
    """An `<img>` with the plot inside, as SVG."""
    figure, axes = plt.subplots(figsize=PANEL, layout="constrained")
    _fill(axes, Panel(title, draw, xlabel))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'


def _quality(curves: dict[str, list[dict[str, Any]]]) -> str:
    if not curves:
        return '<p class="note">Nothing was evaluated yet: megakd evaluate RUN.</p>'
    columns = quality_columns([row for evals in curves.values() for row in evals], [*COLUMNS, *TEACHER_COLUMNS])
    rows = []
    for name, evals in curves.items():
        for row in sorted(evals, key=lambda row: row["step"]):
            label = row["model"] if name == "this run" else f"{name}: {row['model']}"
            rows.append([label, cell(row, "tokens", ","), *quality_cells(row, columns)])
    return _table(["model", "tokens", *(column.title for column in columns)], rows)


def _tasks(curves: dict[str, list[dict[str, Any]]]) -> str:
    """lm-eval's numbers of every model that has some, with the standard errors that lm-eval gives."""
    found = {
        row["model"] if name == "this run" else f"{name}: {row['model']}": row["tasks"]
        for name, evals in curves.items()
        for row in evals
        if row.get("tasks")
    }
    names = list(dict.fromkeys(name for tasks in found.values() for name in flat(tasks)))
    if not names:
        return ""
    rows = []
    for model, tasks in found.items():
        values, errors = flat(tasks), flat(tasks, "_stderr")
        cells = [
            f"{values[n]:.4g}" + (f" ± {errors[n]:.2g}" if n in errors else "") if n in values else "" for n in names
        ]
        rows.append([model, *cells])
    return f'<h2>Tasks</h2><p class="note">As lm-eval measures them.</p>{_table(["model", *names], rows)}'


def write_png(path: Path, panels: Sequence[Panel]) -> None:
    """All panels as one picture, three in a row."""
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(3 * PANEL[0], rows * PANEL[1]), layout="constrained", squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.remove()
    for place, panel in zip(axes.flat, panels, strict=False):
        _fill(place, panel)
    with publishing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80, metadata={"Title": PNG_MARK})
    plt.close(figure)


def _fill(axes: Axes, panel: Panel) -> None:
    panel.draw(axes)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.xlabel, fontsize=9)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def evaluation_panels(curves: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """Measures of the validation set, and a plot a task: against steps, or tokens where runs stand side by side."""
    x, label = ("step", "step") if len(curves) == 1 else ("tokens", "tokens trained on")

    def draw(axes: Axes, lines: dict[str, Callable[[dict[str, Any]], float | None]], reference: str | None) -> None:
        for name, evals in curves.items():
            # the last line of each model; several processes may have written them in any order
            trained = {row["model"]: row for row in evals if row["model"] != "teacher"}.values()
            for title, value in lines.items():
                pairs = ((finite(row.get(x)), finite(value(row))) for row in trained)
                points = sorted((at, y) for at, y in pairs if at is not None and y is not None)
                text = name if len(lines) == 1 else f"{name}: {title}" if len(curves) > 1 else title
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=text)
        teacher = next((row for rows in curves.values() for row in rows if row["model"] == "teacher"), None)
        if teacher and reference and (level := finite(teacher.get(reference))) is not None:
            axes.axhline(level, linestyle="--", color="gray", label="teacher")

    if not any(row.get("tokens") for rows in curves.values() for row in rows):
        return []
    trained = [row for rows in curves.values() for row in rows if row["model"] != "teacher"]
    panels = [
        Panel(title, lambda axes, key=key, own=own: draw(axes, {key: lambda row: row.get(key)}, own), label)
        for key, (title, own) in MEASURES.items()
        if any(finite(line.get(key)) is not None for line in trained)
    ]
    measured = [flat(row.get("tasks", {})) for row in trained]
    names = list(dict.fromkeys(name for numbers in measured for name in numbers))
    for task in dict.fromkeys(name.partition("/")[0] for name in names):
        lines = {
            name.partition("/")[2]: lambda row, name=name: flat(row.get("tasks", {})).get(name)
            for name in names
            if name.partition("/")[0] == task
        }
        panels.append(Panel(task, lambda axes, lines=lines: draw(axes, lines, None), label))
    return panels


def training_panels(metrics: list[dict[str, Any]]) -> list[Panel]:
    """A panel for each term that some step logged: every step, and over noise its mean over a tenth of the stage.

    Steps without a finite value (null in metrics.jsonl) are on no curve; the panel's title says how many there are.
    """

    def draw(axes: Axes, key: str) -> None:
        for stage in dict.fromkeys(row["stage"] for row in metrics):
            found = [
                (row["step"], y) for row in metrics if row["stage"] == stage and (y := finite(row.get(key))) is not None
            ]
            steps, values = np.array(found).reshape(-1, 2).T
            (line,) = axes.plot(steps, values, linewidth=1, label=stage)
            if (size := len(values) // 10) > 1 and key not in NOT_NOISY:
                line.set_alpha(0.35)
                mean = np.convolve(values, np.full(size, 1 / size), "valid")
                axes.plot(steps[size - 1 :], mean, linewidth=1.5, color=line.get_color())

    panels = []
    for key, title in TERMS.items():
        logged = [finite(row[key]) for row in metrics if key in row]
        lost = sum(value is None for value in logged)
        title += f" ({lost} of {len(logged)} steps: not finite)" if lost else ""
        if logged:
            panels.append(Panel(title, lambda axes, key=key: draw(axes, key), "step"))
    return panels


def _compression(compress: dict[str, Any] | None) -> str:
    if compress is None:
        return '<p class="note">The student was not made by compress.</p>'
    means = {(p["layer"], p["projection"]): sum(p["errors"]) / len(p["errors"]) for p in compress["parts"]}
    layers = sorted({layer for layer, _ in means})
    projections = list(dict.fromkeys(projection for _, projection in means))

    def draw(axes: Axes) -> None:
        for projection in projections:
            axes.plot(
                layers, [means[layer, projection] for layer in layers], marker="o", markersize=3, label=projection
            )
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)

    rows = [[str(layer), *(f"{means[layer, p]:.4f}" for p in projections)] for layer in layers]
    rank = f", rank {compress['rank']}" if compress.get("rank") else ""
    image = plot(f"relative weight error{rank}, mean over experts", draw, "layer")
    return f'<div class="grid">{image}<div>{_table(["layer", *projections], rows)}</div></div>'


def _table(headers: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
