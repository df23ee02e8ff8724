"""What a benchmark finds: rows of case, metric and value, and how they are shown."""

from typing import NamedTuple

from megakd.system.text import table


class Row(NamedTuple):
    bench: str
    case: str
    metric: str
    value: float
    unit: str


def show(rows: list[Row]) -> str:
    """A table with a line a case and a column a metric."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    values = {(row.case, row.metric): row.value for row in rows}
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        found = [values.get((case, metric)) for metric in metrics]
        lines.append(
            [
                case,
                *(
                    "" if v is None else f"{v:.1e}" if abs(v) < 0.01 else f"{v:,.4g}" if v < 1e4 else f"{v:,.0f}"
                    for v in found
                ),
            ]
        )
    return table(["", *metrics], lines)
