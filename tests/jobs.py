"""Jobs on a Slurm of two nodes, for tests: submitted, asked for, broken; and what they have made of a run."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megakd.run import Run
from tests.machines import Machines

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
ONE_NODE = ("--nodes=1", "--ntasks=2", "--ntasks-per-node=2")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
TRAINING = ("engine.kind=deepspeed", "engine.ranks=2", "stages.1.tokens=10240", "checkpoint.every_steps=5")


class Slurm:
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
            if time.monotonic() > deadline:
                raise AssertionError(f"never: {what}\n{self.ask('squeue', '--states=all')}\n{self.log()[-5000:]}")
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

    def cancel_all(self) -> None:
        """No job of this test may run on."""
        for job in self.jobs:
            self.ask("scancel", job)
        for job in self.jobs:
            self.until(lambda job=job: not self.ask("squeue", "--noheader", f"--jobs={job}"), f"{job} is gone", 60)


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
    """Whether a training has made a step."""
    return run.path("metrics.jsonl").exists()


def shards(run: Run) -> dict[str, bytes]:
    """Every shard of teacher logits with its content."""
    folder = run.path("data", "logits").resolve()
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def without_logits(run: Run) -> Run:
    """A sibling run that has to capture them itself."""
    run.path("data", "logits").unlink()
    return run
