"""World: which process this is, of how many, on which device; the few collectives the loop needs."""

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from megakd.errors import UserError
from megakd.system.extras import require
from megakd.system.launcher import free_port, read_launcher

T = TypeVar("T")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """Rank and size as the launcher says (`read_launcher`), and the device of this process.

    The device is the GPU of its number on this host, CPU where torch sees none or DS_ACCELERATOR=cpu. UserError where
    CUDA_VISIBLE_DEVICES names GPUs that torch does not see. Starts no process group: workers that share a folder of
    shards need none.
    """
    launched = read_launcher()
    return World(launched.rank, launched.size, _device(launched.local_rank))


def _device(local_rank: int) -> torch.device:
    accelerator = os.environ.get("DS_ACCELERATOR") or None
    if accelerator not in (None, "cpu", "cuda"):
        raise UserError(f"DS_ACCELERATOR={accelerator}: MegaKD runs on cuda or cpu; unset it")
    if accelerator == "cpu":
        return torch.device("cpu")
    wanted = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip() not in ("", "-1")]
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES on hosts without a GPU too, where it says nothing
    if seen < len(wanted) and NVIDIA_DRIVER.exists():
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}: torch sees {seen} of {len(wanted)} GPUs; "
            "name GPUs that exist (nvidia-smi -L), or set DS_ACCELERATOR=cpu"
        )
    if accelerator == "cuda" and not seen:
        raise UserError("DS_ACCELERATOR=cuda, but torch sees no GPU; unset it to run on the CPU")
    return torch.device("cuda", local_rank % seen) if seen else torch.device("cpu")


def join_world() -> World:
    """read_world, then the process group of all ranks through DeepSpeed (NCCL on GPUs, gloo on CPUs)."""
    require("deepspeed", "several ranks, engine.kind=deepspeed and logits.parallel")
    world = read_world()
    _set_meeting_point(world)
    os.environ["DS_ACCELERATOR"] = world.device.type  # set but empty, it would end DeepSpeed
    # On CPUs DeepSpeed maps 69 MB a rank in /dev/shm for an op that training never calls, and never unlinks it; the
    # launcher sets LOCAL_SIZE, so it is overwritten. The op's build is skipped too: a killed build leaves a lock that
    # hangs every later run.
    os.environ["LOCAL_SIZE"] = "0"
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.size)
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)  # DeepSpeed takes it for the number of the GPU
    import deepspeed
    from deepspeed.utils import logger

    from megakd.system.deepspeed_internals import (
        build_no_shared_memory_op,
        count_numa_nodes_once,
        let_all_groups_time_out,
    )

    logger.setLevel("WARNING")
    build_no_shared_memory_op()
    count_numa_nodes_once()
    let_all_groups_time_out()
    take_device(world)  # before NCCL, which goes by the current device
    deepspeed.init_distributed(verbose=False)
    return world


def take_device(world: World) -> World:
    """Make the world's GPU the current one: kernels that are no operators of torch's own start there."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    return world


def _set_meeting_point(world: World) -> None:
    """Check MASTER_ADDR and MASTER_PORT, where ranks meet; chosen for a process that is alone.

    Several ranks would each choose a port of its own, and wait for one another without end.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if world.size > 1 and not (address and port):
        missing = "MASTER_ADDR" if not address else "MASTER_PORT"
        raise UserError(
            f"{missing} is not set: the {world.size} ranks need the address and a free port of the host of rank 0; set "
            "MASTER_ADDR and MASTER_PORT for all, or start with launch/train.sh or launch/train.sbatch"
        )
    if port and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise UserError(f"MASTER_PORT={port}: expected the number of a port, from 1 to 65535")
    if address and world.size > 1:
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:
            raise UserError(f"MASTER_ADDR={address}: not an address that this host can resolve ({error})") from error
    if world.size == 1 and not read_launcher().by:  # what is left of another launch names another host
        address, port = "127.0.0.1", str(free_port())
    os.environ["MASTER_ADDR"] = address or "127.0.0.1"
    os.environ["MASTER_PORT"] = port or str(free_port())


def barrier() -> None:
    """Wait for all ranks; nothing without a process group."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sums of a short list over all ranks, in float64."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    return sum_tensor_over_ranks(torch.tensor(values, dtype=torch.float64, device=device))


def sum_tensor_over_ranks(values: torch.Tensor) -> list[float]:
    """The same of numbers that lie on this process's device: one transfer to the host. `values` are overwritten."""
    return add_over_ranks(values).tolist()


def add_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sums over all ranks, on their device; `values` are overwritten."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """The value of every rank, in their order; the same list on all of them."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make torch's random state a function of (seed, step, rank), so that there is none to save."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:7], "big"))


def close_world() -> None:
    """Leave the process group, if one was joined."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
