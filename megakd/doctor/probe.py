"""What one machine sees, as JSON: run here, and sent to the Python of other hosts through ssh.

It imports the standard library alone, and MegaKD where it can.
"""

import fcntl
import json
import sys
import time
from importlib import metadata
from pathlib import Path


def probe(folder: str, lock: str) -> dict[str, object]:
    """lock: a file in `folder` that the asking machine holds a lock on."""
    versions = {"Python": sys.version.split()[0]}
    for name in ("torch", "transformers", "deepspeed"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    try:
        from megakd.system.version import version_line

        versions["megakd"] = version_line().removeprefix("megakd ")
    except ImportError:
        versions["megakd"] = "not installed"
    return {"time": time.time(), "versions": versions, "folder": Path(folder).is_dir(), "lock": try_lock(Path(lock))}


def try_lock(path: Path) -> str:
    """ "refused" is right, for another holds it; "given", "missing", or what the system says otherwise."""
    if not path.is_file():
        return "missing"
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return "given"
    except BlockingIOError:
        return "refused"
    except OSError as error:
        return error.strerror or "failed"


if __name__ == "__main__":
    print(json.dumps(probe(*sys.argv[1:3])))  # noqa: T201
