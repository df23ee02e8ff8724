"""Routers of a Hugging Face MoE: found by role and shape, given another number of experts a token, listened to.

A router is a module with a matrix [E, D] next to the E experts of its block. Names say nothing: `gate` is a router in
most families and `gate_proj` a projection in all. transformers' routers give (logits [N, E], weights [N, k], experts
[N, k]) and keep k in `top_k`; where a plain Linear gives the logits, the block around it keeps k.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from megakd.errors import UserError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")


class Router(NamedTuple):
    """name: of the module in the model. block: the module that calls it, by `child`.

    experts: to choose from. active: experts a token, as trained. holder: whose `top_k` says how many a token takes.
    """

    name: str
    module: Any
    block: nn.Module
    child: str
    holder: Any
    experts: int
    active: int

    def take(self, active: int) -> None:
        """Let a token take so many experts from now on."""
        self.holder.top_k = active


class Choice(NamedTuple):
    """What a router made of N tokens: logits [N, E] before softmax or sigmoid, experts [N, k]."""

    logits: Tensor
    experts: Tensor


def find_routers(model: nn.Module, place: str, patterns: Sequence[str] = ()) -> list[Router]:
    """All routers of a model in the order of its modules; UserError naming `place` when there is none.

    patterns: regular expressions that find the names of routers where role and shape do not; then nothing else counts.
    A projection of an expert is none, whatever they say.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        block = modules.get(parent)
        weight = getattr(module, "weight", None)
        if block is None or not isinstance(weight, Tensor) or weight.ndim != 2 or child in PROJECTIONS:
            continue
        if patterns:
            experts = weight.shape[0]
            # one row chooses nothing: Qwen2's gate of its shared expert
            if experts == 1 or not any(re.search(pattern, name) for pattern in patterns):
                continue
        else:
            experts = _experts_beside(block)
            if isinstance(module, nn.Embedding) or not experts or weight.shape[0] != experts:
                continue
        found.append(_router(name, module, block, child, experts, place))
    if not found:
        names = ", ".join(repr(p) for p in patterns)
        raise UserError(
            f"objective.router_patterns: {names} find no matrix in {place} but projections of experts, which are no "
            "routers"
            if any(re.search(p, name) for p in patterns for name in modules if name.endswith(PROJECTIONS))
            else f"objective.router_patterns: {names} find no matrix in {place}"
            if patterns
            else f"{place}: no module with a matrix [experts, hidden] next to the experts of its block; a model "
            "without experts has no router to train, and odd names are found by objective.router_patterns"
        )
    return found


def _experts_beside(block: nn.Module) -> int:
    """How many experts a block has as a child: a list of alike modules, or a module of stacked matrices. 0: none."""
    for child in block.children():
        if isinstance(child, nn.ModuleList) and len({type(each) for each in child}) == 1 and len(child) > 1:
            return len(child)
        stacked = [p for p in child.parameters(recurse=False) if p.ndim == 3]
        if stacked and not isinstance(child, nn.Conv1d) and len({p.shape[0] for p in stacked}) == 1:
            return stacked[0].shape[0]
    return 0


def _router(name: str, module: Any, block: Any, child: str, experts: int, place: str) -> Router:
    for holder in (module, block):
        active = getattr(holder, "top_k", None)
        if isinstance(active, int):
            return Router(name, module, block, child, holder, experts, active)
    raise UserError(f"{place}: neither {name} nor the module around it says in top_k how many experts a token takes")


def describe(routers: Sequence[Router]) -> str:
    """One line: how many, which, and what they choose from."""
    sizes = sorted({(r.active, r.experts) for r in routers})
    chosen = ", ".join(f"{active} of {experts} experts" for active, experts in sizes)
    return f"{len(routers)} routers, {chosen}: {routers[0].name}" + (f" … {routers[-1].name}" if routers[1:] else "")


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

    def listen(module: Any, inputs: Any, output: Any, router: Router) -> None:
        if isinstance(output, tuple):
            heard.append(Choice(output[0], output[-1]))
        else:
            logits = output.flatten(0, -2)
            heard.append(Choice(logits, logits.topk(router.holder.top_k).indices))

    hooks = [
        router.module.register_forward_hook(lambda m, i, o, router=router: listen(m, i, o, router))
        for router in routers
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


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

    hooks = [
        router.module.register_forward_hook(lambda m, i, o, index=index: change(m, i, o, index))
        for index, router in enumerate(routers)
    ]
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
        _, weights, experts = router.module.forward(*inputs)
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
    now = [router.holder.top_k for router in routers]
    try:
        for router, other in zip(routers, others, strict=True):
            router.take(router.active)
            setattr(router.block, router.child, other)
        yield
    finally:
        for router, active in zip(routers, now, strict=True):
            setattr(router.block, router.child, router.module)
            router.take(active)


def learns_nothing(router: Router) -> bool:
    """Whether the block's output depends on the router's weights by nothing but which experts it chooses.

    So it is with one expert a token and normalised weights: every weight is x / x = 1, its gradient 0.
    """
    weight = router.module.weight.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 8, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    with torch.enable_grad():
        out: Any = functional_call(router.block, {f"{router.child}.weight": weight}, (tokens,))
        out = out[0] if isinstance(out, tuple) else out
        squares = out.float().square().sum()
        (gradient,) = torch.autograd.grad(squares, weight, allow_unused=True)
    return gradient is None or float(gradient.abs().max()) <= 1e-6 * float(squares.detach())
