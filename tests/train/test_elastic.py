"""On how many ranks a run can train, and that it goes on from one number to another as if nothing had happened."""

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megakd.errors import UserError
from megakd.run import Run
from megakd.train.elastic import fitting, misfit
from tests.conftest import ROOT, assert_goes_like, files, forked, forked_ranks
from tests.forks import Forked

DEEPSPEED = ("engine.kind=deepspeed", "engine.config=zero3")
ELASTIC = (*DEEPSPEED, "checkpoint.every_steps=1")


def test_ranks_that_batch_and_experts_divide_among_fit(sibling):
    """16 sequences in micro-batches of 2."""
    config = sibling(*DEEPSPEED, "optim.micro_batch=2").config
    assert fitting(config, 1, 8) == [1, 2, 4, 8] and fitting(config, 8, 8) == [8]
    config = sibling(*DEEPSPEED, "optim.micro_batch=1", "engine.expert_parallel=4").config
    assert fitting(config, 1, 16) == [4, 8, 16]
    config = sibling(*DEEPSPEED, "optim.micro_batch=2", 'stages.1.optim={"batch_tokens": 128}').config
    assert fitting(config, 1, 2) == [1, 2] and "4 windows per step do not divide among 4" in str(misfit(config, 4))


@pytest.mark.parametrize(
    "changes, least, most, words",
    [
        (DEEPSPEED, 3, 3, "16 windows per step do not divide among 3 ranks x optim.micro_batch 4"),
        ((*DEEPSPEED, "engine.expert_parallel=4"), 1, 3, "engine.expert_parallel: 4 does not divide the 3 ranks"),
        (("engine.kind=deepspeed", "engine.config=zero0"), 1, 2, "engine.config: zero0 has ZeRO stage 0"),
        ((*DEEPSPEED, "stages.1.config=zero0"), 1, 2, "engine.config: zero0 has ZeRO stage 0"),
        (("engine.kind=local",), 2, 2, "engine.kind: local is one process"),
    ],
)
def test_a_run_that_cannot_change_its_ranks_says_why(sibling, changes, least, most, words):
    with pytest.raises(UserError) as error:
        fitting(sibling(*changes).config, least, most)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_launch_files_get_numbers_or_a_reason(sibling):
    run = sibling(*DEEPSPEED)
    for words, code, said in (
        (["1", "4"], 0, "1 2 4\n"),
        (["1", "4", "engine.expert_parallel=2"], 0, "2 4\n"),
        (["1", "3", "engine.expert_parallel=4"], 2, "engine.expert_parallel: 4 does not divide the 3 ranks"),
        (["1", "4", "optim.lr=1"], 2, f"{run.folder}: optim.lr is frozen"),
    ):
        line = [sys.executable, "-m", "megakd.train.elastic", run.folder, *words]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code and done.stdout.startswith(said) and done.stdout.count("\n") == 1, done


def forget(run: Run, step: int) -> None:
    """As if training had been stopped after a step."""
    for path in run.path("checkpoints").glob("*/step-*"):
        if path.name > f"step-{step:06d}":
            shutil.rmtree(path)


def converting(checkpoint: Path) -> list[psutil.Process]:
    """The processes that convert a checkpoint's state, once they have written something."""
    if not any((checkpoint / "state" / "universal").rglob("*.pt")):
        return []
    every = psutil.process_iter(["cmdline"])
    return [each for each in every if str(checkpoint / "state") in " ".join(each.info["cmdline"] or [])]


@pytest.mark.ranks
def test_a_training_on_two_ranks_one_and_two_equals_one_on_two(sibling):
    """Ranks change in each stage; a kill in the midst of a conversion leaves the checkpoint as it was."""
    undisturbed, run = sibling(*ELASTIC), sibling(*ELASTIC)
    forked_ranks(2, "train", undisturbed.folder)
    forked_ranks(2, "train", run.folder)
    forget(run, 6)
    saved = run.path("checkpoints", "all", "step-000006")
    before = files(saved)
    killed = Forked("megakd", "train", run.folder)
    while not (working := converting(saved)):
        assert killed.poll(0.01) is None
    killed.kill()
    killed.wait()
    psutil.wait_procs(working, timeout=10)
    assert not converting(saved)
    left = files(saved)
    assert {name: left[name] for name in before} == before and left.keys() > before.keys()
    said = forked("train", run.folder)
    assert "saved by 2 ranks with expert_parallel 1, converted for 1 ranks" in said and files(saved) == before
    forget(run, 8)
    assert "saved by 1 ranks" in forked_ranks(2, "train", run.folder)
    assert_goes_like(run.folder, undisturbed.folder)
