"""Locks of killed builds, files left in shared memory, compilers."""

import mmap
import os
import subprocess
import sys

import pytest

from megakd.doctor import builds
from megakd.doctor.builds import check_compilers, check_locks, check_shared_memory


@pytest.fixture
def lock(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py311_cu130" / "cpu_adam"
    folder.mkdir(parents=True)
    return folder / "lock"


def test_a_lock_of_a_killed_build_is_a_fault(lock):
    assert [found.mark for found in check_locks()] == ["ok"]
    # as torch's FileBaton makes it; the builder ends without deleting it
    program = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)"
    subprocess.run([sys.executable, "-c", program, lock], check=True)
    (found,) = check_locks()
    assert found.mark == "fault" and "every load of cpu_adam waits" in found.found and f"rm {lock}" in found.remedy
    assert lock.exists()


def test_a_lock_of_a_build_that_goes_on_is_fine(lock):
    held = os.open(lock, os.O_CREAT | os.O_EXCL)
    try:
        (found,) = check_locks()
    finally:
        os.close(held)
    assert found.mark == "ok" and "cpu_adam is being built" in found.found


@pytest.fixture
def shared(monkeypatch, tmp_path):
    monkeypatch.setattr(builds, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(builds, "LEAST_SHARED", 0)
    return tmp_path


def test_files_left_in_shared_memory_are_counted(shared):
    assert [found.mark for found in check_shared_memory()] == ["ok"]
    for rank in range(3):
        (shared / f"deepspeed_allreduce_buffer_0_127.0.0.1_29500_{rank}").write_bytes(bytes(2**20))
    (shared / "of-another-program").write_bytes(bytes(10))
    (found,) = check_shared_memory()
    assert found.mark == "warn" and "3 files (0.00 GiB) that no process of yours uses" in found.found
    assert len(list(shared.iterdir())) == 4


def test_a_file_that_a_process_has_mapped_is_not_left_behind(shared):
    path = shared / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert [found.mark for found in check_shared_memory()] == ["ok"]


def test_little_shared_memory(shared, monkeypatch):
    monkeypatch.setattr(builds, "LEAST_SHARED", 2**60)
    (found,) = check_shared_memory()
    assert found.mark == "warn" and "--shm-size" in found.remedy


def test_compilers(monkeypatch, tmp_path):
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = check_compilers()
    assert (found.mark, found.found) == ("warn", "no C++ compiler, no ninja, no CUDA toolkit")
    for name in ("g++", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    (found,) = check_compilers()
    assert (found.mark, found.found) == ("ok", "g++, ninja, no CUDA toolkit")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (found,) = check_compilers()
    assert found.mark == "warn" and "no bin/nvcc" in found.found
