"""What a process runs on, and whether it has that for itself: recorded with what it measures."""

import os
from pathlib import Path
from typing import Any

from megakd.system.version import library_versions

CPU_INFO = Path("/proc/cpuinfo")
OTHERS_GB = 2.0  # of a GPU's memory: less may be this process's own context and buffers of collectives


def describe_machine(device: Any) -> dict[str, Any]:
    """{"device", "devices", "memory_gb", "cpus", "libraries"}; devices: those that this host's torch sees."""
    found: dict[str, Any] = {"cpus": os.cpu_count(), "libraries": library_versions()}
    if device.type != "cuda":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"device": cpu_name(), "devices": 1, "memory_gb": round(memory / 2**30, 1), **found}
    import torch

    memory = torch.cuda.get_device_properties(device).total_memory
    name, count = torch.cuda.get_device_name(device), torch.cuda.device_count()
    return {"device": name, "devices": count, "memory_gb": round(memory / 2**30, 1), **found}


def cpu_name() -> str:
    """The processor's name as Linux tells it; "CPU" where it does not."""
    try:
        lines = CPU_INFO.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "") or "CPU"


def machine_load(device: Any) -> dict[str, Any]:
    """{"load", "cpus"}: the host's mean number of running processes over the last minute, and its cores.

    On a GPU also "others_gb": its memory that is used, but not by this process's tensors.
    """
    found: dict[str, Any] = {"load": round(os.getloadavg()[0], 2), "cpus": os.cpu_count()}
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        found["others_gb"] = round((total - free - torch.cuda.memory_reserved(device)) / 2**30, 2)
    return found


def why_shared(recorded: Any) -> str:
    """Why a throughput measured under this `machine_load` is not the machine's own; "" where nothing says so."""
    if not isinstance(recorded, dict):
        return ""
    reasons = []
    if (recorded.get("others_gb") or 0) > OTHERS_GB:
        reasons.append(f"other processes held {recorded['others_gb']:.1f} GiB of the GPU")
    if (recorded.get("load") or 0) > (recorded.get("cpus") or float("inf")):
        reasons.append(f"load average {recorded['load']:.1f} on {recorded['cpus']} cores")
    return " and ".join(reasons)
