"""launch/supervise.sh with programs in the place of ssh and of DeepSpeed's launcher: which hosts an attempt gets."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megakd.run import Run
from megakd.system.files import locked
from tests.conftest import ROOT

DEEPSPEED = ("engine.kind=deepspeed", "engine.config=zero3")
# of an attempt: a rank that saves when it is stopped
UNTIL_STOPPED = "RANK=0 bash -c 'trap \"exit 85\" USR1; for i in {1..1500}; do sleep 0.02; done; exit 9'"
PROGRAMS = {
    # hosts are this machine, but for those that `down` lists
    "ssh": 'if grep -qx "${@: -2:1}" "$FOLDER/down"; then echo "${WHY:-}" >&2; exit 255; fi\nexec bash -c "${@: -1}"',
    "ip": "echo 2: eth0 inet 10.0.0.1/24 scope global eth0",
    "python": """
        [ "$2" = deepspeed.launcher.runner ] || exec "$REAL" "$@"
        while [ "$1" != --hostfile ]; do shift; done
        echo "starts on $(cut -d " " -f 1 "$2" | paste -sd " ")"
        step=$(head -n 1 "$FOLDER/steps")
        sed -i 1d "$FOLDER/steps"
        eval "$step"
    """,
}


class Supervisor:
    """steps: what the attempts do, one line of bash each; down: the hosts that do not answer."""

    def __init__(self, folder: Path, run: Run, hosts: int, steps: list[str]):
        self.folder, self.run = folder, run
        for name, text in PROGRAMS.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(stat.S_IRWXU)
        self.hostfile = "".join(f"n{number} slots=1\n" for number in range(1, hosts + 1))
        (folder / "hosts").write_text(self.hostfile)
        (folder / "steps").write_text("".join(f"{step}\n" for step in steps))
        self.down()

    def down(self, *hosts: str) -> None:
        (self.folder / "down").write_text("".join(f"{host}\n" for host in hosts))

    def start(self, **variables: str) -> None:
        own = {"PATH": f"{self.folder}:{os.environ['PATH']}", "FOLDER": str(self.folder), "REAL": sys.executable}
        own |= {"HOSTFILE": str(self.folder / "hosts"), "PYTHON": str(self.folder / "python"), "PYTHONPATH": str(ROOT)}
        own |= {"MEGAKD_HOST_GRACE": "1", "MEGAKD_HOST_POLL": "1", **variables}
        with (self.folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "launch" / "supervise.sh"), "train", str(self.run.folder)],
                env={**os.environ, **own},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return (self.folder / "output").read_text()

    def wait_for(self, words: str) -> None:
        end = time.monotonic() + 60
        while words not in self.said():
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.05)

    def ended(self) -> int:
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            assert (self.folder / "hosts").read_text() == self.hostfile
            assert not list((self.run.folder / "launch").glob("*.hosts"))

    def attempts(self) -> list[str]:
        return re.findall("^starts on (.*)$", self.said(), re.M)


def test_a_lost_host_is_left_out_and_taken_back(sibling, tmp_path):
    lost = f"echo n2 >> {tmp_path / 'down'}; exit 1"
    supervisor = Supervisor(tmp_path, sibling(*DEEPSPEED), 2, [lost, UNTIL_STOPPED, "exit 0"])
    supervisor.start(MEGAKD_MIN_HOSTS="1", MEGAKD_MAX_RELAUNCHES="1")
    supervisor.wait_for("attempt 1 on n1\n")
    supervisor.down()
    assert supervisor.ended() == 0, supervisor.said()
    said = supervisor.said()
    assert supervisor.attempts() == ["n1 n2", "n1", "n1 n2"], said
    for words in (
        "waiting for host n2 (no answer)",
        "going on without host n2 (no answer)",
        "n2 answers again: the ranks save, to go on with n1 n2",
        "attempt 1 ended with exit code 85",
    ):
        assert said.count(words) == 1, said


def test_hosts_are_all_awaited_unless_fewer_are_allowed(sibling, tmp_path):
    supervisor = Supervisor(tmp_path, sibling(*DEEPSPEED), 2, ["exit 0"])
    supervisor.down("n1")
    supervisor.start(WHY="ssh: connect to host n1 port 22: Connection refused")
    supervisor.wait_for("waiting for host n1 (connect to host n1 port 22: Connection refused)\n")
    time.sleep(3)
    assert "attempt 0" not in supervisor.said()
    supervisor.down()
    assert supervisor.ended() == 0 and supervisor.attempts() == ["n1 n2"]


@pytest.mark.parametrize(
    "why",
    ["Could not resolve hostname n2: Name or service not known", "root@n2: Permission denied (publickey)."],
)
def test_a_host_that_waiting_does_not_help_is_refused_at_the_start(sibling, tmp_path, why):
    """A typo in the hostfile: it waited half an hour, and said that the training had failed."""
    run = sibling(*DEEPSPEED)
    supervisor = Supervisor(tmp_path, run, 2, ["exit 0"])
    supervisor.down("n2")
    supervisor.start(WHY=f"ssh: {why}")
    assert supervisor.ended() == 2 and not supervisor.attempts()
    assert f"host n2: {why}; correct " in supervisor.said() and supervisor.said().count("\n") == 1
    assert not run.events("train failed")


def test_a_training_that_never_started_has_not_failed(sibling, tmp_path):
    run = sibling(*DEEPSPEED)
    supervisor = Supervisor(tmp_path, run, 2, ["exit 0"])
    supervisor.down("n2")
    supervisor.start(MEGAKD_HOST_WAIT="1")
    assert supervisor.ended() == 1 and "n2 did not answer for 1 s" in supervisor.said()
    assert not run.events("train failed")


def test_only_hosts_whose_ranks_the_batch_divides_among_train(sibling, tmp_path):
    """And a host that comes back ends no attempt where no more ranks could train with it."""
    supervisor = Supervisor(tmp_path, sibling(*DEEPSPEED), 4, [UNTIL_STOPPED, "exit 0"])
    supervisor.down("n2", "n4")
    supervisor.start(MEGAKD_MIN_HOSTS="1")
    supervisor.wait_for("attempt 0 on n1 n3\n")
    supervisor.down("n4")
    time.sleep(5)
    assert "answers again" not in supervisor.said()
    supervisor.down()
    assert supervisor.ended() == 0, supervisor.said()
    assert supervisor.attempts() == ["n1 n3", "n1 n2 n3 n4"]


def test_a_rank_that_still_holds_the_lock_is_awaited(sibling, tmp_path):
    """Of a host that ssh does not reach: the next attempt would be refused, as a second training in the folder."""
    run = sibling(*DEEPSPEED)
    supervisor = Supervisor(tmp_path, run, 2, ["exit 0"])
    supervisor.down("n1")
    with locked(run.path("train.lock")):
        supervisor.start(MEGAKD_MIN_HOSTS="1")
        supervisor.wait_for("which a rank on a host that does not answer still holds")
        assert not supervisor.attempts()
    assert supervisor.ended() == 0 and supervisor.attempts() == ["n2"], supervisor.said()


def test_a_stop_while_fewer_hosts_train_ends_with_85(sibling, tmp_path):
    supervisor = Supervisor(tmp_path, sibling(*DEEPSPEED), 4, [UNTIL_STOPPED])
    supervisor.down("n3", "n4")
    supervisor.start(MEGAKD_MIN_HOSTS="2")
    supervisor.wait_for("starts on n1 n2")
    supervisor.process.send_signal(signal.SIGTERM)
    assert supervisor.ended() == 85 and supervisor.attempts() == ["n1 n2"], supervisor.said()


@pytest.mark.parametrize(
    "changes, variables, words",
    [
        (DEEPSPEED, {"MEGAKD_MIN_HOSTS": "0"}, "MEGAKD_MIN_HOSTS=0: expected a whole number above 0"),
        (DEEPSPEED, {"MEGAKD_MIN_HOSTS": "3"}, "MEGAKD_MIN_HOSTS=3: HOSTFILE="),
        (DEEPSPEED, {"MASTER_ADDR": "10.0.0.1"}, "MASTER_ADDR=10.0.0.1, a host that may be lost; set IFNAME"),
        (
            ("engine.kind=deepspeed", "engine.config=zero0"),
            {},
            "MEGAKD_MIN_HOSTS=1: engine.config: zero0 has ZeRO stage 0",
        ),
        (
            (*DEEPSPEED, "engine.expert_parallel=2"),
            {},
            "MEGAKD_MIN_HOSTS=1: engine.expert_parallel: 2 does not divide the 1 ranks",
        ),
    ],
)
def test_fewer_hosts_than_the_run_can_train_on_are_refused_at_the_start(sibling, tmp_path, changes, variables, words):
    supervisor = Supervisor(tmp_path, sibling(*changes), 2, ["exit 0"])
    supervisor.start(**{"MEGAKD_MIN_HOSTS": "1", **variables})
    assert supervisor.ended() == 2
    assert words in supervisor.said() and supervisor.said().count("\n") == 1, supervisor.said()
