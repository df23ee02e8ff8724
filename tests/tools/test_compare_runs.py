import subprocess
import sys
from pathlib import Path

from megakd.files import append_json
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
