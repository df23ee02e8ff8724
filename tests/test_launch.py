"""Launch files: clean shell, truthful usage, and the work they start."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megakd.errors import UserError
from megakd.finish import record_failure
from megakd.run import Run
from megakd.train.launch import launch
from tests.conftest import ROOT, files, in_process

SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "launch").glob("*.sbatch")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", [*SCRIPTS, *sorted((ROOT / "tests").glob("*.sh"))], ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script: Path):
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS[:-1] if path.name not in ("lib.sh", "hosts.sh")], ids=lambda p: p.name
)
def test_without_a_run_it_prints_its_usage(script: Path):
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and f"{script.name}" in done.stderr and "RUN" in script.read_text()


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS[:-1] if path.name not in ("lib.sh", "hosts.sh")], ids=lambda p: p.name
)
def test_help_prints_the_usage_and_is_no_error(script: Path):
    """pipeline.sh made a folder --help/slurm."""
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(script.name), done


def test_names_of_jobs_differ_in_what_squeue_shows():
    """It cuts them to 8 characters."""
    names = [
        re.findall("--job-name=(.*)", path.read_text())[0][:8] for path in SCRIPTS[:-1] if path.suffix == ".sbatch"
    ]
    assert len(set(names)) == 5, names


def test_a_python_without_megakd_is_named(tmp_path, monkeypatch):
    """`No module named 'deepspeed'`, which supervise.sh took for a fault and tried again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "python").chmod(stat.S_IRWXU)
    (tmp_path / "hosts").write_text("n1 slots=1\n")
    (tmp_path / "job").mkdir()
    job = Job(tmp_path / "job", "exit 0")
    variables = {"PYTHON": str(tmp_path / "python"), "HOSTFILE": str(tmp_path / "hosts"), "PYTHONPATH": ""}
    found = [job.ended(**variables)]
    for script in ("run.sh", "supervise.sh"):
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / script), "train", str(tmp_path)],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        found.append((done.returncode, done.stderr))
    for code, said in found:
        assert code == 2 and f"PYTHON={tmp_path / 'python'} does not have: megakd" in said, said
        assert said.count("\n") == 1
    assert not job.requeues()


def test_hostfile_example_is_one_deepspeed_reads():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(ROOT / "launch" / "hostfile.example")) == {"node1": 8, "node2": 8}


def test_array_tasks_capture_what_one_worker_does(prepared, tmp_path):
    """The job script's own lines, with Slurm's variables set and `srun` standing for the step it would start."""
    run = tmp_path / "run"
    in_process("new", run, "--from", prepared)
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
    in_process("new", run, "--from", recipe)
    (tmp_path / "srun").write_text('#!/bin/sh\n"$@" & "$@" & wait $! && wait\n')
    (tmp_path / "srun").chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    script = str(ROOT / "launch" / "compress.sbatch")
    subprocess.run(["bash", script, str(run)], env=environment, check=True, capture_output=True)
    assert files(run / "student-0") == files(prepared / "student-0")


@pytest.fixture
def train_sh(tmp_path: Path):
    """train_sh(HOSTFILE=…): the exit code of launch/train.sh, and its error or the launcher's arguments."""
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && echo 12345 || { echo "$@"; [ -z "$DS_ENV_FILE" ] || cat "$DS_ENV_FILE"; }\n'
    )
    stub.chmod(stat.S_IRWXU)
    # a host that answers which port is free and which networks it has
    (tmp_path / "ssh").write_text(
        """#!/bin/bash
        case $* in
          *nowhere*) exit 2 ;;
          *10.1.0.1* | *10.9.0.1*) eval "words=(${@: -1})"; echo "${words[-1]}" ;;
          *) printf 'port 20000\\neth0 10.0.0.1\\nib0 10.1.0.1\\n' ;;
        esac"""
    )
    (tmp_path / "ssh").chmod(stat.S_IRWXU)
    run = tmp_path / "run"
    run.mkdir()

    def start(**variables: str) -> tuple[int, str]:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHON": str(stub)}
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "train.sh"), str(run)],
            capture_output=True,
            text=True,
            env=environment | variables,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr

    return start


def test_hostfile_that_is_not_there_or_names_no_hosts_does_not_train_here(train_sh, tmp_path):
    code, said = train_sh(HOSTFILE=str(tmp_path / "typo"))
    assert code == 2 and f"HOSTFILE={tmp_path / 'typo'}: no such file" in said and said.count("\n") == 1
    assert train_sh(HOSTFILE=str(tmp_path))[0] == 2
    hosts = tmp_path / "hosts"
    for text, words in {
        "# nothing\n\n": "no host in it",
        "n1 slots=8\nn2\n": "line 2: expected HOST slots=N, got: n2",
        "n1 slots=0\n": "line 1: expected",
        "n1 slots=1\nn1 slots=1\n": "line 2: host n1 is named twice",
    }.items():
        hosts.write_text(text)
        code, said = train_sh(HOSTFILE=str(hosts))
        assert code == 2 and words in said and said.count("\n") == 1, said


def test_hostfile_of_one_other_host_does_not_train_here(train_sh, tmp_path):
    hosts = tmp_path / "hosts"
    for text, forced in {"n1 slots=2\n": True, "n1 slots=1\nn2 slots=1\n": True, "localhost slots=2\n": False}.items():
        hosts.write_text(text)
        code, said = train_sh(HOSTFILE=str(hosts))
        assert code == 0 and f"--hostfile {hosts} --master_port" in said, said
        assert ("--force_multi" in said) == forced


def test_variables_of_the_launch_are_checked(train_sh, tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=2\n")
    for variables, words in (
        ({}, "set RANKS, the number of ranks on this machine, or HOSTFILE, the file of the hosts"),
        ({"RANKS": "two"}, "RANKS=two: expected a whole number"),
        ({"RANKS": "0"}, "RANKS=0: expected a whole number"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x"),
        ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python: no such program"),
        ({"HOSTFILE": str(tmp_path / "hosts"), "RANKS": "2"}, "unset one"),
        ({"HOSTFILE": str(tmp_path / "hosts"), "DS_ENV_FILE": "nowhere"}, "DS_ENV_FILE=nowhere: no such file"),
    ):
        code, said = train_sh(**variables)
        assert code == 2 and words in said and said.count("\n") == 1, said
    assert "--master_port 12345 --num_gpus 2 --log_level" in train_sh(RANKS="2")[1]


def test_hosts_get_the_variables_of_the_launch(train_sh, tmp_path):
    """DeepSpeed passes few of them on, and its launcher ends on a blank line; ranks took all cores each."""
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    (tmp_path / "site.env").write_text("# ours\n\nSITE='a \"b\" $c'\nNCCL_IB_HCA=mlx5\n")
    (tmp_path / "mine").write_text("# mine\n\nMINE=1\n")
    code, said = train_sh(
        HOSTFILE=str(tmp_path / "hosts"),
        DS_ENV_FILE=str(tmp_path / "mine"),
        MEGAKD_CLUSTER_ENV=str(tmp_path / "site.env"),
        DS_ACCELERATOR="cpu",
    )
    lines = [line for line in said.splitlines() if not line.startswith("run.sh: ")]
    given = lines[next(number for number, line in enumerate(lines) if "megakd train" in line) + 1 :]
    assert code == 0 and all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*=.+", line) for line in given), said
    for line in ("OMP_NUM_THREADS=1", "DS_ACCELERATOR=cpu", "DEEPSPEED_TIMEOUT=5", "NCCL_IB_HCA=mlx5", "MINE=1"):
        assert line in given
    assert r"SITE=a \"b\" \$c" in given and "5 minutes (DEEPSPEED_TIMEOUT)" in said
    assert [path.suffix for path in (tmp_path / "run" / "launch").iterdir()] == [".log"]


def test_the_network_between_hosts_is_chosen_and_checked(train_sh, tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    for variables, code, words in (
        ({}, 0, "--master_port 20000 --master_addr 10.0.0.1 "),
        ({}, 0, "host n1 has several networks (eth0 10.0.0.1,ib0 10.1.0.1); IFNAME=NAME chooses another"),
        ({"IFNAME": "ib0"}, 0, "--master_addr 10.1.0.1 "),
        ({"IFNAME": "ib0"}, 0, "GLOO_SOCKET_IFNAME=ib0\n"),
        ({"IFNAME": "ib1"}, 2, "IFNAME=ib1: host n1 has no such network, but: eth0 10.0.0.1,ib0 10.1.0.1"),
        ({"MASTER_ADDR": "10.1.0.1", "MASTER_PORT": "7"}, 0, "--master_port 7 --master_addr 10.1.0.1 "),
        ({"MASTER_ADDR": "10.9.0.1"}, 2, "MASTER_ADDR=10.9.0.1: not an address of the first host, n1: eth0"),
        ({"MASTER_ADDR": "nowhere"}, 2, "MASTER_ADDR=nowhere: host n1 does not know this name"),
    ):
        found, said = train_sh(HOSTFILE=str(tmp_path / "hosts"), **variables)
        assert found == code and words in said, said


def test_ranks_of_mpirun_know_where_they_meet(train_sh, tmp_path):
    """Each of its tasks started a whole training."""
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    code, said = train_sh(HOSTFILE=str(tmp_path / "hosts"), LAUNCHER="openmpi", IFNAME="ib0")
    assert code == 0 and "--launcher openmpi --launcher_args --mca btl_tcp_if_include ib0 " in said, said
    assert "MASTER_ADDR=10.1.0.1\nMASTER_PORT=20000\n" in said
    for variables, words in (
        ({"LAUNCHER": "openmpi"}, "set IFNAME"),
        ({"LAUNCHER": "ssh"}, "expected pdsh or openmpi"),
    ):
        code, said = train_sh(HOSTFILE=str(tmp_path / "hosts"), **variables)
        assert code == 2 and words in said, said


@pytest.mark.parametrize("number", ["USR1", "TERM", "INT", "HUP"])
@pytest.mark.parametrize("code, ends", [(85, 85), (0, 0), (1, 85), (2, 2)])
def test_a_stop_on_one_machine_reaches_the_ranks_alone(tmp_path, number, code, ends):
    """USR1 ended DeepSpeed's launcher: 138 instead of 85, and the ranks trained on."""
    (tmp_path / "rank.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"signal.signal(signal.SIGUSR1, lambda *_: sys.exit({code}))\n"
        "print('ready', flush=True)\n"
        "time.sleep(30)\n"
    )
    stub = tmp_path / "python"
    launcher = f"trap 'exit 9' TERM INT USR1\nRANK=0 {sys.executable} {tmp_path / 'rank.py'}\n"
    stub.write_text(f'#!/bin/bash\n[ "$1" != -c ] || exec echo 12345\n{launcher}')
    stub.chmod(stat.S_IRWXU)
    process = subprocess.Popen(
        ["bash", str(ROOT / "launch" / "run.sh"), "train", str(tmp_path)],
        env={**os.environ, "PYTHON": str(stub), "RANKS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[f"SIG{number}"])
    output, said = process.communicate(timeout=30)
    assert (output, process.returncode) == ("", ends)
    last = {85: "stopped, exit code 85; the same command goes on", 2: "exit code 2: a user error", 0: "stopping"}[ends]
    assert said.startswith("run.sh: stopping: the ranks save\n") and last in said.splitlines()[-1], said


@pytest.mark.parametrize(
    "code, user_error, words",
    [
        (2, True, "a rank met a user error; the others have 10 s to end"),
        (255, False, "a host failed: n1: ssh exited with exit code 255; the others"),
        (247, False, "a rank failed: n1: ssh exited with exit code 247; the others"),
    ],
)
def test_what_failed_on_a_host_is_said(train_sh, tmp_path, code, user_error, words):
    """A user error was `a host failed`."""
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    (tmp_path / "python").write_text(
        "#!/bin/bash\n"
        '[ "$1" != -c ] || exit 0\n'
        f"{'touch $MEGAKD_EXIT_CODE-2' if user_error else ':'}\n"
        f"echo pdsh@vm: n1: ssh exited with exit code {code}; sleep 2; exit {code}\n"
    )
    found, said = train_sh(HOSTFILE=str(tmp_path / "hosts"))
    assert found == code and words in said, said
    assert ("exit code 2: a user error, named above" in said) == user_error


def test_a_rank_that_hangs_on_one_machine_is_ended(tmp_path):
    stub = tmp_path / "python"
    rank = f"RANK=0 {sys.executable} -c 'import time; time.sleep(60)'"
    stub.write_text(f'#!/bin/bash\n[ "$1" != -c ] || exec echo 12345\n{rank}\nexit 0\n')
    stub.chmod(stat.S_IRWXU)
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "run.sh"), "train", str(tmp_path / "run")],
        env={**os.environ, "PYTHON": str(stub), "RANKS": "1", "MEGAKD_STALL": "2"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 137 and "no output and no progress for 2 s; ending all ranks" in done.stderr, done


def test_train_does_not_ignore_a_hostfile(monkeypatch, tmp_path):
    monkeypatch.setenv("HOSTFILE", "hosts")
    with pytest.raises(UserError, match="HOSTFILE=hosts: megakd train starts ranks on this machine alone"):
        launch(Run(tmp_path, None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "variables, words",
    [
        ({}, "no job array"),
        ({"ID": "1", "MAX": "4", "MIN": "1", "COUNT": "4"}, "an array of 4 tasks up to number 4"),  # --array=1-4
        ({"ID": "1", "MAX": "1", "MIN": "1", "COUNT": "1"}, "an array of 1 tasks up to number 1"),  # --array=1
        ({"ID": "0", "MAX": "14", "MIN": "0", "STEP": "2", "COUNT": "8"}, "an array of 8 tasks"),  # --array=0-15:2
    ],
)
def test_array_with_gaps_does_not_leave_shards_out(tmp_path, variables, words):
    code, said = array_job(tmp_path, {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()})
    assert code == 2 and words in said and said.count("\n") == 1, said


def test_tasks_of_one_array_job_do_not_capture_the_same_shards(tmp_path):
    array = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    assert array_job(tmp_path, array) == (0, "0 2\n")
    code, said = array_job(tmp_path, {**array, "SLURM_NTASKS": "4"})
    assert code == 2 and "--ntasks=4" in said


def test_an_array_of_some_parts_takes_their_shares(tmp_path):
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "1"}
    code, said = array_job(tmp_path, array)
    assert code == 2 and "PARTS=N sbatch --array=" in said
    assert array_job(tmp_path, {**array, "PARTS": "3"}) == (0, "1 3\n")
    for parts in ("1", "0", "x"):
        code, said = array_job(tmp_path, {**array, "PARTS": parts})
        assert code == 2 and f"PARTS={parts}" in said and said.count("\n") == 1, said


def array_job(folder: Path, variables: dict[str, str]) -> tuple[int, str]:
    """generate_logits.sbatch with an srun that prints the rank; its exit code and output."""
    (folder / "srun").write_text('#!/bin/sh\necho "$RANK $WORLD_SIZE"\n')
    (folder / "srun").chmod(stat.S_IRWXU)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable, **variables}
    script = str(ROOT / "launch" / "generate_logits.sbatch")
    done = subprocess.run(["bash", script, "runs/a"], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


class Job:
    """A job file with programs in the place of Slurm's: `step` is what srun does; `asked` is what scontrol was told."""

    def __init__(self, folder: Path, step: str):
        self.folder, self.asked = folder, folder / "asked"
        self.run = folder / "run"
        self.run.mkdir(exist_ok=True)
        scontrol = f'[ "$1" != requeue ] || echo "$@" >> {self.asked}; [ "$2" != hostnames ] || echo localhost'
        for name, text in (("srun", step), ("scontrol", scontrol), ("squeue", "echo RUNNING"), ("scancel", "exit 1")):
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(stat.S_IRWXU)
        (folder / "spool").mkdir(exist_ok=True)

    def start(self, script: str = "compress.sbatch", **variables: str) -> "subprocess.Popen[str]":
        # like Slurm: a copy of the file, which runs in another folder
        copy = self.folder / "spool" / "slurm_script"
        shutil.copy(ROOT / "launch" / script, copy)
        own = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": "7",
            "MEGAKD_LAUNCH": str(ROOT / "launch"),
        }
        return subprocess.Popen(
            ["bash", str(copy), str(self.run)],
            env={**os.environ, **own, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ended(self, **variables: str) -> tuple[int, str]:
        process = self.start(**variables)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def requeues(self) -> list[str]:
        return self.asked.read_text().splitlines() if self.asked.exists() else []


@pytest.mark.parametrize("code", [1, 137, 246])
def test_a_job_is_requeued_after_a_fault_but_not_for_ever(tmp_path, code):
    """A rank that is killed or hangs left FAILED, though the run could resume."""
    job = Job(tmp_path, f"exit {code}")
    for number in (1, 2):
        found, said = job.ended(MEGAKD_MAX_REQUEUES="2")
        assert found == code and f"exit code {code}, fault {number} of at most 2 in a row; requeued" in said, said
    found, said = job.ended(MEGAKD_MAX_REQUEUES="2")
    assert found == code and "after 2 requeues in a row" in said and len(job.requeues()) == 2, said


def test_a_stop_in_between_counts_faults_anew(tmp_path):
    job = Job(tmp_path, 'read -r code < codes; sed -i 1d codes; exit "$code"'.replace("codes", str(tmp_path / "codes")))
    (tmp_path / "codes").write_text("1\n85\n1\n0\n")
    assert [job.ended(MEGAKD_MAX_REQUEUES="1")[0] for _ in range(4)] == [1, 85, 1, 0]
    assert job.requeues() == ["requeue 7"] * 3 and not list(job.run.iterdir())


def test_a_user_error_is_not_requeued(tmp_path):
    code, said = Job(tmp_path, "exit 2").ended()
    assert code == 2 and "correct it and submit the same job again" in said and not (tmp_path / "asked").exists()


@pytest.mark.parametrize("code, requeued", [(1, True), (2, False)])
def test_the_85_of_ranks_that_srun_ends_does_not_hide_an_error(tmp_path, code, requeued):
    """srun gives the highest code: a user error was requeued for ever."""
    job = Job(tmp_path, '"$@"; exit 85')
    found, said = job.ended(PYTHON=str(user_error(tmp_path, code)))
    assert found == code and bool(job.requeues()) == requeued, said
    assert ("fault 1 of" in said) == requeued


def user_error(folder: Path, code: int) -> Path:
    """A Python whose `megakd` ends with this code by cli.main itself."""
    error = {1: "ValueError()", 2: "UserError('mine')"}[code]
    program = (
        "import sys\nif '-c' in sys.argv: sys.exit()\nfrom megakd import cli; from megakd.errors import UserError\n"
    )
    program += f"def fail(argv): raise {error}\n"
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{program}cli.run_verb = fail\ncli.main()\n")
    path.chmod(stat.S_IRWXU)
    return path


def test_a_job_that_was_cancelled_is_not_requeued(tmp_path):
    job = Job(tmp_path, "exit 85")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho COMPLETING\n")
    code, said = job.ended()
    assert code == 85 and "the job was cancelled: submit it again" in said and not job.requeues()


@pytest.mark.parametrize(
    "script, step, number",
    [
        *((path.name, 'trap "exit 85" USR1', signal.SIGUSR1) for path in SCRIPTS if path.suffix == ".sbatch"),
        *((path.name, 'trap "exit 85" USR1', signal.SIGTERM) for path in SCRIPTS if path.suffix == ".sbatch"),
        ("train.sbatch", ":", signal.SIGUSR1),  # as Python before its first line: 138
    ],
)
def test_a_signal_in_the_step_ends_with_85_and_a_requeue(tmp_path, script, step, number):
    job = Job(tmp_path, f"{step}; echo ready; for try in {{1..1000}}; do sleep 0.02; done; exit 9")
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MAX": "0"}
    process = job.start(script, SLURM_JOB_NODELIST="n1", **(array if "logits" in script else {}))
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 85 and "stopped by a signal; requeued" in output, output
    assert job.requeues() == ["requeue 6_0" if "logits" in script else "requeue 7"]


def test_a_training_that_failed_for_good_tells_watch(prepared, tmp_path):
    job = Job(tmp_path, "exit 2")
    job.run.rmdir()
    in_process("new", job.run, "--from", prepared)
    process = job.start("train.sbatch", SLURM_JOB_NODELIST="n1", PYTHON=sys.executable)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert [(event["code"], event["job"]) for event in Run.open(job.run).events("train failed")] == [(2, "7")]


def test_a_training_that_is_finished_has_not_failed(sibling):
    run = sibling()
    in_process("train", run.folder)
    for count in (0, 1):
        record_failure(str(run.folder), "2", "")
        assert len(run.events("train failed")) == count
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def test_the_failure_is_recorded_by_a_python_in_a_container(tmp_path):
    """PYTHON is a path of the container."""
    (tmp_path / "site.env").write_text("CONTAINER=(echo enter)\nPYTHON=/only/there\n")
    for script in (
        f'MEGAKD_LAUNCH={ROOT}/launch; . "$MEGAKD_LAUNCH/lib.sh"; read_settings; record_failure run 2',
        *re.findall("record='(.*)'", (ROOT / "launch" / "pipeline.sh").read_text()),
    ):
        (tmp_path / "pipeline.jobs").write_text("train 7\n")
        done = subprocess.run(
            ["bash", "-c", script, str(ROOT / "launch"), str(tmp_path), "7"],
            env={**os.environ, "MEGAKD_CLUSTER_ENV": str(tmp_path / "site.env")},
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith("enter /only/there -c "), done


def test_cluster_env_gives_variables_container_and_options(tmp_path):
    job = Job(tmp_path, 'echo "$NCCL_SOCKET_IFNAME: $*"')
    settings = tmp_path / "site.env"
    settings.write_text('NCCL_SOCKET_IFNAME=ib0\nPYTHON=py\nCONTAINER=(enter "my image")\nSRUN_OPTIONS=(--mpi=none)\n')
    code, said = job.ended(MEGAKD_CLUSTER_ENV=str(settings))
    assert (code, said) == (0, f"ib0: --mpi=none enter my image py -m megakd compress {job.run}\n")
    code, said = job.ended(MEGAKD_CLUSTER_ENV=str(tmp_path / "typo"))
    assert code == 2 and "typo: no such file" in said and said.count("\n") == 1
    example = subprocess.run(["bash", "-n", str(ROOT / "launch" / "cluster.env.example")])
    assert example.returncode == 0


def test_a_copy_of_a_job_file_finds_the_installed_library(tmp_path):
    job = Job(tmp_path, "exit 0")
    variables = {"MEGAKD_LAUNCH": "", "SLURM_SUBMIT_DIR": str(tmp_path)}
    variables |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    assert job.ended(**variables) == (0, "")
    code, said = job.ended(**variables | {"PYTHON": "false"})
    assert code == 2 and "/lib.sh: No such file" in said


def test_ranks_meet_on_a_port_that_systems_give_to_nobody(tmp_path):
    """From 32768 on Linux takes ports for connections of its own."""
    job = Job(tmp_path, 'echo "$MASTER_ADDR $MASTER_PORT"')
    ports = []
    for number, restarts in (("1499", "9"), ("1500", "0"), ("1500", "1"), ("98765432", "0")):
        process = job.start("train.sbatch", SLURM_JOB_NODELIST="n1", SLURM_JOB_ID=number, SLURM_RESTART_COUNT=restarts)
        address, port = process.communicate(timeout=30)[0].split()
        assert address == "127.0.0.1"
        ports.append(int(port))
    assert len(set(ports)) == 4 and all(15000 <= port < 30000 for port in ports), ports


@pytest.mark.parametrize(
    "nodes, tasks, code, words",
    [
        (2, 1, 0, "--nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=n1,n2 rank none, 8 threads"),
        (3, 1, 0, "--nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=n1,n2 rank none, 8 threads"),
        (3, 1, 0, "trains on 2 of the 3 nodes: the run can train on 1, 2 ranks"),
        (1, 1, 0, "--nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=n1 rank 0, 8 threads"),
        (3, 4, 0, "--nodes=1 --ntasks=4 --ntasks-per-node=4 --nodelist=n1 rank none, 2 threads"),
        (1, 3, 2, "optim.batch_tokens: 16 windows per step do not divide among 3 ranks"),
        (2, 8, 2, "optim.batch_tokens: 16 windows per step do not divide among 16 ranks"),
        (4, 3, 2, "TASKS_PER_NODE=3: the run can train on 4 ranks"),
    ],
)
def test_a_job_trains_on_as_many_of_its_nodes_as_the_batch_divides_among(prepared, tmp_path, nodes, tasks, code, words):
    """16 sequences in micro-batches of 4."""
    job = Job(tmp_path, 'echo "${@:3:4} rank ${RANK:-none}, $OMP_NUM_THREADS threads"')
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'n%s\\n' 1 2 3 4\n")
    (tmp_path / "getent").write_text("#!/bin/bash\necho 127.0.0.1\n")
    (tmp_path / "getent").chmod(stat.S_IRWXU)
    job.run.rmdir()
    in_process("new", job.run, "--from", prepared, "engine.kind=deepspeed", "engine.config=zero3")
    variables = {"SLURM_JOB_NUM_NODES": str(nodes), "TASKS_PER_NODE": str(tasks), "SLURM_CPUS_PER_TASK": "8"}
    variables |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "SLURM_JOB_NODELIST": "n[1-4]"}
    process = job.start("train.sbatch", **variables)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code and words in said, said
    assert [event["code"] for event in Run.open(job.run).events("train failed")] == [2] * (code == 2)


def test_a_number_of_tasks_fixes_the_number_of_nodes(tmp_path):
    """Slurm 22.05 gives the smallest of --nodes=1-4 with --ntasks-per-node."""
    job = Job(tmp_path, "exit 0")
    process = job.start("train.sbatch", SLURM_JOB_NODELIST="n1", TASKS_PER_NODE="1", SLURM_NTASKS="1")
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "TASKS_PER_NODE=1: leave out --ntasks and --ntasks-per-node" in said


class Chain:
    """launch/pipeline.sh with programs in the place of Slurm's, and of a Python that says what a run lacks."""

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        self.run.mkdir()
        self.lines, self.queue, self.lacks = folder / "lines", folder / "queue", folder / "lacks"
        self.queue.touch()
        programs = {
            "sbatch": f'echo "$@" >> {self.lines}; wc -l < {self.lines}',
            "squeue": f'for word; do case $word in --jobs=*) grep -x "${{word#*=}}" {self.queue}; esac; done',
            "python": f'while read -r verb; do echo "$verb  runs  why"; done < {self.lacks}',
        }
        for name, text in programs.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(stat.S_IRWXU)

    def submit(self, lacks: str, *options: str, **variables: str) -> tuple[int, str]:
        self.lacks.write_text("".join(f"{verb}\n" for verb in lacks.split()))
        path = f"{self.folder}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "pipeline.sh"), *options, str(self.run)],
            env={**os.environ, "PATH": path, "PYTHON": "python", **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr

    def dependencies(self) -> dict[str, str]:
        found = {}
        for line in self.lines.read_text().splitlines() if self.lines.exists() else []:
            words = dict(word.split("=", 1) for word in line.split() if word.startswith("--") and "=" in word)
            found[words["--job-name"].removesuffix("-megakd")] = words.get("--dependency", "")
            assert "--kill-on-invalid-dep=yes" in line
        return found


WHOLE = "tokenize compress generate-logits train evaluate export report"


def test_pipeline_submits_a_chain_of_what_is_missing(tmp_path):
    chain = Chain(tmp_path)
    code, said = chain.submit(WHOLE, LOGITS_OPTIONS="--array=0-3", TRAIN_OPTIONS="--nodes=2 --ntasks-per-node=8")
    assert code == 0, said
    assert chain.dependencies() == {
        "tokenize": "",
        "compress": "afterok:1",
        "logits": "afterok:1",
        "train": "afterok:1:2:3",
        "watch": "after:4",
        "failed": "afternotok:4",
        "finish": "afterok:4,afterany:5",
    }
    lines = chain.lines.read_text().splitlines()
    assert f"--array=0-3 {ROOT}/launch/generate_logits.sbatch {chain.run}" in lines[2]
    assert f"--nodes=2 --ntasks-per-node=8 {ROOT}/launch/train.sbatch {chain.run}" in lines[3]
    assert re.search("^train +4 +afterok:1:2:3$", said, re.M)


def test_pipeline_goes_on(tmp_path):
    """Jobs in the queue are not submitted again, those that ended without a result are."""
    chain = Chain(tmp_path)
    chain.submit(WHOLE)
    chain.queue.write_text("3\n")  # logits still runs; train's job ended, was cancelled, or never started
    chain.lines.write_text("\n" * 100)
    code, said = chain.submit("generate-logits train evaluate export report", WATCH="no")
    assert code == 0 and ["logits", "3", "in", "the", "queue", "already"] in [
        line.split() for line in said.splitlines()
    ]
    chain.lines.write_text(chain.lines.read_text().lstrip("\n"))
    assert chain.dependencies() == {"train": "afterok:3", "finish": "afterok:101"}
    assert chain.submit("")[1].startswith(f"{chain.run}: finished\n")


def test_pipeline_dry_run_submits_nothing(tmp_path):
    chain = Chain(tmp_path)
    code, said = chain.submit(WHOLE, "--dry-run")
    assert code == 0 and said.count("\n") == 8 and "--dependency=afterok:JOB_OF_TOKENIZE " in said, said
    assert not chain.lines.exists() and not list(chain.run.iterdir())
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "pipeline.sh"), "runs/a", "optim.lr=1"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("pipeline.sh: optim.lr=1: expected RUN alone")


def test_all_job_files_find_their_library_alike():
    """By one piece of text, which cannot lie in the library itself."""
    finding = []
    for path in (ROOT / "launch").glob("*.sbatch"):
        text = path.read_text()
        finding.append(text[text.index("set -uo pipefail") : text.index("\njob_begin")])
        assert f'\njob_begin launch/{path.name} "$@"\n' in text
    assert len(finding) == 5 and len(set(finding)) == 1
