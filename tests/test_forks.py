"""A forked process is what `python -m megakd` is: output, exit codes, signals, kills, ranks that meet."""

import os
import signal
import subprocess

from tests.conftest import forked, megakd
from tests.forks import Forked


def test_it_is_what_a_process_started_by_hand_is(tmp_path):
    for argv, code in ((["--help"], 0), (["train", tmp_path / "nowhere"], 2), (["new"], 2)):
        assert forked(*argv, code=code) == megakd(*argv, code=code)


def test_scripts_signals_and_kills(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(sys.argv[1], os.getcwd(), os.environ['NAME'], flush=True)\ninput()")
    with Forked(script, "word", stdout=subprocess.PIPE, env={"NAME": "value"}) as process:
        assert process.stdout and process.stdout.readline() == f"word {os.getcwd()} value\n"
        assert process.wait() == 1  # nothing to read
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)")
    for number in (signal.SIGTERM, signal.SIGKILL):
        with Forked(script, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline() == "up\n" and process.poll() is None
            process.send_signal(number)
            assert process.wait() == -number
