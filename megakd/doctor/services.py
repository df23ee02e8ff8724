"""Slurm, the cache of the Hugging Face hub, and W&B."""

import netrc
import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from megakd.doctor.findings import Finding, fault, ok, warn
from megakd.doctor.machine import output_of
from megakd.errors import listed
from megakd.names import shipped

WANDB_HOST = "api.wandb.ai"
BAD_STATES = ("down", "drain", "fail", "error", "unk", "no_respond")  # beginnings of sinfo's states
OFF = ("", "0", "false", "no", "off")


def check_slurm() -> Iterator[Finding]:
    """Whether the controller answers, and which nodes of the partitions cannot be used."""
    if shutil.which("sinfo") is None:
        yield ok("Slurm", "not installed here")
        return
    ping = output_of(["scontrol", "ping"])
    if ping is None or ping[0] or "UP" not in ping[1]:
        said = "no answer" if ping is None else (ping[1] + ping[2]).strip().partition("\n")[0]
        yield warn("Slurm", f"its controller does not answer: {said}", "ask the administrators, or use ssh")
        return
    nodes = output_of(["sinfo", "--noheader", "--Node", "--format=%N %P %t %c %m"])
    if nodes is None or nodes[0]:
        yield warn("Slurm", f"sinfo fails: {'no answer' if nodes is None else nodes[2].strip()}", "see: sinfo")
        return
    yield judge_nodes(nodes[1])
    yield from judge_sizes(nodes[1])


def judge_nodes(text: str) -> Finding:
    """text: a line NODE PARTITION STATE CPUS MEGABYTES for each node and partition, as sinfo prints them."""
    lines = [words for line in text.splitlines() if len(words := line.split()) == 5]
    states = {words[0]: words[2] for words in lines}
    partitions = {words[1].rstrip("*") for words in lines}
    bad = [f"{node} ({state})" for node, state in states.items() if state.startswith(BAD_STATES) or state[-1:] == "*"]
    found = f"{len(states)} nodes in {listed(sorted(partitions))}"
    if bad and len(bad) == len(states):
        return fault("Slurm", f"{found}, none can be used: {listed(bad)}", "sinfo -R says why")
    return warn("Slurm", f"{found}, down: {listed(bad)}", "sinfo -R says why") if bad else ok("Slurm", found)


def judge_sizes(text: str) -> Iterator[Finding]:
    """Which job files ask for more CPUs or memory for a task than any node has: Slurm lets such a job wait for ever."""
    lines = [words for line in text.splitlines() if len(words := line.split()) == 5]
    sizes = [(int(words[3].rstrip("+")), int(words[4].rstrip("+"))) for words in lines]
    too_large = []
    for path in sorted(shipped("launch", "").glob("*.sbatch")):
        asked = dict(re.findall(r"^#SBATCH --(cpus-per-task|mem-per-cpu)=(\d+)", path.read_text(), re.MULTILINE))
        cpus = int(asked["cpus-per-task"])
        megabytes = cpus * int(asked.get("mem-per-cpu", 0))
        if not any(cpus <= node_cpus and megabytes <= node_megabytes for node_cpus, node_megabytes in sizes):
            too_large.append(f"{path.name} ({cpus} CPUs{f', {megabytes} MB' if megabytes else ''})")
    if sizes and too_large:
        most = f"no node has what a task asks for; the largest has {max(cpus for cpus, _ in sizes)} CPUs"
        yield warn("Slurm", f"{most}: {listed(too_large)}", "sbatch --cpus-per-task=N (docs/launching.md)")


def hub_cache() -> Path:
    """Where models and data sets of the hub are kept, by the variables that huggingface_hub reads."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home) / "hub"
    return Path(hub).expanduser()


def check_hub() -> Iterator[Finding]:
    folder = hub_cache()
    flags = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if is_on(name)]
    offline = f"; {' and '.join(flags)} set: nothing is downloaded" if flags else ""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    found = f"{folder}{'' if folder.exists() else ' (not made yet)'}, {free:.1f} GiB free{offline}"
    if not os.access(existing, os.W_OK) and not flags:
        yield fault("hub cache", f"{found}; cannot be written", "set HF_HOME to a folder of yours")
    else:
        yield ok("hub cache", found)


def is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in OFF


def check_wandb(wanted: str) -> Iterator[Finding]:
    """wanted: what the run's log.wandb says, or disabled."""
    mode = os.environ.get("WANDB_MODE") or wanted
    if find_spec("wandb") is None:
        if wanted == "disabled":
            yield ok("W&B", "not installed; log.wandb needs it")
        else:
            yield fault("W&B", f"not installed, and log.wandb={wanted}", "pip install 'megakd[log]'")
    elif os.environ.get("WANDB_API_KEY") or in_netrc():
        yield ok("W&B", f"logged in, mode {mode}")
    elif wanted == "online" and mode == "online":
        yield fault("W&B", "not logged in, and log.wandb=online", "wandb login, or log.wandb=offline")
    else:
        yield ok("W&B", f"not logged in, mode {mode}")


def in_netrc() -> bool:
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return WANDB_HOST in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
