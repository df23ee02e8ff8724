import pytest
import torch
from torch import nn

from megakd.errors import UserError
from megakd.models.routers import describe, find_routers
from megakd.models.routing import Counts, choices, copies, experts_for, in_place_of, learns_nothing, scheduled, weighed
from tests.models.students import EXPERTS, FAMILIES, HIDDEN, make_model

TOKENS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
NORMALISED = ("qwen3_moe", "mixtral", "deepseek_v3")  # with the tests' configurations


@pytest.fixture(params=FAMILIES)
def model(request):
    return make_model(request.param)


class Block(nn.Module):
    """A block as models that come with code of their own have it: a plain Linear chooses, the block knows how many."""

    def __init__(self, name: str):
        super().__init__()
        self.top_k, self.name = 2, name
        setattr(self, name, nn.Linear(HIDDEN, EXPERTS, bias=False))
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        self.gate_proj = nn.Linear(HIDDEN, EXPERTS)  # of the router's own shape

    def forward(self, x):
        weights, chosen = getattr(self, self.name)(x).softmax(-1).topk(self.top_k)
        outs = torch.stack([expert(x) for expert in self.experts], -2)
        return (outs.gather(-2, chosen[..., None].expand(*chosen.shape, HIDDEN)) * weights[..., None]).sum(-2)


class Odd(nn.Module):
    def __init__(self, name: str = "wg"):
        super().__init__()
        self.embed_tokens = nn.Embedding(61, HIDDEN)
        self.layers = nn.ModuleList(Block(name) for _ in range(2))

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_every_family_has_one_router_a_layer_of_experts(model):
    found = find_routers(model, "teacher")
    blocks = [name.removesuffix(".experts") for name, _ in model.named_modules() if name.endswith(".mlp.experts")]
    assert [router.name for router in found] == [f"{block}.gate" for block in blocks] and len(found) == 2
    for router in found:
        assert router.module.weight.shape == (router.experts, HIDDEN) and router.experts == EXPERTS
        assert router.active == 2 and router.block.get_submodule(router.path) is router.module
    assert describe(found) == f"2 routers, 2 of 4 experts: {blocks[0]}.gate … {blocks[1]}.gate"
    # neither gate_proj nor the gate of a shared expert
    assert [r.name for r in find_routers(model, "teacher", ["gate", "router"])] == [r.name for r in found]


@pytest.mark.parametrize("name", ["wg", "gate", "router"])
def test_plain_linears_are_found_by_role_and_shape(name):
    found = find_routers(Odd(name), "teacher")
    assert [router.name for router in found] == [f"layers.{i}.{name}" for i in range(2)]


def test_a_router_must_say_how_many_it_chooses():
    model = Odd()
    del model.layers[0].top_k
    with pytest.raises(UserError, match=r"teacher: neither layers.0.wg nor the module around it says in top_k"):
        find_routers(model, "teacher")


def test_patterns_find_odd_ones_and_never_projections():
    model = Odd()
    assert [r.name for r in find_routers(model, "teacher", [r"0\.wg$"])] == ["layers.0.wg"]
    assert [r.name for r in find_routers(model, "teacher", ["gate", "wg"])] == ["layers.0.wg", "layers.1.wg"]
    with pytest.raises(UserError, match=r"'gate' find no matrix in teacher but projections of experts"):
        find_routers(model, "teacher", ["gate"])
    with pytest.raises(UserError, match=r"'nothing' find no matrix in teacher"):
        find_routers(model, "teacher", ["nothing"])
    with pytest.raises(UserError, match=r"small: no module with a matrix \[experts, hidden\].*router_patterns"):
        find_routers(nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)] * 3)), "small")


def test_another_number_of_experts_is_taken(model):
    found = find_routers(model, "teacher")
    for active in (1, 3, EXPERTS):
        for router in found:
            router.take(active)
        with torch.no_grad(), choices(found) as heard:
            model(TOKENS)
        assert [choice.experts.shape for choice in heard] == [(TOKENS.numel(), active)] * 2
        assert [choice.logits.shape for choice in heard] == [(TOKENS.numel(), EXPERTS)] * 2
    with torch.no_grad():
        model(TOKENS)
    assert len(heard) == 2  # nothing listens any more


def test_plain_linears_have_no_weights_to_change():
    model = Odd()
    with (
        pytest.raises(
            UserError, match=r"layers.0.wg: gives no routing weights .* another objective.routing than learned"
        ),
        weighed(find_routers(model, "teacher"), None),
    ):
        model(TOKENS)


def test_choices_of_plain_linears():
    model = Odd()
    found = find_routers(model, "teacher")
    with choices(found) as heard:
        model(TOKENS)
    assert heard[0].logits.requires_grad and torch.equal(heard[0].experts, heard[0].logits.topk(2).indices)


def test_the_model_as_it_was_can_be_asked_again(model):
    with torch.no_grad():
        before = model(TOKENS).logits
        found = find_routers(model, "teacher")
        kept = copies(found)
        for router in found:
            router.module.weight.normal_()
            router.take(1)
        changed = model(TOKENS).logits
        with in_place_of(found, kept):
            assert torch.equal(model(TOKENS).logits, before)
        assert torch.equal(model(TOKENS).logits, changed) and not torch.equal(changed, before)
    assert [router.taken for router in found] == [1, 1]


@torch.no_grad()
def test_every_token_takes_its_own_number_of_experts(model):
    """Whatever the family: unsorted choices, a correction bias, weights that are not normalised."""
    router = find_routers(model, "teacher")[0]
    hidden = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(2))
    counts = torch.arange(18) % (EXPERTS + 1) + 1  # one more than there are, too
    router.take(EXPERTS)
    with weighed([router], None, Counts(counts, 1)) as routed:
        out = router.block(hidden)
    assert router.taken == EXPERTS
    (found,) = routed
    for n, count in enumerate(counts.clamp(max=EXPERTS).tolist()):
        router.take(count)
        with choices([router]) as alone:
            expected = router.block(hidden)
        torch.testing.assert_close(out.flatten(0, 1)[n], expected.flatten(0, 1)[n], rtol=1e-5, atol=1e-6)
        taken = found.experts[n][found.weights[n] != 0]
        assert sorted(taken.tolist()) == sorted(alone[0].experts[n].tolist())


@torch.no_grad()
def test_experts_of_a_window_count_by_its_own_factors(model):
    """A token's weights keep their sum; by the slow loop over tokens."""
    router = find_routers(model, "teacher")[0]
    hidden = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(2))
    factors = torch.tensor([[1.0, 2.0, 0.5, 4.0], [0.1, 1.0, 3.0, 1.0]])
    with weighed([router], [factors], Counts(torch.tensor([1, 2] * 9), 1)) as routed:
        router.block(hidden)
    (found,) = routed
    for n in range(18):
        counted = found.unchanged[n] * factors[n // 9, found.experts[n]]
        expected = counted * found.unchanged[n].sum() / counted.sum()
        torch.testing.assert_close(found.weights[n], expected)
        assert (found.weights[n] != 0).sum() == 1 + n % 2


def test_experts_for_a_capacity_are_those_of_the_schedule():
    router = find_routers(Odd(), "teacher")[0]
    capacity = torch.linspace(0, 1, 97)
    for first, last in ((1, 4), (4, 1), (2, 2), (1, 2)):
        found = experts_for(capacity, first, last).tolist()
        assert found == [scheduled(router, "learned", first, last, share) for share in capacity.tolist()]


def test_one_expert_with_normalised_weights_teaches_a_router_nothing(model):
    family = model.config.model_type
    for router in find_routers(model, "teacher"):
        assert not learns_nothing(router)
        router.take(1)
        assert learns_nothing(router) == (family in NORMALISED), family
        assert router.module.weight.grad is None


def test_learns_nothing_agrees_with_a_plain_block():
    assert not any(learns_nothing(router) for router in find_routers(Odd(), "teacher"))
