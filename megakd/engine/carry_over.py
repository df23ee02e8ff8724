"""Where DeepSpeed keeps masters, moments and gradients under any ZeRO stage; what of it crosses a stage border."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from megakd.engine.base import MOMENTS, Carried
from megakd.engine.optim import canonical_names
from megakd.errors import UserError
from megakd.system.dist import World


def hand_over(engine: Any, world: World) -> Carried:
    """Each parameter whole on one rank, in turn; spread experts on the rank that keeps them."""
    own = _masters(engine)
    _link_moments(engine)
    tensors: dict[str, dict[str, Tensor]] = {}
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        packed = getattr(parameter, "packed", None)
        if not parameter.requires_grad or (packed is not None and packed.frozen):
            continue
        state = engine.basic_optimizer.state[own[parameter]]
        if not state:
            continue  # every step so far was left out
        mine = packed is not None or number % world.size == world.rank
        for what in ("fp32", *MOMENTS):
            whole = _whole(parameter, own[parameter], what, state)
            if mine:
                tensors.setdefault(name, {})[what] = whole.to("cpu", copy=True)
    return Carried(update_counts(engine), tensors)


def take_over(engine: Any, carried: Carried, world: World) -> None:
    """Before the first step: give every group its count of updates, then each parameter what is its own."""
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise UserError(
            "zero_optimization.offload_optimizer: MegaKD cannot carry Adam's moments across a stage border while they "
            'lie on NVMe; use "device": "cpu", or one stage'
        )
    own = _masters(engine)
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    engine.basic_optimizer.state.clear()  # bfloat16 without ZeRO begins with a step of zeros
    for parameter, master in own.items():
        if master not in engine.basic_optimizer.state:
            count = torch.tensor(float(carried.updates_of(names[parameter], parameter)))
            moments = {moment: torch.zeros_like(master.data) for moment in MOMENTS}
            engine.basic_optimizer.state[master] = {"step": count, **moments}
    _link_moments(engine)
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        count = carried.updates_of(name, parameter)
        if not count or not parameter.requires_grad:
            continue
        state = engine.basic_optimizer.state[own[parameter]]
        assert int(state["step"]) == count, (name, state["step"], count)
        for what in ("fp32", *MOMENTS):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = torch.empty(shape, dtype=torch.float32, device=world.device)
            if name in carried.tensors:
                whole.copy_(carried.tensors[name][what])
            if not hasattr(parameter, "packed") and world.size > 1:
                dist.broadcast(whole, number % world.size)
            _set_whole(parameter, own[parameter], what, state, whole)


def update_counts(engine: Any) -> dict[str, int]:
    """How often each parameter that is trained, and not at a rate of 0, was updated, by canonical name."""
    found = {}
    own = _masters(engine)
    for name, parameter in engine.module.named_parameters():
        state = engine.basic_optimizer.state.get(own[parameter]) if parameter in own else None
        if state and not getattr(getattr(parameter, "packed", None), "frozen", False):
            found |= {canonical: int(state["step"]) for canonical in canonical_names(name, parameter)}
    return found


def set_update_counts(engine: Any, counts: dict[str, int]) -> None:
    """Give every group its own count again: DeepSpeed's universal checkpoint keeps that of the first one."""
    own = _masters(engine)
    for name, parameter in engine.module.named_parameters():
        count = counts.get(canonical_names(name, parameter)[0])
        if parameter in own and count is not None:
            engine.basic_optimizer.state[own[parameter]]["step"].fill_(count)


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """This rank's piece of a parameter's reduced gradient, between the last backward pass of a step and its update."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_grad(parameter)
    if hasattr(parameter, "_hp_mapping"):
        fragment: Any = parameter
        mapping = fragment._hp_mapping
        return None if mapping is None else mapping.get_lp_grad_fragment(fragment._index_in_param_group)
    return parameter.grad


def _masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Each trained parameter's fp32 tensor in the optimizer: a flat piece of its group under ZeRO, else its own."""
    return {parameter: master for master, parameters in masters(engine) for parameter in parameters}


def masters(engine: Any) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """(fp32 tensor that the optimizer updates, the parameters that lie in it), flat under ZeRO."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        yield from zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    elif stage > 0:
        yield from zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
    elif hasattr(optimizer, "fp32_groups"):  # bfloat16 without ZeRO
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            yield from ((master, [parameter]) for master, parameter in zip(masters, parameters, strict=True))
    else:
        yield from ((p, [p]) for group in optimizer.param_groups for p in group["params"])


def _link_moments(engine: Any) -> None:
    """ZeRO 1 and 2 note where each parameter's moments are when the first group has them, the others not yet."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _whole(parameter: nn.Parameter, master: Tensor, what: str, state: dict[str, Any]) -> Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        found = (
            safe_get_full_fp32_param(parameter) if what == "fp32" else safe_get_full_optimizer_state(parameter, what)
        )
        assert found is not None, what
        return found
    return (master if what == "fp32" else state[what]).detach()


def _set_whole(parameter: nn.Parameter, master: Tensor, what: str, state: dict[str, Any], whole: Tensor) -> None:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        if what == "fp32":
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, what)
    else:
        (master.data if what == "fp32" else state[what]).copy_(whole.view_as(master))
