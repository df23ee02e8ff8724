"""What the united systems promised, row by row, and how MegaKD keeps it (rows.tsv).

Columns: number, promise, kind, proof. Kinds: `test` (a test's node id), `says` (a line of the package or of docs),
`cannot run here` and `open` (a reason). An open row is not shown by a named test; it may work.
"""

import ast
from collections import Counter
from pathlib import Path

from tests.conftest import ROOT

ROWS = [line.split("\t") for line in (Path(__file__).parent / "rows.tsv").read_text().splitlines()]


def test_every_row_is_listed_once_with_a_proof_or_a_reason():
    assert [int(row[0]) for row in ROWS] == list(range(1, 174))
    assert {row[2] for row in ROWS} <= {"test", "says", "cannot run here", "open"}
    assert all(len(row) == 4 and row[1] and row[3] for row in ROWS)
    print(Counter(row[2] for row in ROWS))


def test_named_tests_exist():
    for number, _, kind, proof in ROWS:
        if kind == "test":
            path, name = proof.split("::")
            tree = ast.parse((ROOT / path).read_text())
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, number


def test_lines_that_a_user_gets_exist():
    files = [*(ROOT / "megakd").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(path.read_text() for path in files)
    for number, _, kind, proof in ROWS:
        assert kind != "says" or proof in text, f"{number}: {proof}"
