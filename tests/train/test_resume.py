"""kill -9 anywhere, start again: what an undisturbed run would have written."""

import random
import signal
import subprocess

import pytest

from megakd.run import Run
from megakd.system.dist import read_world, take_device
from megakd.system.signals import StopSignals
from megakd.train.checks import check
from megakd.train.loop import train
from tests.conftest import command, files, forked, forked_ranks, in_process, kill_when, megakd, metrics
from tests.forks import Forked


def steps_logged(run: Run) -> int:
    path = run.path("metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_there(run: Run, moment: str, steps: int) -> bool:
    """Whether a run has come to a moment: `steps` logged, a checkpoint half written, or between the two stages."""
    if moment == "saving":
        return any(run.path("checkpoints").glob("*/step-*.tmp"))
    if moment == "border":
        return run.path("checkpoints", "experts", "step-000004").exists()
    return steps_logged(run) >= steps


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine, ranks, kills",
    [(["engine.kind=local"], 1, 6), (["engine.kind=deepspeed", "engine.ranks=2"], 2, 3)],
    ids=["local", "zero3"],
)
def test_killed_training_goes_on_as_if_nothing_had_happened(sibling, engine, ranks, kills):
    """Killed -9 while it trains, saves, and crosses from one stage to the next."""
    settings = [*engine, "checkpoint.every_steps=1"]
    undisturbed, killed = sibling(*settings), sibling(*settings)
    forked_ranks(ranks, "train", undisturbed.folder)
    expected = metrics(undisturbed.folder)
    moments = random.choices(["training", "saving"], k=kills)
    for number, moment in enumerate(moments):
        done = steps_logged(killed)
        if number >= kills // 3 and done < 4 and "border" not in moments:
            moments[number] = moment = "border"
        steps = done + random.randint(1, 2)
        kill_when(["train", killed.folder], lambda m=moment, n=steps: is_there(killed, m, n), ranks=ranks)
    forked_ranks(ranks, "train", killed.folder)
    assert metrics(killed.folder) == expected, moments
    if ranks == 1:
        weights = "checkpoints/all/step-000010/weights/model.safetensors"
        assert killed.path(weights).read_bytes() == undisturbed.path(weights).read_bytes()
        in_process("train", killed.folder)  # finished: nothing to do
        assert metrics(killed.folder) == expected


@pytest.mark.ranks
@pytest.mark.parametrize(
    "ranks, engine, tokens", [(1, ["engine.kind=local"], 10240), (2, ["engine.kind=deepspeed", "engine.ranks=2"], 2048)]
)
def test_signal_saves_a_checkpoint_and_leaves_with_85(sibling, ranks, engine, tokens):
    """Through the launcher too: the process that the user started passes the signal on to all ranks."""
    # 24 steps, or 8 that take a second each: time enough for the signal to arrive
    longer = [*engine, f"stages.1.tokens={tokens}", "checkpoint.every_steps=20"]
    undisturbed, stopped = sibling(*longer), sibling(*longer)
    forked_ranks(ranks, "train", undisturbed.folder)
    words = ["train", str(stopped.folder)]
    if ranks == 1:
        process = Forked("megakd", *words, stderr=subprocess.PIPE)
    else:  # with the imports of the launcher, through which the signal goes
        process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "experts 2/4" in line:
            process.send_signal(signal.SIGTERM)
            break
    said = process.communicate()[1] or ""
    assert process.returncode == 85
    [saved] = stopped.path("checkpoints").glob("*/step-*")
    place = saved.relative_to(stopped.folder)
    assert said.count(f"train: stopped by SIGTERM; saved {place}; the same command goes on\n") == 1, said
    [event] = stopped.events("stop")
    assert (event["signal"], event["checkpoint"]) == ("SIGTERM", str(place))
    assert forked_ranks(ranks, "train", stopped.folder).count("train: finished: ") == 1
    assert metrics(stopped.folder) == metrics(undisturbed.folder)
    # again: at once, before the process that would start the ranks does so
    for again in (in_process("train", stopped.folder), forked_ranks(ranks, "train", stopped.folder)):
        assert again.count("train: finished already: ") == 1 and "going on from" not in again
    assert len(stopped.events("train")) == 2


@pytest.mark.parametrize("number, name", [(signal.SIGUSR1, "SIGUSR1"), (None, "a signal")])
def test_stop_before_the_first_step_is_said(sibling, capsys, number, name):
    """Also where another rank got the signal."""
    run, stop = sibling(), StopSignals()
    stop.asked, stop.number = True, number
    assert not train(run, check(run), take_device(read_world()), stop)
    assert f"train: stopped by {name} before the first step; the same command goes on\n" in capsys.readouterr().err
    assert run.events("stop")[0]["checkpoint"] is None


def test_a_new_run_goes_on_from_an_epochs_checkpoint(sibling, tmp_path):
    """Bit-equal to the run that the checkpoint belongs to, of which nothing changes."""
    once = ['stages=[{"name": "a", "epochs": 2}]', "optim.batch_tokens=2048", "checkpoint.every_epochs=1"]
    run = sibling(*once, "checkpoint.every_steps=100")
    in_process("train", run.folder)
    first, last = sorted(run.path("checkpoints", "a").iterdir())
    steps = len(metrics(run.folder))
    assert [first.name, last.name] == [f"step-{steps // 2:06d}", f"step-{steps:06d}"] and steps % 2 == 0
    before = files(run.folder)
    said = in_process("new", tmp_path / "b", "--from", first, "optim.lr=1", code=2)
    assert "keeps its configuration but for mutable settings, and optim.lr would change" in said
    in_process("new", tmp_path / "b", "--from", first, "checkpoint.keep=9", "name=b")
    branch = Run.open(tmp_path / "b")
    assert len(metrics(branch.folder)) == steps // 2 and branch.path("data", "logits").is_symlink()
    in_process("train", branch.folder)
    assert metrics(branch.folder) == metrics(run.folder) and files(run.folder) == before
    weights = f"checkpoints/a/{last.name}/weights/model.safetensors"
    assert branch.path(weights).read_bytes() == run.path(weights).read_bytes()


def test_rotation_does_not_take_away_what_later_checkpoints_need(sibling):
    """With one checkpoint kept, the stage before is gone when the second save of a stage describes its weights."""
    run = sibling("checkpoint.every_steps=1", "checkpoint.keep=1")
    in_process("train", run.folder)
    assert [p.name for p in run.path("checkpoints").glob("*/*")] == ["step-000010"]
    assert len(metrics(run.folder)) == 10
    in_process("export", run.folder)


ENDS_IN_A_DELETION = """
import os, shutil
from megakd import cli
whole = shutil.rmtree
def half(path, *args, **more):
    if not (path / "progress.json").exists():
        return whole(path, *args, **more)
    os.unlink(path / "progress.json")
    os.kill(os.getpid(), 9)
shutil.rmtree = half
cli.main()
"""


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_nothing_for_ever(sibling, tmp_path):
    run, script = sibling("checkpoint.every_steps=1", "checkpoint.keep=1"), tmp_path / "script.py"
    script.write_text(ENDS_IN_A_DELETION)
    assert Forked(script, "train", run.folder).wait() == -signal.SIGKILL
    assert {p.name for p in run.path("checkpoints").glob("*/*")} == {"step-000001.tmp", "step-000002"}
    in_process("train", run.folder)
    assert [p.name for p in run.path("checkpoints").glob("*/*")] == ["step-000010"]
    assert len(metrics(run.folder)) == 10


def test_second_training_in_the_same_folder_is_refused(sibling):
    run = sibling()
    process = Forked("megakd", "train", run.folder, stderr=subprocess.PIPE)
    assert process.stderr is not None
    next(line for line in process.stderr if "experts 1/4" in line)
    process.send_signal(signal.SIGSTOP)
    assert "is being trained by another process" in in_process("train", run.folder, code=2)
    process.send_signal(signal.SIGCONT)
    process.communicate()
    assert process.returncode == 0


def test_checkpoint_of_another_number_of_ranks_is_refused(sibling):
    """Without ZeRO; with it another number goes on: tests/engine/test_expert_parallel_train.py."""
    run = sibling("engine.kind=deepspeed", "engine.config=zero0")
    forked("train", run.folder)
    # make it look unfinished: the last checkpoint is that of step 3
    for path in run.path("checkpoints").glob("*/step-*"):
        if path.name != "step-000003":
            path.rename(path.with_name(path.name + ".away"))
    message = megakd("train", run.folder, "engine.ranks=2", code=2)
    assert "saved by 1 ranks, this is a world of 2" in message


def test_killed_capture_gives_the_same_bytes(prepared, tmp_path):
    """Window by window, so that there is time to kill it; the run that is not disturbed does the same."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for run in (undisturbed, killed):
        in_process("new", run, "--from", prepared)
        (run / "data" / "logits").unlink()
    in_process("generate-logits", undisturbed, "logits.batch_size=1")
    target = killed / "data" / "logits"
    verb = ["generate-logits", killed, "logits.batch_size=1"]
    assert kill_when(verb, lambda: (target / "train" / "shard-00000.json").exists())
    assert not (target / "train" / "shard-00003.json").exists(), "the kill came too late to test anything"
    in_process(*verb)
    for name, content in files(undisturbed / "data" / "logits").items():
        assert (target / name).read_bytes() == content, name


def test_two_workers_capture_what_one_does(prepared, tmp_path):
    run = tmp_path / "run"
    in_process("new", run, "--from", prepared)
    (run / "data" / "logits").unlink()
    forked_ranks(2, "generate-logits", run)
    assert files(run / "data" / "logits") == files((prepared / "data" / "logits").resolve())


def test_killed_compression_gives_the_same_bytes(recipe, tmp_path):
    """One worker, killed, then two; against one that was left alone. Many sweeps, so that there is time to kill it."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for run in (undisturbed, killed):
        in_process("new", run, "--from", recipe, "compress.sweeps=150", "compress.tolerance=0")
    in_process("compress", undisturbed)
    assert kill_when(["compress", killed], lambda: any((killed / "compress").glob("*.safetensors")))
    assert not (killed / "student-0").exists(), "the kill came too late to test anything"
    forked_ranks(2, "compress", killed)
    assert files(killed / "student-0") == files(undisturbed / "student-0")


def test_killed_tokenizing_gives_the_same_bytes(prepared, recipe, tmp_path):
    run = tmp_path / "run"
    in_process("new", run, "--from", recipe)
    target = run / "data" / "tokens"
    kill_when(["tokenize", run], lambda: (target / "train" / "shard-00000.json").exists())
    in_process("tokenize", run)
    for name, content in files(prepared / "data" / "tokens").items():
        assert (target / name).read_bytes() == content, name
