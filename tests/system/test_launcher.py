"""Launchers' variables: whose rank counts, and which combinations are refused instead of believed."""

import os
from pathlib import Path

import pytest
import torch

from megakd.errors import UserError
from megakd.system import dist
from megakd.system.launcher import Launched, read_launcher

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
RANKS = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environ, rank, size, local_rank",
    [
        ({}, 0, 1, 0),
        ({"RANK": "", "WORLD_SIZE": ""}, 0, 1, 0),
        ({**RANKS, "LOCAL_RANK": "1"}, 1, 2, 1),
        (BATCH, 0, 1, 0),  # a batch script without srun is one process, however many tasks the job has
        (STEP, 3, 16, 1),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "4"}, 3, 4, 1),  # srun --ntasks=4 inside a larger job
        ({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_PROCID": "0"}, 0, 1, 0),  # salloc's interactive step
        ({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFB), "SLURM_PROCID": "0"}, 0, 1, 0),  # the batch step
        (MPIRUN, 2, 4, 1),
        ({**STEP, **MPIRUN, "SLURM_STEP_NUM_TASKS": "2"}, 2, 4, 1),  # mpirun starts its daemons with srun
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, 1, 2, 1),
        ({**STEP, "WORLD_SIZE": "16"}, 3, 16, 1),  # exported by the job script for all tasks
        ({**STEP, **RANKS, "WORLD_SIZE": "128"}, 1, 128, 1),  # one launcher per node under srun
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "RANK": "5", "WORLD_SIZE": "9"}, 5, 9, 1),  # array
        ({**STEP, "RANK": "1", "WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "x"}, 1, 16, 1),  # torchrun numbers anew
    ],
)
def test_rank_and_size_are_those_of_the_launcher(environ: dict[str, str], rank: int, size: int, local_rank: int):
    assert read_launcher(environ)[:3] == (rank, size, local_rank)


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"RANK": "0"}, "RANK=0 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is set, RANK and WORLD_SIZE are not"),
        ({**RANKS, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 with 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "WORLD_SIZE=x: expected a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1: expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0 processes"),
        ({**STEP, "SLURM_PROCID": "16"}, "rank 16 of 16 processes"),
        ({**STEP, "SLURM_PROCID": ""}, "SLURM_PROCID is not"),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "16"}, "srun started this process as rank 3 of 16"),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "srun started this process as rank 3 of 16"),
        ({**STEP, "WORLD_SIZE": "4"}, "srun says rank 3 of 16"),
        ({**STEP, "LOCAL_RANK": "0"}, "unset LOCAL_RANK"),
        ({**MPIRUN, "RANK": "0", "WORLD_SIZE": "4"}, "Open MPI started this process as rank 2 of 4"),
        ({"PMIX_RANK": "3"}, "PMIX_RANK=3: started by a launcher that does not say"),
        ({"PMI_RANK": "3"}, "PMI_RANK=3: started by a launcher that does not say"),
    ],
)
def test_incomplete_or_contradictory_ranks_are_refused(environ: dict[str, str], words: str):
    with pytest.raises(UserError) as refused:
        read_launcher(environ)
    assert words in str(refused.value)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any launcher's variables; what a test sets in it is undone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", *BATCH):
        monkeypatch.setenv(name, "")
    return monkeypatch


@pytest.mark.parametrize(
    "set_too, words",
    [
        ({}, "MASTER_ADDR is not set: the 2 ranks"),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT=x"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        ({"MASTER_ADDR": "no such host", "MASTER_PORT": "29500"}, "MASTER_ADDR=no such host"),
    ],
)
def test_ranks_without_a_place_to_meet_are_refused_and_do_not_wait_for_ever(alone, set_too, words):
    for name, value in {**RANKS, **set_too}.items():
        alone.setenv(name, value)
    with pytest.raises(UserError) as refused:
        dist.join_world()
    assert words in str(refused.value)


def test_single_process_does_not_meet_at_the_address_of_an_earlier_launch(alone):
    alone.setenv("MASTER_ADDR", "10.255.255.1")
    alone.setenv("MASTER_PORT", "29500")
    dist._set_meeting_point(dist.World(0, 1, torch.device("cpu")))
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and os.environ["MASTER_PORT"] != "29500"


def test_gpus_that_are_not_there_are_refused(alone, tmp_path):
    (tmp_path / "version").touch()
    alone.setattr(dist, "NVIDIA_DRIVER", tmp_path / "version")
    alone.setattr(torch.cuda, "is_available", lambda: True)
    alone.setattr(torch.cuda, "device_count", lambda: 2)
    alone.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert dist.read_world().device == torch.device("cuda", 0)
    alone.setenv("CUDA_VISIBLE_DEVICES", "0,1,8")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=0,1,8: torch sees 2 of 3 GPUs"):
        dist.read_world()
    alone.setenv("DS_ACCELERATOR", "cpu")
    assert dist.read_world().device == torch.device("cpu")
    alone.setenv("DS_ACCELERATOR", "gpu")
    with pytest.raises(UserError, match="DS_ACCELERATOR=gpu"):
        dist.read_world()


def test_a_rank_takes_its_gpu_before_it_meets_the_others(alone):
    """NCCL goes by the current device, which is the first GPU until a rank takes another."""
    order: list[str] = []
    alone.setattr(dist, "read_world", lambda: dist.World(0, 1, torch.device("cuda", 1)))
    alone.setattr(torch.cuda, "set_device", lambda device: order.append(str(device)))
    for name, value in (("DS_ACCELERATOR", "cpu"), ("LOCAL_SIZE", "0")):
        alone.setenv(name, value)
    alone.setattr("deepspeed.init_distributed", lambda **_: order.append("met"))  # imported now, for this accelerator
    dist.join_world()
    assert order == ["cuda:1", "met"]


def test_host_without_a_gpu_runs_on_the_cpu_whatever_a_launcher_numbered(alone):
    alone.setattr(dist, "NVIDIA_DRIVER", Path("/nowhere"))
    alone.setattr(torch.cuda, "is_available", lambda: False)
    alone.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert dist.read_world().device == torch.device("cpu")


def test_alone_is_rank_0_of_1():
    assert Launched() == (0, 1, 0, "")
