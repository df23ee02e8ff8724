"""The job files on a Slurm that answers: broken as clusters break jobs, they go on or end with a line that says why."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megakd.cli import run_verb
from megakd.run import Run
from tests.conftest import ROOT, adam_steps, files, forked_ranks, metrics

pytestmark = pytest.mark.cluster
LAUNCH = ROOT / "launch"
TWO_RANKS = ["--nodes=1", "--ntasks=2", "--ntasks-per-node=2"]


class Cluster:
    """Submits jobs from a folder, which gets their logs, and waits for what Slurm says about them."""

    def __init__(self, folder: Path):
        self.folder, self.jobs = folder, []
        own = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "DEEPSPEED_TIMEOUT": "1"}
        self.environment = {**os.environ, **own}

    def ask(self, *words: str, **variables: str) -> str:
        environment = {**self.environment, **variables}
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, cwd=self.folder)
        return done.stdout.strip()

    def submit(self, script: str, *words: object, options: tuple[str, ...] | list[str] = (), **variables: str) -> str:
        line = ["sbatch", "--parsable", "--cpus-per-task=1", "--time=15", "--output=%j.out", *options]
        job = self.ask(*line, str(LAUNCH / script), *map(str, words), **variables)
        assert job, "sbatch refused it"
        self.jobs.append(job)
        return job

    def states(self, job: str) -> set[str]:
        return set(self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").split())

    def wait(self, job: str, *states: str, seconds: float = 240) -> None:
        self.until(lambda: set() < self.states(job) <= set(states), f"{job} is {'/'.join(states)}", seconds)

    def until(self, ready: Callable[[], bool], what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"never: {what}\n{self.log()[-5000:]}"
            time.sleep(0.3)

    def requeued(self, job: str, restarts: int) -> None:
        """Wait until a job is in the queue for the Nth time again, and let it start at once."""
        self.until(lambda: f"Restarts={restarts} " in self.show(job), f"{job} is requeued")
        self.wait(job, "PENDING")
        time.sleep(2)  # a job that starts in the second of its requeue has a credential that Slurm has revoked
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def show(self, job: str) -> str:
        return self.ask("scontrol", "--oneliner", "show", "job", job)

    def signal(self, job: str, name: str = "USR1") -> None:
        self.ask("scancel", f"--signal={name}", "--batch", job)

    def log(self) -> str:
        logs = sorted(self.folder.rglob("*.out"), key=lambda path: path.stat().st_mtime)
        return "\n".join(path.read_text() for path in logs)


@pytest.fixture
def cluster(slurm, tmp_path):
    used = Cluster(tmp_path)
    yield used
    for job in used.jobs:
        used.ask("scancel", job)
    for job in used.jobs:
        used.until(lambda job=job: not used.ask("squeue", "--noheader", f"--jobs={job}"), f"{job} is gone", 60)
    left = [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(each.info["cmdline"] or [])]
    assert not left, left


def ranks(folder: Path) -> list[psutil.Process]:
    """The Python processes that train a run."""
    ends = ["megakd", "train", str(folder)]
    found = [each for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [])[-3:] == ends]
    return [each for each in found if "srun" not in each.info["cmdline"][0]]


def begun(run: Run) -> bool:
    return run.path("metrics.jsonl").exists()


def shards(run: Run) -> dict[str, bytes]:
    found = files(run.path("data", "logits").resolve())
    return {name: text for name, text in found.items() if name.endswith(".tar")}


@pytest.fixture
def two(sibling) -> Run:
    return sibling("engine.kind=deepspeed", "engine.ranks=2", "stages.1.tokens=30720", "checkpoint.every_steps=5")


def test_a_training_survives_signals_and_a_killed_rank(cluster, two, sibling):
    """A signal while it imports (it ended with 138), kill -9 of a rank (143), a signal between steps: all go on."""
    job = cluster.submit("train.sbatch", two.folder, options=TWO_RANKS)
    cluster.until(lambda: bool(ranks(two.folder)), "ranks start")
    cluster.signal(job)
    cluster.requeued(job, 1)
    cluster.until(lambda: begun(two), "the first step")
    ranks(two.folder)[-1].kill()
    cluster.requeued(job, 2)
    cluster.until(lambda: bool(list(two.folder.glob("checkpoints/all/step-*"))), "a checkpoint")
    cluster.signal(job)
    cluster.requeued(job, 3)
    cluster.wait(job, "COMPLETED")
    said = cluster.log()
    assert said.count("stopped by a signal; requeued") == 2 and "fault 1 of at most 5 in a row; requeued" in said
    undisturbed = sibling(
        "engine.kind=deepspeed", "engine.ranks=2", "stages.1.tokens=30720", "checkpoint.every_steps=5"
    )
    again = cluster.submit("train.sbatch", undisturbed.folder, options=TWO_RANKS)
    cluster.wait(again, "COMPLETED")
    assert metrics(two.folder) == metrics(undisturbed.folder)


def test_one_task_that_starts_its_ranks_saves_and_is_requeued(cluster, two):
    """USR1 ended DeepSpeed's launcher: 246, not requeued."""
    job = cluster.submit("train.sbatch", two.folder, options=["--nodes=1", "--ntasks=1"])
    cluster.until(lambda: begun(two), "the first step")
    cluster.signal(job)
    cluster.requeued(job, 1)
    assert list(two.folder.glob("checkpoints/*/step-*")) and not ranks(two.folder)
    cluster.wait(job, "COMPLETED")


def test_a_user_error_ends_a_training_and_its_watch(cluster, two):
    """Rank 1 ends with 85 when srun ends it, and 85 is the higher code."""
    two.path("student-0").rename(two.path("moved"))
    job = cluster.submit("train.sbatch", two.folder, options=TWO_RANKS)
    cluster.wait(job, "FAILED")
    assert "ExitCode=2:0" in cluster.show(job) and "no student here" in cluster.log()
    assert [event["code"] for event in two.events("train failed")] == [2]


def test_compress_and_capture_are_requeued(cluster, sibling, prepared, recipe):
    """They had no trap: TIMEOUT, or 138."""
    run = cluster.folder / "run"
    run_verb(["new", str(run), "--from", str(recipe), "compress.sweeps=20000"])
    captured = sibling()
    captured.path("data", "logits").unlink()
    jobs = [
        cluster.submit("compress.sbatch", run, options=["--ntasks=1", "--mem-per-cpu=500"]),
        cluster.submit("generate_logits.sbatch", captured.folder, "logits.batch_size=1", options=["--array=0"]),
    ]
    for job in jobs:
        cluster.wait(job, "RUNNING")
        cluster.signal(job)
    for job in jobs:
        cluster.requeued(job, 1)
    for job in jobs:
        cluster.wait(job, "COMPLETED")
    assert shards(captured) == shards(Run.open(prepared))


def test_parts_of_an_array_say_what_is_missing(cluster, sibling, prepared):
    run = sibling()
    run.path("data", "logits").unlink()
    for array, words in (("1", "3 of 5 shards are missing, of workers 0, 2"), ("0,2", "complete, 5 shards")):
        job = cluster.submit("generate_logits.sbatch", run.folder, options=[f"--array={array}"], PARTS="3")
        cluster.wait(job, "COMPLETED")
        assert words in cluster.log()
    assert shards(run) == shards(Run.open(prepared))


def test_one_teacher_on_two_nodes_captures_what_one_process_does(cluster, sibling, prepared):
    run = sibling()
    run.path("data", "logits").unlink()
    words = ["generate-logits", run.folder, "logits.parallel=zero3"]
    job = cluster.submit("job.sbatch", *words, options=["--nodes=2", "--ntasks-per-node=1"])
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


def test_a_requeued_training_takes_the_nodes_that_it_gets(cluster, sibling):
    """2 -> 1 -> 2 nodes: with --ntasks-per-node Slurm gives the smallest number of --nodes, each time."""
    settings = ("engine.kind=deepspeed", "engine.ranks=2", "stages.1.tokens=30720", "checkpoint.every_steps=5")
    run, undisturbed = sibling(*settings), sibling(*settings)
    forked_ranks(2, "train", undisturbed.folder)
    job = cluster.submit("train.sbatch", run.folder, options=["--nodes=1-2"], TASKS_PER_NODE="1")
    cluster.until(lambda: steps(run) > 8, "steps on two nodes")
    node = re.search(r"BatchHost=(\S+)", cluster.show(job))
    lost = next(name for name in cluster.ask("sinfo", "-hNo", "%N").split() if node and name != node[1])
    cluster.ask("scontrol", "update", f"NodeName={lost}", "State=DRAIN", "Reason=test")
    try:
        cluster.signal(job)
        cluster.requeued(job, 1)
        cluster.until(lambda: ranks_of_starts(run) == [2, 1], "a start on one node")
        cluster.until(lambda: steps(run) > 30, "steps on one node")
    finally:
        cluster.ask("scontrol", "update", f"NodeName={lost}", "State=RESUME")
    cluster.signal(job)
    cluster.requeued(job, 2)
    cluster.wait(job, "COMPLETED")
    assert ranks_of_starts(run) == [2, 1, 2]
    found, expected = metrics(run.folder), metrics(undisturbed.folder)
    for name in ("stage", "step", "tokens", "lr"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    for name in ("loss", "ce", "kl", "kl_t1", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-4), name
    assert adam_steps(run.folder) == adam_steps(undisturbed.folder)


def ranks_of_starts(run: Run) -> list[int]:
    return [event["ranks"] for event in run.events("train")]


def steps(run: Run) -> int:
    return len(run.path("metrics.jsonl").read_text().splitlines()) if begun(run) else 0
