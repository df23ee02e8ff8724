"""All checks as one table: what one of them raises hides nothing, and the exit code says whether there is a fault."""

import subprocess
import sys

import pytest

from megakd.commands import doctor
from megakd.doctor.findings import as_text, examine, fault, ok, warn
from tests.conftest import ROOT, in_process


def test_a_check_that_fails_is_a_row_and_the_others_are_shown():
    def broken():
        raise OSError(5, "Input/output error")

    found = examine([("first", lambda: [ok("first", "fine")]), ("broken", broken), ("last", lambda: [ok("last", "")])])
    assert [(each.mark, each.check) for each in found] == [("ok", "first"), ("warn", "broken"), ("ok", "last")]
    assert found[1].found == "not examined: Input/output error"


def test_marks_are_counted():
    text = as_text([ok("a", "b"), warn("c", "d", "e"), fault("f", "g", "h"), fault("i", "j", "k")])
    assert text.splitlines()[0].split() == ["check", "found", "remedy"]
    assert text.endswith("2 faults, 1 warning") and as_text([ok("a", "b")]).endswith("no faults, no warnings")


@pytest.fixture
def few_checks(monkeypatch):
    """Without torch's process, which takes seconds."""
    monkeypatch.setattr(doctor, "check_torch", lambda: [ok("torch", "not asked")])
    monkeypatch.setattr(doctor, "check_locks", lambda: [ok("locks of builds", "not asked")])


def test_exit_code_is_0_without_a_fault_and_nothing_is_left(few_checks, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "check_slurm", lambda: [warn("Slurm", "does not answer", "ask")])
    shown = in_process("doctor", tmp_path)
    assert "not asked" in shown and "flock" in shown and "no faults" in shown
    assert not list(tmp_path.iterdir())


def test_exit_code_is_2_with_a_fault(few_checks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "check_slurm", lambda: [fault("Slurm", "none of its nodes is up", "ask")])
    with pytest.raises(SystemExit) as ended:
        in_process("doctor", tmp_path)
    assert ended.value.code == 2


def test_a_folder_that_does_not_exist_is_one_line(tmp_path):
    assert "no such folder; give a run" in in_process("doctor", tmp_path / "nothing", code=2)


def test_wandb_is_judged_by_the_run(tmp_path):
    assert doctor.wandb_of(tmp_path) == "disabled"
    (tmp_path / "config.json").write_text('{"log": {"wandb": "online"}}')
    assert doctor.wandb_of(tmp_path) == "online"
    (tmp_path / "config.json").write_text("[1")
    assert doctor.wandb_of(tmp_path) == "disabled"


def test_doctor_imports_no_torch():
    """It has to say that torch is missing or broken."""
    program = "import megakd.commands.doctor, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
