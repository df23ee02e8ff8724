"""`megakd train` with experts sharded over two ranks, and on from there on one."""

import shutil

import pytest
from safetensors.torch import load_file

from megakd.cli import run_verb
from megakd.errors import UserError
from megakd.models.hub import WEIGHTS
from megakd.system.files import read_json
from megakd.train.checks import check
from tests.conftest import forked, forked_ranks, metrics

TOLERANCE = 2e-5  # as in test_equivalence.py


def curve(rows: list[dict]) -> list[tuple]:
    return [(row["step"], row["tokens"], row["loss"], row["ce"], row["kl"], row["kl_t1"]) for row in rows]


@pytest.mark.ranks
def test_a_run_moves_between_layouts_of_ranks(sibling):
    """Two stages on two ranks that share the experts, the last steps again on one: the curve of the local engine."""
    local = sibling("eval.every_steps=10")
    run_verb(["train", str(local.folder)])
    expected = curve(metrics(local.folder))
    layout = ["engine.config=zero3", "engine.ranks=2", "engine.expert_parallel=2", "optim.micro_batch=4"]
    layout.append("eval.every_steps=10")
    run = sibling("engine.kind=deepspeed", *layout)
    forked_ranks(2, "train", run.folder)
    found = curve(metrics(run.folder))
    assert len(found) == len(expected) == 10
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=TOLERANCE)
    measured = [[row["validation_nll"] for row in metrics(r.folder) if "validation_nll" in row] for r in (run, local)]
    assert len(measured[0]) == 2 and measured[0] == pytest.approx(measured[1], abs=TOLERANCE)

    done = run.path("checkpoints", "all", "step-000010")
    assert read_json(done / "state" / "layout.json")["expert_parallel"] == 2
    first = load_file(done / "weights" / WEIGHTS)
    shutil.rmtree(done)
    said = forked("train", run.folder, "engine.ranks=1", "engine.expert_parallel=1")
    assert "saved by 2 ranks with expert_parallel 2, converted for 1 ranks with expert_parallel 1" in said
    again = curve(metrics(run.folder))
    assert [row[0] for row in again] == list(range(1, 11))
    for mine, theirs in zip(again, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=TOLERANCE)
    second = load_file(done / "weights" / WEIGHTS)
    assert first.keys() == second.keys() == load_file(run.student_folder / WEIGHTS).keys()
    assert all((tensor - second[name]).abs().max() < 1e-3 for name, tensor in first.items())

    shutil.rmtree(done)  # and back: from what one rank went on from, on two that share the experts again
    forked("train", run.folder, "checkpoint.every_steps=1", "engine.ranks=1", "engine.expert_parallel=1")
    for path in run.path("checkpoints", "all").glob("step-*"):
        if path.name > "step-000008":
            shutil.rmtree(path)
    forked_ranks(2, "train", run.folder, "engine.ranks=2", "engine.expert_parallel=2")
    for mine, theirs in zip(curve(metrics(run.folder)), expected, strict=True):
        assert mine == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["engine.kind=local"], "engine.kind=local is one process"),
        (["engine.ranks=3", "engine.kind=deepspeed"], "2 does not divide the 3 ranks"),
        (
            ["engine.ranks=2", "engine.kind=deepspeed", 'stages.0.lr_multipliers.0.pattern="shared_core|gate_left"'],
            "stage 'experts': lr_multipliers: engine.expert_parallel packs 4 factors into",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused_before_ranks_start(sibling, changes, message):
    with pytest.raises(UserError) as error:  # what config alone tells by `new`
        check(sibling("engine.expert_parallel=2", "engine.config=zero3", *changes))
    assert message in str(error.value) and "\n" not in str(error.value)
