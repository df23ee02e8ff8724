"""The names inside DeepSpeed that it does not document, all in one place, for the one version that has them.

It lies in `system`, the lowest room that needs it: `system/dist.py`, `models` and `engine` do, and models cannot see
engine. A name that is missing is a UserError with the installed and the supported version, not a silent change: what
replaces a method of an optimizer would otherwise have no effect.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megakd.errors import UserError

SUPPORTED = "0.19.8"  # as requirements.txt pins it


def missing(name: str) -> UserError:
    """The error for a name that this DeepSpeed does not have."""
    return UserError(
        f"DeepSpeed {deepspeed.__version__}: {name} is missing, which MegaKD relies on; install the supported version, "
        f"pip install deepspeed=={SUPPORTED}"
    )


try:
    from deepspeed.checkpoint import constants
    from deepspeed.checkpoint.autoep_affine import (
        autoep_experts_for_rank,
        autoep_placement_to_affine_map,
        make_autoep_placement_descriptor,
    )
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.constants import default_pg_timeout
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer as AutoEPMoELayer
    from deepspeed.module_inject.auto_ep_layer import _AllToAllV
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils import groups, numa
except ImportError as error:
    raise missing(str(error)) from error

# What the optimizer's state in a universal checkpoint holds next to tensors.
STATE_TYPES = [LossScaler, ZeroStageEnum]


def member(owner: Any, name: str) -> Any:
    """owner.name; UserError when this DeepSpeed has no such attribute."""
    if not hasattr(owner, name):
        raise missing(f"{type(owner).__name__ if not hasattr(owner, '__name__') else owner.__name__}.{name}")
    return getattr(owner, name)


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Meanwhile owner's attributes have these values; UserError when it has no such attributes."""
    for name in values:
        member(owner, name)
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)


def build_no_shared_memory_op() -> None:
    """Ranks on a CPU never build the op for a host's shared memory."""
    __compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[index]


def count_numa_nodes_once() -> None:
    """Ranks on a CPU ask for the NUMA nodes once: DeepSpeed starts numactl whenever ZeRO-3 reduces a bucket."""
    numa.get_numa_cores = cache(member(numa, "get_numa_cores"))


def let_all_groups_time_out() -> None:
    """Every group of ranks ends a wait after DEEPSPEED_TIMEOUT minutes, as the first one does.

    DeepSpeed makes its groups with torch's own timeout, 30 minutes with gloo: a rank that hung within an all-to-all of
    experts was noticed no sooner.
    """
    member(TorchBackend, "new_group")
    TorchBackend.new_group = lambda self, ranks: torch.distributed.new_group(ranks, timeout=default_pg_timeout)


# ---- ZeRO: where parameters, their fp32 masters, moments and gradients are


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 keeps a piece of the parameter on each rank."""
    return hasattr(parameter, "ds_id")


def is_fragmented(parameter: nn.Parameter) -> bool:
    """Whether its fp32 master lies in pieces over ranks, under any ZeRO stage from 1."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, whatever piece of it is here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def masters(engine: Any) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """(fp32 tensor that the optimizer updates, the parameters that lie in it), flat under ZeRO."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        yield from zip(member(optimizer, "fp32_partitioned_groups_flat"), member(optimizer, "fp16_groups"), strict=True)
    elif stage > 0:
        flat = member(optimizer, "single_partition_of_fp32_groups")
        yield from zip(flat, member(optimizer, "bit16_groups"), strict=True)
    elif hasattr(optimizer, "fp32_groups"):  # bfloat16 without ZeRO
        for own, parameters in zip(optimizer.fp32_groups, member(optimizer, "fp16_groups"), strict=True):
            yield from ((master, [parameter]) for master, parameter in zip(own, parameters, strict=True))
    else:
        yield from ((p, [p]) for group in optimizer.param_groups for p in group["params"])


def link_moments(engine: Any) -> None:
    """ZeRO 1 and 2 note where each parameter's moments are when the first group has them, the others not yet."""
    if engine.zero_optimization_stage() in (1, 2):
        optimizer = engine.optimizer
        member(optimizer, "_hp_optimizer_states_linked")
        optimizer._hp_optimizer_states_linked = False
        member(optimizer, "_lazy_init_hp_params_optimizer_state")()


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """This rank's piece of a parameter's reduced gradient, between the last backward pass of a step and its update."""
    if is_partitioned(parameter):
        return deepspeed.utils.safe_get_local_grad(parameter)
    if is_fragmented(parameter):
        fragment: Any = parameter
        mapping = fragment._hp_mapping
        return None if mapping is None else mapping.get_lp_grad_fragment(fragment._index_in_param_group)
    return parameter.grad


def moments_on_disk(engine: Any) -> bool:
    """Whether ZeRO-3 keeps Adam's moments on NVMe."""
    return getattr(engine.optimizer, "swap_optimizer", False)


class Partitions:
    """Parameters read straight into the pieces of ZeRO-3, into which `deepspeed.initialize` would cut whole ones.

    config: the DeepSpeed configuration of the engine to come.
    """

    def __init__(self, config: dict[str, Any]):
        self.init: Any = deepspeed.zero.Init(config_dict_or_path=config)
        self.device: torch.device = member(self.init, "local_device")
        if self.init.mem_efficient_linear:
            member(self.init, "_enable_mem_efficient_linear")()

    def cut(self, parameter: Any, read: Callable[[slice | None], Tensor]) -> None:
        """Make a parameter that holds nothing yet this rank's piece; read: rows of it, called for those of the piece.

        Until then its memory is reserved, but on a CPU no page of it is touched beyond those rows.
        """
        if group := getattr(parameter, "ds_zero_partition_group_name", None):  # of experts on their ranks
            parameter.ds_zero_partition_process_group = member(groups, "_get_expert_data_parallel_group")(group)
        member(self.init, "_convert_to_deepspeed_param")(parameter)
        size = math.ceil(parameter.numel() / parameter.ds_zero_partition_world_size)
        start = min(size * parameter.ds_zero_partition_rank, parameter.numel())
        stop = min(start + size, parameter.numel())
        if parameter.ndim == 0:
            parameter.data.copy_(read(None))
        elif start < stop:
            row = parameter[0].numel()
            rows = slice(start // row, math.ceil(stop / row))
            parameter.data[rows].copy_(read(rows))
        parameter.partition()


def gathered(parameters: list[nn.Parameter]) -> Any:
    """A context in which parameters that ZeRO-3 has cut are whole on every rank, which all enter it together."""
    return deepspeed.zero.GatheredParameters(parameters)


# ---- Steps and checkpoints


def norm_scale(optimizer: Any) -> float:
    """The divisor of the gradient norm that DeepSpeed reports: float16 without ZeRO leaves the loss scale in it."""
    return float(optimizer.loss_scale_config.cur_scale) if isinstance(optimizer, FP16_UnfusedOptimizer) else 1.0


def clip_with(engine: Any, clip: Callable[[], None]) -> None:
    """Without ZeRO, have `clip` called in the place of DeepSpeed's own clipping."""
    member(engine, "clip_fp32_gradients")
    engine.clip_fp32_gradients = clip


def set_global_norm(engine: Any, norm: float) -> None:
    """What `engine.get_global_grad_norm` returns."""
    member(engine, "_global_grad_norm")
    engine._global_grad_norm = norm


@contextmanager
def skipping_update(engine: Any) -> Iterator[None]:
    """Meanwhile the engine drops its gradients as after an overflow, and makes no update."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()

    def overflow(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    def nothing(*_: Any, **__: Any) -> None: ...

    if stage == 3:
        owner, changes = optimizer, {"_overflow_check_and_loss_scale_update": overflow, "_update_scale": nothing}
    elif stage > 0:
        changes = {"check_grad_overflow": True, "check_overflow": overflow, "_update_scale": nothing}
        owner = optimizer
    elif hasattr(optimizer, "overflow_checker"):  # 16 bits without ZeRO
        owner, changes = optimizer.overflow_checker, {"check": lambda *_, **__: True}
    else:
        owner, changes = optimizer, {"step": nothing}
    with replaced(owner, **changes):
        yield


def load_universal(engine: Any, folder: str, tag: str) -> None:
    """Load a universal checkpoint, whatever the configuration says of checkpoints."""
    with replaced(engine._config, load_universal_checkpoint=True):
        engine.load_checkpoint(folder, tag=tag)


# ---- AutoEP: experts distributed over groups of ranks


def join_groups(size: int) -> int:
    """Make the groups of `size` neighbouring ranks that share experts (once a process); this rank's place in its own.

    Called by all ranks together.
    """
    member(groups, "_create_expert_and_data_parallel")(size)
    return member(groups, "_get_expert_parallel_rank")(group_name(size))


def group_name(size: int) -> str:
    """What DeepSpeed calls the groups of `size` ranks."""
    return f"ep_size_{size}"


def expert_group(name: str) -> Any:
    """This rank's process group among those of a `group_name`."""
    return member(groups, "_get_expert_parallel_group")(name)


def all_to_all(group: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Rows to and from each rank of a group, with gradients."""
    return _AllToAllV.apply(group, rows, sent, received)  # type: ignore[return-value]


def place_layer(layer: Any, num_experts: int, size: int, rank: int) -> None:
    """What DeepSpeed asks of an AutoEPMoELayer that keeps the share `rank` of `size` equal ones."""
    share = num_experts // size
    layer.num_experts, layer.num_local_experts = num_experts, share
    layer.ep_size, layer.ep_rank, layer.ep_group, layer.ep_group_name = size, rank, None, group_name(size)
    by_rank = [range(start, start + share) for start in range(0, num_experts, share)]
    layer.expert_placement_descriptor = make_autoep_placement_descriptor(num_experts, by_rank)
    layer.folding_group_handles = layer._deepep_exchange = layer._async_split_plan_pending = None


def tag_expert(layer: Any, parameter: Any) -> None:
    """What DeepSpeed's reduction, partitioning and universal checkpoints ask of a parameter of a placed layer."""
    parameter.allreduce = False
    parameter.group_name = parameter.ds_zero_partition_group_name = layer.ep_group_name
    parameter.ds_zero_placement_family = "autoep_expert"
    placement, shape = layer.expert_placement_descriptor, [layer.num_experts, *parameter.shape[1:]]
    meta = {
        member(constants, "AUTOEP_EXPERT_PLACEMENT"): placement,
        member(constants, "AFFINE_MAP"): autoep_placement_to_affine_map(placement, shape).to_dict(),
        member(constants, "AUTOEP_PARAM_LOGICAL_SHAPE"): shape,
        member(constants, "AUTOEP_PARAM_EP_RANK"): layer.ep_rank,
        member(constants, "AUTOEP_PARAM_LOCAL_EXPERTS"): list(autoep_experts_for_rank(placement, layer.ep_rank)),
    }
    setattr(parameter, member(constants, "DS_AUTOEP_UC_META"), meta)


def universal_expert(whole: Tensor) -> dict[str, Any]:
    """What a universal checkpoint holds of an expert parameter, whole [E, ...]."""
    names = ("PARAM", "CAT_DIM", "EP_IS_EXPERT_PARAM", "EP_NUM_EXPERTS")
    return dict(zip((member(constants, name) for name in names), (whole, 0, True, len(whole)), strict=True))
