"""A folder without locks, links, whole renames, space or the same clock."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from megakd.doctor import folder
from megakd.doctor.folder import check_folder, file_system, is_shared, judge_clock, judge_space, judge_type


def marks(path: Path) -> dict[str, str]:
    found = {each.check: each.mark for each in check_folder(path)}
    assert not list(path.iterdir())  # the temporary folder is deleted
    return found


def planted(number: int):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_an_ordinary_folder_has_all(tmp_path):
    found = marks(tmp_path)
    assert set(found) == {"file system", "space", "flock", "hard links", "rename", "clock of the folder"}
    assert {found[name] for name in ("flock", "hard links", "rename", "clock of the folder")} == {"ok"}


def test_no_flock(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.fcntl, "flock", planted(errno.ENOLCK))
    assert marks(tmp_path)["flock"] == "fault"


def test_flock_that_excludes_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.fcntl, "flock", lambda *_: None)
    found = {each.check: each for each in check_folder(tmp_path)}["flock"]
    assert found.mark == "fault" and "two locks" in found.found
    assert fcntl.LOCK_EX


def test_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.os, "link", planted(errno.EPERM))
    assert marks(tmp_path)["hard links"] == "warn"


def test_a_rename_that_deletes_first(tmp_path, monkeypatch):
    replace = os.replace

    def slow(source: Path, target: Path) -> None:
        target.unlink()
        folder.time.sleep(0.005)
        replace(source, target)

    monkeypatch.setattr(folder.os, "replace", slow)
    assert marks(tmp_path)["rename"] == "fault"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.tempfile, "TemporaryDirectory", planted(errno.EROFS))
    assert {each.check: each.mark for each in check_folder(tmp_path)}["write"] == "fault"


def test_a_clock_that_differs(tmp_path, monkeypatch):
    now = folder.time.time
    monkeypatch.setattr(folder.time, "time", lambda: now() + 90)
    found = {each.check: each for each in check_folder(tmp_path)}["clock of the folder"]
    assert found.mark == "warn" and found.found == "90 s behind this machine"


@pytest.mark.parametrize(
    "there, mark, words", [(100.5, "ok", "within 2 s"), (112.0, "warn", "10 s ahead of"), (95.0, "warn", "5 s behind")]
)
def test_clocks_are_compared_with_the_time_that_asking_took(there, mark, words):
    found = judge_clock("clock", there, before=100.0, after=102.0)
    assert found.mark == mark and words in found.found


def test_space(tmp_path):
    for free, inodes, mark in ((2**40, None, "ok"), (2**33, 10**6, "warn"), (2**20, None, "fault"), (2**40, 5, "warn")):
        assert judge_space(tmp_path, free, inodes).mark == mark


def test_the_mount_that_holds_the_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my runs").mkdir()
    monkeypatch.setattr(folder, "MOUNTS", tmp_path / "mounts")
    lines = [
        "20 1 8:1 / / rw - ext4 /dev/sda rw",
        f"21 20 0:50 / {tmp_path}/my\\040runs rw shared:1 - nfs4 server:/x rw",
        f"22 20 0:51 / {tmp_path}/my rw - xfs /dev/sdb rw",
    ]
    (tmp_path / "mounts").write_text("\n".join(lines))
    assert file_system(tmp_path / "my runs") == ("nfs4", f"{tmp_path}/my runs")
    assert file_system(tmp_path) == ("ext4", "/")
    (tmp_path / "mounts").unlink()
    assert file_system(tmp_path) == ("unknown", "")


def test_types(tmp_path):
    assert is_shared("lustre") and is_shared("nfs4") and is_shared("fuse.glusterfs") and not is_shared("ext4")
    assert judge_type(tmp_path, "nfs4", "/home").found.endswith("nfs4, shared")
    assert judge_type(tmp_path, "tmpfs", "/tmp").mark == "warn"
