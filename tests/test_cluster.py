"""The job files on a Slurm of two nodes: what they submit, capture, refuse and finish."""

import json
import re
import subprocess
import sys

import pytest

from megakd.cli import run_verb
from megakd.run import Run
from tests.jobs import LAUNCH, ONE_NODE, TRAINING, TWO_NODES, shards, without_logits

pytestmark = pytest.mark.cluster


@pytest.mark.brief
@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sbatch")))
def test_slurm_accepts_the_job_files(script, slurm):
    """Their own options, as Slurm reads them; nothing is started."""
    line = ["sbatch", "--test-only", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--time=1"]
    done = subprocess.run(
        [*line, str(LAUNCH / script), "run"], capture_output=True, text=True, timeout=60, env=slurm.environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.brief
def test_tasks_of_srun_know_rank_and_size_and_a_job_without_srun_is_one_process(slurm, sibling):
    """By the variables that Slurm really sets. Without srun: an empty log, or a share of the work; without a place to
    meet each rank waited on a port of its own for ever."""
    ask = "from megakd.system.launcher import read_launcher as read; found = read(); print(found.rank, found.size)"
    lines = (
        f'"$PYTHON" -c "{ask}"; srun "$PYTHON" -c "{ask}"; srun "$PYTHON" -m megakd train {sibling(*TRAINING).folder}'
    )
    job = slurm.sbatch("--ntasks=2", "--cpus-per-task=1", "--output=%j.out", "--wrap", lines)
    slurm.wait(job, "FAILED")
    said = slurm.log().splitlines()
    assert said[0] == "0 1" and sorted(said[1:3]) == ["0 2", "1 2"], said
    assert "ExitCode=2:0" in slurm.show(job) and "MASTER_ADDR" in slurm.log(), said


@pytest.mark.brief
def test_a_user_error_ends_a_training_and_its_watch(slurm, sibling, tmp_path):
    """Rank 1 ends with 85 when srun ends it, and 85 is the higher code. The watch never ended; here it waits 1 s."""
    run = sibling(*TRAINING)
    run.path("student-0").rename(run.path("moved"))
    job = slurm.submit("train.sbatch", run.folder, options=ONE_NODE)
    slurm.wait(job, "FAILED")
    assert "ExitCode=2:0" in slurm.show(job) and "no student here" in slurm.log()
    assert [event["code"] for event in run.events("train failed")] == [2]
    run.path("moved").rename(run.path("student-0"))
    impatient = tmp_path / "python"
    program = "import sys; from megakd import cli; from megakd.evals import watch; watch.FAILED_SECONDS = 1.0"
    start = f'shift 2\nexec {sys.executable} -c "{program}; cli.main()" "$@"\n'
    impatient.write_text(f'#!/bin/sh\n[ "$1" != -c ] || exit 0\n{start}')
    impatient.chmod(0o755)
    job = slurm.submit("watch.sbatch", run.folder, PYTHON=str(impatient))
    slurm.wait(job, "FAILED")
    assert "ExitCode=2:0" in slurm.show(job) and "training failed for good" in slurm.log()


def test_an_array_goes_on_after_a_killed_task_at_another_width(slurm, sibling, prepared):
    run = without_logits(sibling("logits.batch_size=1"))
    job = slurm.submit("generate_logits.sbatch", run.folder, options=("--array=0-2",))
    slurm.until(lambda: slurm.states(f"{job}_1") == {"RUNNING"}, "task 1 runs")
    slurm.ask("scancel", "--signal=KILL", "--full", f"{job}_1")
    slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert len(shards(run)) < len(shards(Run.open(prepared))) and "shards are missing, of workers 1" in slurm.log()
    again = slurm.submit("generate_logits.sbatch", run.folder, options=("--array=0-1",))
    slurm.wait(again, "COMPLETED")
    assert "complete, 5 shards" in slurm.log() and shards(run) == shards(Run.open(prepared))


@pytest.mark.brief
def test_parts_of_an_array_say_what_is_missing(slurm, sibling, prepared):
    """An array that ran again by one index was COMPLETED, and nobody said what it had not captured."""
    run = without_logits(sibling())
    for array, words in (("1", "3 of 5 shards are missing, of workers 0, 2"), ("0,2", "complete, 5 shards")):
        job = slurm.submit("generate_logits.sbatch", run.folder, options=(f"--array={array}",), PARTS="3")
        slurm.wait(job, "COMPLETED")
        assert words in slurm.log()
    assert shards(run) == shards(Run.open(prepared))


def test_one_teacher_on_two_nodes_captures_what_one_process_does(slurm, sibling, prepared):
    run = without_logits(sibling())
    words = ["generate-logits", run.folder, "logits.parallel=zero3"]
    job = slurm.submit("job.sbatch", *words, options=TWO_NODES)
    slurm.wait(job, "COMPLETED")
    assert shards(run) == shards(Run.open(prepared))


def test_pipeline_brings_a_run_to_its_end(slurm, recipe):
    """The first training is cancelled: what follows it goes too, and the same command goes on."""
    run = slurm.folder / "run"
    run_verb(["new", str(run), "--from", str(recipe)])
    options = dict.fromkeys([f"{stage}_OPTIONS" for stage in ("TOKENIZE", "TRAIN", "WATCH", "FINISH")], "-c1")
    options |= {"LOGITS_OPTIONS": "-c1 --array=0-1", "COMPRESS_OPTIONS": "-c1 --ntasks=2 --mem-per-cpu=500"}
    rows = []
    for _ in range(2):
        table = slurm.ask("bash", str(LAUNCH / "pipeline.sh"), str(run), **options)
        jobs = dict(re.findall(r"^(\w+) +(\d+) ", table, re.M))
        slurm.jobs += jobs.values()
        rows.append(jobs)
        if len(rows) == 1:
            slurm.wait(jobs["compress"], "COMPLETED")
            slurm.wait(jobs["logits"], "COMPLETED")
            slurm.ask("scancel", jobs["train"])
            slurm.wait(jobs["finish"], "CANCELLED")
            slurm.wait(jobs["failed"], "COMPLETED")
            slurm.ask("scancel", jobs["watch"])
            slurm.until(lambda job=jobs["watch"]: not slurm.ask("squeue", "-h", f"-j{job}"), "watch ends")
    assert [event["job"] for event in Run.open(run).events("train failed")]
    assert rows[1].keys() == {"train", "watch", "failed", "finish"}
    slurm.wait(rows[1]["finish"], "COMPLETED")
    assert (run / "report.html").exists() and (run / "export").is_dir()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))
    assert slurm.ask("bash", str(LAUNCH / "pipeline.sh"), str(run)).endswith("finished")
