"""Multi-component distillation as a run: trained, killed, resumed, on one process and on two ranks."""

import json
from pathlib import Path

import pytest

from megakd.run import Run
from tests.conftest import in_process, kill_when, megakd, metrics
from tests.objectives.sar import sar_recipe
from tests.test_resume import steps_logged

ONLINE = {"gap": 1.0, "importance": 0.5, "routing": "capacity", "initial_top_k": 2, "final_top_k": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, recipe, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("online")
    value = json.loads(sar_recipe(recipe, folder, tokenizer).read_text())
    value["objective"]["kind"], value["online"] = "online", ONLINE
    value["stages"][0]["lr_multipliers"] = [{"pattern": "projector", "lr_multiplier": 2.0}]
    (folder / "online.json").write_text(json.dumps(value))
    for verb in (["new", folder / "run", "--from", folder / "online.json"], ["tokenize", folder / "run"]):
        in_process(*verb)
    in_process("train", folder / "run")
    return folder / "run"


def test_every_part_is_logged_and_learns(trained):
    rows = metrics(trained)
    parts = {"kl", "feature", "attention", "layers", "contrastive", "capacity"}
    assert len(rows) == 7 and parts < rows[0].keys()
    assert all(rows[-1][name] < rows[0][name] for name in ("loss", "feature", "layers"))
    assert rows[0]["capacity"] == 0 < rows[-1]["capacity"] < 1


@pytest.mark.ranks
def test_it_resumes_and_ranks_give_the_local_curve(trained, tmp_path):
    """What experts count and the capacity come back too."""
    settings = ["checkpoint.every_steps=1", "engine.offload_teacher=true"]  # the latter changes nothing
    killed = Run.create(trained, settings, tmp_path / "killed")
    for steps in (2, 4):
        kill_when(["train", killed.folder], lambda n=steps: steps_logged(killed) >= n)
    in_process("train", killed.folder)
    assert metrics(killed.folder) == metrics(trained)
    for zero in ("zero2", "zero3"):
        settings = ["engine.kind=deepspeed", f"engine.config={zero}", "engine.ranks=2"]
        run = Run.create(trained, settings, tmp_path / zero)
        megakd("train", run.folder)
        for mine, theirs in zip(metrics(run.folder), metrics(trained), strict=True):
            assert mine.keys() == theirs.keys()
            numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
            assert {name: mine[name] for name in numbers} == pytest.approx(numbers, rel=2e-4, abs=2e-5), zero
