import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakd.config.train import LrRule, OptimConfig
from megakd.engine.optim import assign_rules, build_optimizer
from megakd.errors import UserError
from megakd.models.expert_parallel import SpreadExperts, spread_experts
from megakd.models.shared_core import PROJECTIONS, DenseExperts, Form, SharedCoreExperts, core_shape
from megakd.system.deepspeed_internals import join_groups

EXPERTS, HIDDEN, EXPERT_HIDDEN, ACTIVE = 6, 7, 5, 3
SHAPES: dict[str, dict[str, Form]] = {
    "wrappers": {p: Form("wrappers", 2, 3) for p in PROJECTIONS},
    "unequal": {"gate": Form("wrappers", 1, 4), "up": Form("wrappers", 3, 0), "down": Form("wrappers", 2, 5)},
    "no free factors": {"gate": Form("wrappers", 0, 2), "up": Form("wrappers", 0, 3), "down": Form("wrappers", 2, 0)},
    "additive": {"gate": Form("additive", 2, 0), "up": Form("additive", 3, 0), "down": Form("additive", 0, 2)},
    "basis": {"gate": Form("basis", 0, 3), "up": Form("basis", 0, 4), "down": Form("basis", 2, 0)},
    "groups": {"gate": Form("basis", 0, 3, 2), "up": Form("additive", 3, 0), "down": Form("basis", 2, 0, 3)},
    "mixture": {"gate": Form("mixture", 0, 3, 2), "up": Form("additive", 3, 0), "down": Form("mixture", 2, 0, 3)},
}


class Block(nn.Module):
    """As much of a family's block as spreading looks at."""

    def __init__(self, forms: dict[str, Form], exempt: tuple[int, ...] = ()):
        super().__init__()
        shapes = {p: core_shape(form, p, HIDDEN, EXPERT_HIDDEN) for p, form in forms.items()}
        self.shared_core = nn.ModuleDict({f"{p}_proj": nn.Linear(i, o, bias=False) for p, (o, i) in shapes.items()})
        act = nn.functional.silu
        self.dense_experts = DenseExperts(exempt, HIDDEN, EXPERT_HIDDEN, act) if exempt else None
        self.experts: Any = SharedCoreExperts(
            EXPERTS, HIDDEN, EXPERT_HIDDEN, forms, act, self.shared_core, self.dense_experts
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)


def routed(rows: int, experts: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, `ACTIVE` of the first `experts` for each, and weights, as a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, HIDDEN, dtype=torch.float64, generator=generator).requires_grad_()
    expert = torch.stack([torch.randperm(experts, generator=generator)[:ACTIVE] for _ in range(rows)])
    return x, expert, torch.rand(rows, ACTIVE, dtype=torch.float64, generator=generator).requires_grad_()


def run(block: Block, x: Tensor, expert: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and gradients of everything by canonical name, of one backward."""
    y = block.experts(x, expert, weight)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y))
    found = {"x": x.grad, "weight": weight.grad}
    for name, parameter in block.named_parameters():
        packed = getattr(parameter, "packed", None)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found |= (
            {name: gradient} if packed is None else dict(zip(packed.names(name), packed.split(gradient), strict=True))
        )
    return y.detach(), found  # type: ignore[return-value]


def on_two_ranks(rank: int) -> None:
    """Every shape against the layer that keeps all experts; started by tests/engine/test_expert_parallel.py.

    Each rank has other rows, and gradients of experts are those of both ranks' rows: the reference runs them all.
    """
    half = EXPERTS // 2
    place = join_groups(2)
    assert place == rank
    for case, (name, forms) in enumerate(SHAPES.items()):
        # `near`: all rows of both ranks go to the experts of the first, nothing comes to the second
        for exempt, rows, experts in (((), (5, 4), EXPERTS), ((1, 4), (3, 6), EXPERTS), ((), (2, 3), half)):
            torch.manual_seed(case)
            block = Block(forms, exempt).double()
            whole = copy.deepcopy(block)
            spread_experts(nn.ModuleDict({"mlp": block}), 2, rank)
            assert isinstance(block.experts, SpreadExperts)
            for module in block.modules():
                if isinstance(module, SpreadExperts):
                    module.set_deepspeed_parallelism()
            batches = [routed(count, experts, seed) for seed, count in enumerate(rows)]
            y, mine = run(block, *batches[rank])
            expected = [
                run(copy.deepcopy(whole), *(t.detach().clone().requires_grad_(t.is_floating_point()) for t in b))
                for b in batches
            ]
            torch.testing.assert_close(y, expected[rank][0])
            kept = slice(rank * half, (rank + 1) * half)
            for key, gradient in mine.items():
                theirs = [found[key] for _, found in expected]
                of_all_rows = key.startswith("experts.")
                wanted = (theirs[0] + theirs[1])[kept] if of_all_rows else theirs[rank]
                torch.testing.assert_close(gradient, wanted, msg=f"{name} {exempt} {key}: {gradient} is not {wanted}")


def student(forms: dict[str, Form] = SHAPES["wrappers"]) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": Block(forms)})])})


def names(module: nn.Module, rules: tuple[LrRule, ...] = ()) -> list[str]:
    return [assigned.name for assigned in assign_rules(module, rules)]


@pytest.mark.parametrize("forms", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_canonical_names_stay(forms, device):
    with torch.device(device):
        whole, spread = student(forms), student(forms)
    spread_experts(spread, 3, 1)
    assert sorted(names(spread)) == sorted(names(whole))
    packed = [name for name, _ in spread.named_parameters() if ".experts." in name]
    assert [name.rsplit(".", 1)[1] for name in packed] == ["w1", "w3", "w2"]  # gate, up, down: those DeepSpeed saves


@pytest.mark.parametrize("forms", SHAPES.values(), ids=SHAPES)
def test_the_shares_together_are_the_whole(forms):
    torch.manual_seed(0)
    whole = Block(forms)
    shares = [copy.deepcopy(whole) for _ in range(3)]
    for rank, share in enumerate(shares):
        spread_experts(nn.ModuleDict({"mlp": share}), 3, rank)
    for place in ("w1", "w2", "w3"):
        parameters = [getattr(share.experts.experts, place) for share in shares]
        assert all(parameter.shape[0] == 2 and parameter.ndim == 3 for parameter in parameters)
        packed = parameters[0].packed
        factors = dict(zip(packed.shapes, packed.split(torch.cat(parameters)), strict=True))
        assert all(torch.equal(tensor, getattr(whole.experts, name)) for name, tensor in factors.items())
        again = packed.universal([tensor.flatten() for tensor in factors.values()])["param"]
        assert torch.equal(again, torch.cat(parameters))


def test_groups_of_a_basis_stay_whole_for_checkpoints():
    block = Block(SHAPES["groups"])
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    spread_experts(nn.ModuleDict({"mlp": block}), 2, 1)
    saved = block.state_dict()
    assert len(before) == 2 and all(torch.equal(saved[name], buffer) for name, buffer in before.items())
    assert not [name for name in saved if name.startswith("experts.experts.basis")]


def test_experts_that_cannot_be_divided_are_refused():
    with pytest.raises(UserError, match=r"engine.expert_parallel: 4 does not divide the 6 experts of layers.0.mlp"):
        spread_experts(student(), 4, 0)
    with pytest.raises(UserError, match="no shared-core experts to spread"):
        spread_experts(nn.Linear(2, 2), 2, 0)
    alone = {**SHAPES["wrappers"], "up": Form("additive", 0, 0)}
    with pytest.raises(UserError, match=r"layers.0.mlp have no factors for up.*engine.expert_parallel=1"):
        spread_experts(student(alone), 2, 0)


@pytest.mark.parametrize(
    "patterns",
    [
        [("input_wrapper_gate", 0.5)],
        [("gate_left", 0.0)],
        [("gate_left", 1.0), ("gate_right", 2.0)],
        [("core|output", 0.1), (".*", 1.0)],
    ],
)
def test_rules_that_split_a_packed_tensor_are_refused(patterns):
    """One line that names the tensor, two of its factors and what they were to get."""
    rules = tuple(LrRule(pattern=pattern, lr_multiplier=multiplier) for pattern, multiplier in patterns)
    whole, spread = student(), student()
    assign_rules(whole, rules)
    spread_experts(spread, 2, 0)
    with pytest.raises(UserError) as error:
        build_optimizer(spread, rules, OptimConfig(lr=1e-3))
    message = str(error.value)
    assert "\n" not in message and "layers.0.mlp.experts.experts.w1" in message
    assert "layers.0.mlp.experts.input_wrapper_gate_left" in message and repr(patterns[0][0]) in message
    assert "engine.expert_parallel=1" in message


def test_rules_that_keep_packed_tensors_whole_are_taken():
    rules = (LrRule(pattern="wrapper_gate", lr_multiplier=0.0), LrRule(pattern="wrapper", lr_multiplier=0.5))
    spread = student()
    spread_experts(spread, 2, 0)
    groups = build_optimizer(spread, rules, OptimConfig(lr=1e-3, weight_decay=0.1)).param_groups
    found = {(g["lr"], g["weight_decay"], g.get("moe", False), g.get("name")): len(g["params"]) for g in groups}
    assert found == {
        (0.0, 0.0, True, "ep_size_2"): 1,  # frozen by its rate: DeepSpeed saves no experts that need no gradient
        (0.5e-3, 0.1, True, "ep_size_2"): 2,
        (1e-3, 0.1, False, None): 3,
    }
    frozen = {name: p.packed.frozen for name, p in spread.named_parameters() if hasattr(p, "packed")}  # type: ignore
    assert [name for name, value in frozen.items() if value] == ["layers.0.mlp.experts.experts.w1"]
    assert all(p.requires_grad for p in spread.parameters())


def test_experts_frozen_by_their_rate_do_not_count_as_trained():
    spread = student()
    spread_experts(spread, 2, 0)
    with pytest.raises(UserError, match="every parameter is frozen"):
        build_optimizer(spread, (LrRule(pattern=".*", lr_multiplier=0.0),), OptimConfig(lr=1e-3))
