"""Following checkpoints: one line each whatever is killed, rotated or broken; curves; the best stays."""

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megakd.evals.watcher
from megakd.cli import run_verb
from megakd.engine.checkpoint import best_weights, published, rotate
from megakd.errors import UserError
from megakd.evals.measure import Meter
from megakd.evals.tasks import Harness
from megakd.evals.watch import Stopped, TrainingJob, expected_checkpoints, failed, progress, stage_steps
from megakd.evals.watcher import Follower, hold
from megakd.run import Run
from megakd.system.slurm import in_queue
from megakd.system.tasks import claimed
from megakd.tracking import wandb_id
from megakd.train.checks import open_dataset
from tests.conftest import ROOT, kill_when, start_ranks
from tests.evals.test_tasks import write_tasks

NAMES = ["experts/step-000003", "experts/step-000004", "all/step-000007", "all/step-000010"]


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    """A finished training with its four checkpoints; read-only: see `run`."""
    folder = tmp_path_factory.mktemp("watch") / "trained"
    run_verb(["new", str(folder), "--from", str(prepared)])
    run_verb(["train", str(folder)])
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(trained, tmp_path / "run", symlinks=False)
    return tmp_path / "run"


def watch(run: Path, *argv: object) -> None:
    run_verb(["watch", str(run), "eval.poll_seconds=0.02", *map(str, argv)])


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "evals.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(run: Path) -> list[str]:
    return [line["model"] for line in lines(run)]


def held(run: Path) -> list[Path]:
    """What is left of the work: nothing, once it is done."""
    return [*run.glob("watch/held/*/*"), *run.glob("watch/best/*/*.*"), *run.glob("checkpoints/*/*.tmp*")]


def best(run: Path) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / "best.json").read_text())


def with_tasks(folder: Path, *tasks: str) -> list[str]:
    return [f"eval.tasks={json.dumps(tasks)}", f"eval.task_folder={write_tasks(folder)}", "eval.task_batch_size=4"]


@pytest.mark.ranks
def test_one_line_a_checkpoint_whatever_is_killed(prepared, tmp_path):
    """Two deepspeed ranks train and keep one checkpoint, two watches are killed somewhere, a third one ends the work.

    The test itself goes on scanning, as a further watch would: between two watches rotation takes checkpoints.
    """
    folder = tmp_path / "run"
    live = ["checkpoint.every_steps=1", "checkpoint.keep=1", "eval.poll_seconds=0.02", "log.tensorboard=true"]
    run_verb(["new", str(folder), "--from", str(prepared), "engine.kind=deepspeed", "engine.ranks=2", *live])
    training = start_ranks(2, "megakd", "train", folder)
    done = threading.Event()

    def scan() -> None:
        run = Run.open(folder)
        follower = Follower(run, Meter(run), watching=False)
        while not done.wait(0.02):
            follower.scan()

    def after(count: int) -> bool:
        """So many lines are there, and a moment of the next evaluation has passed."""
        return len(lines(folder)) >= count and (time.sleep(random.random() * 0.2) or True)

    scanner = threading.Thread(target=scan)
    scanner.start()
    try:
        for count in (2, 5):
            assert kill_when(["watch", folder], lambda count=count: after(count))
        assert [rank.wait(300) for rank in training] == [0, 0]
        watch(folder)
    finally:
        done.set()
        scanner.join()
    run = Run.open(folder)
    expected = [event["folder"].removeprefix("checkpoints/") for event in run.events("checkpoint")]
    assert len(expected) == 10 and sorted(names(folder)) == sorted(expected)
    assert not run.events("evaluation_lost") and not held(folder)
    assert all(line["step"] == int(line["model"][-6:]) for line in lines(folder))
    first = min(lines(folder), key=lambda line: line["kl"])
    assert best(folder)["model"] == first["model"] and best_weights(folder / "checkpoints").is_dir()
    board = EventAccumulator(str(folder / "tensorboard" / "eval"))
    board.Reload()
    for name in ("kl", "perplexity"):
        points = {event.step: event.value for event in board.Scalars(f"eval/{name}")}  # the same twice after a kill
        assert points == pytest.approx({line["step"]: line[name] for line in lines(folder)}, rel=1e-6)


def lines_of(run: Path) -> dict[str, dict[str, Any]]:
    return {line["model"]: line for line in lines(run)}


def test_it_says_at_once_that_it_waits_for_a_training(sibling, monkeypatch, capsys):
    def stop(seconds: float) -> None:
        raise Stopped

    folder = sibling().folder
    monkeypatch.setattr(time, "sleep", stop)
    with pytest.raises(SystemExit):
        run_verb(["watch", str(folder)])
    assert f"watch: waiting for a checkpoint of {folder}" in capsys.readouterr().err


def test_it_ends_with_the_training_and_evaluate_finds_nothing_to_do(run, capfd):
    watch(run)
    assert names(run) == NAMES and not held(run)
    said = capfd.readouterr().err
    assert "all/step-000010: kl " in said and "4/4 checkpoints  100%  0 waiting  ETA 0:00" in said
    assert "the best by kl is" in said
    watch(run)
    run_verb(["evaluate", str(run)])
    assert names(run) == [*NAMES, "teacher", "student-0"]
    quality = {name: line for name, line in lines_of(run).items() if name in NAMES}
    (run / "evals.jsonl").unlink()
    run_verb(["evaluate", str(run)])  # the same numbers another way
    for name, line in quality.items():
        speed = {"tokens_per_second": 0, "machine_load": {}}
        assert {**lines_of(run)[name], **speed} == {**line, **speed}


def test_the_end_of_a_training_by_epochs_is_known(prepared, run):
    """Steps then depend on how many samples there are, at 16 windows per step."""
    opened = Run.create(prepared, ["stages.1.tokens=null", "stages.1.epochs=1.5"], run.parent / "epochs")
    windows = len(open_dataset(opened))
    assert stage_steps(opened) == [4, math.ceil(1.5 * windows / 16)]
    assert stage_steps(Run.open(run)) == [4, 6]


def test_once_ends_though_the_training_has_not(run):
    shutil.rmtree(run / "checkpoints" / "all" / "step-000010")
    watch(run, "--once")
    assert names(run) == NAMES[:3]


# the signal may come while evals.jsonl is being opened: Python closes it later, with a warning
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_ends_it_and_what_is_finished_stays(run, capfd):
    def stop() -> None:
        deadline = time.monotonic() + 60
        while len(lines(run)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(SystemExit) as ended:
        watch(run, "--follow")
    assert ended.value.code == 85 and names(run) == NAMES
    assert "stopped by a signal" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_pieces_outlive_a_kill(run, tmp_path, monkeypatch):
    """Killed in the second task: the validation set and the first task are measured again only if settings changed."""
    measured: list[str] = []
    original, quality = Harness.measure, Meter._quality

    def measure(self: Harness, name: str, *args: Any, **kwargs: Any) -> Any:
        measured.append(name)
        if measured == ["hold-out", "tiny_choice", "tiny_last"]:
            raise KeyboardInterrupt
        return original(self, name, *args, **kwargs)

    monkeypatch.setattr(Harness, "measure", measure)
    monkeypatch.setattr(Meter, "_quality", lambda *args: measured.append("hold-out") or quality(*args))
    shutil.rmtree(run / "checkpoints" / "experts")
    shutil.rmtree(run / "checkpoints" / "all" / "step-000007")
    tasks = with_tasks(tmp_path / "tasks", "tiny_choice", "tiny_last")
    with pytest.raises(KeyboardInterrupt):
        watch(run, *tasks)
    assert not lines(run)
    del measured[:]
    watch(run)
    assert measured == ["tiny_last"] and names(run) == NAMES[-1:]
    assert lines(run)[0]["tasks"].keys() == {"tiny_choice", "tiny_last"} and "nll" in lines(run)[0]


@pytest.mark.parametrize("place", ["log_evaluation", "append_json"])
def test_a_kill_around_the_line_repeats_nothing(place, run, monkeypatch):
    """Before the line is written the numbers are there already; after it, curves and the pin are done again."""
    original = getattr(megakd.evals.watcher, place)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(megakd.evals.watcher, place, killed)
    with pytest.raises(KeyboardInterrupt):
        watch(run, "--once")
    assert names(run) == (NAMES[:1] if place == "log_evaluation" else [])
    monkeypatch.setattr(megakd.evals.watcher, place, original)
    watch(run)
    assert names(run) == NAMES and not held(run)


def test_watches_share(run, tmp_path):
    """Two processes: each does some, each line is there once."""

    def work(number: int) -> None:
        opened = Run.open(run)
        follower = Follower(opened, Meter(opened), watching=True)
        follower.scan()
        (tmp_path / f"ready-{number}").touch()
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.001)
        while waiting := follower.pending():
            for name in waiting:
                if follower.take(name):
                    with (tmp_path / f"took-{number}").open("a") as file:
                        file.write(name + "\n")

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    took = [(tmp_path / f"took-{number}").read_text().split() for number in range(2)]
    assert sorted(names(run)) == sorted(NAMES) == sorted(took[0] + took[1])
    assert took[0] and took[1]


def test_what_another_process_is_at_is_left_to_it(run, capfd):
    (run / "watch" / "locks").mkdir(parents=True)
    with claimed(run / "watch" / "locks" / "all--step-000007.lock") as mine:
        assert mine
        watch(run, "--once")
        run_verb(["evaluate", str(run)])
    said = capfd.readouterr().err
    assert said.count("all/step-000007 is being evaluated by another process") == 2
    assert [name for name in names(run) if name in NAMES] == [NAMES[0], NAMES[1], NAMES[3]]
    watch(run)
    assert sorted(n for n in names(run) if n in NAMES) == sorted(NAMES)


def spoil(checkpoint: Path, how: str) -> None:
    """New files in the old ones' places, as a training would have written them."""
    weights = checkpoint / "weights" / "model.safetensors"
    if how in ("nan", "config"):
        shutil.rmtree(checkpoint / "checksums")  # which would tell
    if how == "nan":
        tensors = load_file(weights)
        tensors["model.norm.weight"].fill_(torch.nan)
        weights.unlink()
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "cut":
        content = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.unlink()
        weights.write_bytes(content)
    elif how == "nothing listed":
        (checkpoint / "checksums" / "00000.json").unlink()
        (checkpoint / "checksums" / "00000.json").write_text("{")
    elif how == "config":
        (checkpoint / "weights" / "config.json").write_text('{"model_type": "qwen3_moe_shared_core", "layers": 3')
    elif how == "progress":
        (checkpoint / "progress.json").write_text("[]")
    else:
        shutil.rmtree(checkpoint / "weights")


@pytest.mark.parametrize("how", ["cut", "one bit", "nothing listed", "config", "progress", "nothing"])
def test_a_bad_checkpoint_is_named_and_left_out(how, run, capfd, trained):
    name = NAMES[1]
    spoil(run / "checkpoints" / name, how)
    with pytest.raises(UserError, match=f"1 could not be measured, everything else was: {name}: "):
        watch(run)
    assert names(run) == [n for n in NAMES if n != name] and not held(run)
    (event,) = Run.open(run).events("bad_checkpoint")
    assert event["checkpoint"] == name and event["reason"]
    assert f"{name} cannot be evaluated and is skipped" in capfd.readouterr().err
    for verb in ("watch", "evaluate"):  # exit code 2 as long as it is so
        with pytest.raises(UserError, match=name):
            run_verb([verb, str(run)])
    assert len(Run.open(run).events("bad_checkpoint")) == 1 and "skipped" not in capfd.readouterr().err
    shutil.rmtree(run / "checkpoints" / name)  # another content is tried
    shutil.copytree(trained / "checkpoints" / name, run / "checkpoints" / name)
    watch(run, "--once")
    assert name in names(run)


def test_the_last_checkpoint_may_be_the_bad_one(run):
    spoil(run / "checkpoints" / NAMES[-1], "cut")
    with pytest.raises(UserError, match=NAMES[-1]):
        watch(run)
    assert names(run) == NAMES[:-1]


def test_nan_of_a_checkpoint_is_null_with_its_reason(run, capfd):
    """It stops no other checkpoint, is never the best, and is not measured again."""
    spoil(run / "checkpoints" / NAMES[1], "nan")
    for verb in ("watch", "evaluate", "evaluate"):
        with pytest.raises(UserError, match=f"{NAMES[1]}: nll: .*weights: nll on the validation set is NaN"):
            run_verb([verb, str(run)])
    assert names(run) == [*NAMES, "teacher", "student-0"] and not held(run)
    line = lines_of(run)[NAMES[1]]
    measures = {"perplexity", "nll", "bits_per_byte", "kl", "top1", "topk"}
    assert {name for name, value in line.items() if value is None} == measures == set(line["failed"])
    assert line["positions"] > 0 and not any("failed" in lines_of(run)[name] for name in NAMES if name != NAMES[1])
    assert best(run)["model"] != NAMES[1]
    row = next(line for line in capfd.readouterr().out.splitlines() if NAMES[1] in line)
    assert row.split()[1:6] == ["-"] * 5


def test_an_unusable_student_stops_no_checkpoint(run, tmp_path):
    """Its perplexity is infinite, its NLL is not."""
    weights = run / "student-0" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 1e4
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"student-0: perplexity: .*student-0: perplexity on the validation set is infinite"
    ):
        run_verb(["evaluate", str(run)])
    assert names(run) == ["teacher", "student-0", *NAMES]
    line = lines_of(run)["student-0"]
    assert (
        line["perplexity"] is None and line["nll"] > 709 and line["kl"] > 0 and list(line["failed"]) == ["perplexity"]
    )
    run_verb(["export", str(run), "--out", str(tmp_path / "export")])  # its card compares with student-0
    assert "| student before training | 0 | - |" in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.parametrize("model", ["teacher", "student-0"])
def test_a_model_that_does_not_load_stops_no_other(model, run, monkeypatch):
    original = Meter._load

    def load(self: Meter, subject: Any) -> Any:
        if subject.name == model:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, subject)

    monkeypatch.setattr(Meter, "_load", load)
    with pytest.raises(
        UserError, match=f"1 could not be measured, .*: {model}: .*OutOfMemoryError: CUDA out of memory"
    ):
        run_verb(["evaluate", str(run)])
    assert names(run) == [*({"teacher", "student-0"} - {model}), *NAMES]
    monkeypatch.undo()
    run_verb(["evaluate", str(run)])
    assert names(run)[5:] == [model]


def test_a_checkpoint_that_finds_no_memory_waits_for_another_process(run, monkeypatch):
    """It is recorded as bad by none, and what is finished of it is kept."""
    original = Meter._load

    def load(self: Meter, subject: Any) -> Any:
        if subject.name == NAMES[1]:
            raise MemoryError("of this machine")
        return original(self, subject)

    monkeypatch.setattr(Meter, "_load", load)
    with pytest.raises(UserError, match=f"{NAMES[1]}: .*MemoryError: of this machine"):
        watch(run)
    assert names(run) == [name for name in NAMES if name != NAMES[1]]
    assert not Run.open(run).events("bad_checkpoint")
    monkeypatch.undo()
    watch(run)
    assert NAMES[1] in names(run) and not held(run)


def test_a_task_that_fails_stops_no_other(run, tmp_path, monkeypatch):
    settings, original = with_tasks(tmp_path, "tiny_last", "tiny_choice"), Harness.measure

    def measure(self: Harness, name: str, *args: Any) -> Any:
        if name == "tiny_last":
            raise ZeroDivisionError("of a metric")
        return original(self, name, *args)

    monkeypatch.setattr(Harness, "measure", measure)
    with pytest.raises(UserError, match=f"{NAMES[0]}: tiny_last: ZeroDivisionError: of a metric"):
        watch(run, *settings)
    for line in lines(run):
        assert line["tasks"]["tiny_last"] is None and line["tasks"]["tiny_choice"]["samples"] > 0
        assert list(line["failed"]) == ["tiny_last"] and line["kl"] > 0
    with pytest.raises(UserError, match="tiny_last"):
        watch(run, *settings, "eval.best=tiny_last/acc")
    assert names(run) == NAMES
    monkeypatch.undo()
    for name in NAMES:
        run_verb(["evaluate", str(run), "--model", name])
    assert all(line["tasks"]["tiny_last"] for line in lines_of(run).values())
    watch(run)  # nothing is left to name


def test_a_name_that_goes_while_checkpoints_are_listed_ends_nothing(run, monkeypatch):
    """A temporary folder next to the stages, of another process: listed, and gone before it is looked into."""
    follower, gone = (
        Follower(Run.open(run), Meter(Run.open(run)), watching=False),
        run / "checkpoints" / "best.json.tmp-1",
    )
    gone.mkdir()
    original = os.scandir

    def scandir(path: Any = ".") -> Any:
        if Path(os.fspath(path)).name == gone.name:
            raise FileNotFoundError(path)
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(follower.published()) == NAMES


def test_half_written_checkpoints_are_not_read(run):
    """One being written, one being deleted, one put aside, one without its progress."""
    whole = run / "checkpoints" / NAMES[2]
    for other in ("all/step-000008.tmp", "all/step-000006.damaged", "all/step-000009"):
        shutil.copytree(whole, run / "checkpoints" / other)
    (run / "checkpoints" / "all" / "step-000009" / "progress.json").unlink()
    watch(run)
    assert names(run) == NAMES


def test_rotation_may_take_a_checkpoint_while_it_is_measured(run, monkeypatch):
    original = Meter._quality

    def rotated(self: Meter, *args: Any) -> Any:
        rotate(run / "checkpoints", 1, set())
        return original(self, *args)

    monkeypatch.setattr(Meter, "_quality", rotated)
    watch(run)
    assert names(run) == NAMES and not held(run)
    found = [f"{saved.folder.parent.name}/{saved.folder.name}" for saved in published(run / "checkpoints")]
    assert set(found) <= {NAMES[-1], best(run)["model"]}


@pytest.mark.parametrize("after", range(1, 10))
def test_a_checkpoint_that_vanishes_while_it_is_linked(after, run, monkeypatch, tmp_path):
    """Rotated after so many links: nothing is held, no half of it stays."""
    checkpoint, links, original = run / "checkpoints" / NAMES[0], [], os.link

    def link(source: Path, target: Path) -> None:
        original(source, target)
        links.append(target)
        if len(links) == after:
            rotate(run / "checkpoints", 1, set())

    monkeypatch.setattr(os, "link", link)
    assert not hold(checkpoint, tmp_path / "held") and len(links) == after
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("held")]


def test_where_there_are_no_hard_links_files_are_copied(run, monkeypatch, tmp_path):
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "link", link)
    checkpoint = run / "checkpoints" / NAMES[0]
    assert hold(checkpoint, tmp_path / "held")
    for path in [*(checkpoint / "weights").iterdir(), checkpoint / "progress.json"]:
        copy = tmp_path / "held" / path.relative_to(checkpoint)
        assert copy.read_bytes() == path.read_bytes() and copy.stat().st_ino != path.stat().st_ino


def test_what_rotation_took_before_is_named_once(run, capfd):
    rotate(run / "checkpoints", 1, set())
    watch(run)
    watch(run)
    assert names(run) == NAMES[-1:]
    (event,) = Run.open(run).events("evaluation_lost")
    assert event["checkpoints"] == NAMES[:-1]
    assert capfd.readouterr().err.count("without a line: experts/step-000003, experts/step-000004") == 1


def test_the_best_is_kept_by_the_measure_that_was_asked_for(run, tmp_path, capfd):
    """By KL, by another measure later, by a task; rotation spares it; verbs know it; its weights outlive rotation."""
    checkpoints = run / "checkpoints"
    with pytest.raises(UserError, match="no best checkpoint yet"):
        run_verb(["evaluate", str(run), "--model", "best"])
    with pytest.raises(UserError, match="no best checkpoint yet"):
        run_verb(["export", str(run), "--checkpoint", "best"])
    with pytest.raises(UserError, match=r"eval.best: 'accuracy' is not measured; give one of auto, kl, perplexity"):
        watch(run, "eval.best=accuracy")
    tasks = with_tasks(tmp_path / "tasks", "tiny_last")
    watch(run, "eval.best=kl", *tasks)
    order = sorted(NAMES, key=lambda name: lines_of(run)[name]["kl"])
    assert best(run)["model"] == order[0] and best(run)["value"] == lines_of(run)[order[0]]["kl"]
    # the other measures at once: made up, so that each has another best
    rows = lines(run)
    for index, row in enumerate(rows):
        row["top1"] = 0.9 if index == 0 else 0.1
        row["tasks"]["tiny_last"]["perplexity,none"] = 1.0 if index == 1 else 9.0
    (run / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for measure, expected in (("top1", NAMES[0]), ("tiny_last/perplexity", NAMES[1])):
        watch(run, f"eval.best={measure}")
        assert best(run)["model"] == expected and [p.name for p in run.glob("watch/best/*/*")] == [expected[-11:]]
    watch(run, "eval.best=tiny_last/perplexity,other")
    assert "no line has tiny_last/perplexity,other" in capfd.readouterr().err
    watch(run, "eval.best=tiny_last/perplexity")
    rotate(checkpoints, 1, set())
    assert {f"{saved.folder.parent.name}/{saved.folder.name}" for saved in published(checkpoints)} == {
        NAMES[1],
        NAMES[3],
    }
    shutil.rmtree(checkpoints / NAMES[1])  # by hand
    run_verb(["export", str(run), "--checkpoint", "best", "--out", str(tmp_path / "out")])
    assert "was not evaluated" not in (tmp_path / "out" / "README.md").read_text()
    run_verb(["evaluate", str(run), "--model", "best", "--tasks", "tiny_choice"])
    assert lines(run)[-1]["model"] == NAMES[1] and lines(run)[-1]["tasks"].keys() == {"tiny_choice"}
    assert "tiny_choice/acc" in capfd.readouterr().out


def test_the_job_is_requeued_before_its_time_limit(run, tmp_path):
    """The job script itself, with `srun` standing for its one task and `scontrol` writing down what it is asked."""
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\n[ "$1" != requeue ] || echo "$@" > {tmp_path / "asked"}\n')
    for tool in ("srun", "scontrol"):
        (tmp_path / tool).chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    script = ["bash", str(ROOT / "launch" / "watch.sbatch"), str(run), "--follow", "eval.poll_seconds=0.1"]
    job = subprocess.Popen(
        script, env={**environment, "SLURM_JOB_ID": "7"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while len(lines(run)) < 4 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 85 and "stopped by a signal" in output, output
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_it_ends_when_training_failed_for_good(run, monkeypatch):
    """It waited for ever; the user has some minutes to correct and submit again, and a training that begins counts."""
    Run.open(run).record("train failed", code=1)
    monkeypatch.setattr("megakd.evals.watch.ended", lambda *_: False)
    monkeypatch.setattr("megakd.evals.watch.FAILED_SECONDS", -1.0)
    with pytest.raises(UserError, match="training failed for good"):
        watch(run)
    assert len(lines(run)) == 4 and failed(Run.open(run))
    Run.open(run).record("train", step=0)
    assert not failed(Run.open(run))
    Run.open(run).record("train failed", code=1)
    monkeypatch.setattr("megakd.evals.watch.FAILED_SECONDS", 600.0)
    assert not failed(Run.open(run))


def test_it_ends_when_the_job_of_the_training_was_cancelled(run, monkeypatch):
    """It waited for ever: scancel leaves nothing in the run. A job in the queue, or steps by any other, are awaited."""
    opened, age = Run.open(run), 700.0
    opened.record("train", step=0, job="7")
    for name in ("FAILED_SECONDS", "SECONDS_BETWEEN_QUESTIONS"):
        monkeypatch.setattr(f"megakd.evals.watch.{name}", 0.05)
    job = TrainingJob(opened)
    for answer, gone in ((True, False), (None, False), (False, True)):
        monkeypatch.setattr("megakd.evals.watch.in_queue", lambda id, answer=answer: {"7": answer}[id])
        os.utime(run / "metrics.jsonl", (time.time() - age, time.time() - age))
        for _ in range(2):
            time.sleep(0.1)
            found = job.gone()
        assert found == gone, answer
    monkeypatch.setattr("megakd.evals.watch.ended", lambda *_: False)
    with pytest.raises(UserError, match="training failed for good"):
        watch(run)
    opened.record("train", step=0)
    assert not job.gone()


def test_slurm_says_whether_a_job_is_in_the_queue(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert in_queue("7") is None
    for text, known in (
        ("echo PENDING", True),
        ("exit 0", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", None),
    ):
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "squeue").chmod(stat.S_IRWXU)
        assert in_queue("7") is known, text


def test_unreadable_best_ends_no_training(run, capfd):
    (run / "checkpoints" / "best.json").write_text("{")
    rotate(run / "checkpoints", 1, set())
    assert len(published(run / "checkpoints")) == 4 and "no checkpoint is deleted" in capfd.readouterr().err


def test_curves_stand_at_their_steps_under_the_runs_own_id(run, capfd):
    """TensorBoard, with training's event file next to; W&B offline, the same run, a step of its own."""
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_scalar("train/loss", 1.0, 99)
    watch(run, "log.tensorboard=true", "log.wandb=offline")
    opened = Run.open(run)
    board = EventAccumulator(str(run / "tensorboard" / "eval"))
    board.Reload()
    for key in ("kl", "perplexity", "top1"):
        # by step: a file for each checkpoint, which TensorBoard reads by name, the tenth of a second before the ninth
        values = {event.step: event.value for event in board.Scalars(f"eval/{key}")}
        assert sorted(values) == [3, 4, 7, 10]
        assert list(map(values.get, sorted(values))) == pytest.approx([line[key] for line in lines(run)], rel=1e-6)
    files = [
        p for p in run.glob("watch/wandb/offline-run-*/*.wandb") if p.name == f"run-{wandb_id(opened.config)}.wandb"
    ]
    assert len(files) == 4
    deadline = time.monotonic() + 20
    expected = {str(line["kl"]).encode() for line in lines(run)}
    while time.monotonic() < deadline and expected:  # another process writes them
        expected = {value for value in expected if not any(value in path.read_bytes() for path in files)}
    assert not expected and all(b"eval/step" in path.read_bytes() for path in files)
    assert "wandb" not in capfd.readouterr().out


def test_counts_of_watch_name_each_checkpoint_once(sibling):
    """Of two processes, one still had a checkpoint pinned that the other had just given its line: 2/7, 2/6, 6/7."""
    opened = sibling()  # saves at 3 and 4 of the first stage, 3 and 6 of the second
    follower = Follower(opened, Meter(opened), watching=True)
    done = {"experts/step-000003": {}, "experts/step-000004": {}}
    follower.lines = lambda: done
    follower.pending = lambda: {name: Path(name) for name in (*done, "all/step-000007")}
    assert progress(opened, follower, 1.0) == "watch  2/4 checkpoints   50%  1 waiting  ETA 0:02"
    follower.pending = lambda: {"all/step-000005": Path("a")}  # that a stop saved
    assert progress(opened, follower, 1.0) == "watch  2/5 checkpoints   40%  1 waiting  ETA 0:03"
    epochs = sibling('stages=[{"name": "a", "epochs": 3}]', "checkpoint.every_epochs=1", "checkpoint.every_steps=1000")
    assert len(expected_checkpoints(epochs)) == 3
