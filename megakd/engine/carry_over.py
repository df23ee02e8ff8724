"""Where DeepSpeed keeps masters, moments and gradients under any ZeRO stage; what a stage transition carries over."""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from megakd.engine.base import MOMENTS, CarryOver
from megakd.engine.optim import canonical_names
from megakd.errors import UserError
from megakd.system.deepspeed_internals import is_fragmented, link_moments, masters, moments_on_disk, whole_shape
from megakd.system.dist import World


def export_state(engine: Any, world: World) -> CarryOver:
    """Each parameter whole on one rank, in turn; sharded experts on the rank that keeps them."""
    own = _masters(engine)
    link_moments(engine)
    tensors: dict[str, dict[str, Tensor]] = {}
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        packed = getattr(parameter, "packed", None)
        if not parameter.requires_grad or (packed is not None and packed.frozen):
            continue
        state = engine.basic_optimizer.state[own[parameter]]
        if not state:
            continue  # every step so far was skipped
        mine = packed is not None or number % world.size == world.rank
        for what in ("fp32", *MOMENTS):
            whole = _whole(parameter, own[parameter], what, state)
            if mine:
                tensors.setdefault(name, {})[what] = whole.to("cpu", copy=True)
    return CarryOver(update_counts(engine), tensors)


def import_state(engine: Any, carried: CarryOver, world: World) -> None:
    """Before the first step: give every group its count of updates, then each parameter what is its own."""
    if moments_on_disk(engine):
        raise UserError(
            "zero_optimization.offload_optimizer: MegaKD cannot carry Adam's moments across a stage transition while "
            "they "
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
    link_moments(engine)
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        count = carried.updates_of(name, parameter)
        if not count or not parameter.requires_grad:
            continue
        state = engine.basic_optimizer.state[own[parameter]]
        assert int(state["step"]) == count, (name, state["step"], count)
        for what in ("fp32", *MOMENTS):
            shape = whole_shape(parameter)
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


def _masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """Each trained parameter's fp32 tensor in the optimizer: a flat piece of its group under ZeRO, else its own."""
    return {parameter: master for master, parameters in masters(engine) for parameter in parameters}


def _whole(parameter: nn.Parameter, master: Tensor, what: str, state: dict[str, Any]) -> Tensor:
    if is_fragmented(parameter):
        found = (
            safe_get_full_fp32_param(parameter) if what == "fp32" else safe_get_full_optimizer_state(parameter, what)
        )
        assert found is not None, what
        return found
    return (master if what == "fp32" else state[what]).detach()


def _set_whole(parameter: nn.Parameter, master: Tensor, what: str, state: dict[str, Any], whole: Tensor) -> None:
    if is_fragmented(parameter):
        if what == "fp32":
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, what)
    else:
        (master.data if what == "fp32" else state[what]).copy_(whole.view_as(master))
