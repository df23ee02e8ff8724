"""launch/run.sh and launch/supervise.sh on two hosts that tests/two_hosts.sh makes of this machine."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megakd.run import Run
from tests.conftest import ROOT, adam_steps, forked_ranks, metrics

pytestmark = pytest.mark.hosts
LONG = ("engine.kind=deepspeed", "engine.ranks=2", "engine.config=zero3", "stages.1.tokens=30720")


class Launch:
    """A launch file that trains a run on the hosts; its output goes to a file."""

    def __init__(self, hosts: Path, script: str, run: Run, **variables: str):
        self.run, self.output = run, run.folder / "output"
        own = {"PATH": f"{hosts / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
        own |= {"HOSTFILE": str(hosts / "hostfile"), "PYTHONPATH": str(ROOT), **variables}
        with self.output.open("a") as file:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "launch" / script), "train", str(run.folder)],
                env={**os.environ, **own},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.output.read_text()

    def wait_for(self, words: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not re.search(words, self.said()):
            assert self.process.poll() is None and time.monotonic() < end, f"no {words!r} in:\n{self.said()}"
            time.sleep(0.1)

    def ended(self) -> int:
        try:
            code = self.process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.said()) from None
        assert not ranks_of(self.run), self.said()
        return code


def ranks_of(run: Run) -> list[psutil.Process]:
    """The ranks on both hosts, whose processes this machine sees too."""
    words = [sys.executable, "-u", "-m", "megakd", "train", str(run.folder)]
    return [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == words]


@pytest.fixture
def undisturbed(sibling: Callable[..., Run]) -> Run:
    run = sibling(*LONG)
    forked_ranks(2, "train", run.folder)
    return run


def test_a_stopped_training_on_two_hosts_goes_on_and_equals_one_host(two_hosts, sibling, undisturbed):
    """USR1 ended the launcher alone, and both ranks trained on."""
    run = sibling(*LONG)
    launch = Launch(two_hosts, "run.sh", run)
    launch.wait_for("all 2/")
    launch.process.send_signal(signal.SIGUSR1)
    assert launch.ended() == 85, launch.said()
    assert Launch(two_hosts, "run.sh", run).ended() == 0
    assert metrics(run.folder) == metrics(undisturbed.folder)


def test_a_host_without_power_is_noticed_and_the_training_goes_on(two_hosts, sibling, undisturbed):
    """The other host waited ten minutes, and nobody started again."""
    run = sibling(*LONG)
    launch = Launch(two_hosts, "supervise.sh", run)
    launch.wait_for("all 8/")
    power_off(two_hosts, "n2")
    launch.wait_for("attempt 0 ended", 60)
    power_on(two_hosts)
    assert launch.ended() == 0, launch.said()
    assert metrics(run.folder) == metrics(undisturbed.folder)


def test_a_rank_that_hangs_is_noticed_and_a_stop_ends_with_85(two_hosts, sibling):
    """The launcher waited for it without end; TERM gave 1 and could end rank 0 before it had saved."""
    run = sibling(*LONG, "stages.1.tokens=307200")
    launch = Launch(two_hosts, "supervise.sh", run, MEGAKD_STALL="15")
    launch.wait_for("all 8/")
    ranks_of(run)[-1].send_signal(signal.SIGSTOP)
    launch.wait_for("no output and no progress for 15 s", 40)
    launch.wait_for("attempt 1")
    launch.wait_for(r"(?s)attempt 1.* all \d+/")
    launch.process.terminate()
    assert launch.ended() == 85, launch.said()


def power_off(hosts: Path, name: str) -> None:
    subprocess.run(["bash", str(ROOT / "tests" / "two_hosts.sh"), "power", str(hosts), name], check=True)


def power_on(hosts: Path) -> None:
    subprocess.run(["bash", str(ROOT / "tests" / "two_hosts.sh"), "up", str(hosts)], check=True)


def test_a_training_goes_on_with_one_host_and_takes_the_other_back(two_hosts, sibling, undisturbed):
    """2 -> 1 -> 2 ranks: the same samples, losses within 1e-4, Adam's counts of steps as without any fault."""
    run = sibling(*LONG)
    elastic = {"MEGAKD_MIN_HOSTS": "1", "MEGAKD_HOST_GRACE": "10", "MEGAKD_HOST_POLL": "3"}
    launch = Launch(two_hosts, "supervise.sh", run, **elastic)
    launch.wait_for("all 8/")
    power_off(two_hosts, "n2")
    launch.wait_for("attempt 1 on n1\n")
    launch.wait_for(r"converted for 1 ranks(?s:.)* all \d+/")
    power_on(two_hosts)
    launch.wait_for("attempt 2 on n1 n2\n")
    launch.wait_for("converted for 2 ranks")
    assert launch.ended() == 0, launch.said()
    assert [event["ranks"] for event in run.events("train")] == [2, 1, 2]
    found, expected = metrics(run.folder), metrics(undisturbed.folder)
    for name in ("stage", "step", "tokens", "lr"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    for name in ("loss", "ce", "kl", "kl_t1", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-4), name
    assert adam_steps(run.folder) == adam_steps(undisturbed.folder)
