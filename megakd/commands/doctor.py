"""Examine this machine, its libraries, a run's folder, the hosts of a hostfile and Slurm, with a remedy for each fault.

Nothing is changed: all that is written is a temporary folder in RUN (else the working directory), which is deleted.
Marks: ok; warn, works slowly or with a risk; fault, a verb would fail or hang. Exit code 0 without a fault, else 2.

examples:
  megakd doctor
  megakd doctor runs/a
  megakd doctor runs/a --hostfile launch/hostfile.example
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from megakd.doctor.builds import check_compilers, check_locks, check_shared_memory
from megakd.doctor.findings import FAULT, Check, as_text, examine
from megakd.doctor.folder import check_folder
from megakd.doctor.hosts import check_hosts, read_hostfile
from megakd.doctor.libraries import check_libraries
from megakd.doctor.machine import check_memory, check_open_files, check_torch
from megakd.doctor.services import check_hub, check_slurm, check_wandb
from megakd.errors import UserError
from megakd.names import expand


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", default=".", metavar="RUN", help="a run, or a folder where runs will lie")
    parser.add_argument("--hostfile", type=expand, metavar="FILE", help="ask its hosts over ssh; lines HOST slots=N")


def main(args: argparse.Namespace) -> None:
    folder = expand(args.run)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run, or the folder where runs will lie")
    checks: list[tuple[str, Check]] = [
        ("libraries", check_libraries),
        ("torch", check_torch),
        ("DeepSpeed ops", check_compilers),
        ("locks of builds", check_locks),
        ("shared memory", check_shared_memory),
        ("memory", check_memory),
        ("open files", check_open_files),
        ("folder", partial(check_folder, folder)),
        ("Slurm", check_slurm),
        ("hub cache", check_hub),
        ("W&B", partial(check_wandb, wandb_of(folder))),
    ]
    if args.hostfile is not None:
        checks.append(("hosts", partial(check_hosts, read_hostfile(args.hostfile), folder)))
    findings = examine(checks)
    print(as_text(findings))
    if any(finding.mark == FAULT for finding in findings):
        sys.exit(2)


def wandb_of(folder: Path) -> str:
    """log.wandb of the run in a folder; disabled without a run. The configuration is not checked here."""
    try:
        return str(json.loads((folder / "config.json").read_text("utf-8"))["log"]["wandb"])
    except (OSError, ValueError, LookupError, TypeError):
        return "disabled"
