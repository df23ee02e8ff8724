import subprocess
import sys
from pathlib import Path

from megakd.system.files import append_json
from tests.conftest import ROOT


def compare(*argv: object) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "tools" / "compare_runs.py"), *map(str, argv)]
    return subprocess.run(script, capture_output=True, text=True)


def run_with(folder: Path, losses: list[float]) -> Path:
    for step, loss in enumerate(losses, 1):
        row = {"step": step, "loss": loss, "ce": 1.0, "kl": 0.5, "kl_t1": 0.5, "lr": 1e-3}
        append_json(folder / "metrics.jsonl", row)
    return folder


def test_equal_runs_pass_and_different_ones_do_not(tmp_path):
    first = run_with(tmp_path / "a", [3.0, 2.0, 1.0])
    close = run_with(tmp_path / "b", [3.0, 2.00001, 1.0])
    other = run_with(tmp_path / "c", [3.0, 2.1, 1.0])
    shorter = run_with(tmp_path / "d", [3.0, 2.0])
    assert compare(first, close).returncode == 0
    assert compare(first, close, "--tolerance", 0).returncode == 1
    done = compare(first, other)
    assert done.returncode == 1 and "0.1" in done.stdout
    done = compare(first, shorter)
    assert done.returncode == 1 and "[3]" in done.stdout


def write(folder: Path, rows: list[dict[str, float]]) -> Path:
    for step, row in enumerate(rows, 1):
        append_json(folder / "metrics.jsonl", {"step": step, **row})
    return folder


def cell(output: str, name: str) -> str:
    """What the table says of a metric."""
    return next(line for line in output.splitlines() if line.split()[:1] == [name]).removeprefix(name).strip()


def test_a_metric_that_neither_run_has_is_blank(tmp_path):
    """KL at T = 1, where draws at another temperature are all that is stored; a step without any loss."""
    row = {"loss": 2.0, "ce": 1.0, "kl": 0.5, "lr": 1e-3}
    first, same = (write(tmp_path / name, [row, row, {"lr": 1e-3}]) for name in "ab")
    done = compare(first, same)
    assert done.returncode == 0 and cell(done.stdout, "kl_t1") == "" and cell(done.stdout, "kl") == "0"


def test_a_metric_of_one_run_alone_or_without_a_number_is_a_difference(tmp_path):
    row = {"loss": 2.0, "ce": 1.0, "kl": 0.5, "lr": 1e-3}
    first = write(tmp_path / "a", [row, row, row])
    for name, other in (("b", [row, {**row, "kl_t1": 0.5}, row]), ("c", [row, row, {**row, "kl_t1": float("nan")}])):
        done = compare(first, write(tmp_path / name, other))
        assert done.returncode == 1 and cell(done.stdout, "kl_t1") == "inf"
    broken = write(tmp_path / "d", [{**row, "loss": float("nan")}] * 3)
    assert cell(compare(first, broken).stdout, "loss") == "inf" and compare(broken, broken).returncode == 1


def test_value_that_was_not_finite_in_both_runs_is_equal(tmp_path):
    """Training writes null for it: a step that the loss scaler skipped has no gradient norm in either run."""
    row = {"loss": 2.0, "ce": 1.0, "kl": 0.5, "lr": 1e-3}
    first, same = (write(tmp_path / name, [row, {**row, "loss": None}]) for name in "ab")
    assert compare(first, same).returncode == 0
    done = compare(first, write(tmp_path / "c", [row, row]))
    assert done.returncode == 1 and cell(done.stdout, "loss") == "inf"
