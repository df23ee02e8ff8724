"""One loss curve, whatever executes it: local, ZeRO-0, 2 and 3, 1 and 2 ranks, accumulation 1 and 4."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megakd.models.hub import WEIGHTS
from tests.conftest import forked, forked_ranks, in_process, metrics, run_ranks
from tests.forks import Forked

TOLERANCE = 2e-5  # float32, 10 steps over two stages; what differs is the order of sums


def curve(rows: list[dict]) -> list[tuple]:
    return [(row["step"], row["tokens"], row["loss"], row["ce"], row["kl"], row["kl_t1"]) for row in rows]


def validation(rows: list[dict]) -> dict[int, float]:
    """{step: validation loss}; measured every 3 steps of both stages and at their ends."""
    found = {row["step"]: row["validation_nll"] for row in rows if "validation_nll" in row}
    assert list(found) == [3, 4, 7, 10]
    return found


@pytest.fixture(scope="module")
def local(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("local") / "run"
    in_process("new", run, "--from", prepared, "eval.every_steps=3")
    in_process("train", run)
    return metrics(run)


@pytest.fixture(scope="module")
def local_curve(local):
    return curve(local)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "zero, ranks, accumulation", [("zero2", 1, 4), ("zero2", 2, 1), ("zero3", 1, 1), ("zero3", 2, 4)]
)
def test_deepspeed_gives_the_local_curve(local, local_curve, sibling, zero, ranks, accumulation):
    micro_batch = 16 // ranks // accumulation
    engine = [f"engine.config={zero}", f"engine.ranks={ranks}", f"optim.micro_batch={micro_batch}"]
    run = sibling("engine.kind=deepspeed", *engine, "eval.every_steps=3")
    # through launch/train.sh once: what starts the ranks is the same for all
    run_ranks(ranks, run.folder) if (zero, ranks) == ("zero3", 2) else forked_ranks(ranks, "train", run.folder)
    found = curve(metrics(run.folder))
    assert len(found) == len(local_curve) == 10
    for mine, expected in zip(found, local_curve, strict=True):
        assert mine[:2] == expected[:2]
        assert mine[2:] == pytest.approx(expected[2:], abs=TOLERANCE)
    assert validation(metrics(run.folder)) == pytest.approx(validation(local), abs=TOLERANCE)
    if ranks == 2:
        check_zero_to_fp32(run.path("checkpoints", "all", "step-000010"))


def check_zero_to_fp32(checkpoint: Path) -> None:
    """DeepSpeed's script, as it lies in the checkpoint, gives the weights that were saved next to it."""
    state = checkpoint / "state"
    with Forked(state / "zero_to_fp32.py", state, state / "whole", stdout=subprocess.PIPE) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    whole = torch.load(state / "whole" / "pytorch_model.bin", weights_only=True)
    for name, tensor in load_file(checkpoint / "weights" / WEIGHTS).items():
        assert torch.equal(whole[f"student.{name}"], tensor), name


def test_local_accumulation_gives_the_same_curve(local_curve, sibling):
    run = sibling("optim.micro_batch=16")
    in_process("train", run.folder)
    for mine, expected in zip(curve(metrics(run.folder)), local_curve, strict=True):
        assert mine == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.ranks
def test_a_curriculum_is_the_same_on_two_ranks(local_curve, sibling):
    one, two = (sibling("stream.curriculum=nll", *more) for more in ([], ["engine.kind=deepspeed", "engine.ranks=2"]))
    for run in (one, two):  # how hard sequences are is written next to the logits, which other tests compare
        logits = run.path("data", "logits")
        whole = logits.resolve()
        logits.unlink()
        shutil.copytree(whole, logits)
    in_process("train", one.folder)
    forked_ranks(2, "train", two.folder)
    mine, expected = curve(metrics(two.folder)), curve(metrics(one.folder))
    assert [row[:2] for row in mine] == [row[:2] for row in expected]
    assert [row[2:] for row in mine] == [pytest.approx(row[2:], abs=TOLERANCE) for row in expected]
    assert expected[0] != local_curve[0]


@pytest.mark.ranks
def test_a_stage_may_have_its_own_deepspeed_file(local_curve, sibling):
    """Masters and moments move from ZeRO-2's flat groups to ZeRO-3's pieces."""
    run = sibling("engine.kind=deepspeed", "engine.config=zero2", "stages.1.config=zero3")
    forked("train", run.folder)
    for mine, expected in zip(curve(metrics(run.folder)), local_curve, strict=True):
        assert mine == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.ranks
@pytest.mark.parametrize("engine", [["local"], ["deepspeed", "zero0"], ["deepspeed", "zero2"], ["deepspeed", "zero3"]])
def test_bfloat16_trains_close_to_float32(local_curve, prepared, sibling, engine):
    kind, *config = engine
    student = f"model.student={prepared / 'student-0'}"  # given, so that the run need not compress in bfloat16
    run = sibling("model.dtype=bfloat16", student, f"engine.kind={kind}", *(f"engine.config={c}" for c in config))
    (in_process if kind == "local" else forked)("train", run.folder)
    for mine, expected in zip(curve(metrics(run.folder)), local_curve, strict=True):
        assert mine[2:] == pytest.approx(expected[2:], rel=0.03)


def test_curve_falls(local_curve):
    kl = [row[5] for row in local_curve]
    assert sum(kl[-3:]) < 0.95 * sum(kl[:3])
