"""Hosts over ssh: a program named ssh that runs the command on this machine, or fails as ssh does."""

import json
import sys
import time
from pathlib import Path

import pytest

from megakd.doctor import hosts
from megakd.doctor.findings import Finding
from megakd.doctor.hosts import check_hosts, judge_host, read_hostfile
from megakd.doctor.probe import try_lock
from megakd.errors import UserError
from tests.conftest import in_process

LOCAL = 'for command in "$@"; do :; done\nexec sh -c "$command"\n'  # the last argument is the command


@pytest.fixture
def ssh(monkeypatch, tmp_path):
    """ssh("script"): what the program does; the findings of one host, or of those named."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "run").mkdir()
    program = tmp_path / "bin" / "ssh"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def ask(script: str, *names: str) -> list[Finding]:
        program.write_text("#!/bin/sh\n" + script)
        program.chmod(0o755)
        found = list(check_hosts(dict.fromkeys(names or ("node1",), 8), tmp_path / "run"))
        assert not list((tmp_path / "run").iterdir())
        return found

    return ask


def test_a_host_that_is_the_same(ssh):
    (found,) = ssh(LOCAL)
    assert (found.mark, found.check) == ("ok", "host node1"), found


def test_hosts_are_asked_at_the_same_time_and_keep_their_order(ssh):
    start = time.monotonic()
    found = ssh("sleep 1\n" + LOCAL, *(f"node{i}" for i in range(4)))
    assert [each.check for each in found] == [f"host node{i}" for i in range(4)]
    assert time.monotonic() - start < 3.5


def test_a_host_that_is_not_reachable(ssh):
    (found,) = ssh('echo "ssh: connect to host node1 port 22: No route to host" >&2; exit 255')
    assert found.mark == "fault" and "No route to host" in found.found and "BatchMode=yes node1 true" in found.remedy


def test_a_host_that_does_not_answer(ssh, monkeypatch):
    monkeypatch.setattr(hosts, "SECONDS", 0.5)
    (found,) = ssh("exec sleep 30")
    assert found.mark == "fault" and "no answer within 0.5 s" in found.found


def test_a_host_without_this_python(ssh):
    (found,) = ssh('echo "sh: 1: python: not found" >&2; exit 127')
    assert found.mark == "fault" and f"no Python at {sys.executable}" in found.found


def test_a_host_with_another_folder_at_the_path(ssh, tmp_path):
    (tmp_path / "other").mkdir()
    script = LOCAL.replace('"$command"', f'"$(echo "$command" | sed s!{tmp_path}/run!{tmp_path}/other!g)"')
    (found,) = ssh(script)
    assert found.mark == "fault" and "another folder at the run's path" in found.found


def test_a_host_whose_python_answers_something_else(ssh):
    (found,) = ssh("cat > /dev/null; echo Welcome")
    assert found.mark == "fault" and "its Python answered: 'Welcome" in found.found


def answer(**changes: object) -> dict:
    versions = {"Python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "megakd": "0.1.0 (abc1234)"}
    return {"time": 100.0, "versions": versions, "folder": True, "lock": "refused", **changes}


@pytest.mark.parametrize(
    "changes, mark, words",
    [
        ({}, "ok", "reachable"),
        ({"versions": {**answer()["versions"], "torch": "2.12.0"}}, "fault", "torch 2.12.0 (here 2.13.0)"),
        ({"folder": False, "lock": "missing"}, "fault", "does not see the folder"),
        ({"lock": "missing"}, "fault", "another folder at the run's path"),
        ({"lock": "given"}, "fault", "flock does not hold among hosts"),
        ({"time": 160.0}, "warn", "its clock is 59 s ahead of"),
    ],
)
def test_what_a_host_answers(changes, mark, words):
    (found,) = judge_host("host node1", answer(**changes), answer(), before=100.0, after=101.0)
    assert found.mark == mark and words in found.found


def test_a_lock_that_nobody_holds_is_given(tmp_path):
    assert try_lock(tmp_path / "lock") == "missing"
    (tmp_path / "lock").touch()
    assert try_lock(tmp_path / "lock") == "given"


def test_hostfiles(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nnode1 slots=8\n\n  node2  slots=4 # four\n")
    assert read_hostfile(path) == {"node1": 8, "node2": 4}
    for text, words in (
        ("node1\n", "line 1: expected HOST slots=N, got: node1"),
        ("a slots=1\na slots=2\n", "line 2: host a is named twice"),
        ("# none\n", "no host in it"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_hostfile(path)
    path.unlink()
    assert "cannot be read: No such file" in in_process("doctor", tmp_path, "--hostfile", path, code=2)


def test_the_probe_prints_json_of_the_standard_library_alone():
    text = Path(hosts.probe.__file__).read_text()
    assert json.loads(json.dumps(hosts.probe.probe("/", "/none")))["lock"] == "missing"
    assert "import torch" not in text
