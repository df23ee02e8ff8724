"""Compare the metrics of two runs step by step; exit 0 when every loss is equal within a tolerance, else 1.

python tools/compare_runs.py runs/a runs/b
python tools/compare_runs.py runs/a runs/b --tolerance 0        # resumed against uninterrupted: bit-equal
"""

import argparse
import sys
from pathlib import Path

from megakd.files import read_json_lines
from megakd.log import table

NAMES = ("loss", "ce", "kl", "kl_t1", "lr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument(
        "--tolerance", type=float, default=2e-5, help="largest absolute difference (default: %(default)s)"
    )
    args = parser.parse_args()
    mine, theirs = (
        {row["step"]: row for row in read_json_lines(run / "metrics.jsonl")} for run in (args.run, args.other)
    )
    steps = sorted(mine.keys() & theirs.keys())
    worst = {name: max((abs(mine[s][name] - theirs[s][name]) for s in steps), default=0.0) for name in NAMES}
    print(
        table(
            [f"{len(steps)} common steps", "largest difference"],
            [[name, f"{value:.3g}"] for name, value in worst.items()],
        )
    )
    alone = sorted(mine.keys() ^ theirs.keys())
    if alone:
        print(f"steps in one run only: {alone[:10]}")
    sys.exit(0 if steps and not alone and max(worst.values()) <= args.tolerance else 1)


if __name__ == "__main__":
    main()
