"""Stop signals from the first line of a process to its last: exit code 85 and one line, whatever it is doing."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megakd.cli import run_verb
from megakd.train.launch import launch
from tests.conftest import ROOT, command, start_ranks

PYTHON = {**os.environ, "PYTHONPATH": str(ROOT)}


def catches(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGUSR1."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    return bool(mask >> (signal.SIGUSR1 - 1) & 1)


def python(program: str, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=PYTHON
    )


def ended(process: "subprocess.Popen[str]", number: int) -> str:
    """What a process says that a stop signal ends."""
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 85, output
    return output


@pytest.mark.parametrize(
    "verb, number",
    [("train", signal.SIGTERM), ("train", signal.SIGUSR1), ("tokenize", signal.SIGUSR1), ("run", signal.SIGTERM)],
)
def test_a_verb_that_imports_its_libraries_ends_with_85(sibling, verb, number):
    process = subprocess.Popen(
        command(verb, sibling().folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=PYTHON
    )
    while not catches(process.pid) and process.poll() is None:
        time.sleep(0.005)
    name = signal.Signals(number).name
    assert ended(process, number) == f"megakd: stopped by {name}; what is finished is kept, the same command goes on\n"


def test_a_long_call_of_a_library_is_no_hiding_place():
    """Python calls no handler there: it waited 10 minutes for the other ranks."""
    process = python(
        "import hashlib; from megakd.system.signals import *; end_on_stop_signals(); print('ready', flush=True);"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    start = time.monotonic()
    assert "stopped by SIGTERM" in ended(process, signal.SIGTERM)
    assert time.monotonic() - start < 5


def test_a_rank_does_not_contradict_the_user_error_of_another(tmp_path, monkeypatch):
    """srun ends the others, and they said that the same command goes on."""
    monkeypatch.setitem(PYTHON, "MEGAKD_EXIT_CODE", str(tmp_path / ".exit-1"))
    for left, said in ((1, "megakd: stopped by SIGTERM"), (2, "")):
        (tmp_path / f".exit-1-{left}").touch()
        process = python(
            "import time; from megakd.system.signals import *; end_on_stop_signals(); print('ready', flush=True);"
            "time.sleep(60)"
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        output = ended(process, signal.SIGTERM)
        assert output.startswith(said) and bool(output) == bool(said)


@pytest.mark.ranks
def test_a_rank_that_waits_for_the_others_ends_with_85(sibling):
    run = sibling("engine.kind=deepspeed", "engine.ranks=2")
    (first,) = start_ranks(1, "megakd", "train", run.folder, env=_first_of_two(run.folder))
    while first.poll(0.05) is None and not listens(first.pid):
        pass
    time.sleep(0.3)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(20) == 85


def _first_of_two(folder: Path) -> dict[str, str]:
    from megakd.system.launcher import free_port

    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return {**world, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}


def listens(pid: int) -> bool:
    return any(each.status == psutil.CONN_LISTEN for each in psutil.Process(pid).net_connections("tcp"))


def test_the_signal_of_a_forked_child_does_not_end_its_parent():
    process = python(
        "import os, signal, time; from megakd.system.signals import *; end_on_stop_signals()\n"
        "child = os.fork()\n"
        "if not child: time.sleep(30)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "status = os.waitpid(child, 0)[1]; time.sleep(0.2); print(os.waitstatus_to_exitcode(status))"
    )
    assert process.communicate(timeout=20)[0] == f"{-signal.SIGTERM}\n" and process.returncode == 0


def test_a_late_signal_does_not_change_the_exit_code():
    """USR1 while the interpreter ends gave 246."""
    process = python(
        "import os, signal, sys; from megakd.cli import main\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1): kill(pid, number)\n"
        "late = Late(); sys.late = late; main()",
        "nonsense",
    )
    process.communicate(timeout=20)
    assert process.returncode == 2


LAUNCHER = """#!/bin/sh
[ "$1" = -c ] && exec echo 1
sleep 0.7
RANK=0 PYTHON -c '
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))
time.sleep(30)' megakd train RUN
exit 246
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_ranks_that_start_after_it(sibling, tmp_path, monkeypatch, number):
    """The launcher was still importing when it came: nobody was told, and the training went on."""
    program = tmp_path / "python"
    program.write_text(LAUNCHER.replace("PYTHON", sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr("megakd.train.launch.SECONDS_BETWEEN_SIGNALS", 0.3)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    start = time.monotonic()
    assert launch(sibling()) == 85
    assert time.monotonic() - start < 15


def test_a_launcher_that_ends_before_the_training_is_no_success(sibling, tmp_path, monkeypatch, capsys):
    """DeepSpeed's runner ended with 0 after `kill -9` of its child, and so did `megakd train`."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\n[ "$1" = -c ] && exec echo 1\nexit 0\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(SystemExit) as ended:
        run_verb(["train", str(sibling("engine.kind=deepspeed", "engine.ranks=2").folder)])
    assert ended.value.code == 1
    assert "the launcher ended before the training did: no checkpoint yet" in capsys.readouterr().err
