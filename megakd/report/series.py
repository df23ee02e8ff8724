"""What a run recorded, as charts of plain numbers: no library draws here.

A line has a point for each step that logged a finite value, and a gap (None) where the value was null or not finite.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megakd.evals.tasks import flat
from megakd.models.hub import load_config
from megakd.models.shared_core import Form, stored_parameters
from megakd.models.spec import spec_for
from megakd.run import Run
from megakd.system.files import read_json, read_json_lines
from megakd.system.text import finite

STRETCHES = 1000  # a longer line keeps the smallest and the largest value of so many stretches of its points
SPAN = 20.0  # positive values whose 1st and 99th percentiles are so far apart have a logarithmic axis at first


class Term(NamedTuple):
    """How a recorded number is shown. unit: "%" for shares of 1; noisy: has a mean over it; log: never, if False.

    section: of the page.
    """

    title: str
    unit: str = ""
    noisy: bool = True
    log: bool = True
    section: str = "Losses"


OPTIMIZER, SYSTEM, OTHER = "Optimizer", "Speed and memory", "Other measures"
NATS, RELATIVE = "nats per token", "relative, mean over experts"
OF_OUTPUT = "relative, on held-out tokens"
# Of metrics.jsonl, in the order of the page. A name that is missing here is drawn under its own name, behind these.
TERMS = {
    "loss": Term("loss", NATS),
    "ce": Term("cross entropy", NATS),
    "kl": Term("divergence from the teacher as trained, at objective.temperature", NATS),
    "kl_t1": Term("KL(teacher || student), T = 1", NATS),
    "span_kl": Term("likelihood of spans: divergence of the student from the teacher", NATS),
    "span_kl_t1": Term("likelihood of spans: KL(teacher || student), T = 1", NATS),
    "kl_frozen": Term("KL(teacher as it was || student), T = 1", NATS),
    "teacher_ce": Term("the teacher's cross entropy", NATS),
    "teacher_drift": Term("KL(teacher as it was || teacher), T = 1", NATS),
    "validation_nll": Term("validation loss while training", NATS, noisy=False),
    "validation_perplexity": Term("validation perplexity while training", "perplexity", noisy=False),
    "features": Term("features of spans"),
    "feature": Term("features"),
    "attention": Term("attention"),
    "layers": Term("layers"),
    "contrastive": Term("contrast"),
    "layers_compared": Term("layers compared by the layer-wise component", "layers", False, False),
    "capacity": Term("capacity", noisy=False),
    "experts": Term("experts per token of the teacher", "experts", False, False),
    "capacity_loss": Term("learned router: loss of the estimated capacity", NATS),
    "gap_loss": Term("learned router: loss of the estimated gap"),
    "importance_loss": Term("learned router: loss of the estimated importance of experts", NATS),
    "importance_entropy": Term("learned router: normalised entropy of the importance of experts", "%"),
    "router_anchor": Term("router drift (squared L2, by objective.anchor_form)", noisy=False),
    "router_certainty": Term("1 − normalised router entropy", "%"),
    "router_balance": Term("load balance of experts"),
    "lr": Term("learning rate", "", False, False, OPTIMIZER),
    "competence": Term("competence: share of the sequences, easiest first", "%", False, False, OPTIMIZER),
    "grad_norm": Term("gradient norm", "L2 norm", section=OPTIMIZER),
    "update_norm": Term("norm of the update", "L2 norm", section=OPTIMIZER),
    "stored_mass": Term("teacher's probability on the stored tokens", "%", log=False),
    "unaligned": Term("labels in no scored span", "per label", log=False),
    "damaged_samples": Term("damaged samples since the process began", "samples", False, False, OPTIMIZER),
    "left_out_updates": Term("skipped updates", "updates", False, False, OPTIMIZER),
    "tokens_per_second": Term("throughput", "tokens/s", True, False, SYSTEM),
    "data_wait_share": Term("waiting for data, of the step's time", "%", True, False, SYSTEM),
    "memory_gb": Term("peak memory of the first process", "GiB", False, False, SYSTEM),
}
PLACE = ("step", "stage", "tokens")  # of a line of metrics.jsonl: where it stands, no measure
MEASURES = {
    "perplexity": Term("held-out perplexity", "perplexity"),
    "bits_per_byte": Term("held-out bits per byte", "bits per byte"),
    "kl": Term("held-out KL(teacher || student)", NATS),
    "top1": Term("top-1 agreement", "%", log=False),
    "topk": Term("top-k agreement", "%", log=False),
    "attention": Term("overlap of attention with the teacher's", "%", log=False),
    "teacher_perplexity": Term("held-out perplexity of the teacher with its new routers", "perplexity"),
    "teacher_kl": Term("held-out KL(teacher || teacher with its new routers)", NATS),
    "tokens_per_second": Term("forward passes of the evaluation", "tokens/s", log=False),
}
# the measure of the initial teacher that a measure is compared with; the student's KL has 0 as its aim
OF_TEACHER = {"teacher_perplexity": "perplexity", "teacher_kl": "kl", "perplexity": "perplexity"}
OF_TEACHER |= {"bits_per_byte": "bits_per_byte", "tokens_per_second": "tokens_per_second"}
SHARES = re.compile(r"acc|exact_match|f1|pass@|em\b")  # metrics of lm-eval that are shares of 1


class Line(NamedTuple):
    """A curve: x values in steps (or layers), the same in tokens where there are such, y with None for gaps.

    run: number of the run that it is of. role: "raw" under a "mean", "points" that were measured one by one,
    "level" across the chart. errors: standard errors, if any is known.
    """

    name: str
    x: list[float]
    tokens: list[float] | None
    y: list[float | None]
    role: str = "raw"
    run: int = 0
    errors: list[float | None] | None = None


class Chart(NamedTuple):
    """Lines with one y axis. xlabel None: steps or tokens, as the reader chooses. note: what is missing in it."""

    title: str
    unit: str
    lines: list[Line]
    log: bool = False
    xlabel: str | None = None
    note: str = ""
    section: str = ""


class Border(NamedTuple):
    """A stage begins after this step."""

    stage: str
    step: int
    tokens: int


class Recorded(NamedTuple):
    """What a run's folder holds for the page; name: as charts call it.

    shares: of the tokens that each of several sources gave, in the order of data.sources.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    history: list[dict[str, Any]]
    compress: dict[str, Any] | None = None
    sizes: tuple[int, int] | None = None  # hidden size, and that of an expert
    shares: tuple[float, ...] = ()

    @classmethod
    def of(cls, run: Run) -> "Recorded":
        compressed = run.path("student-0", "compress.json")
        sizes = None
        if compressed.exists():
            student = load_config(compressed.parent)
            sizes = spec_for(student, str(compressed.parent)).sizes
        return cls(
            run.config.name,
            run.folder,
            run.config.model_dump(mode="json"),
            read_json_lines(run.path("metrics.jsonl"), "step", "stage"),
            read_json_lines(run.path("evals.jsonl"), "model", "step"),
            read_json_lines(run.path("history.jsonl"), "event"),
            read_json(compressed) if compressed.exists() else None,
            sizes,
            _shares(run.path("data", "tokens", "train", "manifest.json")),
        )


def _shares(manifest: Path) -> tuple[float, ...]:
    return tuple(each["share"] for each in read_json(manifest).get("sources", [])) if manifest.exists() else ()


def with_names(runs: Sequence[Recorded]) -> list[Recorded]:
    """The runs under names that tell them apart: their own; where those are equal, with as much of the folder's."""
    own = [run.name for run in runs]
    for depth in range(1 + max(len(run.folder.parts) for run in runs)):
        tails = ["/".join(run.folder.parts[-depth:]) if depth else "" for run in runs]
        names = [f"{n} ({t})" if t and own.count(n) > 1 else n for n, t in zip(own, tails, strict=True)]
        if len(set(names)) == len(names):
            return [run._replace(name=name) for run, name in zip(runs, names, strict=True)]
    names = [f"{name} #{number}" for number, name in enumerate(own, 1)]  # one folder twice
    return [run._replace(name=name) for run, name in zip(runs, names, strict=True)]


def borders(metrics: Sequence[dict[str, Any]]) -> list[Border]:
    """Where each stage of a run begins: the last step before it, 0 for the first."""
    found, last, stage = [], (0, 0), None
    for row in metrics:
        if row["stage"] != stage:
            found.append(Border(row["stage"], *last))
        last, stage = (row["step"], int(finite(row.get("tokens")) or 0)), row["stage"]
    return found


def training_charts(runs: Sequence[Recorded]) -> list[Chart]:
    """A chart for each number that some step of some run logged; NAME/GROUP are lines of NAME's chart."""
    keys: dict[str, list[str]] = {}
    for run in runs:
        for key in dict.fromkeys(key for row in run.metrics for key in row):
            numbers = (row.get(key) for row in run.metrics)
            if key not in PLACE and any(v is None or finite(v) is not None for v in numbers):
                members = keys.setdefault(key.partition("/")[0], [])
                if key not in members:
                    members.append(key)
    order = [*(key for key in TERMS if key in keys), *sorted(key for key in keys if key not in TERMS)]
    charts = [_training_chart(key, sorted(keys[key], key=lambda k: "/" in k), runs) for key in order]
    return [chart for chart in charts if chart.lines or chart.note]


def _training_chart(name: str, keys: list[str], runs: Sequence[Recorded]) -> Chart:
    term = TERMS.get(name, Term(name, section=OTHER))
    lines: list[Line] = []
    lost = logged = 0
    for number, run in enumerate(runs):
        for key, label, factor in _parts(name, keys, run):
            rows = [row for row in run.metrics if key in row]
            if factor is not None and label:
                rows = [row for row in rows if row["stage"] in factor[1]]
            values = np.array([finite(row[key]) for row in rows], float) * (factor[0] if factor else 1)
            if factor is None or not label:
                lost, logged = lost + int(np.isnan(values).sum()), logged + len(values)
            if not np.isfinite(values).any():
                continue
            text = " ".join(part for part in (run.name if len(runs) > 1 else "", label) if part)
            lines += _smoothed(text or term.title, rows, values, term.noisy, number)
    note = f"{lost} of {logged} steps: not finite" if lost else ""
    return Chart(term.title, term.unit, lines, term.log and wants_log(lines), None, note, term.section)


def _parts(name: str, keys: list[str], run: Recorded) -> list[tuple[str, str, tuple[float, set[str]] | None]]:
    """(key, label, (factor, stages)) of the lines that a run has in a chart: the number itself, and one per group."""
    if name == "lr":
        multipliers = _multipliers(run.metrics)
        if multipliers and multipliers.keys() != {1.0}:
            return [("lr", f"x{each:g}", (each, stages)) for each, stages in sorted(multipliers.items(), reverse=True)]
    own = [key for key in keys if any(key in row for row in run.metrics)]
    several = len(own) > 1
    return [(key, key.partition("/")[2] or ("all" if several else ""), None) for key in own]


def _multipliers(metrics: Iterable[dict[str, Any]]) -> dict[float, set[str]]:
    """The learning-rate multipliers of parameter groups, and in which stages: groups' norms are logged by them."""
    found: dict[float, set[str]] = {}
    for stage, keys in dict.fromkeys((row["stage"], tuple(row)) for row in metrics):  # few, of many rows
        for key in keys:
            if match := re.fullmatch(r"(?:grad|update)_norm/x([\d.e+-]+?)(?:-no-decay)?", key):
                found.setdefault(float(match[1]), set()).add(stage)
    return found


def _smoothed(name: str, rows: list[dict[str, Any]], values: np.ndarray, noisy: bool, run: int) -> list[Line]:
    """The values as they are and, over noise, their mean over the last tenth of the stage's points."""
    steps = np.array([row["step"] for row in rows])
    counted = [finite(row.get("tokens")) for row in rows]
    tokens = None if any(each is None for each in counted) else np.array(counted)
    lines = [_line(name, steps, tokens, values, "raw", run)]
    if not noisy:
        return lines
    means = np.full(len(values), np.nan)
    stages = np.array([row["stage"] for row in rows])
    for stage in dict.fromkeys(stages.tolist()):
        mine = np.flatnonzero((stages == stage) & np.isfinite(values))
        if (size := len(mine) // 10) > 1:
            sums = np.cumsum(np.concatenate([[0.0], values[mine]]))
            means[mine[size - 1 :]] = (sums[size:] - sums[:-size]) / size
    at = np.isfinite(means)
    if at.any():
        lines.append(_line(name, steps[at], None if tokens is None else tokens[at], means[at], "mean", run))
    return lines


def _line(name: str, steps: np.ndarray, tokens: np.ndarray | None, values: np.ndarray, role: str, run: int) -> Line:
    kept = thinned(values)
    y: list[float | None] = [None if np.isnan(v) else float(v) for v in values[kept]]
    return Line(name, steps[kept].tolist(), None if tokens is None else tokens[kept].tolist(), y, role, run)


def thinned(values: np.ndarray) -> np.ndarray:
    """Which points of a line are drawn: all of a short one; of a long one first and last, and of each stretch the
    smallest, the largest and the first gap."""
    if len(values) <= 2 * STRETCHES:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), STRETCHES):
        part = values[stretch]
        gaps = np.isnan(part)
        if gaps.any():
            kept.add(int(stretch[gaps.argmax()]))
        if not gaps.all():
            kept |= {int(stretch[np.nanargmin(part)]), int(stretch[np.nanargmax(part)])}
    return np.array(sorted(kept))


def wants_log(lines: Sequence[Line]) -> bool:
    """Whether positive values span so much that a linear axis would hide the small ones."""
    values = np.array([y for line in lines for y in line.y if y is not None], float)
    if not len(values) or values.min() <= 0:
        return False
    low, high = np.quantile(values, [0.01, 0.99])
    return bool(high > SPAN * low)


def quality_charts(runs: Sequence[Recorded]) -> list[Chart]:
    """Measures of the validation set and of lm-eval's tasks at the checkpoints; a dashed line: the teacher's own."""
    rows_of = [trained(run) for run in runs]
    if not any(finite(row.get("tokens")) for rows in rows_of for row in rows):
        return []
    teacher = next((row for run in runs for row in run.evals if row["model"] == "teacher"), {})
    charts = []
    for key, term in MEASURES.items():
        several = len(runs) > 1
        lines = [
            _measured(run.name if several else "student", rows, [finite(row.get(key)) for row in rows], None, number)
            for number, (run, rows) in enumerate(zip(runs, rows_of, strict=True))
        ]
        lines = [line for line in lines if line.x]
        level = finite(teacher.get(OF_TEACHER.get(key, "")))
        if lines and level is not None:
            lines.append(Line("teacher", [], None, [level], "level"))
        if lines:
            charts.append(Chart(term.title, term.unit, lines, term.log and wants_log(lines)))
    return charts + _task_charts(runs, rows_of, teacher)


def _task_charts(
    runs: Sequence[Recorded], rows_of: Sequence[list[dict[str, Any]]], teacher: dict[str, Any]
) -> list[Chart]:
    names = list(dict.fromkeys(n for rows in rows_of for row in rows for n in flat(row.get("tasks", {}))))
    level = flat(teacher.get("tasks", {}))
    charts = []
    for name in names:
        lines = []
        for number, (run, rows) in enumerate(zip(runs, rows_of, strict=True)):
            values = [finite(flat(row.get("tasks", {})).get(name)) for row in rows]
            errors = [finite(flat(row.get("tasks", {}), "_stderr").get(name)) for row in rows]
            lines.append(_measured(run.name if len(runs) > 1 else "student", rows, values, errors, number))
        if name in level:
            lines.append(Line("teacher", [], None, [level[name]], "level"))
        charts.append(Chart(name, unit_of(name), [line for line in lines if line.y]))
    return [chart for chart in charts if chart.lines]


def unit_of(task: str) -> str:
    """ "%" where lm-eval's metric is a share of 1; else nothing is known."""
    return "%" if SHARES.match(task.partition("/")[2]) else ""


def trained(run: Recorded) -> list[dict[str, Any]]:
    """The last line of each model but the teacher, in the order of training; any process may have written them."""
    last = {row["model"]: row for row in run.evals if row["model"] != "teacher"}
    return sorted(last.values(), key=lambda row: row["step"])


def _measured(
    name: str,
    rows: list[dict[str, Any]],
    values: list[float | None],
    errors: list[float | None] | None,
    run: int,
) -> Line:
    at = [index for index, value in enumerate(values) if value is not None]
    x, tokens = [rows[i]["step"] for i in at], [finite(rows[i].get("tokens")) for i in at]
    known = None if errors is None or all(errors[i] is None for i in at) else [errors[i] for i in at]
    counted = None if None in tokens else [t for t in tokens if t is not None]
    return Line(name, x, counted, [values[i] for i in at], "points", run, known)


def compression_charts(compress: dict[str, Any] | None, sizes: tuple[int, int] | None) -> list[Chart]:
    """By layer: the errors of the output, of the metric that the fit minimised and of the weights, ranks, parameters.

    sizes: hidden size and that of an expert; None: parameters are not known.
    """
    if compress is None:
        return []
    parts = {(part["layer"], part["projection"]): part for part in compress.get("parts", [])}
    measured = [layer for layer in compress.get("layers", []) if "output_error" in layer]
    output = Line(
        compress.get("method", "shared_core"),
        [layer["layer"] for layer in measured],
        None,
        [layer["output_error"] for layer in measured],
        "points",
    )
    layers = sorted({layer for layer, _ in parts})
    projections = list(dict.fromkeys(projection for _, projection in parts))
    rank = f", rank {compress['rank']}" if compress.get("rank") else ""

    def chart(title: str, unit: str, value: Callable[[dict[str, Any], str], dict[str, float]]) -> Chart:
        found: dict[str, list[tuple[float, float]]] = {}
        for projection in projections:
            for layer in layers:
                if (layer, projection) in parts:
                    for name, number in value(parts[layer, projection], projection).items():
                        found.setdefault(name, []).append((layer, number))
        lines = [
            Line(name, [x for x, _ in pairs], None, [y for _, y in pairs], "points") for name, pairs in found.items()
        ]
        return Chart(title, unit, lines, False, "layer")

    def mean(key: str) -> Callable[[dict[str, Any], str], dict[str, float]]:
        return lambda part, projection: (
            {projection: sum(part[key]) / len(part[key])} if part.get(key) and None not in part[key] else {}
        )

    def ranks(part: dict[str, Any], projection: str) -> dict[str, float]:
        form = part.get("form") or {}
        return {f"{projection} {side}": form[f"{side}_rank"] for side in ("input", "output") if f"{side}_rank" in form}

    def stored(part: dict[str, Any], projection: str) -> dict[str, float]:
        if sizes is None or "form" not in part:
            return {}
        return {projection: stored_parameters(Form(**part["form"]), projection, len(part["errors"]), *sizes)}

    charts = [
        Chart("error of the MoE layers' output", OF_OUTPUT, [output] if measured else [], False, "layer"),
        chart(f"weighted error, which the fit minimised{rank}", RELATIVE, mean("weighted_errors")),
        chart(f"error of the weights{rank}", RELATIVE, mean("errors")),
        chart("ranks of the wrappers", "rank", ranks),
        chart("stored parameters of the experts", "parameters", stored),
    ]
    return [each for each in charts if each.lines]


def router_charts(run: Recorded) -> list[Chart]:
    """How evenly the teacher's routers use their experts, at first and at the last checkpoint that measured it."""
    rows = [row for row in run.evals if row.get("teacher_routers")]
    shown = [row for row in rows if row["model"] == "teacher"][-1:]
    shown += sorted((row for row in rows if row["model"] != "teacher"), key=lambda row: row["step"])[-1:]
    titles = {
        "busiest": Term("load of the busiest expert", "times the mean load"),
        "idle": Term("experts that receive no token", "experts"),
        "entropy": Term("normalised router entropy", "%"),
    }
    charts = []
    for key, term in titles.items():
        lines = []
        for row in shown:
            found = [finite(router.get(key)) for router in row["teacher_routers"].values()]
            pairs = [(at, y) for at, y in enumerate(found) if y is not None]
            if pairs:
                x, y = zip(*pairs, strict=True)
                lines.append(Line(row["model"], list(x), None, list(y), "points"))
        if lines:
            charts.append(Chart(term.title, term.unit, lines, False, "router, from the first layer on"))
    return charts
