"""Ways to compress compared at equal bytes: the runs that are made, what a second command does, and what is refused."""

import json
from pathlib import Path

import pytest

from megakd.errors import UserError
from megakd.models.hub import load_config
from tests.conftest import metrics
from tests.tools.examples import refused, tool

module = tool("compare_methods")
SETTINGS = ['stages=[{"name": "all", "steps": 2}]', "compress.calibration_tokens=640", "compress.rank=64"]


def test_methods_are_compressed_trained_and_measured_once(recipe: Path, tmp_path, capsys):
    folder, file, plot = tmp_path / "runs", tmp_path / "rows.json", tmp_path / "rows.png"
    argv = [str(recipe), "--folder", str(folder), "--only", "wrappers", "prune", "--budgets", "0.5", "--seeds", "2"]
    argv += [*SETTINGS, "--json", str(file), "--plot", str(plot)]
    module.main(argv)
    said = capsys.readouterr()
    assert "wrappers-0.5" in said.out and "the teacher: perplexity" in said.out and "ETA" in said.err
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == ["wrappers", "prune"] and plot.stat().st_size > 5000
    for row in rows:
        before, after = row["compressed"], row["trained"]
        assert 0 < row["share"] < 1 and row["seeds"] == [0, 1] and len(after) == 2
        assert after[0] != after[1] and all(abs(found["kl"] - before["kl"]) > 1e-6 for found in after)
    # equal bytes, for the rest of the model is the same
    assert abs(rows[0]["share"] - rows[1]["share"]) < 0.05
    assert not hasattr(load_config(folder / "prune-0.5" / "student-0"), "shared_core")
    seeds = [folder / "prune-0.5" / f"seed-{seed}" for seed in (0, 1)]
    assert len({(seed / "student-0").resolve() for seed in seeds}) == 1
    assert metrics(seeds[0]) != metrics(seeds[1])
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    module.main(argv)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == times
    assert json.loads(file.read_text())["rows"] == rows


def test_the_largest_rank_within_a_budget():
    """Numbers by hand: F D + E (2 F R + (F + D) R) of E F D."""
    experts, hidden, inner = 8, 576, 1536
    rank = module.largest_rank(0.25, experts, hidden, inner)
    stored = [inner * hidden + experts * (3 * inner + hidden) * r for r in (rank, rank + 1)]
    assert stored[0] <= 0.25 * experts * inner * hidden < stored[1] and rank == 21
    with pytest.raises(
        UserError, match=r"--budgets 0.1: a shared core and wrappers of rank 1 take 13\.1% of the experts"
    ):
        module.largest_rank(0.1, experts, hidden, inner)


def test_what_cannot_be_compared_is_refused(recipe: Path, tmp_path, capsys):
    folder = ["--folder", str(tmp_path / "runs")]
    assert "add engine.kind=local" in refused(module, capsys, recipe, *folder, "engine.kind=deepspeed")
    assert "leaves nothing to compress" in refused(module, capsys, recipe, *folder, "model.student=demo")
    module.main([str(recipe), *folder, "--budgets", "0.5", "--list"])
    listed = capsys.readouterr().out
    assert "prune+core-0.5" in listed and "compress.experts=" in listed and not (tmp_path / "runs").exists()
