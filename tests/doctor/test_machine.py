"""torch in a process of its own, GPUs against driver and build, memory and limits."""

from typing import Any

import pytest

from megakd.doctor import machine
from megakd.doctor.machine import check_memory, check_open_files, check_torch, judge_devices, runs_on

DRIVER = [["NVIDIA H100 80GB HBM3", "570.86.15"]] * 8
SEEN: dict[str, Any] = {"version": "2.13.0", "cuda": "13.0", "rocm": None, "devices": [], "kinds": []}
SEEN |= {"built_for": ["sm_80", "sm_90"], "nccl": None}
WORKING = {**SEEN, "devices": ["NVIDIA H100 80GB HBM3"] * 8, "kinds": ["90"] * 8, "nccl": [2, 28, 3]}


@pytest.fixture
def torch_is(monkeypatch, tmp_path):
    """Put another torch before the installed one."""

    def put(text: str) -> None:
        (tmp_path / "torch.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(machine, "driver_devices", list)

    return put


def test_a_broken_torch_is_a_fault_with_its_last_line(torch_is):
    torch_is("raise ImportError('libcudart.so.13: cannot open shared object file')")
    (found,) = check_torch()
    assert found.mark == "fault" and "ImportError: libcudart.so.13: cannot open" in found.found


def test_a_torch_that_ends_the_process_is_a_fault(torch_is):
    torch_is("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (found,) = check_torch()
    assert found.mark == "fault" and "exit code -11" in found.found


def test_a_torch_that_takes_too_long_is_a_warning(torch_is, monkeypatch):
    torch_is("import time; time.sleep(60)")
    monkeypatch.setattr(machine.output_of, "__defaults__", ("", 0.5))
    (found,) = check_torch()
    assert found.mark == "warn" and "takes more than" in found.found


def test_a_working_torch_without_gpus(torch_is):
    torch_is(
        "from types import SimpleNamespace\n__version__ = '2.13.0+cpu'\n"
        "version = SimpleNamespace(cuda=None, hip=None)\n"
        "cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)\n"
    )
    assert [(f.mark, f.found) for f in check_torch()] == [
        ("ok", "2.13.0+cpu, built for no GPU"),
        ("ok", "none; everything runs on the CPU"),
    ]


def test_gpus_that_torch_cannot_use(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = judge_devices(SEEN, DRIVER)
    assert found.mark == "fault" and "8 x NVIDIA H100 80GB HBM3, driver 570.86.15" in found.found
    assert "torch with CUDA 13.0 cannot use them" in found.found
    (found,) = judge_devices({**SEEN, "cuda": None}, DRIVER)
    assert found.mark == "warn" and "built for CPUs" in found.found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (found,) = judge_devices(SEEN, DRIVER)
    assert found.mark == "warn" and "hidden by CUDA_VISIBLE_DEVICES" in found.found


def test_gpus_that_torch_has_no_code_for():
    gpus, nccl = judge_devices(WORKING, DRIVER)
    assert gpus.mark == nccl.mark == "ok" and nccl.found == "2.28.3"
    gpus, _ = judge_devices({**WORKING, "kinds": ["60"]}, DRIVER)
    assert gpus.mark == "fault" and "no code for compute capability 60" in gpus.found


def test_architectures():
    assert runs_on("90", ["sm_80", "sm_90"]) and runs_on("86", ["sm_80"]) and runs_on("90", ["sm_90a"])
    assert runs_on("120", ["sm_80", "compute_90"]) and not runs_on("120", ["sm_90", "sm_100"])
    assert not runs_on("60", ["sm_75", "sm_80"]) and not runs_on("80", ["sm_86"])
    assert runs_on("90", ["gfx942"]) and runs_on("90", [])


def test_little_memory_and_a_containers_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP_LIMIT", tmp_path / "memory.max")
    (tmp_path / "meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    assert [(f.mark, f.found) for f in check_memory()] == [("ok", "16.0 of 32.0 GiB available")]
    (tmp_path / "memory.max").write_text("max\n")
    assert next(iter(check_memory())).mark == "ok"
    (tmp_path / "memory.max").write_text(f"{2 * 2**30}\n")
    (found,) = check_memory()
    assert found.mark == "warn" and "2.0 GiB allowed" in found.found


def test_few_open_files(monkeypatch):
    for limits, mark, remedy in (((1024, 524288), "warn", "ulimit -n 65536"), ((-1, -1), "ok", "")):
        monkeypatch.setattr(machine.resource, "getrlimit", lambda _, limits=limits: limits)
        (found,) = check_open_files()
        assert (found.mark, found.remedy) == (mark, remedy)
