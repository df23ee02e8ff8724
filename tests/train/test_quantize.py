"""Stages that round the student's weights: one curve whatever executes it, resume, and what evaluations measure."""

import pytest

from megakd.errors import UserError
from megakd.evals.evaluate import evaluate
from tests.conftest import forked_ranks, in_process, kill_when, metrics
from tests.engine.test_equivalence import curve

INT4 = 'stages.1.quantize={"core": "int4", "factors": "int4", "linear": "int8"}'


@pytest.mark.ranks
def test_a_stage_that_rounds_trains_alike_on_ranks_and_after_a_kill(sibling):
    run, plain, killed = sibling(INT4, "checkpoint.every_steps=1"), sibling(), sibling(INT4, "checkpoint.every_steps=1")
    zero3 = sibling(INT4, "engine.kind=deepspeed", "engine.ranks=2", "engine.config=zero3", "optim.micro_batch=4")
    for each in (run, plain):
        in_process("train", each.folder)
    found, others = curve(metrics(run.folder)), curve(metrics(plain.folder))
    assert found[:4] == others[:4] and all(
        mine[2:] != other[2:] for mine, other in zip(found[4:], others[4:], strict=True)
    )

    kill_when(["train", killed.folder], lambda: killed.path("checkpoints", "all", "step-000006").exists())
    in_process("train", killed.folder)
    assert metrics(killed.folder) == metrics(run.folder)

    # sums in another order move a weight over the border between two codes now and then
    forked_ranks(2, "train", zero3.folder)
    for mine, expected in zip(curve(metrics(zero3.folder)), found, strict=True):
        assert mine[:2] == expected[:2] and mine[2:] == pytest.approx(expected[2:], abs=5e-4)


def test_experts_of_several_ranks_are_refused(sibling):
    with pytest.raises(UserError, match=r"stages\.1\.quantize rounds whole factors.*set engine\.expert_parallel=1"):
        sibling(INT4, "engine.kind=deepspeed", "engine.expert_parallel=2")


def test_what_a_stage_rounds_is_measured_rounded(sibling):
    run = sibling(INT4)
    in_process("train", run.folder)
    last = evaluate(run, "last")[0]
    assert last["model"] == "all/step-000010" and last["quantized"] == run.config.stages[1].quantize
    again = evaluate(run, "last", quantize={"core": "int4", "factors": "int4", "linear": "int8"})[0]
    assert again["model"] == "all/step-000010@core=int4,factors=int4,linear=int8"
    assert again["kl"] == last["kl"] and again["bytes"] == last["bytes"]
    before, rounded = evaluate(run, "student-0")[0], evaluate(run, "student-0", quantize="int3")[0]
    assert rounded["model"] == "student-0@int3" and rounded["kl"] != before["kl"]
    assert rounded["bytes"] < before["bytes"] / 2
    assert "--quantize core=int4,factors=int4,linear=int8" in in_process("export", run.folder)
    # lines of rounded models take nobody's place
    rows = {row["model"]: row for row in evaluate(run)}
    assert rows["student-0"]["kl"] == before["kl"] and "quantized" not in rows["student-0"]
    assert "there is no experts to round" in in_process(
        "evaluate", run.folder, "--model", "last", "--quantize", "experts=int8", code=2
    )
    assert "name it with --model" in in_process("evaluate", run.folder, "--quantize", "int8", code=2)


def test_a_student_that_trained_rounded_loses_less_of_it(sibling):
    """The point of it: at 3 bits, the same steps with rounding beat rounding behind the same steps without."""
    said = ["core", "factors", "linear"]
    int3 = dict.fromkeys(said, "int3")
    longer = ["stages.1.tokens=20480", "optim.lr=3e-3"]
    plain, knows = sibling(*longer), sibling(*longer, "stages.1.quantize=int3")
    for run in (plain, knows):
        in_process("train", run.folder)
    afterwards, trained = evaluate(plain, "last", quantize=int3)[0], evaluate(knows, "last")[0]
    assert trained["quantized"] == int3 and trained["kl"] < afterwards["kl"]
