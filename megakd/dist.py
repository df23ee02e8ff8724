"""World: which process this is, of how many, on which device; the few collectives the loop needs."""

import hashlib
import os
import signal
import socket
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed

from megakd.errors import UserError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """Rank and size from a launcher (RANK, WORLD_SIZE), from srun (SLURM_PROCID, SLURM_NTASKS), else 0 of 1.

    Starts no process group: workers that share a folder of shards need none.
    """
    try:
        rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
        size = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
        local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
    if not 0 <= rank < size:
        raise UserError(f"RANK={rank} with WORLD_SIZE={size}: a rank runs from 0 to WORLD_SIZE - 1")
    device = (
        torch.device("cuda", local_rank % torch.cuda.device_count())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    return World(rank, size, device)


def join_world() -> World:
    """read_world, then the process group of all ranks through DeepSpeed (NCCL on GPUs, gloo on CPUs)."""
    world = read_world()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if world.device.type == "cuda" else "cpu")
    # On CPUs DeepSpeed maps 69 MB a rank in /dev/shm for an op that training never calls, and never unlinks it; the
    # launcher sets LOCAL_SIZE, so it is overwritten. The op's build is skipped too: a killed build leaves a lock that
    # hangs every later run.
    os.environ["LOCAL_SIZE"] = "0"
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("WORLD_SIZE", str(world.size))
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)  # DeepSpeed takes it for the number of the GPU
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[index]
    deepspeed.init_distributed(verbose=False)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    return world


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def barrier() -> None:
    """Wait for all ranks; nothing without a process group."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sums of a short list over all ranks, in float64."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make torch's random state a function of (seed, step, rank), so that there is none to save."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:7], "big"))


def close_world() -> None:
    """Leave the process group, if one was joined."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class StopSignals:
    """SIGTERM and SIGUSR1 ask for a checkpoint and an end; all ranks agree on the step.

    asked: this process got a signal. agreed: some rank had one when all ranks last met.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False

    def __enter__(self) -> "StopSignals":
        self.previous = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            # after a stop, a late signal must not end the process before its exit code is given
            signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def agree(self, world: World, ready: bool = True) -> bool:
        """Let all ranks meet: sets `agreed`, and says whether every one of them is `ready`."""
        # a signal may come while the ranks meet: `asked` stays for the next time
        asked, waiting = sum_over_ranks([float(self.asked), float(not ready)], world.device)
        self.agreed = asked > 0
        return waiting == 0
