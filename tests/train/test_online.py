"""Multi-component distillation as a run: trained, killed, resumed, on one process and on two ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megakd.objectives.base import LossReport
from megakd.objectives.online import OnlineDistillation
from megakd.run import Run
from megakd.system.files import read_json, write_json
from tests.conftest import forked_ranks, in_process, kill_when, metrics
from tests.engine.test_guard import spoil
from tests.objectives.sar import sar_recipe
from tests.train.test_resume import steps_logged

ONLINE = {"gap": 1.0, "importance": 0.5, "routing": "capacity", "initial_top_k": 2, "final_top_k": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, recipe, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("online")
    value = json.loads(sar_recipe(recipe, folder, tokenizer).read_text())
    value["objective"] = {"kind": "online", "alpha": 0.7, "temperature": 2.0, **ONLINE}
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
    for zero, teacher in (("zero2", "zero3"), ("zero3", "replica"), ("zero3", "zero3")):
        settings = ["engine.kind=deepspeed", f"engine.config={zero}", "engine.ranks=2"]
        settings.append(f"engine.teacher_parallel={teacher}")
        run = Run.create(trained, settings, tmp_path / f"{zero}-{teacher}")
        forked_ranks(2, "train", run.folder)
        for mine, theirs in zip(metrics(run.folder), metrics(trained), strict=True):
            assert mine.keys() == theirs.keys()
            numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
            assert {name: mine[name] for name in numbers} == pytest.approx(numbers, rel=2e-4, abs=2e-5), settings


LEARNED = {"routing": "learned", "router_lr": 0.02}
STAGES = [
    {
        "name": "low",
        "steps": 3,
        "objective": {
            "feature": 0,
            "contrastive": 0,
            "attention": 0,
            "layers": 1,
            "progressive_layers": True,
            **LEARNED,
        },
    },
    {"name": "maps", "steps": 2, "objective": {"layers": 0, "routing": "all", "importance": 0}},
    {"name": "all", "steps": 2, "objective": LEARNED},
]


def auxiliary(run: Run, checkpoint: str) -> dict[str, Any]:
    return load_file(run.path("checkpoints", checkpoint, "auxiliary.safetensors"))


def train_interrupted(run: Run, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train to the end, through an exception after each of these steps and before its checkpoint."""
    observe = OnlineDistillation.observe

    def interrupted(self: Any, *args: Any) -> None:
        observe(self, *args)
        if steps_logged(run) + 1 in steps:
            steps.remove(steps_logged(run) + 1)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OnlineDistillation, "observe", interrupted)
        for _ in range(len(steps)):
            with pytest.raises(KeyboardInterrupt):
                in_process("train", run.folder)
        in_process("train", run.folder)


@pytest.fixture(scope="module")
def phased(trained, tmp_path_factory) -> Run:
    """Stages with other components, and a router that learns in two of them."""
    settings = ["checkpoint.every_steps=1", f"stages={json.dumps(STAGES)}"]
    run = Run.create(trained, settings, tmp_path_factory.mktemp("phased") / "run")
    in_process("train", run.folder)
    return run


def test_stages_with_other_components_resume_and_keep_what_is_off(phased, trained, tmp_path, monkeypatch):
    """A stage without the projection of one before it ended with a KeyError."""
    rows = metrics(phased.folder)
    parts = ("feature", "attention", "layers", "contrastive")
    assert [{name for name in parts if name in row} for row in rows] == [
        *[{"layers"}] * 3,
        *[{"feature", "attention", "contrastive"}] * 2,
        *[set(parts)] * 2,
    ]
    assert [row.get("layers_compared") for row in rows] == [1, 2, 2, None, None, None, None]
    first, kept, last = (auxiliary(phased, at) for at in ("low/step-000003", "maps/step-000005", "all/step-000007"))
    own = {"layer_projector.weight", *(f"heads.{name}" for name in ("weights", "exp_avg", "exp_avg_sq", "updates"))}
    assert first.keys() == own and kept.keys() == last.keys() == own | {"projector.weight"}
    for name in own:
        assert torch.equal(kept[name], first[name]) and not torch.equal(last[name], kept[name]), name
    assert [each["heads.updates"].item() for each in (first, kept, last)] == [3, 3, 5]

    resumed = Run.create(phased.folder, [], tmp_path / "resumed")
    train_interrupted(resumed, {2, 5, 7}, monkeypatch)
    assert metrics(resumed.folder) == rows
    for at in ("low/step-000002", "maps/step-000004", "all/step-000007"):
        mine, theirs = auxiliary(resumed, at), auxiliary(phased, at)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_a_learned_router_is_logged_and_learns(phased):
    rows = [row for row in metrics(phased.folder) if row["stage"] != "maps"]
    names = {"capacity", "experts", "importance_entropy", "capacity_loss", "gap_loss", "importance_loss"}
    assert all(names < row.keys() for row in rows)
    assert rows[0]["importance_entropy"] == pytest.approx(1) and rows[0]["experts"] == 2
    assert rows[-1]["importance_entropy"] < 1 and all(2 <= row["experts"] <= 4 for row in rows)
    assert not names & metrics(phased.folder)[4].keys()


def test_a_rollback_takes_the_learned_router_back(phased, tmp_path, monkeypatch):
    """The checkpoint is that of step 3; step 4 updates the heads again, steps 5 and 6 fail, and step 3 comes back."""
    spoil(monkeypatch, {4: math.nan, 5: math.nan})
    stages = [{**STAGES[0], "steps": 6}]
    settings = [f"stages={json.dumps(stages)}", "checkpoint.every_steps=3", "guard.nonfinite=skip", "guard.rollback=2"]
    run = Run.create(phased.folder, settings, tmp_path / "run")
    in_process("train", run.folder)
    (event,) = run.events("rollback")
    assert event["step"] == 6 and event["to"].endswith("step-000003")
    saved, back = (auxiliary(run, f"low/step-{step:06d}") for step in (3, 6))
    assert saved["heads.updates"].item() == 3 and saved.keys() == back.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in saved.items())


@pytest.mark.ranks
def test_stages_with_other_components_are_the_same_on_two_ranks(phased, tmp_path):
    run = Run.create(
        phased.folder, ["engine.kind=deepspeed", "engine.config=zero3", "engine.ranks=2"], tmp_path / "run"
    )
    forked_ranks(2, "train", run.folder)
    for mine, theirs in zip(metrics(run.folder), metrics(phased.folder), strict=True):
        assert mine.keys() == theirs.keys()
        numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
        assert {name: mine[name] for name in numbers} == pytest.approx(numbers, rel=2e-4, abs=2e-5)
    mine, theirs = (auxiliary(each, "all/step-000007") for each in (run, phased))
    assert mine.keys() == theirs.keys()
    assert torch.allclose(mine["heads.weights"], theirs["heads.weights"], atol=1e-3)


def finite(memory: dict[str, list[float]]) -> bool:
    return all(math.isfinite(value) for values in memory.values() for value in values)


def test_what_a_skipped_step_measured_is_not_remembered(trained, tmp_path, monkeypatch):
    """NaN in the memory ended the run at its next step (capacity), or made every later answer NaN (importance)."""
    forward, steps = OnlineDistillation.forward, iter(range(100))

    def spoiled(self: Any, batch: Any, held_out: bool = False) -> LossReport:
        report = forward(self, batch, held_out)
        if next(steps) in (4, 5):
            self.gap_sums.fill_(math.nan)
            return LossReport(report.total * math.nan, {name: value * math.nan for name, value in report.terms.items()})
        return report

    monkeypatch.setattr(OnlineDistillation, "forward", spoiled)
    run = Run.create(trained, ["guard.nonfinite=skip", "checkpoint.every_steps=1"], tmp_path / "run")
    in_process("train", run.folder)
    rows, whole = metrics(run.folder), metrics(trained)
    spoiled_rows = [index for index, row in enumerate(rows) if row["loss"] is None]
    assert spoiled_rows and rows[: spoiled_rows[0]] == whole[: spoiled_rows[0]]
    assert all(math.isfinite(row["loss"]) for row in rows[spoiled_rows[-1] + 1 :]) and len(rows) == 7
    saved = [read_json(path)["memory"] for path in run.path("checkpoints").glob("*/step-*/progress.json")]
    assert len(saved) == 7 and all(finite(memory) for memory in saved)


def test_a_memory_that_is_not_finite_begins_anew_and_is_named(trained, tmp_path):
    """Checkpoints of older versions hold what skipped steps had measured."""
    run = Run.create(trained, ["checkpoint.every_steps=3"], tmp_path / "run")
    in_process("train", run.folder)
    last, *later = sorted(run.path("checkpoints").glob("*/step-*"), key=lambda path: path.name)
    for path in later:
        path.rename(path.with_name(path.name + ".away"))
    progress = read_json(last / "progress.json")
    progress["memory"]["importance"][1] = math.nan
    write_json(last / "progress.json", progress)
    for path in (last / "checksums").iterdir():
        path.unlink()  # or the checkpoint would be put aside as damaged
    said = in_process("train", run.folder)
    assert f"{last}: what the objective remembers of importance is not finite; it begins anew" in said
    assert all(math.isfinite(row["loss"]) for row in metrics(run.folder)) and len(metrics(run.folder)) == 7
