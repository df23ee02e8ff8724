"""tools/bench/gpu_smoke: its parts on the CPU, its report, and on a machine with a GPU every part there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.tools.examples import tool

gpu_smoke = tool("bench.gpu_smoke")

SCRIPT = ROOT / "tools" / "bench" / "gpu_smoke.sh"
CPU = torch.device("cpu")


def smoke(*argv: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, argv)]
    inherited = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, **(env or {})}, cwd="/")


@pytest.mark.parametrize("part", ["experts", "loss", "capture", "cached", "online", "sar"])
def test_a_part_passes_on_the_cpu(part: str, tmp_path: Path) -> None:
    assert gpu_smoke.PARTS[part].run(CPU, tmp_path)


def test_a_wrong_number_fails_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megakd.models.shared_core import SharedCoreExperts

    right = SharedCoreExperts.factors
    monkeypatch.setattr(SharedCoreExperts, "factors", lambda *a: tuple(1.1 * y for y in right(*a)))
    with pytest.raises(AssertionError, match="relative error"):
        gpu_smoke.experts(CPU, tmp_path)


@pytest.mark.ranks
def test_the_report_names_what_was_skipped_and_why(tmp_path: Path) -> None:
    done = smoke("--cpu", "--only", "zero3,benches", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "gpu_smoke.json").read_text()) == report
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"gpu_smoke.json", "gpu_smoke.log"}
    assert "===== benches" in (tmp_path / "out" / "gpu_smoke.log").read_text()
    assert report["kind"] == "cpu" and report["versions"]["torch"] == torch.__version__
    zero3, benches = report["parts"]["zero3"], report["parts"]["benches"]
    assert zero3["state"] == "ok" and "skipped" in zero3["result"]["float16"] and zero3["seconds"] > 0
    assert benches == {"state": "skipped", "reason": "measures a GPU"}


def test_parts_without_time_fail_and_say_so(tmp_path: Path) -> None:
    done = smoke("--cpu", "--only", "experts,loss", "--limit", "0")
    assert done.returncode == 1, done.stderr
    assert {part["error"] for part in json.loads(done.stdout)["parts"].values()} == {"no time was left"}


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    states = iter([{"state": "failed", "error": ["why"]}, {"state": "ok", "seconds": 1.0, "result": {}}])
    monkeypatch.setattr(gpu_smoke, "start_part", lambda *_: next(states))
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--cpu", "--only", "loss,sar"])
    assert gpu_smoke.main() == 1
    assert [part["state"] for part in json.loads(capsys.readouterr().out)["parts"].values()] == ["failed", "ok"]


def test_a_missing_folder_of_wheels_is_refused(tmp_path: Path) -> None:
    done = smoke("--wheels", tmp_path / "none", "--cpu")
    assert done.returncode == 2 and "no such folder" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("part", gpu_smoke.PARTS)
def test_a_part_passes_on_the_gpu(part: str, tmp_path: Path, on_card: dict[str, str]) -> None:
    done = smoke("--only", part, "--out", tmp_path, env=on_card)
    assert done.returncode == 0, done.stdout + done.stderr
