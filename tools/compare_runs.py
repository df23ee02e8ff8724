"""Compare the metrics of two runs step by step; exit 0 when every loss is equal within a tolerance, else 1.

A metric that neither run has is left blank; one that a single run has, or that is NaN, is no equal one.

python tools/compare_runs.py runs/a runs/b
python tools/compare_runs.py runs/a runs/b --tolerance 0        # resumed against uninterrupted: bit-equal
"""

import argparse
import math
import sys
from typing import Any

import installed  # noqa: F401

from megakd.names import expand
from megakd.system.files import read_json_lines
from megakd.system.terminal import accept_any_encoding
from megakd.system.text import table

NAMES = ("loss", "ce", "kl", "kl_t1", "lr")


def main() -> None:
    accept_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=expand)
    parser.add_argument("other", type=expand)
    parser.add_argument(
        "--tolerance", type=float, default=2e-5, help="largest absolute difference (default: %(default)s)"
    )
    args = parser.parse_args()
    mine, theirs = (
        {row["step"]: row for row in read_json_lines(run / "metrics.jsonl", "step")} for run in (args.run, args.other)
    )
    steps = sorted(mine.keys() & theirs.keys())
    worst = {name: largest([(mine[step], theirs[step]) for step in steps], name) for name in NAMES}
    rows = [[name, "" if value is None else f"{value:.3g}"] for name, value in worst.items()]
    print(table([f"{len(steps)} common steps", "largest difference"], rows))
    alone = sorted(mine.keys() ^ theirs.keys())
    if alone:
        print(f"steps in one run only: {alone[:10]}")
    equal = all(value is None or value <= args.tolerance for value in worst.values())
    sys.exit(0 if steps and not alone and equal else 1)


def largest(pairs: list[tuple[dict[str, Any], dict[str, Any]]], name: str) -> float | None:
    """The largest difference of a metric over rows of the same step; infinite where one row lacks it or holds NaN.

    Null, which training writes for what was not finite, equals null alone.
    """
    found = []
    for mine, theirs in ((a.get(name, math.nan), b.get(name, math.nan)) for a, b in pairs if name in a or name in b):
        if mine is None or theirs is None:
            found.append(0.0 if mine is theirs else math.inf)
        else:
            found.append(math.inf if math.isnan(mine - theirs) else abs(mine - theirs))
    return max(found, default=None)


if __name__ == "__main__":
    main()
