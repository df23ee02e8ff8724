"""Launch files: clean shell, truthful usage, and the work they start."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, files, megakd

SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "launch").glob("*.sbatch")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script: Path):
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS[:-1], ids=lambda p: p.name)
def test_without_a_run_it_prints_its_usage(script: Path):
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and f"{script.name}" in done.stderr and "RUN" in script.read_text()


def test_hostfile_example_is_one_deepspeed_reads():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(ROOT / "launch" / "hostfile.example")) == {"node1": 8, "node2": 8}


def test_array_tasks_capture_what_one_worker_does(prepared, tmp_path):
    """The job script's own lines, with Slurm's variables set and `srun` standing for the step it would start."""
    run = tmp_path / "run"
    megakd("new", run, "--from", prepared)
    (run / "data" / "logits").unlink()
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "srun").chmod(stat.S_IRWXU)
    for task in (1, 0):
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MAX": "1",
            "SLURM_CPUS_PER_TASK": "1",
        }
        script = str(ROOT / "launch" / "generate_logits.sbatch")
        subprocess.run(["bash", script, str(run)], env=environment, check=True, capture_output=True)
    assert files(run / "data" / "logits") == files((prepared / "data" / "logits").resolve())


def test_tasks_compress_together(recipe, prepared, tmp_path):
    """The job script with `srun` standing for two tasks at once: the student is that of one process."""
    run = tmp_path / "run"
    megakd("new", run, "--from", recipe)
    (tmp_path / "srun").write_text('#!/bin/sh\n"$@" & "$@" & wait $! && wait\n')
    (tmp_path / "srun").chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    script = str(ROOT / "launch" / "compress.sbatch")
    subprocess.run(["bash", script, str(run)], env=environment, check=True, capture_output=True)
    assert files(run / "student-0") == files(prepared / "student-0")
