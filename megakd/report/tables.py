"""Tables of evaluations and of compression errors as text."""

from typing import Any

from megakd.evals.tasks import flat
from megakd.models.shared_core import (
    PROJECTIONS,
)
from megakd.system.text import cell, finite, table


def error_table(report: dict[str, Any]) -> str:
    """Relative error of each layer and projection, mean over experts: of the weights, or of what they give."""
    key = "weighted_errors" if "weighted_errors" in report["parts"][0] else "errors"
    errors = {(p["layer"], p["projection"]): p[key] for p in report["parts"]}
    rows = []
    for layer in sorted({layer for layer, _ in errors}):
        rows.append([f"layer {layer}", *(f"{sum(e) / len(e):.4f}" for e in (errors[layer, p] for p in PROJECTIONS))])
    return table(["relative error" if key == "errors" else "error of outputs", *PROJECTIONS], rows)


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
