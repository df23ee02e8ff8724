"""Quality against bytes: the cases that exist and their sizes, what is measured, what a second command does."""

import json
from pathlib import Path

import pytest
import torch

from megakd.models.loading import load_model
from tests.conftest import metrics
from tests.tools.examples import refused, tool

module = tool("bench.size")
SETTINGS = ['stages=[{"name": "all", "steps": 2}]', "compress.calibration_tokens=640"]


def test_cases_are_as_large_as_their_targets(teacher: Path):
    sizes = module.sizes_of(teacher)
    model = load_model(teacher, torch.bfloat16)
    assert sizes.whole == 2 * sum(p.numel() for p in model.parameters())
    stacked = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    assert sizes.expert_numbers == stacked and 1 < sizes.each["int8"] < 1.2 < sizes.each["bf16"] == 2
    cases = module.cases_of(sizes, ["wrappers", "prune", "teacher"], ["bf16", "int8"], [0.45, 0.7], None)
    assert module.Case("teacher", "int8", None) in cases and module.Case("teacher", "bf16", None) not in cases
    for case in cases:
        if case.method == "wrappers":
            target = sizes.bytes(case.budget, case.precision) / sizes.whole
            assert min(abs(target - wanted) for wanted in (0.45, 0.7)) < 0.002, case
    assert {case.budget for case in module.cases_of(sizes, ["prune"], ["int4"], [], [0.6])} == {0.5}


def test_cases_are_measured_rounded_and_only_once(recipe: Path, tmp_path, capsys):
    folder, file, plot = tmp_path / "runs", tmp_path / "rows.json", tmp_path / "rows.png"
    argv = [str(recipe), "--folder", str(folder), "--methods", "teacher", "prune", "--budgets", "0.5"]
    argv += ["--precisions", "bf16", "int4", "--seeds", "1", *SETTINGS, "--speed"]
    argv += ["--json", str(file), "--plot", str(plot)]
    module.main(argv)
    said = capsys.readouterr()
    assert "teacher-int4" in said.out and "prune-0.5-bf16" in said.out and "ETA" in said.err
    rows = {row["case"]: row for row in json.loads(file.read_text())["rows"]}
    assert plot.stat().st_size > 5000 and set(rows) == {"prune-0.5-bf16", "teacher-int4", "prune-0.5-int4"}
    whole, rounded = rows["prune-0.5-bf16"], rows["prune-0.5-int4"]
    assert whole["compressed"]["kl"] != rounded["compressed"]["kl"] and rounded["megabytes"] < whole["megabytes"]
    assert whole["trained"][0]["kl"] != rounded["trained"][0]["kl"] and whole["speed"] == rounded["speed"]
    assert rows["teacher-int4"]["compressed"]["kl"] > 0 and rows["teacher-int4"]["budget"] is None
    # both precisions share a compressed student, and training knows of the rounding
    students = [path for path in folder.glob("prune-0.5/*/student-0")]
    assert len(students) == 2 and len({path.resolve() for path in students}) == 1
    assert metrics(students[0].parent) != metrics(students[1].parent)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    module.main([word for word in argv if word != "--speed"])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == times


def test_the_front_is_what_nothing_beats():
    points = [(3.0, 0.1), (1.0, 0.5), (2.0, 0.6), (2.5, 0.2), (4.0, 0.1)]
    assert module.pareto(points) == [(1.0, 0.5), (2.5, 0.2), (3.0, 0.1)]


def test_what_cannot_be_compared_is_refused(recipe: Path, tmp_path, capsys):
    folder = ["--folder", str(tmp_path / "runs")]
    assert "add engine.kind=local" in refused(module, capsys, recipe, *folder, "engine.kind=deepspeed")
    assert "leaves nothing to compress" in refused(module, capsys, recipe, *folder, "model.student=demo")
    assert "--shard 3/2: expects I/N" in refused(module, capsys, recipe, *folder, "--shard", "3/2")
    with pytest.raises(SystemExit):
        module.main([str(recipe), "--precisions", "int5"])
