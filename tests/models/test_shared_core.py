from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from megakd.models.naive_experts import naive_experts
from megakd.models.shared_core import (
    PROJECTIONS,
    DenseExperts,
    Form,
    SharedCoreExperts,
    core_shape,
    dense_weight,
    factor_shapes,
    free_and_core_rank,
    make_form,
    mix_name,
    stored_parameters,
)
from tests.conftest import for_each

EXPERTS, ACTIVE, HIDDEN, EXPERT_HIDDEN = 5, 2, 7, 6
FORMS = {
    "wrappers": Form("wrappers", 2, 2),
    "unequal": Form("wrappers", 1, 3),
    "no output wrapper": Form("wrappers", 3, 0),
    "no input wrapper": Form("wrappers", 0, 2),
    "additive gate": Form("additive", 2, 0),
    "basis of 4": Form("basis", 0, 4),
    "two bases of 3": Form("basis", 0, 3, 2),
    "mixture of two": Form("mixture", 0, 3, 2),
}
# gate and up have the rank of a basis, or of what is added, on the other side than down
MIRRORED = {
    "additive gate": Form("additive", 0, 2),
    "basis of 4": Form("basis", 4, 0),
    "two bases of 3": Form("basis", 3, 0, 2),
    "mixture of two": Form("mixture", 3, 0, 2),
}
SETS = {name: {"gate": form, "up": form, "down": MIRRORED.get(name, form)} for name, form in FORMS.items()}
SETS["mixed"] = {"gate": FORMS["wrappers"], "up": FORMS["two bases of 3"], "down": MIRRORED["additive gate"]}
SETS["mixed down"] = {"gate": FORMS["additive gate"], "up": FORMS["unequal"], "down": MIRRORED["two bases of 3"]}
SETS["mixed mixtures"] = {
    "gate": FORMS["mixture of two"],
    "up": FORMS["wrappers"],
    "down": Form("mixture", 4, 0, 3),
}


class Block(nn.Module):
    """What share_core makes of a family's block, without the router."""

    def __init__(self, forms: dict[str, Form], exempt: tuple[int, ...], sizes: tuple[int, int, int]):
        super().__init__()
        experts, hidden, expert_hidden = sizes
        shapes = {p: core_shape(form, p, hidden, expert_hidden) for p, form in forms.items()}
        self.shared_core = nn.ModuleDict({f"{p}_proj": nn.Linear(i, o, bias=False) for p, (o, i) in shapes.items()})
        act_fn = ACT2FN["silu"].forward
        self.dense_experts = DenseExperts(exempt, hidden, expert_hidden, act_fn) if exempt else None
        self.experts = SharedCoreExperts(
            experts, hidden, expert_hidden, forms, act_fn, self.shared_core, self.dense_experts
        )

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.experts(*arguments)


def make_block(
    name: str,
    exempt: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int, int] = (EXPERTS, HIDDEN, EXPERT_HIDDEN),
    scale: int = 1,
) -> Block:
    """A block with random factors; `scale` multiplies the ranks."""
    torch.manual_seed(0)
    forms = {p: Form(f.shape, f.input_rank * scale, f.output_rank * scale, f.groups) for p, f in SETS[name].items()}
    block = Block(forms, exempt, sizes).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5 / scale**0.5)
    for buffer in block.buffers():
        buffer.copy_(torch.randint(2, buffer.shape))  # groups as a fit chooses them, not in turn
    return block


def rows(tokens: int, dtype: torch.dtype = torch.float64, hidden: int = HIDDEN, experts: int = EXPERTS) -> Any:
    """Tokens, the experts that a router chose for them, and the weights, which need not add up to one."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    chosen = torch.rand(tokens, experts, generator=generator).topk(ACTIVE).indices
    weights = torch.rand(tokens, ACTIVE, generator=generator, dtype=torch.float64).to(dtype)
    return x, chosen, weights


def reference_weight(block: Block, projection: str, expert: int) -> Tensor:
    """The documented products with whole identity matrices."""
    core = block.shared_core[f"{projection}_proj"].weight
    form = block.experts.forms[projection]
    eye = torch.eye(block.experts.expert_hidden, dtype=core.dtype)

    def factor(wrapper: str, side: str) -> Tensor:
        return getattr(block.experts, f"{wrapper}_wrapper_{projection}_{side}")[expert]

    def product(wrapper: str, rank: int) -> Tensor | float:
        return factor(wrapper, "left").T @ factor(wrapper, "right").T if rank else 0.0

    if form.shape == "mixture":
        coefficients = getattr(block.experts, mix_name(projection))[expert, :, 0]
        parts = core.chunk(form.groups, dim=1 if projection == "down" else 0)
        mixed = torch.stack([m * part for m, part in zip(coefficients, parts, strict=True)]).sum(0)
        return mixed @ factor("input", "right").T if projection == "down" else factor("output", "left").T @ mixed
    if form.shape == "basis":
        group = int(getattr(block.experts, f"basis_group_{projection}")[expert]) if form.groups > 1 else 0
        if projection == "down":
            return core.chunk(form.groups, dim=1)[group] @ factor("input", "right").T
        return factor("output", "left").T @ core.chunk(form.groups, dim=0)[group]
    inner, outer = product("input", form.input_rank), product("output", form.output_rank)
    return core @ (eye + inner) + outer if projection == "down" else (eye + outer) @ core + inner


def reference(block: Block, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """One token and one expert at a time, through whole matrices."""
    out = []
    for token, experts, gates in zip(x, chosen.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(experts, gates, strict=True):
            kept = block.dense_experts
            if kept is not None and expert in kept.ids:
                slot = kept.ids.index(expert)
                (gate, up), down = kept.gate_up_proj[slot].chunk(2), kept.down_proj[slot]
            else:
                gate, up, down = (reference_weight(block, p, expert) for p in PROJECTIONS)
            total = total + weight * (down @ (nn.functional.silu(gate @ token) * (up @ token)))
        out.append(total)
    return torch.stack(out)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


every_set = for_each("name", SETS)
every_exempt = for_each("exempt", [(), (1,), (4, 0)], ids=["none dense", "one dense", "two dense"])


@every_set
@every_exempt
@for_each("tokens", [1, 18])
@torch.no_grad()
def test_forward_is_that_of_the_expanded_experts(name, exempt, tokens):
    block, given = make_block(name, exempt), rows(tokens)
    found = block(*given)
    assert found.shape == given[0].shape and found.dtype == given[0].dtype
    assert relative(found, reference(block, *given)) <= 1e-12
    assert relative(naive_experts(block.experts, *given), found) <= 1e-12


@every_set
@for_each("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@torch.no_grad()
def test_lower_precision_stays_close(name, dtype, tolerance):
    block, given = make_block(name, (1,), dtype), rows(17, dtype)
    found = block(*given)
    assert found.dtype == dtype
    expected = reference(block.double(), given[0].double(), given[1], given[2].double())
    assert relative(found, expected) <= tolerance


@every_set
@torch.no_grad()
def test_a_router_may_weigh_in_float32(name):
    """As DeepSeek's does for a model in bfloat16."""
    block, (x, chosen, weights) = make_block(name, (1,), torch.bfloat16), rows(9, torch.bfloat16)
    found = block(x, chosen, weights.float())
    assert found.dtype == torch.bfloat16 and torch.equal(found, block(x, chosen, weights))


@every_set
@pytest.mark.parametrize("path", ["loop", "grouped", "gathered"])
@torch.no_grad()
def test_autocast_computes_in_bfloat16(name, path, monkeypatch):
    sizes = (EXPERTS, 16, 8)
    block, given = make_block(name, (1,), torch.float32, sizes, scale=8), rows(9, torch.float32, 16)
    expected = block(*given)
    monkeypatch.setattr(block.experts, "factors", getattr(block.experts, path))
    with torch.autocast("cpu", torch.bfloat16):
        found = block(*given)
    assert 1e-6 < relative(found, expected) <= 3e-2


@every_set
@for_each("tokens", [1, 3])
@torch.no_grad()
def test_few_rows_may_copy_their_factors(name, tokens, monkeypatch):
    block, given = make_block(name, (1,)), rows(tokens)
    expected = reference(block, *given)
    assert relative(block(*given), expected) <= 1e-12
    monkeypatch.setattr(block.experts, "factors", block.experts.gathered)
    assert relative(block(*given), expected) <= 1e-12


@for_each("dtype", [torch.bfloat16, torch.float32, torch.float64])
@for_each("tokens, path", [(1, "gathered"), (16, "gathered"), (17, "loop")])  # of two experts each
def test_few_rows_take_their_path_without_gradients(dtype, tokens, path, monkeypatch):
    block, given = make_block("wrappers", dtype=dtype), rows(tokens, dtype)
    taken = []
    for name in ("gathered", "grouped", "loop"):
        function = getattr(block.experts, name)
        monkeypatch.setattr(block.experts, name, lambda *a, f=function, n=name: (taken.append(n), f(*a))[1])
    with torch.no_grad():
        block(*given)
    block(*given)
    assert taken == [path, "loop"]  # copies would have whole stacks as gradients


@every_set
@for_each("chosen", [[0], [4], [1, 3]])
def test_experts_without_tokens(name, chosen):
    """The output is that of the others, the others' factors alone get gradient, and the gradient is not None."""
    block, (x, _, weights) = make_block(name), rows(6)
    routed = torch.tensor([chosen] * 6)
    found = block(x, routed, weights[:, : len(chosen)])
    assert relative(found, reference(block, x, routed, weights[:, : len(chosen)])) <= 1e-12
    found.square().sum().backward()
    for factor, parameter in block.experts.named_parameters():
        assert parameter.grad is not None
        assert [e for e in range(EXPERTS) if parameter.grad[e].abs().max() > 0] == chosen, factor


def gradients(block: Block, function: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Of a random linear function of the output; x, weights and all parameters by name."""
    given = {"x": x.detach().requires_grad_(), "weights": weights.detach().requires_grad_()}
    given |= {f"parameter {name}": p for name, p in block.named_parameters()}
    out = function(given["x"], chosen, given["weights"])
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(out, list(given.values()), direction.to(out.dtype))
    return dict(zip(given, found, strict=True))


@every_set
@every_exempt
def test_gradients_are_those_of_the_naive_experts(name, exempt):
    block, given = make_block(name, exempt), rows(11)
    found = gradients(block, block, *given)
    expected = gradients(block, lambda *g: naive_experts(block.experts, *g), *given)
    assert found.keys() == expected.keys() and len(found) > 5
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).norm() <= 1e-11 * gradient.norm() + 1e-14, parameter


@for_each("name", ["unequal", "mixed down"])
def test_gradients_are_those_of_finite_differences(name):
    block = make_block(name, (2,))
    x, chosen, weights = rows(3)
    names = [name for name, _ in block.named_parameters()]

    def forward(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        held = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(block, held, (x, chosen, weights))

    given = (x.requires_grad_(), weights.requires_grad_(), *block.parameters())
    assert torch.autograd.gradcheck(forward, given, atol=1e-6)


def routed_in_groups(block: Block) -> Any:
    """forward with the path that GPUs take."""

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        core = block.shared_core
        if block.dense_experts is not None:
            for expert in block.dense_experts.ids:
                weights = weights.masked_fill(chosen == expert, 0.0)
        gate, up = core["gate_proj"](x), core["up_proj"](x)
        inner, outer = block.experts.grouped(x, gate, up, chosen, weights)
        return core["down_proj"](inner) + outer

    return forward


def looped(block: Block) -> Any:
    """The same with the path that CPUs take."""

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        core = block.shared_core
        gate, up = core["gate_proj"](x), core["up_proj"](x)
        inner, outer = block.experts.loop(x, gate, up, chosen, weights)
        return core["down_proj"](inner) + outer

    return forward


@every_set
@for_each("tokens", [1, 5, 40])  # with one token, three of five experts have no row
@for_each("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_grouped_products_are_the_loop(name, tokens, dtype, tolerance):
    """Forward and all gradients."""
    block = make_block(name, (), dtype, (EXPERTS, 16, 8), scale=8)
    assert block.experts._aligned()
    x, chosen, weights = rows(tokens, dtype, 16)
    with torch.no_grad():
        found, expected = (path(block)(x, chosen, weights) for path in (routed_in_groups, looped))
        assert found.dtype == dtype and relative(found, expected) <= tolerance
    one, other = (gradients(block, path(block), x, chosen, weights) for path in (routed_in_groups, looped))
    for parameter, gradient in other.items():
        assert one[parameter].dtype == gradient.dtype
        assert relative(one[parameter], gradient) <= 3 * tolerance, parameter


@for_each("sizes, scale", [((5, 12, 8), 8), ((5, 16, 8), 3)])
def test_odd_sizes_are_not_for_grouped_products(sizes, scale):
    assert not make_block("wrappers", (), torch.float32, sizes, scale).experts._aligned()


@every_set
def test_grouped_products_compile_without_a_break(name):
    """One graph, forward and backward, for any number of tokens: nothing waits for the device.

    In bfloat16, for which alone torch can trace a grouped product.
    """
    block = make_block(name, (), torch.bfloat16, (EXPERTS, 16, 8), scale=8)
    torch._dynamo.reset()  # it gives up on a function that it compiled eight times, here for other forms
    compiled = torch.compile(routed_in_groups(block), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 9):
        given = rows(tokens, torch.bfloat16, 16)
        found = gradients(block, compiled, *given)
        for parameter, gradient in gradients(block, routed_in_groups(block), *given).items():
            assert relative(found[parameter], gradient) <= 2e-2, parameter


@every_set
@torch.no_grad()
def test_dense_weight_is_the_documented_formula(name):
    block = make_block(name)
    tensors = block.state_dict()
    for projection in PROJECTIONS:
        shape = (HIDDEN, EXPERT_HIDDEN) if projection == "down" else (EXPERT_HIDDEN, HIDDEN)
        for expert in range(EXPERTS):
            found = dense_weight(tensors, projection, expert)
            assert found.shape == shape and found.dtype == torch.float64
            assert relative(found, reference_weight(block, projection, expert)) <= 1e-12


@every_set
@torch.no_grad()
def test_dense_weight_of_bfloat16_factors_is_computed_in_float32(name):
    block = make_block(name, (), torch.bfloat16)
    found = dense_weight(block.state_dict(), "gate", 1)
    assert found.dtype == torch.float32
    assert relative(found, reference_weight(block.double(), "gate", 1)) <= 1e-6


@every_set
def test_stated_shapes_and_counts_are_those_of_the_module(name):
    """Also that a wrapper of rank 0 has no parameters, and what rules like `shared_core|wrapper` find."""
    block = make_block(name)
    named = {name: tuple(p.shape) for name, p in block.named_parameters()}
    stated: dict[str, tuple[int, ...]] = {}
    for projection, form in block.experts.forms.items():
        sizes = (form, projection, EXPERTS, HIDDEN, EXPERT_HIDDEN)
        shapes = factor_shapes(*sizes)
        stated |= {f"experts.{name}": shape for name, shape in shapes.items()}
        core = f"shared_core.{projection}_proj.weight"
        stated[core] = core_shape(form, projection, HIDDEN, EXPERT_HIDDEN)
        own = [shape for name, shape in named.items() if f"_{projection}_" in f"{name}_" or name == core]
        assert stored_parameters(*sizes) == sum(torch.Size(shape).numel() for shape in own)
        assert make_form(form.shape, projection, *free_and_core_rank(form, projection), form.groups) == form
    assert stated == named


def test_parameters_have_the_names_that_rules_are_written_for():
    f, d = EXPERT_HIDDEN, HIDDEN
    named = {name: tuple(p.shape) for name, p in make_block("unequal", (3,)).named_parameters()}
    expected = {"dense_experts.gate_up_proj": (1, 2 * f, d), "dense_experts.down_proj": (1, d, f)}
    for projection, (rows, columns) in {"gate": (f, d), "up": (f, d), "down": (d, f)}.items():
        expected[f"shared_core.{projection}_proj.weight"] = (rows, columns)
        # each wrapper's product has the shape of what it is added to: the matrix, or a square on the core's short side
        inner, outer = ((rows, columns), (f, f)) if projection != "down" else ((f, f), (rows, columns))
        for wrapper, rank, (left, right) in (("input", 1, inner), ("output", 3, outer)):
            expected[f"experts.{wrapper}_wrapper_{projection}_left"] = (EXPERTS, rank, left)
            expected[f"experts.{wrapper}_wrapper_{projection}_right"] = (EXPERTS, right, rank)
    assert named == expected


@for_each("exempt", [(), (1,)])
def test_every_input_calls_the_same_modules(exempt):
    """ZeRO-3 ends the run when ranks call different modules: an expert without tokens must not show in the calls."""
    block = make_block("wrappers", exempt)
    calls: list[str] = []
    for name, module in block.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    seen = []
    for expert in range(EXPERTS):
        calls.clear()
        block(rows(4)[0], torch.full((4, 1), expert), torch.ones(4, 1).double())
        seen.append(list(calls))
    assert all(calls == seen[0] for calls in seen) and len(seen[0]) == 5 + len(exempt)
    assert not list(block.experts.children())  # the activation among them, and what is held and not owned


def test_a_new_wrapper_is_the_core_alone():
    """Zero left factors; a basis is random."""
    torch.manual_seed(0)
    block = Block(SETS["unequal"], (), (EXPERTS, HIDDEN, EXPERT_HIDDEN)).double()
    x, chosen, _ = rows(4)
    core = block.shared_core
    expected = core["down_proj"](nn.functional.silu(core["gate_proj"](x)) * core["up_proj"](x))
    assert relative(block(x, chosen, torch.full((4, ACTIVE), 1 / ACTIVE).double()), expected) <= 1e-12
    basis = Block(SETS["two bases of 3"], (), (EXPERTS, HIDDEN, EXPERT_HIDDEN)).experts
    assert all(p.std() > 0.1 for p in basis.parameters())
    assert basis.basis_group_gate.tolist() == [0, 1, 0, 1, 0]


def test_no_tokens_at_all():
    for path in (looped, routed_in_groups):
        block = make_block("wrappers", (), torch.float32, (EXPERTS, 16, 8), scale=8)
        given = rows(3, torch.float32, 16)
        found = path(block)(*(tensor[:0] for tensor in given))
        assert found.shape == (0, 16)
