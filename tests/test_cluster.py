"""The job files on a Slurm of two nodes: broken as clusters break jobs, they go on or end with a line that says why.

A training that suffered faults is compared with the undisturbed one of two ranks on one machine, difference 0. Where a
process must last until Slurm does something, it is stopped (SIGSTOP) and resumed.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megakd.cli import run_verb
from megakd.run import Run
from tests.conftest import ROOT, files, metrics
from tests.machines import Machines

pytestmark = pytest.mark.cluster
LAUNCH = ROOT / "launch"
ONE_NODE = ("--nodes=1", "--ntasks=2", "--ntasks-per-node=2")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
TRAINING = ("engine.kind=deepspeed", "engine.ranks=2", "stages.1.tokens=10240", "checkpoint.every_steps=5")


class Cluster:
    """Submits jobs from a folder, which gets their logs, and waits for what Slurm says about them."""

    def __init__(self, machines: Machines, folder: Path):
        self.machines, self.folder, self.jobs = machines, folder, list[str]()
        own = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "DEEPSPEED_TIMEOUT": "1"}
        self.environment = {**machines.environment(), **own}

    def ask(self, *words: str, **variables: str) -> str:
        environment = {**self.environment, **variables}
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, cwd=self.folder)
        return done.stdout.strip()

    def submit(self, script: str, *words: object, options: tuple[str, ...] = (), **variables: str) -> str:
        line = ["--cpus-per-task=1", "--time=15", "--output=%j.out", *options, str(LAUNCH / script)]
        return self.sbatch(*line, *map(str, words), **variables)

    def sbatch(self, *words: str, **variables: str) -> str:
        job = self.ask("sbatch", "--parsable", *words, **variables)
        assert job, f"sbatch refused {words}"
        self.jobs.append(job)
        return job

    def states(self, job: str) -> set[str]:
        return set(self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").split())

    def wait(self, job: str, *states: str, seconds: float = 240) -> None:
        self.until(lambda: set() < self.states(job) <= set(states), f"{job} is {'/'.join(states)}", seconds)

    def until(self, ready: Callable[[], object], what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            said = f"{self.ask('squeue', '--states=all')}\n{self.log()[-5000:]}"
            assert time.monotonic() < deadline, f"never: {what}\n{said}"
            time.sleep(0.2)

    def requeued(self, job: str, restarts: int, *changes: str) -> None:
        """Wait until a job is in the queue for the Nth time again, and let it start at once."""
        self.until(lambda: f"Restarts={restarts} " in self.show(job), f"{job} is requeued")
        self.wait(job, "PENDING")
        time.sleep(2)  # a job that starts in the second of its requeue has a credential that Slurm has revoked
        self.update(job, "StartTime=now", *changes)

    def update(self, job: str, *changes: str) -> None:
        self.ask("scontrol", "update", f"JobId={job}", *changes)

    def show(self, job: str) -> str:
        return self.ask("scontrol", "--oneliner", "show", "job", job)

    def signal(self, job: str, name: str = "USR1") -> None:
        self.ask("scancel", f"--signal={name}", "--batch", job)

    def limit(self, *jobs: str) -> None:
        """Leave these jobs less time than the two minutes before which Slurm sends its signal."""
        for job in jobs:
            self.update(job, "TimeLimit=2")

    def log(self) -> str:
        logs = sorted(self.folder.rglob("*.out"), key=lambda path: path.stat().st_mtime)
        return "\n".join(path.read_text() for path in logs)


@pytest.fixture
def cluster(slurm, tmp_path):
    used = Cluster(slurm, tmp_path)
    yield used
    for job in used.jobs:
        used.ask("scancel", job)
    for job in used.jobs:
        used.until(lambda job=job: not used.ask("squeue", "--noheader", f"--jobs={job}"), f"{job} is gone", 60)


def tasks(folder: Path, verb: str = "train") -> list[psutil.Process]:
    """The Python processes of a verb of a run, in the order of their ranks; not what started them."""
    words = [sys.executable, "-m", "megakd", verb, str(folder)]
    found = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == words]
    return sorted(found, key=lambda process: int(process.environ().get("SLURM_PROCID", 0)))


def waits_with(process: psutil.Process, number: int) -> bool:
    """Whether a process that is stopped has got a signal."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(bits >> (number - 1) & 1 for bits in pending)


def begun(run: Run) -> bool:
    return run.path("metrics.jsonl").exists()


def shards(run: Run) -> dict[str, bytes]:
    found = files(run.path("data", "logits").resolve())
    return {name: text for name, text in found.items() if name.endswith(".tar")}


def without_logits(run: Run) -> Run:
    run.path("data", "logits").unlink()
    return run


@pytest.mark.brief
@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sbatch")))
def test_slurm_accepts_the_job_files(script, cluster):
    """Their own options, as Slurm reads them; nothing is started."""
    line = ["sbatch", "--test-only", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--time=1"]
    done = subprocess.run(
        [*line, str(LAUNCH / script), "run"], capture_output=True, text=True, timeout=60, env=cluster.environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.brief
def test_tasks_of_srun_know_rank_and_size_and_a_job_without_srun_is_one_process(cluster, sibling):
    """By the variables that Slurm really sets. Without srun: an empty log, or a share of the work; without a place to
    meet each rank waited on a port of its own for ever."""
    ask = "from megakd.system.launcher import read_launcher as read; found = read(); print(found.rank, found.size)"
    lines = (
        f'"$PYTHON" -c "{ask}"; srun "$PYTHON" -c "{ask}"; srun "$PYTHON" -m megakd train {sibling(*TRAINING).folder}'
    )
    job = cluster.sbatch("--ntasks=2", "--cpus-per-task=1", "--output=%j.out", "--wrap", lines)
    cluster.wait(job, "FAILED")
    said = cluster.log().splitlines()
    assert said[0] == "0 1" and sorted(said[1:3]) == ["0 2", "1 2"], said
    assert "ExitCode=2:0" in cluster.show(job) and "MASTER_ADDR" in cluster.log(), said


def test_a_training_goes_on_after_a_stop_a_kill_and_preemption(cluster, sibling, one_host):
    """One job suffers all: a signal while it imports (it ended with 138), kill -9 of a rank (143, not requeued), TERM
    because another job needs its nodes."""
    run = sibling(*TRAINING)
    job = cluster.submit("train.sbatch", run.folder, options=(*TWO_NODES, "--partition=spare"))
    cluster.until(lambda: tasks(run.folder), "a rank starts")
    cluster.signal(job)
    cluster.requeued(job, 1)
    cluster.until(lambda: begun(run), "the first step")
    tasks(run.folder)[1].kill()
    cluster.requeued(job, 2)
    cluster.until(lambda: list(run.folder.glob("checkpoints/*/step-*")), "a checkpoint")
    tasks(run.folder)[0].suspend()  # Slurm wakes what it preempts
    other = cluster.sbatch("--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true")
    cluster.wait(other, "COMPLETED")
    cluster.until(lambda: "stopped by a signal; requeued" in cluster.log().split("fault 1")[1], "it saves")
    cluster.requeued(job, 3)
    cluster.wait(job, "COMPLETED")
    said = cluster.log()
    assert said.count("stopped by a signal; requeued") == 2 and "fault 1 of at most 5 in a row; requeued" in said
    assert metrics(run.folder) == metrics(one_host(*TRAINING).folder)


def test_a_training_goes_on_after_a_node_is_lost_and_a_rank_hangs(cluster, sibling, one_host):
    """Experts are sharded over both nodes. A rank that hung left FAILED."""
    layout = (*TRAINING, "engine.config=zero3", "engine.expert_parallel=2")
    run = sibling(*layout)
    job = cluster.submit("train.sbatch", run.folder, options=TWO_NODES)
    cluster.until(lambda: list(run.folder.glob("checkpoints/*/step-*")), "a checkpoint")
    cluster.machines.power_off("n2")
    cluster.until(lambda: "Restarts=1 " in cluster.show(job), "the job is requeued")
    cluster.machines.up(slurm=True)
    cluster.requeued(job, 1)
    cluster.until(lambda: len(tasks(run.folder)) == 2, "both ranks start")
    before = run.path("metrics.jsonl").stat().st_mtime
    cluster.until(lambda: run.path("metrics.jsonl").stat().st_mtime > before, "another step")
    tasks(run.folder)[1].suspend()
    cluster.requeued(job, 2)
    cluster.wait(job, "COMPLETED")
    assert "fault 1 of at most 5 in a row; requeued" in cluster.log()
    assert metrics(run.folder) == metrics(one_host(*layout).folder)


def test_every_job_file_goes_on_after_its_time_limit(cluster, sibling, prepared, recipe, one_host):
    """compress and generate_logits had no trap: TIMEOUT. All five wait for Slurm's signal as long as it takes."""
    made, tokenized = cluster.folder / "made", cluster.folder / "tokenized"
    for run in (made, tokenized):
        run_verb(["new", str(run), "--from", str(recipe)])
    captured, trained = without_logits(sibling()), sibling(*TRAINING)
    jobs = {
        ("compress", made): cluster.submit("compress.sbatch", made, options=("--ntasks=1", "--mem-per-cpu=500")),
        ("generate-logits", captured.folder): cluster.submit(
            "generate_logits.sbatch", captured.folder, options=("--array=0",)
        ),
        ("tokenize", tokenized): cluster.submit("job.sbatch", "tokenize", tokenized),
        ("watch", trained.folder): cluster.submit("watch.sbatch", trained.folder),
        ("train", trained.folder): cluster.submit("train.sbatch", trained.folder, options=ONE_NODE),
    }
    stopped = []
    for verb, folder in jobs:
        cluster.until(lambda verb=verb, folder=folder: tasks(folder, verb), f"{verb} starts")
        if verb == "train":
            cluster.until(lambda: begun(trained), "the first step")
        stopped.append(tasks(folder, verb)[-1])
        stopped[-1].suspend()
    cluster.limit(*jobs.values())
    for process in stopped:
        cluster.until(lambda process=process: waits_with(process, signal.SIGUSR1), "Slurm's signal", 90)
        process.resume()
    for job in jobs.values():
        cluster.requeued(job, 1, "TimeLimit=15")
    for job in jobs.values():
        cluster.wait(job, "COMPLETED")
    assert cluster.log().count("stopped by a signal; requeued") == len(jobs)
    assert files(made / "student-0") == files(prepared / "student-0")
    assert shards(captured) == shards(Run.open(prepared))
    assert metrics(trained.folder) == metrics(one_host(*TRAINING).folder)


def test_one_task_that_starts_its_ranks_saves_and_is_requeued(cluster, sibling, one_host):
    """USR1 ended DeepSpeed's launcher: 246, not requeued."""
    run = sibling(*TRAINING)
    job = cluster.submit("train.sbatch", run.folder, options=("--nodes=1", "--ntasks=1"))
    cluster.until(lambda: begun(run), "the first step")
    cluster.signal(job)
    cluster.requeued(job, 1)
    assert list(run.folder.glob("checkpoints/*/step-*")) and not tasks(run.folder)
    cluster.wait(job, "COMPLETED")
    assert metrics(run.folder) == metrics(one_host(*TRAINING).folder)


@pytest.mark.brief
def test_a_user_error_ends_a_training_and_its_watch(cluster, sibling, tmp_path):
    """Rank 1 ends with 85 when srun ends it, and 85 is the higher code. The watch never ended; here it waits 1 s."""
    run = sibling(*TRAINING)
    run.path("student-0").rename(run.path("moved"))
    job = cluster.submit("train.sbatch", run.folder, options=ONE_NODE)
    cluster.wait(job, "FAILED")
    assert "ExitCode=2:0" in cluster.show(job) and "no student here" in cluster.log()
    assert [event["code"] for event in run.events("train failed")] == [2]
    run.path("moved").rename(run.path("student-0"))
    impatient = tmp_path / "python"
    program = "import sys; from megakd import cli; from megakd.evals import watch; watch.FAILED_SECONDS = 1.0"
    impatient.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -c "{program}; cli.main()" "$@"\n')
    impatient.chmod(0o755)
    job = cluster.submit("watch.sbatch", run.folder, PYTHON=str(impatient))
    cluster.wait(job, "FAILED")
    assert "ExitCode=2:0" in cluster.show(job) and "training failed for good" in cluster.log()


def test_an_array_goes_on_after_a_killed_task_at_another_width(cluster, sibling, prepared):
    run = without_logits(sibling("logits.batch_size=1"))
    job = cluster.submit("generate_logits.sbatch", run.folder, options=("--array=0-2",))
    cluster.until(lambda: cluster.states(f"{job}_1") == {"RUNNING"}, "task 1 runs")
    cluster.ask("scancel", "--signal=KILL", "--full", f"{job}_1")
    cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert len(shards(run)) < len(shards(Run.open(prepared))) and "shards are missing, of workers 1" in cluster.log()
    again = cluster.submit("generate_logits.sbatch", run.folder, options=("--array=0-1",))
    cluster.wait(again, "COMPLETED")
    assert "complete, 5 shards" in cluster.log() and shards(run) == shards(Run.open(prepared))


@pytest.mark.brief
def test_parts_of_an_array_say_what_is_missing(cluster, sibling, prepared):
    """An array that ran again by one index was COMPLETED, and nobody said what it had not captured."""
    run = without_logits(sibling())
    for array, words in (("1", "3 of 5 shards are missing, of workers 0, 2"), ("0,2", "complete, 5 shards")):
        job = cluster.submit("generate_logits.sbatch", run.folder, options=(f"--array={array}",), PARTS="3")
        cluster.wait(job, "COMPLETED")
        assert words in cluster.log()
    assert shards(run) == shards(Run.open(prepared))


def test_one_teacher_on_two_nodes_captures_what_one_process_does(cluster, sibling, prepared):
    run = without_logits(sibling())
    words = ["generate-logits", run.folder, "logits.parallel=zero3"]
    job = cluster.submit("job.sbatch", *words, options=TWO_NODES)
    cluster.wait(job, "COMPLETED")
    assert shards(run) == shards(Run.open(prepared))


def test_pipeline_brings_a_run_to_its_end(cluster, recipe):
    """The first training is cancelled: what follows it goes too, and the same command goes on."""
    run = cluster.folder / "run"
    run_verb(["new", str(run), "--from", str(recipe)])
    options = dict.fromkeys([f"{stage}_OPTIONS" for stage in ("TOKENIZE", "TRAIN", "WATCH", "FINISH")], "-c1")
    options |= {"LOGITS_OPTIONS": "-c1 --array=0-1", "COMPRESS_OPTIONS": "-c1 --ntasks=2 --mem-per-cpu=500"}
    rows = []
    for _ in range(2):
        table = cluster.ask("bash", str(LAUNCH / "pipeline.sh"), str(run), **options)
        jobs = dict(re.findall(r"^(\w+) +(\d+) ", table, re.M))
        cluster.jobs += jobs.values()
        rows.append(jobs)
        if len(rows) == 1:
            cluster.wait(jobs["compress"], "COMPLETED")
            cluster.wait(jobs["logits"], "COMPLETED")
            cluster.ask("scancel", jobs["train"])
            cluster.wait(jobs["finish"], "CANCELLED")
            cluster.wait(jobs["failed"], "COMPLETED")
            cluster.ask("scancel", jobs["watch"])
            cluster.until(lambda job=jobs["watch"]: not cluster.ask("squeue", "-h", f"-j{job}"), "watch ends")
    assert [event["job"] for event in Run.open(run).events("train failed")]
    assert rows[1].keys() == {"train", "watch", "failed", "finish"}
    cluster.wait(rows[1]["finish"], "COMPLETED")
    assert (run / "report.html").exists() and (run / "export").is_dir()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))
    assert cluster.ask("bash", str(LAUNCH / "pipeline.sh"), str(run)).endswith("finished")
