import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from megakd.config.train import LrRule, OptimConfig
from megakd.engine.optim import assign_rules, build_optimizer, canonical_name, schedule, set_learning_rate
from megakd.errors import UserError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.proj = nn.Linear(3, 3)
        self.experts = nn.Parameter(torch.zeros(2, 3, 3))


class Objective(nn.Module):
    """Names as an objective has them: everything below `student.`."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"embed": nn.Embedding(5, 3), "layers": nn.ModuleList([Layer(), Layer()])})


NAMES = ["embed.weight"] + [
    f"layers.{i}.{name}"
    for i in range(2)
    for name in ("experts", "norm.weight", "norm.bias", "proj.weight", "proj.bias")
]


def rules(*pairs: tuple[str, float]) -> tuple[LrRule, ...]:
    return tuple(LrRule(pattern=pattern, lr_multiplier=multiplier) for pattern, multiplier in pairs)


def reference_multiplier(name: str, pairs: tuple[tuple[str, float], ...]) -> float:
    for pattern, multiplier in pairs:
        if re.search(pattern, name):
            return multiplier
    return 1.0


PAIRS = [
    (),
    ((".*", 0.5),),
    (("norm", 0.0), ("layers.0", 0.1), ("proj", 2.0)),
    (("^embed", 3.0), (r"\.bias$", 0.0), (r"layers\.\d+\.(norm|experts)", 0.25), (".*", 0.0)),
]


@pytest.mark.parametrize("pairs", PAIRS)
def test_first_match_wins_and_no_match_is_one(pairs):
    found = assign_rules(Objective(), rules(*pairs))
    assert sorted(a.name for a in found) == sorted(NAMES)
    for assigned in found:
        assert assigned.multiplier == reference_multiplier(assigned.name, pairs)
        if assigned.rule is None:
            assert not any(re.search(pattern, assigned.name) for pattern, _ in pairs)
        else:
            assert re.search(pairs[assigned.rule][0], assigned.name)


@pytest.mark.parametrize("pairs", PAIRS)
def test_groups_hold_rates_decay_and_every_trained_parameter_once(pairs):
    module = Objective()
    optim = OptimConfig(lr=0.02, weight_decay=0.3, betas=(0.8, 0.99), eps=1e-6)
    optimizer = build_optimizer(module, rules(*pairs), optim)
    placed = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(placed) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in module.named_parameters():
        multiplier = reference_multiplier(name.removeprefix("student."), pairs)
        assert parameter.requires_grad == (multiplier > 0)
        assert (id(parameter) in placed) == (multiplier > 0)
        if multiplier > 0:
            group = placed[id(parameter)]
            assert group["lr"] == group["base_lr"] == pytest.approx(0.02 * multiplier)
            assert group["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.3)
            assert (group["betas"], group["eps"]) == ((0.8, 0.99), 1e-6)
    kinds = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert len(set(kinds)) == len(kinds)


def test_a_later_stage_trains_again_what_an_earlier_one_froze():
    module = Objective()
    build_optimizer(module, rules(("experts", 1.0), (".*", 0.0)), OptimConfig(lr=1e-3))
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        f"student.layers.{i}.experts" for i in range(2)
    }
    build_optimizer(module, (), OptimConfig(lr=1e-3))
    assert all(p.requires_grad for p in module.parameters())


def test_partitioned_parameters_keep_their_decay():
    """ZeRO-3 leaves an empty tensor of one dimension; the shape it had counts."""
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(0)) for name in ("matrix", "norm")})
    module["matrix"].ds_shape, module["norm"].ds_shape = torch.Size((4, 4)), torch.Size((4,))
    optimizer = build_optimizer(module, (), OptimConfig(lr=1e-3, weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(module["matrix"]): 0.3, id(module["norm"]): 0.0}


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(
        UserError,
        match=r"'experst' has no effect.*matches no parameter.*layers\.\d|'experst' has no effect.*embed\.weight",
    ):
        assign_rules(Objective(), rules(("norm", 0.0), ("experst", 0.1)))


def test_a_rule_for_a_tied_weight_is_told_its_first_name():
    objective = Objective()
    objective.student["lm_head"] = nn.Linear(3, 5, bias=False)
    objective.student["lm_head"].weight = objective.student["embed"].weight
    assert assign_rules(objective, rules((".*embed.*", 0.1)))[0].multiplier == 0.1
    with pytest.raises(UserError, match=r"lm_head\.weight is tied to embed\.weight: one tensor"):
        assign_rules(objective, rules((".*lm_head.*", 0.1)))


def test_a_rule_whose_parameters_are_all_taken_is_refused_naming_by_whom():
    with pytest.raises(UserError) as error:
        assign_rules(
            Objective(), rules(("embed", 0.5), ("proj.weight", 0.1), ("bias", 0.2), ("proj", 1.0), (".*", 0.0))
        )
    message = str(error.value)
    assert "'proj' has no effect" in message and "all 4 parameters" in message
    assert "proj.weight" in message and "bias" in message and "embed" not in message


@pytest.mark.parametrize("pattern", ["(", "*experts", "[a", "(?P<x"])
def test_a_bad_pattern_is_refused(pattern):
    with pytest.raises(UserError, match=r"not a regular expression") as error:
        assign_rules(Objective(), rules(("norm", 1.0), (pattern, 0.1)))
    assert repr(pattern) in str(error.value)


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="frozen"):
        build_optimizer(Objective(), rules((".*", 0.0)), OptimConfig(lr=1e-3))


@pytest.mark.parametrize("name", ["module.student.model.x", "student.model.x", "module.model.x", "model.x"])
def test_canonical_names_are_below_the_student(name):
    assert canonical_name(name) == "model.x"


def test_rules_see_canonical_names():
    """`^layers` must match although the objective calls it `student.layers`, wrapped by an engine or not."""
    for module in (Objective(), nn.ModuleDict({"module": Objective()}), Objective().student):
        found = assign_rules(module, rules(("^layers", 0.1), ("^embed", 0.2)))
        assert {a.name for a in found} == set(NAMES) and {a.multiplier for a in found} == {0.1, 0.2}


def test_the_schedule_multiplies_each_groups_own_rate():
    optimizer = build_optimizer(Objective(), rules(("embed", 0.5)), OptimConfig(lr=0.02))
    for factor in (0.25, 1.0, 0.0, 0.5):  # of the base rate each time, not of the last one
        set_learning_rate(optimizer, factor)
        assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx(
            sorted({0.01 * factor, 0.02 * factor})
        )


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup, steps", [(0, 7), (1, 7), (4, 23), (100, 9), (100, 1000)])
def test_schedule(kind, warmup, steps):
    optim = OptimConfig(schedule=kind, warmup_steps=warmup, final_lr_ratio=0.1)
    factors = [schedule(optim, step, steps) for step in range(steps)]
    warmup = min(warmup, steps // 2)  # at most half of the stage
    assert factors[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert factors[warmup] == max(factors) == 1.0
    after = factors[warmup:]
    assert factors[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    falls = [a - b for a, b in pairwise(after)]
    assert all(fall >= 0 for fall in falls) and all((fall > 0) == (kind != "constant") for fall in falls)
    middle = (len(after) - 1) / 2  # cosine and linear are symmetric around their middle
    if kind != "constant" and middle == int(middle):
        assert after[int(middle)] == pytest.approx(0.55)
    if kind == "linear":
        assert falls == pytest.approx([falls[0]] * len(falls))
    if kind == "cosine":
        place = len(after) // 3
        share = place / (len(after) - 1)
        assert after[place] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 1, 100])
def test_the_shortest_stages_train(warmup, steps):
    factors = [schedule(OptimConfig(warmup_steps=warmup), step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1.0


def test_final_ratio_zero_and_one():
    assert schedule(OptimConfig(warmup_steps=0, final_lr_ratio=0), 9, 10) == pytest.approx(0, abs=1e-12)
    assert {schedule(OptimConfig(warmup_steps=0, final_lr_ratio=1), step, 10) for step in range(10)} == {1.0}
