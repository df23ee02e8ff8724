"""What DeepSpeed needs to build its ops, and what builds and runs that were killed left behind."""

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from megakd.doctor.findings import Finding, fault, ok, warn
from megakd.errors import listed

SHARED_MEMORY = Path("/dev/shm")
LEFT_BEHIND = "deepspeed_*"  # names of DeepSpeed's buffers in SHARED_MEMORY
LEAST_SHARED = 2**30  # bytes free: NCCL and worker processes exchange data there
GIB = 2**30


def check_compilers() -> Iterator[Finding]:
    """Compiler, ninja and CUDA toolkit. MegaKD's own files need no op of DeepSpeed, so what is missing is a warning."""
    compiler = os.environ.get("CXX") or next((name for name in ("c++", "g++") if shutil.which(name)), None)
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    toolkit = f"CUDA_HOME={cuda}" if cuda else nvcc or "no CUDA toolkit"
    found = f"{compiler or 'no C++ compiler'}, {'ninja' if shutil.which('ninja') else 'no ninja'}, {toolkit}"
    if cuda and not (Path(cuda) / "bin" / "nvcc").is_file():
        yield warn("DeepSpeed ops", f"{found}: no bin/nvcc in it", "set CUDA_HOME to a CUDA toolkit, or unset it")
    elif compiler is None or shutil.which("ninja") is None:
        remedy = "install g++ and ninja where a DeepSpeed file asks for NVMe offload or a fused optimizer"
        yield warn("DeepSpeed ops", found, remedy)
    else:
        yield ok("DeepSpeed ops", found)


def extensions_folder() -> Path:
    """Where torch builds extensions, DeepSpeed's ops among them."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")


def check_locks() -> Iterator[Finding]:
    """Locks of builds. A builder keeps its lock open and deletes it; a lock that nobody has open makes every later
    load of this op wait without end."""
    folder = extensions_folder()
    locks = sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")])
    if not locks:
        yield ok("locks of builds", f"none in {folder}")
        return
    opened = opened_files()
    for lock in locks:
        age = f"{max(0, time.time() - lock.stat().st_mtime) / 60:.0f} minutes old"
        if str(lock.resolve()) in opened:
            yield ok("locks of builds", f"{lock.parent.name} is being built ({age})")
        else:
            found = f"{lock} ({age}) is held by no process of this machine: every load of {lock.parent.name} waits"
            yield fault("locks of builds", found, f"rm {lock}, unless another machine builds there now")


def check_shared_memory() -> Iterator[Finding]:
    """Buffers of DeepSpeed that no process has mapped, and space for new ones."""
    if not SHARED_MEMORY.is_dir():
        yield warn("shared memory", f"no {SHARED_MEMORY}", "give the container one, as with --shm-size")
        return
    mapped = mapped_files()
    left = [path for path in sorted(SHARED_MEMORY.glob(LEFT_BEHIND)) if path.is_file() and str(path) not in mapped]
    if left:
        size = sum(path.stat().st_size for path in left)
        names = listed(path.name for path in left[:3])
        found = f"{len(left)} files ({size / GIB:.2f} GiB) that no process of yours uses: {names}"
        yield warn("shared memory", found, f"rm {SHARED_MEMORY / LEFT_BEHIND} when nothing runs; they take memory")
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < LEAST_SHARED:
        found = f"{free / GIB:.2f} GiB free in {SHARED_MEMORY}"
        yield warn("shared memory", found, "give the container more, as with --shm-size=16g or --ipc=host")
    elif not left:
        yield ok("shared memory", f"{free / GIB:.1f} GiB free, nothing of DeepSpeed's left behind")


def opened_files() -> set[str]:
    """Paths that processes of this user have open; of all users for root."""
    return {target for link in Path("/proc").glob("[0-9]*/fd/*") for target in _target(link)}


def _target(link: Path) -> Iterable[str]:
    try:
        return [os.readlink(link)]
    except OSError:  # closed meanwhile, or another user's
        return []


def mapped_files() -> set[str]:
    """Paths in shared memory that processes of this user have mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue
        found |= {line.split(maxsplit=5)[-1] for line in lines if str(SHARED_MEMORY) in line}
    return found
