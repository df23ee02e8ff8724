"""Numbers, durations and tables as text."""

import math
from collections.abc import Mapping
from typing import Any


def short(number: float) -> str:
    """1234567 → 1.23M, in three digits."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.9995:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def finite(value: Any) -> float | None:
    """A number that can be compared, drawn and formatted; None for null, NaN, infinity, and what is no number."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def cell(row: Mapping[str, Any], name: str, form: str, scale: float = 1) -> str:
    """A cell of a table: the number `name` of a row times `scale`, "-" where it is missing or not finite."""
    value = finite(row.get(name))
    return "-" if value is None else format(value * scale if scale != 1 else value, form)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def table(headers: list[str], rows: list[list[str]], left: bool = False) -> str:
    """A plain text table: the first column flush left, the others flush right (`left`: all flush left)."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(row: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if left or i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *map(line, rows)])
