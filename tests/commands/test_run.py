"""`megakd run`: the verbs that are missing, in order; a kill or a signal anywhere, and the same command goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megakd.finish as module
from megakd.cli import run_verb
from megakd.config.parsing import parse
from megakd.errors import UserError
from megakd.finish import steps_of, to_the_end
from megakd.run import Run
from megakd.system.signals import STOPPED
from megakd.system.verbs import VerbFailed, Verbs
from tests.conftest import forked, in_process, kill_when

ALL = ["tokenize", "compress", "generate-logits", "train", "evaluate", "export", "report"]


def titles(output: str) -> dict[str, str]:
    """{verb: what `run` says before it}."""
    return dict(re.findall(r"^run: \d of \d: ([a-z-]+): (.*)$", output, re.MULTILINE))


@pytest.mark.parametrize(
    "sections, verbs",
    [
        ({}, ALL),
        ({"model": {"student": "demo"}}, [verb for verb in ALL if verb != "compress"]),
        ({"model": {"student": "demo"}, "objective": {"kind": "sar"}}, [verb for verb in ALL if verb != "compress"]),
    ],
)
def test_a_run_has_the_verbs_that_its_configuration_needs(tmp_path, sections, verbs):
    run = Run(tmp_path, parse(sections, "recipe"))
    assert [step.verb for step in steps_of(run)] == verbs
    assert [step.verb for step in steps_of(run, "train")] == verbs[: verbs.index("train") + 1]
    if "compress" not in verbs:
        with pytest.raises(UserError, match="this run has no compress"):
            steps_of(run, "compress")


def test_dry_run_says_which_verbs_run_and_why_and_changes_nothing(sibling):
    run = sibling()
    before = {path for path in run.folder.rglob("*")}
    output = in_process("run", run.folder, "--dry-run")
    rows = {line.split()[0]: line.split()[1] for line in output.splitlines() if line.split()[:1] and line[0] != "-"}
    assert {verb: rows[verb] for verb in ALL} == {
        **dict.fromkeys(("tokenize", "compress", "generate-logits"), "finished"),
        **dict.fromkeys(("train", "evaluate", "export", "report"), "runs"),
    }
    assert "no checkpoint yet" in output
    assert {path for path in run.folder.rglob("*")} - before <= {run.path("watch"), run.path("watch", "locks")}
    assert "--dry-run changes nothing" in in_process("run", run.folder, "--dry-run", "optim.micro_batch=2", code=2)


def test_a_run_ends_whole_and_the_same_again_does_nothing(sibling, cheap, capsys):
    run = sibling("log.wandb=disabled")
    to_the_end(run, "train")
    said = titles(capsys.readouterr().err)
    assert list(said) == ALL[:4] and said["tokenize"] == "finished already" and said["train"] == "no checkpoint yet"
    to_the_end(run)
    output = capsys.readouterr().err
    assert [verb for verb, why in titles(output).items() if why != "finished already"] == ALL[4:]
    assert "run: 5 of 7: evaluate: no line yet of teacher, student-0" in output
    assert re.search(r"^report +\d+:\d\d$", output, re.MULTILINE) and re.search(r"^in all ", output, re.MULTILINE)
    assert run.path("export", "model.safetensors").exists() and run.path("report.html").exists()
    to_the_end(run)
    assert set(titles(capsys.readouterr().err).values()) == {"finished already"}
    shutil.rmtree(run.path("export"))
    to_the_end(run)
    assert [v for v, why in titles(capsys.readouterr().err).items() if why != "finished already"] == ["export"]


def test_a_verb_that_fails_ends_the_run_with_its_code_but_evaluate_does_not_stop_the_export(
    sibling, monkeypatch, capsys
):
    run, codes, started = sibling(), {"evaluate": 2}, []

    def start(self: Verbs, verb: str, folder: str) -> int:
        started.append(verb)
        return codes.get(verb, 0)

    monkeypatch.setattr(Verbs, "run", start)
    with pytest.raises(VerbFailed) as failed:
        to_the_end(run)
    assert (failed.value.verb, failed.value.code) == ("evaluate", 2) and started == ALL[3:]
    codes, started[:] = {"train": STOPPED}, []
    with pytest.raises(SystemExit) as ended:
        run_verb(["run", str(run.folder)])
    assert started == ["train"] and ended.value.code == STOPPED
    assert f"exit code 85; megakd run {run.folder} goes on" in capsys.readouterr().err
    codes, started[:] = {"train": 2}, []
    with pytest.raises(SystemExit):
        run_verb(["run", str(run.folder)])
    assert f"exit code 2; correct that, then megakd run {run.folder} goes on" in capsys.readouterr().err


def test_two_runs_of_one_folder_are_refused(sibling):
    run = sibling()
    with module.locked(run.path("run.lock")):
        assert "is being brought to its end by another process" in in_process("run", run.folder, code=2)


def test_ranks_of_a_launcher_are_refused(sibling, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run: started as rank 0 of 2" in in_process("run", sibling().folder, code=2)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, STOPPED), (signal.SIGUSR1, STOPPED), (signal.SIGKILL, -9)])
def test_a_stop_signal_goes_to_the_verb_and_gives_85(tmp_path, number, code):
    """The child ends by the signal's default, as tokenize does; a kill that nobody can catch ends the verb as well."""
    program = f"""
import sys, threading, os, time, signal
from megakd.system.verbs import Verbs
with Verbs.listening() as verbs:
    sys.executable = {str(fake(tmp_path))!r}
    print("ready", flush=True)
    sys.exit(verbs.run("tokenize", "RUN"))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["ready", "child -m megakd tokenize RUN"]
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(20) == code
    started = time.monotonic()
    assert process.stdout.read() == "" and time.monotonic() - started < 10  # its pipe is open as long as the verb runs
    process.stdout.close()


def fake(folder: Path) -> Path:
    """A program in the place of Python that names its arguments and sleeps."""
    path = folder / "program"
    path.write_text('#!/bin/sh\necho "child $*"\nexec sleep 30\n')
    path.chmod(0o755)
    return path


def test_a_verb_that_another_signal_killed_is_no_stop(tmp_path):
    path = tmp_path / "program"
    path.write_text("#!/bin/sh\nkill -9 $$\n")
    path.chmod(0o755)
    with Verbs.listening() as verbs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(path))
        assert verbs.run("train") == 137
        assert not verbs.stopped
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(VerbFailed, match="exit code 85"):
            verbs.check_stopped("train")


@pytest.mark.ranks
def test_a_run_that_was_killed_goes_on(sibling):
    """Real processes: kill -9 in the midst of training, then the same command."""
    run = sibling("log.wandb=disabled")
    assert kill_when(["run", run.folder, "--until", "train"], lambda: run.path("metrics.jsonl").exists())
    output = forked("run", run.folder, "--until", "train")
    assert titles(output)["compress"] == "finished already" and "in all" in output
    steps = [json.loads(line)["step"] for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))
