"""Parameter groups from regex rules, the AdamW they share, and the learning-rate schedule."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from megakd.config.train import LrRule, OptimConfig
from megakd.errors import UserError


class Assignment(NamedTuple):
    """One parameter, the index of the rule that it got (None: no rule), and its multiplier (0: frozen).

    Under expert parallelism several names share a parameter (`parameter.packed`) and, by `assign_rules`, a multiplier.
    """

    name: str
    parameter: nn.Parameter
    rule: int | None
    multiplier: float


def assign_rules(module: nn.Module, rules: tuple[LrRule, ...]) -> list[Assignment]:
    """Every parameter with the first rule whose pattern is found in its canonical name.

    Without one the multiplier is what an objective marked the parameter with (`lr_multiplier`), else 1.
    Canonical names are those of the student alone (`model.layers.0.mlp.shared_core.gate_proj.weight`); factors that
    expert parallelism packs into one tensor keep theirs. Raises UserError for a pattern that is no regex, for a rule
    that no parameter gets, naming what took its place, and for rules that would train parts of a tensor differently.
    """
    patterns = []
    for rule in rules:
        try:
            patterns.append(re.compile(rule.pattern))
        except re.error as error:
            raise UserError(f"lr_multipliers: {rule.pattern!r} is not a regular expression: {error}") from error
    assigned = []
    for whole, parameter in module.named_parameters():
        parts = []
        for name in canonical_names(whole, parameter):
            first = next((i for i, pattern in enumerate(patterns) if pattern.search(name)), None)
            own = getattr(parameter, "lr_multiplier", 1.0)
            parts.append(Assignment(name, parameter, first, own if first is None else rules[first].lr_multiplier))
        _check_alike(canonical_name(whole), parts, rules)
        assigned += parts
    for index, pattern in enumerate(patterns):
        if all(a.rule != index for a in assigned):
            matches = [a for a in assigned if pattern.search(a.name)]
            why = _why_unused(matches, assigned, rules) if matches else _why_unmatched(pattern, module, assigned)
            raise UserError(f"lr_multipliers: the rule {rules[index].pattern!r} has no effect: {why}")
    return assigned


def canonical_name(name: str) -> str:
    """A parameter's name below the student, whatever wraps it."""
    return name.removeprefix("module.").removeprefix("student.")


def canonical_names(name: str, parameter: nn.Parameter) -> list[str]:
    """`canonical_name`, or those of the factors that lie packed in the parameter."""
    packed = getattr(parameter, "packed", None)
    return [canonical_name(name)] if packed is None else packed.names(canonical_name(name))


def _why_unused(matches: list[Assignment], assigned: list[Assignment], rules: tuple[LrRule, ...]) -> str:
    """Why no parameter got a rule whose pattern matches `matches`."""
    earlier = sorted({rules[a.rule].pattern for a in matches if a.rule is not None})
    return f"all {len(matches)} parameters it matches are taken by earlier rules: {', '.join(earlier)}"


def _why_unmatched(pattern: re.Pattern[str], module: nn.Module, assigned: list[Assignment]) -> str:
    """Why a pattern matches no parameter: it may know a tied weight by its second name."""
    first_names = {id(a.parameter): a.name for a in assigned}
    for whole, parameter in module.named_parameters(remove_duplicate=False):
        name, first = canonical_name(whole), first_names[id(parameter)]
        if name != first and pattern.search(name):
            return f"{name} is tied to {first}: one tensor, which rules know as {first}"
    examples = assigned[0].name, assigned[len(assigned) // 2].name
    return f"it matches no parameter; names look like {examples[0]} and {examples[1]}"


def _check_alike(tensor: str, parts: list[Assignment], rules: tuple[LrRule, ...]) -> None:
    """One tensor has one learning rate: UserError names it and two rules that want more."""
    for part in parts[1:]:
        if part.multiplier != parts[0].multiplier:
            wanted = [
                f"{p.name} {p.multiplier:g} ({'no rule' if p.rule is None else f'rule {rules[p.rule].pattern!r}'})"
                for p in (parts[0], part)
            ]
            raise UserError(
                f"lr_multipliers: engine.expert_parallel packs {len(parts)} factors into {tensor}, which has one "
                f"learning rate, but {wanted[0]} and {wanted[1]} differ; give them one multiplier, or set "
                "engine.expert_parallel=1"
            )


def build_optimizer(
    module: nn.Module,
    rules: tuple[LrRule, ...],
    optim: OptimConfig,
    updates: Mapping[str, int] | None = None,
    fused: bool = False,
) -> torch.optim.AdamW:
    """AdamW with a group for each (multiplier, decay, updates); parameters with multiplier 0 need no gradients.

    Weight decay never touches norms and biases (parameters of one dimension), nor what an objective marks `no_decay`.
    UserError when nothing is left to train.
    updates: how often a parameter, by canonical name, was updated before (`CarryOver`): ZeRO keeps one count a group.
    fused: update in one pass over memory, for states that lie on the CPU.
    Sharded experts get groups of their own, marked as DeepSpeed wants them; with multiplier 0 they stay as they are by
    a rate of 0 (`packed.frozen`), for DeepSpeed can neither group nor save experts that require no gradient.
    """
    counts = {id(p): (updates or {}).get(canonical_names(name, p)[0], 0) for name, p in module.named_parameters()}
    # by parameter: the several names of a packed one are one tensor to the optimizer, and have one multiplier
    assignments = {id(assigned.parameter): assigned for assigned in assign_rules(module, rules)}
    groups: dict[GroupKey, list[nn.Parameter]] = {}
    for assigned in assignments.values():
        parameter, multiplier = assigned.parameter, assigned.multiplier
        packed = getattr(parameter, "packed", None)
        parameter.requires_grad_(multiplier > 0 or packed is not None)
        if packed is not None:
            packed.frozen = multiplier == 0
        if parameter.requires_grad:
            decay = optim.weight_decay if multiplier > 0 and decays(parameter) else 0.0
            experts = packed.group if packed is not None else None
            key = GroupKey(multiplier, decay, experts, counts[id(parameter)])
            groups.setdefault(key, []).append(parameter)
    if all(key.multiplier == 0 for key in groups):
        raise UserError("lr_multipliers: every parameter is frozen; a stage must train something")
    settings = [group_settings(key, parameters, optim) for key, parameters in groups.items()]
    return torch.optim.AdamW(settings, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused or None)


def rule_rows(assigned: list[Assignment], rules: tuple[LrRule, ...], optim: OptimConfig) -> list[list[str]]:
    """A row for each rule and each weight decay: pattern, multiplier, rate, tensors, parameters, weight decay."""
    groups: dict[tuple[int, float, float], list[nn.Parameter]] = {}
    for each in assigned:
        decay = optim.weight_decay if each.multiplier > 0 and decays(each.parameter) else 0.0
        place = len(rules) if each.rule is None else each.rule  # without a rule: last
        groups.setdefault((place, each.multiplier, decay), []).append(each.parameter)
    rows = []
    for (place, multiplier, decay), parameters in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][2])):
        pattern = rules[place].pattern if place < len(rules) else "(no rule)"
        sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in parameters}  # packed: one tensor, several names
        rate = f"{optim.lr * multiplier:g}" if multiplier else "frozen"
        rows.append([pattern, f"{multiplier:g}", rate, str(len(parameters)), f"{sum(sizes.values()):,}", f"{decay:g}"])
    return rows


RULE_HEADERS = ["rule", "x lr", "lr", "tensors", "parameters", "weight decay"]


class GroupKey(NamedTuple):
    """What the parameters of one optimizer group share; experts: their group of ranks, where experts are sharded."""

    multiplier: float
    decay: float
    experts: str | None
    updates: int


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to one dimension, nor to what an objective marks `no_decay`."""
    # ZeRO-3 leaves an empty tensor behind and keeps the shape in ds_shape
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and not getattr(parameter, "no_decay", False)


def group_settings(key: GroupKey, parameters: list[nn.Parameter], optim: OptimConfig) -> dict[str, Any]:
    """A group as torch takes it, with `base_lr` for the schedule, its `label` in the log, and DeepSpeed's marks."""
    rate = optim.lr * key.multiplier
    label = f"x{key.multiplier:g}"
    if optim.weight_decay and not key.decay:
        label += "-no-decay"
    group = {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": key.decay, "label": label}
    return group if key.experts is None else {**group, "moe": True, "name": key.experts}


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate becomes its own base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def schedule(optim: OptimConfig, step: int, steps: int) -> float:
    """The factor of the learning rate at `step` of a stage of `steps`: linear warmup, then cosine, linear or constant.

    Warmup takes at most half of the stage; after it, the last step comes to `final_lr_ratio` (but for `constant`).
    """
    warmup = min(optim.warmup_steps, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    final = optim.final_lr_ratio
    if optim.schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if optim.schedule == "linear":
        return final + (1 - final) * (1 - progress)
    return 1.0
