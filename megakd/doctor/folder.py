"""Whether a folder has what runs rely on: space, locks, hard links, renames that replace at once, the same clock."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from megakd.doctor.findings import Finding, fault, ok, warn
from megakd.errors import UserError

GIB = 2**30
LEAST_SPACE, FEW_SPACE, FEW_FILES = GIB, 20 * GIB, 10_000
SKEW = 2.0  # seconds between two clocks that are worth a word
RENAMES = 50
MOUNTS = Path("/proc/self/mountinfo")
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "glusterfs", "pvfs2", "orangefs", "wekafs")
TEMPORARY = {"tmpfs": "memory", "ramfs": "memory", "overlay": "the container"}


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`, deleted at the end: all that is written to examine it."""
    try:
        made = tempfile.TemporaryDirectory(prefix=".megakd-doctor-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with made as path:
        yield Path(path)


def check_folder(folder: Path) -> Iterator[Finding]:
    """All of it, for the folder of a run or the working directory."""
    kind, mount = file_system(folder)
    yield judge_type(folder, kind, mount)
    yield judge_space(folder, shutil.disk_usage(folder).free, free_inodes(folder))
    try:
        with scratch(folder) as here:
            yield flock_works(here)
            yield links_work(here)
            yield renames_replace(here)
            yield same_clock(here)
    except UserError as error:
        yield fault("write", str(error), "change its owner or mode, or take another folder")


def file_system(folder: Path) -> tuple[str, str]:
    """(type, mount point) of the file system that holds a folder; ("unknown", "") where the kernel does not list it."""
    place, best = str(folder.resolve()), ("unknown", "")
    with suppress(OSError):
        for line in MOUNTS.read_text().splitlines():
            mount = line.split()[4].encode().decode("unicode_escape")
            inside = place == mount or place.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best[1]):
                best = line.partition(" - ")[2].split()[0], mount
    return best


def is_shared(kind: str) -> bool:
    return kind.removeprefix("fuse.").startswith(SHARED)


def judge_type(folder: Path, kind: str, mount: str) -> Finding:
    where = f"{folder} on {mount or '?'}: {kind}"
    if kind in TEMPORARY:
        return warn("file system", f"{where}, gone with {TEMPORARY[kind]}", "keep runs on a disk")
    return ok("file system", f"{where}, {'shared' if is_shared(kind) else 'local to this machine'}")


def free_inodes(folder: Path) -> int | None:
    """How many files may still be made; None where the file system sets no number."""
    found = os.statvfs(folder)
    return found.f_favail if found.f_files else None


def judge_space(folder: Path, free: int, inodes: int | None) -> Finding:
    found = f"{free / GIB:.1f} GiB free"
    remedy = "delete what is not needed, or take another disk; megakd plan RUN says what a run takes"
    if inodes is not None and inodes < FEW_FILES:
        return warn("space", f"{found}, but only {inodes:,} more files", remedy)
    if free < LEAST_SPACE:
        return fault("space", found, remedy)
    return warn("space", found, remedy) if free < FEW_SPACE else ok("space", found)


def flock_works(here: Path) -> Finding:
    """A lock that is held must be refused to a second one who opens the file."""
    remedy = "mount with locks (Lustre: -o flock; NFS: version 4, not nolock), or take another folder"
    try:
        with locked_file(here / "lock"), (here / "lock").open("w") as second:
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return ok("flock", "works")
    except OSError as error:
        return fault("flock", f"refused: {error.strerror}", remedy)
    return fault("flock", "two locks on one file at the same time", remedy)


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def links_work(here: Path) -> Finding:
    source, target = here / "source", here / "target"
    source.touch()
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise
        found = f"refused: {error.strerror}"
        return warn("hard links", found, "megakd watch copies checkpoints instead, which takes space and time")
    return ok("hard links", "work")


def renames_replace(here: Path) -> Finding:
    """A reader must find a file whole at every moment while another is renamed over it again and again."""
    path, new, finished, faults = here / "file", here / "new", Event(), []
    texts = {"a" * 4096, "b" * 4096}
    path.write_text(min(texts))

    def read() -> None:
        while not finished.is_set():
            try:
                if path.read_text() not in texts:
                    faults.append("a reader saw a part of a file")
            except OSError as error:
                faults.append(f"a reader found no file ({error.strerror})")

    reader = Thread(target=read)
    reader.start()
    try:
        for _ in range(RENAMES // 2):
            for text in texts:
                new.write_text(text)
                os.replace(new, path)
    finally:
        finished.set()
        reader.join()
    if faults:
        found = f"{faults[0]} while it was replaced"
        return fault("rename", found, "take a file system with POSIX renames: no object store, no cached FUSE mount")
    return ok("rename", "replaces a file at once")


def same_clock(here: Path) -> Finding:
    """The time that the file system gives to a file that is written now, against this machine's."""
    before, path = time.time(), here / "now"
    path.write_text("now")
    after = time.time()
    return judge_clock("clock of the folder", path.stat().st_mtime, before, after)


def judge_clock(check: str, there: float, before: float, after: float) -> Finding:
    """there: another clock, read between `before` and `after` by this machine's."""
    skew = there - after if there > after else min(0.0, there - before)
    if abs(skew) > SKEW:
        direction = "ahead of" if skew > 0 else "behind"
        return warn(check, f"{abs(skew):.0f} s {direction} this machine", "run chrony or ntpd on both machines")
    return ok(check, f"within {SKEW:g} s of this machine's")
