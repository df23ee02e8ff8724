"""Two hosts made of this machine, and a Slurm on them: brought up, looked at for what a test has left, taken down.

tests/two_hosts.sh and tests/slurm.sh do the work. Everything is below one folder, whose path is in the environment or
the command line of each process that belongs to it.
"""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

SCRIPTS = Path(__file__).parent
HOSTS = ("n1", "n2")
DAEMONS = ("sshd", "slurmd", "slurmctld", "slurmscriptd", "munged", "unshare")


class Machines:
    def __init__(self, folder: Path):
        self.folder = folder
        self.builds = folder / "builds"  # DeepSpeed's; a lock that stays there blocks every later start
        self.guard: subprocess.Popen[bytes] | None = None

    def refused(self) -> str:
        """Why this machine cannot be two hosts; empty where it can."""
        if os.geteuid() != 0:
            return "hosts are made by root alone"
        missing = self.missing("sshd", "pdsh", "ip", "unshare", "ssh-keygen")
        if missing:
            return missing
        tried = subprocess.run(self._line("two_hosts.sh", "try"), capture_output=True, text=True, timeout=60)
        return f"this machine allows no name spaces: {tried.stderr.strip()[-200:]}" if tried.returncode else ""

    @staticmethod
    def missing(*programs: str) -> str:
        names = [name for name in programs if shutil.which(name) is None]
        return f"missing on this machine: {', '.join(names)}" if names else ""

    def environment(self) -> dict[str, str]:
        """Of a process that uses these hosts: the ssh that knows them first, and where Slurm's settings are."""
        own = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_CONF": str(self.folder / "slurm.conf")}
        own["TORCH_EXTENSIONS_DIR"] = str(self.builds)
        return {**os.environ, **own}

    def watch(self) -> None:
        """Start a process that takes everything down if this one ends without having done it, as by Ctrl-C."""
        words = [sys.executable, __file__, str(self.folder), str(os.getpid())]
        self.guard = subprocess.Popen(
            words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def up(self, slurm: bool = False) -> None:
        """Start what is missing: at first all, later a host without power."""
        self._do("two_hosts.sh", "up")
        if slurm:
            self._do("slurm.sh", "up")

    def power_off(self, host: str) -> None:
        self._do("two_hosts.sh", "power", host)

    def take_down(self) -> None:
        """End and remove everything; nothing of it may be left."""
        if self.guard:
            self.guard.kill()
            self.guard.wait()
        if (self.folder / "slurm.conf").exists():
            self._do("slurm.sh", "down")
        self._do("two_hosts.sh", "down")
        tag = (self.folder / "tag").read_text().strip() if (self.folder / "tag").exists() else "none"
        names = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
        names += subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
        assert tag not in names, names
        self.check(daemons=False)

    def check(self, daemons: bool = True, seconds: float = 20) -> None:
        """Nothing but the daemons may be left: no process, nothing in a host's /dev/shm, no lock of a build.

        Processes get some seconds to end. What is found is ended, so that one test fails and not all after it.
        """
        deadline = time.monotonic() + seconds
        while (found := self.left(daemons)) and time.monotonic() < deadline:
            time.sleep(0.2)
        for path in [each for each in found if isinstance(each, Path)]:
            path.unlink(missing_ok=True)
        for process in [each for each in found if isinstance(each, psutil.Process)]:
            with suppress(psutil.Error):
                process.kill()
        assert not found, found

    def left(self, daemons: bool = True) -> list[psutil.Process | Path]:
        own = {os.getpid(), self.guard.pid if self.guard else 0}
        inside = {self._spaces(pid) for pid in self._first_processes().values()}
        processes = [
            process
            for process in psutil.process_iter()
            if process.pid not in own and (self._spaces(process.pid) in inside or self._names_folder(process))
        ]
        shared = [
            path for pid in self._first_processes().values() for path in Path(f"/proc/{pid}/root/dev/shm").glob("*")
        ]
        return [
            *(each for each in processes if not (daemons and _name(each) in DAEMONS)),
            *shared,
            *self.builds.rglob("lock"),
        ]

    def _first_processes(self) -> dict[str, int]:
        """Process 1 of each host that has power."""
        found = {}
        for host in HOSTS:
            with suppress(OSError, ValueError, psutil.Error, IndexError):
                unshare = psutil.Process(int((self.folder / host / "pid").read_text()))
                found[host] = unshare.children()[0].pid
        return found

    @staticmethod
    def _spaces(pid: int) -> str:
        with suppress(OSError):
            return os.readlink(f"/proc/{pid}/ns/pid")
        return f"of {pid}, which has ended"

    def _names_folder(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error, OSError):
            return any(str(self.folder) in word for word in [*process.cmdline(), *process.environ().values()])
        return False

    def _do(self, script: str, *words: str) -> None:
        done = subprocess.run(self._line(script, *words), capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr

    def _line(self, script: str, what: str, *words: str) -> list[str]:
        return ["bash", str(SCRIPTS / script), what, str(self.folder), *words]


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


if __name__ == "__main__":  # the process of `watch`
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(sys.argv[2])).wait()
    Machines(Path(sys.argv[1])).take_down()
