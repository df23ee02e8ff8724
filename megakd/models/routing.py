"""What a MoE's routers choose: given another number of experts a token, listened to, changed.

transformers' routers give (logits [N, E], weights [N, k], experts [N, k]); where a plain Linear gives the logits, the
block around it does the rest.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from megakd.errors import UserError
from megakd.models.routers import Router


class Choice(NamedTuple):
    """What a router made of N tokens: logits [N, E] before softmax or sigmoid, experts [N, k]."""

    logits: Tensor
    experts: Tensor


def scheduled(router: Router, rule: str, first: int, last: int, share: float) -> int:
    """Experts a token takes at this share of the way, 0 to 1; never more than there are.

    rule: trained, all, or (any other) from `first` to `last`, each of the numbers between for as long.
    """
    if rule == "trained":
        return router.active
    if rule == "all":
        return router.experts
    steps = min(int(share * (abs(last - first) + 1)), abs(last - first))
    return min(first + (steps if last > first else -steps), router.experts)


def experts_for(capacity: Tensor, first: int, last: int) -> Tensor:
    """Experts for each capacity, 0 to 1: `scheduled` from `first` to `last`, however many there are."""
    steps = (capacity * (abs(last - first) + 1)).long().clamp(max=abs(last - first))
    return first + steps if last > first else first - steps


@contextmanager
def choices(routers: Sequence[Router]) -> Iterator[list[Choice]]:
    """What every router chooses during one forward pass, in the order of the calls, with gradients."""
    heard: list[Choice] = []
    inner: dict[str, Tensor] = {}

    def keep(module: Any, inputs: Any, output: Tensor, router: Router) -> None:
        inner[router.name] = output.flatten(0, -2)

    def listen(module: Any, inputs: Any, output: Any, router: Router) -> None:
        if isinstance(output, Tensor):
            logits = output.flatten(0, -2)
            heard.append(Choice(logits, logits.topk(router.taken).indices))
            return
        _check_output(router, output)
        heard.append(Choice(inner.pop(router.name, output[0]), output[2]))

    hooks = []
    for router in routers:
        if router.gate is not router.module:
            # what the module around gives first may be probabilities, as in Gemma 4
            hooks.append(router.module.register_forward_hook(partial(keep, router=router)))
        hooks.append(router.gate.register_forward_hook(partial(listen, router=router)))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _check_output(router: Router, output: Any) -> None:
    """UserError unless a router gives (logits, weights, experts), with as many experts as it was told to take."""
    if len(output) != 3 or output[2].is_floating_point():
        raise UserError(
            f"{router.name}: its router does not give (logits, weights, experts); it cannot be trained alone"
        )
    if output[2].shape[-1] != router.taken:
        raise UserError(
            f"{router.name}: a token takes {output[2].shape[-1]} experts where {router.field} says {router.taken}"
        )


class Routed(NamedTuple):
    """What a router's tokens took: experts [N, k], their weights, and those weights without factors."""

    weights: Tensor
    experts: Tensor
    unchanged: Tensor


class Counts(NamedTuple):
    """Experts that each token takes, [N], none fewer than `fewest`; routers are set to the most of them."""

    tokens_N: Tensor
    fewest: int


@contextmanager
def weighed(
    routers: Sequence[Router], factors: Sequence[Tensor] | None, counts: Counts | None = None
) -> Iterator[list[Routed]]:
    """Routing weights times what each expert counts, a token's sum kept; what every router gave during the pass.

    factors: [E] each, or [B, E] for B windows of N / B tokens; None leaves the weights alone. counts: None for as many
    experts as routers take. Routers must give (logits, weights, experts), as transformers' do.
    """
    routed: list[Routed] = []

    def change(module: Any, inputs: Any, output: Any, index: int) -> Any:
        if not isinstance(output, tuple) or len(output) != 3:
            raise UserError(
                f"{routers[index].name}: gives no routing weights that could be changed; set objective.importance=0, "
                "and another objective.routing than learned"
            )
        logits, weights, experts = output
        if counts is not None:
            weights, experts = _narrowed(routers[index], inputs, weights, experts, counts)
        unchanged = weights
        if factors is not None:
            changed = weights * _of_experts(factors[index].to(weights), experts)
            weights = changed * (weights.sum(-1, keepdim=True) / changed.sum(-1, keepdim=True))
        routed.append(Routed(weights, experts, unchanged))
        return logits, weights, experts

    hooks = [router.gate.register_forward_hook(partial(change, index=index)) for index, router in enumerate(routers)]
    try:
        yield routed
    finally:
        for hook in hooks:
            hook.remove()


def _narrowed(
    router: Router, inputs: Any, weights_Nk: Tensor, experts_Nk: Tensor, counts: Counts
) -> tuple[Tensor, Tensor]:
    """Each token's own number of experts: what the router itself gives with that top_k, and weight 0 up to k.

    So order, ties, groups, biases and whether the weights are normalised stay the family's. A row with fewer experts
    repeats its first.
    """
    most = weights_Nk.shape[-1]
    counts_N1 = counts.tokens_N[:, None]
    for fewer in range(counts.fewest, most):
        router.take(fewer)
        _, weights, experts = router.gate.forward(*inputs)
        weights_Nk = torch.where(counts_N1 == fewer, functional.pad(weights, (0, most - fewer)), weights_Nk)
        repeated = torch.cat([experts, experts[:, :1].expand(-1, most - fewer)], -1)
        experts_Nk = torch.where(counts_N1 == fewer, repeated, experts_Nk)
    router.take(most)
    return weights_Nk, experts_Nk


def _of_experts(factors: Tensor, experts_Nk: Tensor) -> Tensor:
    """What the experts of each token count, [N, k], from [E] or [B, E]."""
    if factors.ndim == 1:
        return factors[experts_Nk]
    return factors.gather(1, experts_Nk.view(len(factors), -1)).view(experts_Nk.shape)


def copies(routers: Sequence[Router]) -> list[nn.Module]:
    """Frozen copies of the routers as they are."""
    return [copy.deepcopy(router.module).requires_grad_(False) for router in routers]


@contextmanager
def in_place_of(routers: Sequence[Router], others: Sequence[nn.Module]) -> Iterator[None]:
    """The model with other routers, each with as many experts a token as it was trained with."""
    now = [router.taken for router in routers]
    try:
        for router, other in zip(routers, others, strict=True):
            router.take(router.active)
            router.block.set_submodule(router.path, other)
        yield
    finally:
        for router, active in zip(routers, now, strict=True):
            router.block.set_submodule(router.path, router.module)
            router.take(active)


def learns_nothing(router: Router) -> bool:
    """Whether the block's output depends on the router's weights by nothing but which experts it chooses.

    So it is with one expert a token and normalised weights: every weight is x / x = 1, its gradient 0; with a small
    number added to the sum, as in LFM2, the gradient is 1e-6 of what others are (at least 2e-3 in small models).
    Where the block is a decoder layer, which needs more than hidden states, the router is asked without it.
    """
    weight = router.module.weight.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 8, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    with torch.enable_grad():
        if isinstance(router.block, GradientCheckpointingLayer):
            path = router.path.partition(".")[2]
            _, out, _ = functional_call(router.gate, {f"{path}.weight": weight}, (tokens[0],))
        else:
            out: Any = functional_call(router.block, {f"{router.path}.weight": weight}, (tokens,))
            out = out[0] if isinstance(out, tuple) else out
        squares = out.float().square().sum()
        (gradient,) = torch.autograd.grad(squares, weight, allow_unused=True)
    return gradient is None or float(gradient.abs().max()) <= 1e-5 * float(squares.detach())
