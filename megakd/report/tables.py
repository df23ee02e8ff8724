"""Tables of evaluations and of compression errors as text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from megakd.evals.tasks import flat
from megakd.system.text import cell, finite, table


class Column(NamedTuple):
    """A measure of evals.jsonl in tables: its title, its name in a line, its format; shown as value times scale.

    only_with: the column is shown where some line has this measure.
    """

    title: str
    name: str
    form: str
    scale: float = 1
    only_with: str | None = None


COLUMNS = (
    Column("perplexity", "perplexity", ".2f"),
    Column("bits/byte", "bits_per_byte", ".3f"),
    Column("KL to teacher", "kl", ".4f"),
    Column("top-1", "top1", ".1%"),
    Column("top-k", "topk", ".1%"),
    Column("attention", "attention", ".1%", only_with="attention"),
    Column("parameters", "parameters", ","),
    Column("MB", "bytes", ".1f", 1e-6),
    Column("tokens/s", "tokens_per_second", ",.0f"),
)
# in a table of their own where text is printed (`teacher_table`)
TEACHER_COLUMNS = (
    Column("teacher's perplexity", "teacher_perplexity", ".2f", only_with="teacher_nll"),
    Column("teacher's KL", "teacher_kl", ".4f", only_with="teacher_nll"),
)


def error_table(report: dict[str, Any]) -> str:
    """What compress.json says of each layer, whatever the method: the error of its experts' output, and of matrices.

    Of matrices the mean over experts is shown: of the weights, or where inputs were measured of what they give.
    """
    parts, layers = report.get("parts", []), report.get("layers", [])
    columns: dict[str, dict[int, str]] = {}
    if any("output_error" in layer for layer in layers):
        columns["MoE output"] = {each["layer"]: f"{each['output_error']:.4f}" for each in layers}
    key = "weighted_errors" if parts and "weighted_errors" in parts[0] else "errors"
    for part in parts:
        errors = part[key]
        columns.setdefault(part["projection"], {})[part["layer"]] = f"{sum(errors) / len(errors):.4f}"
    numbers = sorted({number for column in columns.values() for number in column})
    what = "error of outputs" if key == "weighted_errors" else "relative error"
    rows = [[f"layer {number}", *(column.get(number, "-") for column in columns.values())] for number in numbers]
    return table([what, *columns], rows) + "\n" + stored_text(report)


def method_of(report: dict[str, Any]) -> str:
    """The method of compress.json; of versions before there were several, shared_core."""
    return report.get("method", "shared_core")


def stored_text(report: dict[str, Any]) -> str:
    """What the student's experts are, in numbers."""
    if "expert_share" not in report:
        return f"{method_of(report)}: {report['expert_parameters']:,} parameters in experts"
    left = f"{report['experts']} of {report['teacher_experts']} experts in each layer, "
    return (
        f"{method_of(report)}: {left if report['experts'] < report['teacher_experts'] else ''}"
        f"{report['expert_parameters']:,} parameters in experts, {report['expert_bytes'] / 1e6:,.1f} MB, "
        f"{report['expert_share']:.1%} of the teacher's"
    )


def task_table(rows: list[dict[str, Any]]) -> str:
    """The tasks of rows of evals.jsonl as text, a model a line."""
    found = [flat(row.get("tasks", {})) for row in rows]
    names = list(dict.fromkeys(name for numbers in found for name in numbers))
    cells = [[f"{numbers[name]:.4g}" if name in numbers else "-" for name in names] for numbers in found]
    return table(["tasks", *names], [[row["model"], *line] for row, line in zip(rows, cells, strict=True)])


def quality_columns(rows: list[dict[str, Any]], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """The columns that lines of evals.jsonl fill."""
    return [c for c in columns if c.only_with is None or any(c.only_with in row for row in rows)]


def quality_cells(row: dict[str, Any], columns: list[Column]) -> list[str]:
    return [cell(row, column.name, column.form, column.scale) for column in columns]


def quality_table(rows: list[dict[str, Any]], names: list[str] | None = None) -> str:
    """Rows of evals.jsonl as text, a model a line."""
    columns = quality_columns(rows)
    named = zip(names or [row["model"] for row in rows], rows, strict=True)
    lines = [[name, *quality_cells(row, columns)] for name, row in named]
    return table(["held out", *(column.title for column in columns)], lines)


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


def conclusion(rows: list[dict[str, Any]]) -> str:
    """Which shares of what compression lost KD and CE alone win back; rows: teacher, compressed, after KD, after CE."""
    teacher, compressed, kd, ce = rows

    def won_back(trained: dict[str, Any], name: str) -> str:
        return f"{(compressed[name] - trained[name]) / (compressed[name] - teacher[name]):.0%}"

    return (
        f"KD closed {won_back(kd, 'kl')} of the KL that compression opened (CE alone: {won_back(ce, 'kl')}) and "
        f"{won_back(kd, 'nll')} of the loss (CE alone: {won_back(ce, 'nll')}), at {kd['tokens']:,} tokens each."
    )
