"""The hosts of a hostfile over ssh, all at the same time: reachable, the same software, the same folder and locks."""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megakd.doctor import probe
from megakd.doctor.findings import Finding, fault, ok
from megakd.doctor.folder import judge_clock, locked_file, scratch
from megakd.doctor.machine import output_of
from megakd.errors import UserError

SECONDS, CONNECT = 10, 8  # per host: in all, and until ssh gives up with a reason
LINE = re.compile(r"(\S+)\s+slots=([1-9][0-9]*)(\s|$)")
NO_PROGRAM = 127  # exit code of a shell that finds no such program


def read_hostfile(path: Path) -> dict[str, int]:
    """{host: slots} of lines `HOST slots=N`; UserError for anything else, as launch/train.sh refuses it."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = LINE.match(line)
        if match is None:
            raise UserError(f"--hostfile {path}, line {number}: expected HOST slots=N, got: {line}")
        if match[1] in hosts:
            raise UserError(f"--hostfile {path}, line {number}: host {match[1]} is named twice")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"--hostfile {path}: no host in it; expected lines HOST slots=N")
    return hosts


def check_hosts(hosts: dict[str, int], folder: Path) -> Iterator[Finding]:
    """The rows of every host; while they are asked, this machine holds a lock in the folder."""
    with scratch(folder) as here, locked_file(here / "lock"), ThreadPoolExecutor(len(hosts)) as pool:
        place = str(folder.resolve()), str((here / "lock").resolve())
        mine = probe.probe(*place)
        for found in pool.map(lambda host: list(ask_host(host, mine, *place)), hosts):
            yield from found


def ask_host(host: str, mine: dict[str, Any], folder: str, lock: str) -> Iterator[Finding]:
    """mine: what this machine's own probe says."""
    before = time.time()
    done = output_of(ssh(host, folder, lock), Path(probe.__file__).read_text("utf-8"), SECONDS)
    after, name = time.time(), f"host {host}"
    if done is None:
        yield fault(name, f"no answer within {SECONDS} s", f"see why: ssh {host} true")
        return
    code, out, error = done
    said = next((line for line in reversed(error.splitlines()) if line.strip()), f"exit code {code}").strip()
    if code == NO_PROGRAM or "No such file" in said:
        yield fault(name, f"no Python at {sys.executable}", "install the same environment there, at the same path")
    elif code == 255:
        yield fault(name, f"not reachable: {said}", f"make `ssh -o BatchMode=yes {host} true` work: keys, known_hosts")
    elif code:
        yield fault(name, f"its Python failed: {said}", f"see why: ssh {host} {sys.executable} -V")
    elif (theirs := read_answer(out)) is None:
        yield fault(name, f"its Python answered: {out[-100:]!r}", f"see why: ssh {host} {sys.executable} -V")
    else:
        yield from judge_host(name, theirs, mine, before, after)


def read_answer(out: str) -> dict[str, Any] | None:
    """What the probe printed, after whatever a login prints; None for anything else."""
    try:
        return json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        return None


def ssh(host: str, folder: str, lock: str) -> list[str]:
    """The command that runs a program from standard input on a host, with this machine's Python and its PYTHONPATH."""
    program = [sys.executable, "-", folder, lock]
    if path := os.environ.get("PYTHONPATH"):
        program = ["env", f"PYTHONPATH={path}", *program]
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT}"]
    return ["ssh", *options, host, shlex.join(program)]


def judge_host(
    name: str, theirs: dict[str, Any], mine: dict[str, Any], before: float, after: float
) -> Iterator[Finding]:
    different = [
        f"{library} {theirs['versions'].get(library)} (here {version})"
        for library, version in mine["versions"].items()
        if theirs["versions"].get(library) != version
    ]
    if different:
        remedy = "install the same environment there (requirements.txt), or share one"
        yield fault(name, f"other versions: {', '.join(different)}", remedy)
    if not theirs["folder"]:
        yield fault(name, "does not see the folder of the run", "put it on a disk that all hosts mount at this path")
    elif theirs["lock"] == "missing":
        yield fault(name, "has another folder at the run's path", "put the run on a disk that all hosts share")
    elif theirs["lock"] != "refused":
        found = f"flock does not hold among hosts ({theirs['lock']})"
        yield fault(name, found, "mount with locks (Lustre: -o flock; NFS: version 4, not nolock)")
    clock = judge_clock(name, theirs["time"], before, after)
    if clock.mark != "ok":
        yield clock._replace(found=f"its clock is {clock.found}")
    elif not different and theirs["folder"] and theirs["lock"] == "refused":
        yield ok(name, "reachable; the same Python, libraries, folder, locks and time")
