import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megakd.models.shared_core import PROJECTIONS, SharedCoreMoeBlock, dense_weight, naive_forward, wrapper_shapes
from megakd.models.tiny import tiny_moe_config

SIZES = [(3, 1, 1), (5, 2, 3), (7, 3, 2), (4, 4, 5)]  # experts, active, rank
HIDDEN, EXPERT_HIDDEN = 7, 5


class Router(nn.Module):
    """A family's router in whatever dtype its input has; `bias` decides who gets tokens."""

    def __init__(self, experts: int, active: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, HIDDEN))
        self.bias: Tensor = torch.zeros(experts)
        self.active = active

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.weight.T + self.bias.to(x.dtype)
        values, experts = logits.softmax(-1).topk(self.active)
        return logits, values / values.sum(-1, keepdim=True), experts


def make_block(experts: int, active: int, rank: int, dtype: torch.dtype = torch.float64) -> SharedCoreMoeBlock:
    torch.manual_seed(experts)
    block = SharedCoreMoeBlock(Router(experts, active), experts, HIDDEN, EXPERT_HIDDEN, rank, "silu").to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def reference_weight(block: SharedCoreMoeBlock, projection: str, expert: int) -> Tensor:
    """The documented products with whole identity matrices."""
    core = block.shared_core[f"{projection}_proj"].weight
    (q, v), (u, s) = (
        [getattr(block.experts, f"{wrapper}_wrapper_{projection}_{side}")[expert] for side in ("left", "right")]
        for wrapper in ("input", "output")
    )
    if projection == "down":
        return core @ (torch.eye(EXPERT_HIDDEN, dtype=core.dtype) + q @ v.T) + u @ s.T
    return (torch.eye(EXPERT_HIDDEN, dtype=core.dtype) + u @ s.T) @ core + q @ v.T


def reference_forward(block: SharedCoreMoeBlock, x: Tensor) -> Tensor:
    """One token and one expert at a time, through whole matrices."""
    flat = x.reshape(-1, HIDDEN)
    out = []
    for token, (weights, experts) in zip(flat, zip(*block.gate(flat)[1:], strict=True), strict=True):
        total = torch.zeros(HIDDEN, dtype=x.dtype)
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            gate, up, down = (reference_weight(block, p, expert) for p in PROJECTIONS)
            total = total + weight * (down @ (nn.functional.silu(gate @ token) * (up @ token)))
        out.append(total)
    return torch.stack(out).view_as(x)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (13,)])
@torch.no_grad()
def test_forward_is_that_of_the_expanded_experts(shape, size):
    block = make_block(*size)
    x = torch.randn(*shape, HIDDEN, dtype=torch.float64)
    found = block(x)
    assert found.shape == x.shape and found.dtype == x.dtype
    assert relative(found, reference_forward(block, x)) <= 1e-10


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_naive_forward_is_a_reference_in_float64(size):
    block = make_block(*size)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    assert relative(block(x), naive_forward(block, x)) <= 1e-10


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@torch.no_grad()
def test_lower_precision_stays_close(dtype, tolerance, size):
    block, x = make_block(*size, dtype), torch.randn(17, HIDDEN, dtype=dtype)
    _, weights, experts = block.gate(x)
    found = block(x)
    assert found.dtype == dtype
    block.double().gate.forward = lambda _: (None, weights.double(), experts)  # rounding must not choose other experts
    assert relative(found.double(), reference_forward(block, x.double())) <= tolerance


@pytest.mark.parametrize("chosen", [[0], [4], [1, 3]])
def test_experts_without_tokens(chosen):
    """The output is that of the others, the others' factors alone get gradient, and the gradient is not None."""
    block = make_block(5, len(chosen), 2)
    block.gate.bias[chosen] = 100.0
    x = torch.randn(6, HIDDEN, dtype=torch.float64)
    found = block(x)
    assert relative(found, reference_forward(block, x)) <= 1e-10
    found.square().sum().backward()
    for name, parameter in block.experts.named_parameters():
        assert [e for e in range(5) if parameter.grad[e].abs().max() > 0] == chosen, name


@pytest.mark.parametrize("size", [(3, 2, 1), (4, 1, 2)])
def test_gradients_are_those_of_finite_differences(size):
    block = make_block(*size)
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in block.named_parameters()]

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *block.parameters()), atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("projection", PROJECTIONS)
@torch.no_grad()
def test_dense_weight_is_the_documented_formula(projection, size):
    block = make_block(*size)
    shape = (HIDDEN, EXPERT_HIDDEN) if projection == "down" else (EXPERT_HIDDEN, HIDDEN)
    for expert in range(size[0]):
        found = dense_weight(dict(block.named_parameters()), projection, expert)
        assert found.shape == shape
        assert relative(found.double(), reference_weight(block, projection, expert)) <= 1e-6


def test_dense_weight_of_bfloat16_factors_is_computed_in_float32():
    block = make_block(3, 1, 2, torch.bfloat16)
    with torch.no_grad():
        found = dense_weight(dict(block.named_parameters()), "gate", 1)
        assert found.dtype == torch.float32
        assert relative(found.double(), reference_weight(block.double(), "gate", 1)) <= 1e-6


def test_parameters_have_the_names_that_rules_are_written_for():
    names = {name: tuple(p.shape) for name, p in make_block(3, 1, 2).named_parameters()}
    d, f = HIDDEN, EXPERT_HIDDEN
    sides = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    expected = {"gate.weight": (3, d)}
    for projection, (rows, columns) in sides.items():
        expected[f"shared_core.{projection}_proj.weight"] = (rows, columns)
        # each wrapper's product has the shape of what it is added to: the matrix, or a square on the core's short side
        inner, outer = ((rows, columns), (f, f)) if projection != "down" else ((f, f), (rows, columns))
        for wrapper, (left, right) in (("input", inner), ("output", outer)):
            expected[f"experts.{wrapper}_wrapper_{projection}_left"] = (3, left, 2)
            expected[f"experts.{wrapper}_wrapper_{projection}_right"] = (3, right, 2)
        stated = {f"experts.{name}": shape for name, shape in wrapper_shapes(projection, 3, d, f, 2).items()}
        assert stated.items() <= expected.items() and len(stated) == 4
    assert names == expected


def test_every_input_calls_the_same_modules():
    """ZeRO-3 ends the run when ranks call different modules: an expert without tokens must not show in the calls."""
    block = make_block(4, 1, 2)
    calls: list[str] = []
    for name, module in block.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    seen = []
    for biases in ([100.0, 0, 0, 0], [0, 0, 0, 100.0], [0, 0, 0, 0]):
        block.gate.bias = torch.tensor(biases)
        calls.clear()
        block(torch.randn(9, HIDDEN, dtype=torch.float64))
        seen.append(list(calls))
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 6
    assert not list(block.experts.children())  # the activation among them


def test_a_wrapper_with_zero_left_factors_is_the_core_alone():
    block = make_block(5, 2, 3)
    for name, parameter in block.experts.named_parameters():
        if name.endswith("_left"):
            nn.init.zeros_(parameter)
    x = torch.randn(4, HIDDEN, dtype=torch.float64)
    core = block.shared_core
    expected = core["down_proj"](nn.functional.silu(core["gate_proj"](x)) * core["up_proj"](x))
    assert relative(block(x), expected) <= 1e-12  # router weights sum to one


def test_works_with_the_family_router():
    config = tiny_moe_config(hidden_size=HIDDEN, num_experts=5, num_experts_per_tok=2)
    router = Qwen3MoeTopKRouter(config)
    nn.init.normal_(router.weight)
    block = make_block(5, 2, 2, torch.float32)
    block.gate = router
    x = torch.randn(2, 6, HIDDEN)
    assert relative(block(x), reference_forward(block, x)) <= 1e-5
