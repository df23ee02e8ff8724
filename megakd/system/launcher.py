"""Which process this is, of how many, by the variables of the launcher that started it; needs no torch."""

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from megakd.errors import UserError

# launcher → variables of its rank, its number of processes, the rank on this host
MPI = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "Flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
}
# ranks of launchers that do not say in one variable of how many processes
UNKNOWN = ("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE")
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # numbers of Slurm's steps that are no srun of the user: batch, interactive, extern


class Launched(NamedTuple):
    """rank: 0 ≤ rank < size. local_rank: on this host. by: whose variables said so, "" when this process is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    by: str = ""


def read_launcher(environ: Mapping[str, str] | None = None) -> Launched:
    """Rank and size from RANK and WORLD_SIZE, else from MPI's variables, else from srun's; alone without any.

    Slurm sets SLURM_NTASKS and SLURM_PROCID=0 in a batch script too, which is one process: they count inside a step
    that srun started (SLURM_STEP_ID) alone. UserError where variables are incomplete, are no numbers, contradict one
    another, or belong to a launcher that MegaKD does not know.
    """
    environ = os.environ if environ is None else environ
    outer = _mpi(environ) or _slurm(environ)
    rank, size, local_rank = (_number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank is None and size is None:
        if outer is None:
            _refuse_unknown(environ, local_rank)
            return Launched()
        return _checked(outer, local_rank, outer, environ)
    if rank is None or size is None:
        there, missing = ("RANK", "WORLD_SIZE") if size is None else ("WORLD_SIZE", "RANK")
        # a job script may export WORLD_SIZE for all tasks, which know their own ranks
        if outer is None or (rank is not None and rank != outer.rank) or (size is not None and size != outer.size):
            said = f", and {outer.by} says rank {outer.rank} of {outer.size}" if outer else ""
            raise UserError(
                f"{there}={environ[there]} is set and {missing} is not{said}; set both for every process, or unset it"
            )
        return _checked(outer, local_rank, outer, environ)
    found = Launched(rank, size, outer.local_rank if outer else 0, "RANK and WORLD_SIZE")
    return _checked(found, local_rank, outer, environ)


def _checked(found: Launched, local_rank: int | None, outer: Launched | None, environ: Mapping[str, str]) -> Launched:
    """`found` with LOCAL_RANK where it is set, after comparing all with one another and with the outer launcher."""
    if not found.rank < found.size:
        raise UserError(f"{found.by}: rank {found.rank} of {found.size} processes; ranks run from 0 to one less")
    if outer is not None and outer.size > 1 and found is not outer:
        # one launcher may start others, one for each host, which number their own processes; never fewer than itself
        renumbered = found.size > outer.size or (found.size == outer.size and "TORCHELASTIC_RUN_ID" in environ)
        if not renumbered and (found.rank, found.size) != (outer.rank, outer.size):
            raise UserError(
                f"RANK={found.rank} and WORLD_SIZE={found.size}, but {outer.by} started this process as rank "
                f"{outer.rank} of {outer.size}; unset RANK and WORLD_SIZE"
            )
    if local_rank is None:
        return found
    if local_rank >= found.size:
        raise UserError(
            f"LOCAL_RANK={local_rank} with {found.size} processes in all; it counts those of one host, from 0"
        )
    if outer is not None and found is outer and local_rank != outer.local_rank:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but {outer.by} started this process as number {outer.local_rank} on its host; "
            "unset LOCAL_RANK"
        )
    return found._replace(local_rank=local_rank)


def _mpi(environ: Mapping[str, str]) -> Launched | None:
    for by, names in MPI.items():
        rank, size, local_rank = (_number(environ, name) for name in names)
        if rank is not None and size is not None:
            return Launched(rank, size, local_rank or 0, by)
    return None


def _slurm(environ: Mapping[str, str]) -> Launched | None:
    step = _number(environ, "SLURM_STEP_ID")
    if step is None:
        return None
    rank = _number(environ, "SLURM_PROCID")
    size = _number(environ, "SLURM_STEP_NUM_TASKS")
    if step >= FIRST_SPECIAL_STEP:
        return Launched(by="Slurm") if rank is not None else None
    size = _number(environ, "SLURM_NTASKS") if size is None else size
    if rank is None or size is None:
        missing = "SLURM_PROCID" if rank is None else "SLURM_NTASKS"
        raise UserError(f"SLURM_STEP_ID={step} is set and {missing} is not; start with srun, or unset SLURM_STEP_ID")
    return Launched(rank, size, _number(environ, "SLURM_LOCALID") or 0, "srun")


def _refuse_unknown(environ: Mapping[str, str], local_rank: int | None) -> None:
    incomplete = [name for names in MPI.values() for name in names[:2]]
    for name in (*UNKNOWN, *incomplete):
        if environ.get(name):
            raise UserError(
                f"{name}={environ[name]}: started by a launcher that does not say of how many processes this is one; "
                "set RANK, WORLD_SIZE and LOCAL_RANK for every process, or unset it"
            )
    if local_rank is not None:
        raise UserError(
            f"LOCAL_RANK={local_rank} is set, RANK and WORLD_SIZE are not; set all three for every process, or unset it"
        )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """A whole number from 0, None where `name` is unset or empty."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise UserError(f"{name}={text}: expected a whole number from 0, as launchers set it")
    return int(text)


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
