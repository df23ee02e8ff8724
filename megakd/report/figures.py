"""Draw charts: as figures of Plotly for the page, or with matplotlib for a PNG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.report.series import Border, Chart, Line
from megakd.system.files import publishing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PNG_MARK = "made by megakd report --png"
PANEL = (5.6, 3.2)  # inches
COLORS = ("#2f6fde", "#e0662b", "#24936e", "#b2459b", "#8a6d1d", "#5b4fc4", "#c23b4b", "#3f8fa8", "#6b7280", "#7aa02c")
LEVEL = "#8b949e"
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}  # names of Plotly and of matplotlib
GRID = {"gridcolor": "#eaeef2", "linecolor": "#d0d7de", "zeroline": False, "automargin": True}
HEIGHT, LEGEND_LINE, LEGEND_WIDTH = 272, 19, 340  # pixels
FROM_ZERO = ("tokens/s", "GiB", "rank", "parameters", "samples", "updates", "experts")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def figure(chart: Chart) -> dict[str, Any]:
    """{"traces", "layout", "log", "training"} of a chart. meta of a trace: its x in tokens, for the page's switch."""
    styles = _styles(chart.lines)
    traces = [_trace(chart, line, *style) for line, style in zip(chart.lines, styles, strict=True)]
    shares = chart.unit == "%"
    y: dict[str, Any] = {**GRID, "title": {"text": "" if shares else chart.unit, "standoff": 8}}
    y |= {"type": "log"} if chart.log else {}
    y |= {"tickformat": "~%" if shares else ",.9~g"}
    y |= {"dtick": "D2" if _decades(chart) < 1.5 else 1} if chart.log else {}
    y |= {"rangemode": "tozero"} if chart.unit in FROM_ZERO else {}
    if shares and not chart.log and len({y for line in chart.lines for y in line.y if y is not None}) == 1:
        y["range"] = [0, 1]  # else a constant share's axis would go from below 0 to above 100%
    x = {**GRID, "title": {"text": chart.xlabel or "step", "standoff": 6}}
    if chart.xlabel is None:
        x["tickformat"] = "~s"
    else:
        places = {at for line in chart.lines for at in line.x}
        x |= {"tick0": 0, "dtick": max(1, -(-len(places) // 12)), "tickformat": "d"}
    names = [trace["name"] for trace in traces if trace.get("showlegend", True)]
    layout = {**layout_of(), "xaxis": x, "yaxis": y, "showlegend": len(names) > 1}
    lines = _legend_lines(names)
    layout["margin"] = {**layout["margin"], "b": 44 + LEGEND_LINE * lines}
    height = HEIGHT + LEGEND_LINE * max(0, lines - 1)
    return {"traces": traces, "layout": layout, "log": chart.log, "training": chart.xlabel is None, "height": height}


def layout_of() -> dict[str, Any]:
    """What all figures have in common."""
    return {
        "font": {"family": FONT, "size": 12, "color": "#1f2328"},
        "margin": {"l": 56, "r": 12, "t": 18, "b": 40},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hovermode": "x unified",
        "hoverlabel": {"font": {"size": 12}, "namelength": -1},
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0.01,
            "yanchor": "bottom",
            "xref": "container",
            "x": 0.03,
            "maxheight": 0.9,
            "font": {"size": 11},
        },
    }


def _legend_lines(names: Sequence[str]) -> int:
    """How many lines a legend takes below a figure of usual width; Plotly makes no room for them."""
    if len(names) < 2:
        return 0
    lines, left = 1, LEGEND_WIDTH
    widest = max(len(name) for name in names) * 6.2 + 44  # Plotly gives every name the room of the longest
    for _ in names:
        if left < widest and left < LEGEND_WIDTH:
            lines, left = lines + 1, LEGEND_WIDTH
        left -= widest
    return lines


def _decades(chart: Chart) -> float:
    values = [y for line in chart.lines for y in line.y if y is not None and y > 0]
    return math.log10(max(values) / min(values)) if values else 0.0


def _styles(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """A colour and a dash for each line: a run has one colour on the whole page where it has one line in a chart."""
    names = {run: dict.fromkeys(line.name for line in lines if line.run == run and line.role != "level") for run in
             {line.run for line in lines}}  # fmt: skip
    if all(len(each) <= 1 for each in names.values()):
        return [(LEVEL if line.role == "level" else COLORS[line.run % len(COLORS)], "solid") for line in lines]
    order = {run: {name: at for at, name in enumerate(each)} for run, each in names.items()}
    return [
        (LEVEL, "solid")
        if line.role == "level"
        else (COLORS[order[line.run][line.name] % len(COLORS)], list(DASHES)[line.run % len(DASHES)])
        for line in lines
    ]


def _trace(chart: Chart, line: Line, color: str, dash: str) -> dict[str, Any]:
    form = "%{y:.1%}" if chart.unit == "%" else "%{y:.6g}"
    smoothed = {(each.name, each.run) for each in chart.lines if each.role == "mean"}
    below = line.role == "raw" and (line.name, line.run) in smoothed
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if line.role == "points" else "lines",
        "name": plain(f"{line.name}, mean" if line.role == "mean" else line.name),
        "legendgroup": f"{line.run} {line.name}",
        "x": line.x,
        "y": line.y,
        "meta": {"role": line.role, "step": line.x, "tokens": line.tokens},
        "line": {"color": color, "dash": dash, "width": 2 if line.role in ("mean", "points") else 1.3},
        "hovertemplate": f"{form}<extra>%{{fullData.name}}</extra>",
    }
    if below:
        trace |= {"opacity": 0.3, "showlegend": False}
    if line.role == "mean":
        trace["line"]["width"] = 2.2
    if line.role == "points":
        trace["marker"] = {"size": 6, "color": color}
    if sum(y is not None for y in line.y) == 1 and line.role == "raw":
        trace |= {"mode": "markers", "marker": {"size": 6, "color": color}}
    if line.errors is not None:
        trace["error_y"] = {"type": "data", "array": line.errors, "color": color, "thickness": 1, "width": 3}
        precision = ".1%" if chart.unit == "%" else ".2g"
        trace["customdata"] = ["" if error is None else f" ± {error:{precision}}" for error in line.errors]
        trace["hovertemplate"] = f"{form}%{{customdata}}<extra>%{{fullData.name}}</extra>"
    if line.role == "level":
        ends = _ends(chart.lines)
        trace |= {"x": ends[0], "y": line.y * 2, "meta": {"role": "level", "step": ends[0], "tokens": ends[1]}}
        trace["line"] = {"color": LEVEL, "dash": "dash", "width": 1.5}
    return trace


def _ends(lines: Sequence[Line]) -> tuple[list[float], list[float] | None]:
    """The smallest and largest x of a chart, in steps and in tokens."""
    steps = [x for line in lines for x in line.x]
    tokens = [x for line in lines for x in line.tokens or []]
    return [min(steps), max(steps)], [min(tokens), max(tokens)] if tokens else None


def timeline(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The events of history.jsonl over time, a row for each kind; what was written of an event is shown on hover."""
    kinds = list(dict.fromkeys(label(event) for event in history))
    traces = []
    for kind in kinds:
        events = [event for event in history if label(event) == kind and event.get("time")]
        events = events[:: -(-len(events) // MOST_EVENTS)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(kind),
                "x": [str(event["time"]).removesuffix("Z").replace("T", " ") for event in events],
                "y": [plain(kind)] * len(events),
                "text": [_told(event) for event in events],
                "marker": {"size": 9, "color": BAD if kind in WRONG else COLORS[0], "symbol": "circle"},
                "hovertemplate": "%{x}<br>%{text}<extra>%{y}</extra>",
            }
        )
    y = {
        **GRID,
        "categoryorder": "array",
        "categoryarray": [plain(kind) for kind in reversed(kinds)],
        "type": "category",
    }
    x = {**GRID, "type": "date", "title": {"text": "UTC"}}
    layout = {**layout_of(), "xaxis": x, "yaxis": y, "showlegend": False, "hovermode": "closest"}
    height = 90 + 26 * len(kinds)
    return {"traces": traces, "layout": layout, "log": False, "training": False, "height": height}


MOST_EVENTS = 1000  # of a kind
BAD = "#c23b4b"
WRONG = ("skipped", "rollback", "damaged", "damaged checkpoint", "bad_checkpoint", "evaluation_lost", "memory")


def label(event: dict[str, Any]) -> str:
    """The kind of an event; a training that goes on from a checkpoint is a resume."""
    return "resume" if event["event"] == "train" and event.get("resumed") else str(event["event"])


def _told(event: dict[str, Any]) -> str:
    """A line for each fact of an event; Plotly reads simple tags in it."""
    shown = {key: value for key, value in event.items() if key not in ("time", "event", "megakd", "machine")}
    lines = [f"{key}: {str(value)[:80]}" for key, value in shown.items()][:8]
    return "<br>".join(plain(line) for line in lines)


def plain(text: str) -> str:
    """Text of a user as Plotly shows it literally; it reads some tags and entities."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def write_png(path: Path, charts: Sequence[Chart], stages: Sequence[Border]) -> None:
    """All charts as one picture, three in a row, with lines between stages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(charts) // 3)
    picture, axes = plt.subplots(rows, 3, figsize=(3 * PANEL[0], rows * PANEL[1]), layout="constrained", squeeze=False)
    for place in axes.flat[len(charts) :]:
        place.remove()
    for place, chart in zip(axes.flat, charts, strict=False):
        draw(place, chart, stages)
    with publishing(path) as temporary:
        picture.savefig(temporary, format="png", dpi=80, metadata={"Title": PNG_MARK})
    plt.close(picture)


def draw(axes: "Axes", chart: Chart, stages: Sequence[Border]) -> None:
    """One chart on axes of matplotlib."""
    smoothed = {(line.name, line.run) for line in chart.lines if line.role == "mean"}
    for line, (color, dash) in zip(chart.lines, _styles(chart.lines), strict=True):
        if line.role == "level" and line.y[0] is not None:
            axes.axhline(line.y[0], linestyle="--", color=LEVEL, label=line.name)
            continue
        below = line.role == "raw" and (line.name, line.run) in smoothed
        y = [float("nan") if value is None else value for value in line.y]
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if line.role == "points" else {}
        axes.plot(
            line.x,
            y,
            color=color,
            alpha=0.35 if below else 1,
            label=None if below else line.name,
            linestyle=DASHES[dash],
            **style,
        )
        if line.errors is not None:
            axes.errorbar(line.x, y, [error or 0 for error in line.errors], color=color, fmt="none", capsize=2)
    if chart.xlabel is None:
        for border in stages[1:]:
            axes.axvline(border.step, color=LEVEL, linestyle=":", linewidth=1)
    axes.set_yscale("log" if chart.log else "linear")
    axes.set_title(f"{chart.title} ({chart.note})" if chart.note else chart.title, fontsize=10)
    axes.set_xlabel(chart.xlabel or "step", fontsize=9)
    axes.set_ylabel("share" if chart.unit == "%" else chart.unit, fontsize=9)
    axes.grid(alpha=0.3)
    if len({line.name for line in chart.lines}) > 1:
        axes.legend(fontsize=8, frameon=False)
