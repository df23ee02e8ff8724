"""The job files on a Slurm of two nodes, broken as clusters break jobs: they go on, to the same result.

A training that suffered faults is compared with the undisturbed one of two ranks on one machine, difference 0. Where a
process must last until Slurm does something, it is stopped (SIGSTOP) and resumed.
"""

import signal

import pytest
from safetensors.torch import load_file

from megakd.cli import run_verb
from megakd.models.hub import WEIGHTS
from megakd.run import Run
from tests.conftest import assert_goes_like, metrics
from tests.jobs import ONE_NODE, TRAINING, TWO_NODES, begun, shards, tasks, waits_with, without_logits

pytestmark = pytest.mark.cluster


def test_a_training_goes_on_after_a_stop_a_kill_and_preemption(slurm, sibling, one_host):
    """One job suffers all: a signal while it imports (it ended with 138), kill -9 of a rank (143, not requeued), TERM
    because another job needs its nodes."""
    run = sibling(*TRAINING)
    job = slurm.submit("train.sbatch", run.folder, options=(*TWO_NODES, "--partition=spare"))
    slurm.until(lambda: tasks(run.folder), "a rank starts")
    slurm.signal(job)
    slurm.requeued(job, 1)
    slurm.until(lambda: begun(run), "the first step")
    tasks(run.folder)[1].kill()
    slurm.requeued(job, 2)
    slurm.until(lambda: list(run.folder.glob("checkpoints/*/step-*")), "a checkpoint")
    tasks(run.folder)[0].suspend()  # Slurm wakes what it preempts
    other = slurm.sbatch("--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true")
    slurm.wait(other, "COMPLETED")
    slurm.until(lambda: "stopped by a signal; requeued" in slurm.log().split("fault 1")[1], "it saves")
    slurm.requeued(job, 3)
    slurm.wait(job, "COMPLETED")
    said = slurm.log()
    assert said.count("stopped by a signal; requeued") == 2 and "fault 1 of at most 5 in a row; requeued" in said
    assert metrics(run.folder) == metrics(one_host(*TRAINING).folder)


def test_a_training_goes_on_after_a_node_is_lost_and_a_rank_hangs(slurm, sibling, one_host):
    """Experts are sharded over both nodes. A rank that hung left FAILED."""
    layout = (*TRAINING, "engine.config=zero3", "engine.expert_parallel=2")
    run = sibling(*layout)
    job = slurm.submit("train.sbatch", run.folder, options=TWO_NODES)
    slurm.until(lambda: list(run.folder.glob("checkpoints/*/step-*")), "a checkpoint")
    slurm.machines.power_off("n2")
    slurm.until(lambda: "Restarts=1 " in slurm.show(job), "the job is requeued")
    slurm.machines.up(slurm=True)
    slurm.requeued(job, 1)
    slurm.until(lambda: len(tasks(run.folder)) == 2, "both ranks start")
    before = run.path("metrics.jsonl").stat().st_mtime
    slurm.until(lambda: run.path("metrics.jsonl").stat().st_mtime > before, "another step")
    tasks(run.folder)[1].suspend()
    slurm.requeued(job, 2)
    slurm.wait(job, "COMPLETED")
    assert "fault 1 of at most 5 in a row; requeued" in slurm.log()
    assert metrics(run.folder) == metrics(one_host(*layout).folder)


def test_every_job_file_goes_on_after_its_time_limit(slurm, sibling, prepared, recipe, one_host):
    """compress and generate_logits had no trap: TIMEOUT. All five wait for Slurm's signal as long as it takes."""
    made, tokenized = slurm.folder / "made", slurm.folder / "tokenized"
    for run in (made, tokenized):
        run_verb(["new", str(run), "--from", str(recipe)])
    captured, trained = without_logits(sibling()), sibling(*TRAINING)
    jobs = {
        ("compress", made): slurm.submit("compress.sbatch", made, options=("--ntasks=1", "--mem-per-cpu=500")),
        ("generate-logits", captured.folder): slurm.submit(
            "generate_logits.sbatch", captured.folder, options=("--array=0",)
        ),
        ("tokenize", tokenized): slurm.submit("job.sbatch", "tokenize", tokenized),
        ("watch", trained.folder): slurm.submit("watch.sbatch", trained.folder),
        ("train", trained.folder): slurm.submit("train.sbatch", trained.folder, options=ONE_NODE),
    }
    stopped = []
    for verb, folder in jobs:
        slurm.until(lambda verb=verb, folder=folder: tasks(folder, verb), f"{verb} starts")
        if verb == "train":
            slurm.until(lambda: begun(trained), "the first step")
        stopped.append(tasks(folder, verb)[-1])
        stopped[-1].suspend()
    slurm.limit(*jobs.values())
    for process in stopped:
        slurm.until(lambda process=process: waits_with(process, signal.SIGUSR1), "Slurm's signal", 90)
        process.resume()
    for job in jobs.values():
        slurm.requeued(job, 1, "TimeLimit=15")
    for job in jobs.values():
        slurm.wait(job, "COMPLETED")
    assert slurm.log().count("stopped by a signal; requeued") == len(jobs)
    student, expected = (load_file(folder / "student-0" / WEIGHTS) for folder in (made, prepared))
    assert student.keys() == expected.keys() and all(student[name].equal(expected[name]) for name in expected)
    assert shards(captured) == shards(Run.open(prepared))
    assert metrics(trained.folder) == metrics(one_host(*TRAINING).folder)


def test_one_task_that_starts_its_ranks_saves_and_is_requeued(slurm, sibling):
    """USR1 ended DeepSpeed's launcher: 246, not requeued."""
    run = sibling(*TRAINING)
    job = slurm.submit("train.sbatch", run.folder, options=("--nodes=1", "--ntasks=1"))
    slurm.until(lambda: begun(run), "the first step")
    slurm.signal(job)
    slurm.until(lambda: "Restarts=1 " in slurm.show(job), "the job is requeued")
    assert list(run.folder.glob("checkpoints/*/step-*")) and not tasks(run.folder)


def test_a_requeued_training_takes_the_nodes_that_it_gets(slurm, sibling, one_host):
    """2 -> 1 -> 2 nodes: with --ntasks-per-node Slurm gives the smallest number of --nodes, each time."""
    run = sibling(*TRAINING)
    job = slurm.submit("train.sbatch", run.folder, options=("--nodes=1-2",), TASKS_PER_NODE="1")
    slurm.until(lambda: begun(run), "a step on two nodes")
    lost = "n2" if "BatchHost=n1" in slurm.show(job) else "n1"
    slurm.ask("scontrol", "update", f"NodeName={lost}", "State=DRAIN", "Reason=test")
    try:
        slurm.signal(job)
        slurm.requeued(job, 1)
        slurm.until(lambda: [event["ranks"] for event in run.events("train")] == [2, 1], "a start on one node")
        before = run.path("metrics.jsonl").stat().st_mtime
        slurm.until(lambda: run.path("metrics.jsonl").stat().st_mtime > before, "a step on one node")
    finally:
        slurm.ask("scontrol", "update", f"NodeName={lost}", "State=RESUME")
    slurm.signal(job)
    slurm.requeued(job, 2)
    slurm.wait(job, "COMPLETED")
    assert [(event["ranks"], event["job"]) for event in run.events("train")] == [(2, job), (1, job), (2, job)]
    assert_goes_like(run.folder, one_host(*TRAINING).folder)
