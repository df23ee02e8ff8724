"""RUN/measured.json: tokens/s per GPU of each verb on each device, as the last real run measured it.

{"version": 1, "rates": [{"verb", "device", "tokens_per_second", "ranks", "tokens", "seconds", …}, …]}
"""

import time
from pathlib import Path
from typing import Any

from megakd.errors import UserError
from megakd.system.files import locked, read_json, write_json
from megakd.system.text import finite

NAME, VERSION = "measured.json", 1


class Stopwatch:
    """Tokens, and the seconds in which they were made, from the second addition on: the first one warms up."""

    def __init__(self) -> None:
        self.warm, self.last = False, time.perf_counter()
        self.tokens, self.seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        if self.warm:
            self.tokens += tokens
            self.seconds += seconds
        self.warm = True

    def count(self, tokens: int) -> None:
        """Add tokens that took all the time since the last call."""
        now = time.perf_counter()
        self.add(tokens, now - self.last)
        self.last = now


def record_rate(
    folder: Path, verb: str, device: str, tokens: float, seconds: float, ranks: int, **settings: Any
) -> None:
    """Replace the rate of a verb on a device; tokens: of all ranks, in `seconds`. Nothing where nothing was measured.

    Several workers of one verb may end at the same time: each states its own rate, the last one stays.
    """
    if not (tokens > 0 and seconds > 0):
        return
    rate = {"verb": verb, "device": device, "tokens_per_second": float(f"{tokens / seconds / ranks:.4g}")}
    rate |= {"ranks": ranks, "tokens": tokens, "seconds": round(seconds, 3), **settings}
    path = folder / NAME
    with locked(folder / f".{NAME}.lock"):
        others = [r for r in read_rates(path) if (r["verb"], r["device"]) != (verb, device)] if path.exists() else []
        write_json(path, {"version": VERSION, "rates": [*others, rate]})


def read_rates(path: Path) -> list[dict[str, Any]]:
    """The rates of a file; UserError where it is no such file."""
    found = read_json(path)
    rates = found.get("rates") if isinstance(found, dict) else None
    if not isinstance(rates, list) or found.get("version") != VERSION:
        raise UserError(f'{path}: expected {{"version": {VERSION}, "rates": [...]}}, as megakd train writes it')
    for rate in rates:
        number = finite(rate.get("tokens_per_second")) if isinstance(rate, dict) else None
        if number is None or number <= 0 or not all(isinstance(rate.get(k), str) for k in ("verb", "device")):
            raise UserError(f"{path}: a rate without verb, device and tokens_per_second above 0: {rate}")
    return rates
