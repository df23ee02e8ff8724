"""GPUs, their driver and torch; memory and limits of this machine."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megakd.doctor.findings import Finding, fault, ok, warn

SECONDS = 9  # that a program of another maker may take
GIB = 2**30
LEAST_MEMORY, LEAST_FILES = 4 * GIB, 4096
MEMINFO, CGROUP_LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")

# In a process of its own: an import of a broken torch may end the process, and takes seconds.
ASK_TORCH = """
import json, torch
cuda = torch.cuda
there = cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "rocm": torch.version.hip,
    "devices": [cuda.get_device_name(i) for i in range(cuda.device_count())] if there else [],
    "kinds": ["%d%d" % cuda.get_device_capability(i) for i in range(cuda.device_count())] if there else [],
    "built_for": cuda.get_arch_list() if there else [],
    "nccl": list(cuda.nccl.version()) if there else None,
}))
"""


def check_torch() -> Iterator[Finding]:
    """Whether torch can be imported, which CUDA it is built for, and whether it can use the GPUs of this machine."""
    done = output_of([sys.executable, "-c", ASK_TORCH])
    if done is None:
        yield warn("torch", f"its import takes more than {SECONDS} s", "install Python's environment on a local disk")
        return
    code, out, error = done
    if code:
        line = next((line for line in reversed(error.splitlines()) if line.strip()), f"exit code {code}")
        yield fault("torch", f"cannot be imported: {line.strip()}", "install torch again (docs/install.md)")
        return
    seen = json.loads(out.splitlines()[-1])
    build = f"CUDA {seen['cuda']}" if seen["cuda"] else f"ROCm {seen['rocm']}" if seen["rocm"] else "no GPU"
    yield ok("torch", f"{seen['version']}, built for {build}")
    yield from judge_devices(seen, driver_devices())


def judge_devices(seen: dict[str, Any], driver: list[list[str]]) -> Iterator[Finding]:
    """seen: what ASK_TORCH printed; driver: [name, driver's version] of each GPU, as nvidia-smi lists them."""
    if not driver and not seen["devices"]:
        yield ok("GPUs", "none; everything runs on the CPU")
        return
    names = seen["devices"] or [name for name, _ in driver]
    version = f", driver {driver[0][1]}" if driver else ""
    text = f"{len(names)} x {names[0]}{version}"
    if not seen["devices"]:
        if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
            yield warn("GPUs", f"{text}, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
        elif not (seen["cuda"] or seen["rocm"]):
            yield warn("GPUs", f"{text}, but torch is built for CPUs", "install torch with CUDA (docs/install.md)")
        else:
            remedy = "update the driver, or install a torch for an older CUDA; compare: nvidia-smi"
            yield fault("GPUs", f"{text}, but torch with CUDA {seen['cuda']} cannot use them", remedy)
        return
    unknown = {kind for kind in seen["kinds"] if not runs_on(kind, seen["built_for"])}
    if unknown:
        found = f"{text}: this torch has no code for compute capability {', '.join(sorted(unknown))}"
        yield fault("GPUs", found, "install a torch that has it; compare: torch.cuda.get_arch_list()")
    else:
        yield ok("GPUs", text)
    if seen["nccl"]:
        yield ok("NCCL", ".".join(map(str, seen["nccl"])))


def runs_on(kind: str, built_for: list[str]) -> bool:
    """Whether code for these architectures runs on a GPU of capability `kind` ("90"): the same major version, a minor
    one that is not newer; or PTX ("compute_90"), which the driver compiles for newer ones."""
    if not built_for or not built_for[0].startswith(("sm_", "compute_")):  # ROCm's names
        return True
    for each in built_for:
        form, _, number = each.rstrip("af").partition("_")
        if form == "compute" and int(number) <= int(kind):
            return True
        if form == "sm" and number[:-1] == kind[:-1] and int(number) <= int(kind):
            return True
    return False


def driver_devices() -> list[list[str]]:
    """[name, driver's version] of each GPU; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if done is None or done[0]:
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done[1].splitlines() if line.count(",") == 1]


def check_memory() -> Iterator[Finding]:
    """Memory that a new process may take: what the kernel calls available, at most the limit of a container."""
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB available"
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        found += f", {int(limit) / GIB:.1f} GiB allowed for this container or job"
        free = min(free, int(limit))
    if free < LEAST_MEMORY:
        yield warn("memory", found, "end other processes, or ask the scheduler for more memory")
    else:
        yield ok("memory", found)


def check_open_files() -> Iterator[Finding]:
    """The number of files that one process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        yield warn("open files", f"at most {soft:,}", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")
    else:
        yield ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,}")


def output_of(command: list[str], given: str = "", seconds: float = SECONDS) -> tuple[int, str, str] | None:
    """(exit code, standard output, standard error) of a program; None where it takes longer than `seconds`."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode, done.stdout, done.stderr
