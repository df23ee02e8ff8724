"""launch/run.sh and launch/supervise.sh on two hosts that tests/two_hosts.sh makes of this machine.

A training that suffered faults is compared with the undisturbed one of two ranks on one machine, difference 0.
"""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megakd.run import Run
from tests.conftest import ROOT, assert_goes_like, metrics
from tests.machines import Machines

pytestmark = pytest.mark.hosts
SHORT = ("engine.kind=deepspeed", "engine.ranks=2", "checkpoint.every_steps=5")
LONG = (*SHORT, "stages.1.tokens=10240")


class Launch:
    """A launch file that runs a verb on the hosts, or with RANKS here; its output goes to a file of the run."""

    def __init__(self, hosts: Path, script: str, run: Run, verb: str = "train", **variables: str):
        self.run, self.verb, self.output = run, verb, run.folder / "output"
        own = {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        own |= {} if "RANKS" in variables else {"HOSTFILE": str(hosts / "hostfile")}
        with self.output.open("a") as file:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "launch" / script), verb, str(run.folder)],
                env={**Machines(hosts).environment(), **own, **variables},
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

    def ranks(self) -> list[psutil.Process]:
        return ranks_of(self.run, self.verb)

    def wait_for_ranks(self) -> None:
        end = time.monotonic() + 120
        while len(self.ranks()) < 2:
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.1)

    def ended(self) -> int:
        try:
            code = self.process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.said()) from None
        assert not self.ranks(), self.said()
        return code


def ranks_of(run: Run, verb: str = "train") -> list[psutil.Process]:
    """The ranks on both hosts, whose processes this machine sees too."""
    words = [sys.executable, "-u", "-m", "megakd", verb, str(run.folder)]
    return [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == words]


@pytest.fixture
def hosts(two_hosts: Path) -> Iterator[Path]:
    """Both hosts have power at the end too."""
    yield two_hosts
    Machines(two_hosts).up()


@pytest.mark.brief
def test_a_stopped_training_on_two_hosts_goes_on_and_equals_one_host(hosts, sibling, one_host):
    """USR1 ended the launcher alone, and both ranks trained on; the next start met their port. Each took all cores."""
    layout = (*LONG, "engine.config=zero2")
    run = sibling(*layout)
    launch = Launch(hosts, "run.sh", run)
    launch.wait_for("all 2/")
    assert [rank.environ()["OMP_NUM_THREADS"] for rank in launch.ranks()] == ["1", "1"]
    launch.process.send_signal(signal.SIGUSR1)
    assert launch.ended() == 85, launch.said()
    assert Launch(hosts, "run.sh", run).ended() == 0
    assert metrics(run.folder) == metrics(one_host(*layout).folder)


def test_a_host_without_power_is_noticed_and_the_training_goes_on(hosts, sibling, one_host):
    """The other host waited ten minutes, and nobody started again."""
    layout = (*LONG, "engine.config=zero3")
    run = sibling(*layout)
    launch = Launch(hosts, "supervise.sh", run)
    launch.wait_for("all 8/")
    Machines(hosts).power_off("n2")
    launch.wait_for("attempt 0 ended", 60)
    Machines(hosts).up()
    assert launch.ended() == 0, launch.said()
    assert metrics(run.folder) == metrics(one_host(*layout).folder)


def test_a_training_goes_on_with_one_host_and_takes_the_other_back(hosts, sibling, one_host):
    """2 -> 1 -> 2 ranks. The one that is left is stopped (SIGSTOP) until the other host has been seen."""
    layout = (*LONG, "engine.config=zero3")
    run = sibling(*layout)
    elastic = {"MEGAKD_MIN_HOSTS": "1", "MEGAKD_HOST_GRACE": "10", "MEGAKD_HOST_POLL": "3"}
    launch = Launch(hosts, "supervise.sh", run, **elastic)
    launch.wait_for("all 8/")
    Machines(hosts).power_off("n2")
    launch.wait_for("attempt 1 on n1\n")
    launch.wait_for(r"converted for 1 ranks(?s:.)* all \d+/")
    (left,) = launch.ranks()
    left.suspend()
    Machines(hosts).up()
    launch.wait_for("n2 answers again")
    left.resume()
    launch.wait_for("attempt 2 on n1 n2\n")
    launch.wait_for("converted for 2 ranks")
    assert launch.ended() == 0, launch.said()
    assert [event["ranks"] for event in run.events("train")] == [2, 1, 2]
    assert_goes_like(run.folder, one_host(*layout).folder)


def test_a_supervised_training_goes_on_after_a_kill_and_a_hang(hosts, sibling, one_host):
    """Experts are sharded over both hosts. The launcher waited without end for a rank that hung."""
    layout = (*LONG, "engine.config=zero3", "engine.expert_parallel=2")
    run = sibling(*layout)
    launch = Launch(hosts, "supervise.sh", run, MEGAKD_STALL="15")
    launch.wait_for("all 2/")
    launch.ranks()[-1].kill()
    launch.wait_for("attempt 0 ended")
    launch.wait_for(r"(?s)attempt 1 on.* all \d+/")
    launch.ranks()[-1].suspend()
    launch.wait_for("no output and no progress for 15 s", 40)
    assert launch.ended() == 0, launch.said()
    assert metrics(run.folder) == metrics(one_host(*layout).folder)


def test_ranks_of_mpirun_train_together(hosts, sibling, one_host):
    """Each of its tasks started a whole training in the same folder. mpirun is started on one of the hosts."""
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun on this machine (openmpi-bin)")
    layout = (*SHORT, "engine.config=zero3")
    run = sibling(*layout)
    variables = {"PYTHON": sys.executable, "PYTHONPATH": ROOT, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    variables |= {"LAUNCHER": "openmpi", "IFNAME": "eth0", "HOSTFILE": hosts / "hostfile"}
    words = ["env", *(f"{name}={value}" for name, value in variables.items())]
    line = [str(hosts / "bin" / "ssh"), "n1", *words, "bash", str(ROOT / "launch" / "train.sh"), str(run.folder)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(run.folder) == metrics(one_host(*layout).folder)


@pytest.mark.brief
def test_what_a_test_leaves_behind_is_noticed(hosts):
    """And ended, so that no other test meets it."""
    leave = "setsid sleep 600 >/dev/null 2>&1 </dev/null & touch /dev/shm/left"
    subprocess.run([str(hosts / "bin" / "ssh"), "n1", leave], check=True, timeout=60)
    with pytest.raises(AssertionError, match=r"name='sleep'.*/dev/shm/left"):
        Machines(hosts).check(seconds=1)
    Machines(hosts).check()


@pytest.mark.brief
def test_a_network_that_a_host_lacks_is_refused_by_name(hosts, sibling):
    """There was no way to choose it."""
    run = sibling(*SHORT)
    for variables, words in (
        ({"IFNAME": "ib0"}, r"IFNAME=ib0: host n1 has no such network, but: eth0 10\."),
        ({"MASTER_ADDR": "n2"}, r"MASTER_ADDR=n2: not an address of the first host, n1: eth0 10\."),
    ):
        launch = Launch(hosts, "run.sh", run, **variables)
        assert launch.ended() == 2 and re.search(words, launch.said()), launch.said()


@pytest.mark.parametrize(
    "script, verb", [("run.sh", "generate-logits"), ("run.sh", "compress"), ("supervise.sh", "watch")]
)
def test_a_signal_ends_every_verb_on_hosts_with_85(hosts, sibling, script, verb):
    """`train` too, above. TERM to a launcher gave 1, and could end rank 0 before it had saved."""
    run = sibling()
    launch = Launch(hosts, script, run, verb)
    launch.wait_for_ranks()
    launch.process.terminate()
    assert launch.ended() == 85, launch.said()


@pytest.mark.brief
def test_a_signal_ends_ranks_on_one_machine_with_85(hosts, sibling):
    """It ended DeepSpeed's launcher: 143, and the ranks trained on."""
    run = sibling(*LONG)
    launch = Launch(hosts, "run.sh", run, RANKS="2")
    launch.wait_for("all 2/")
    launch.process.terminate()
    assert launch.ended() == 85 and list(run.folder.glob("checkpoints/*/step-*")), launch.said()
