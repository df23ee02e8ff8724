import pytest
import torch
from torch import nn
from torch.nn import functional

from megakd.models.naive_experts import naive_experts
from megakd.models.shared_core import DenseExperts, SharedCoreExperts, core_shape
from megakd.serve.own_experts import OwnExperts, share_of
from tests.serve.serving import FORMS

EXPERTS, HIDDEN, INNER = 6, 24, 16
PLACEMENTS = {
    "in a row": [[0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]],
    "in turns": [[0, -1, 1, -1, 2, -1], [-1, 0, -1, 1, -1, 2]],
    "unequal": [[0, 1, 2, 3, 4, -1], [-1, -1, -1, -1, -1, 0]],
}


def layer(kind, experts, forms, dense):
    core = nn.ModuleDict()
    for projection, form in forms.items():
        rows, columns = core_shape(form, projection, HIDDEN, INNER)
        core[f"{projection}_proj"] = nn.Linear(columns, rows, bias=False)
    exempt = DenseExperts(dense, HIDDEN, INNER, functional.silu) if dense else None
    made = kind(experts, HIDDEN, INNER, forms, functional.silu, core, exempt)
    return made, nn.ModuleDict({"shared_core": core, "experts": made} | ({"dense_experts": exempt} if exempt else {}))


@pytest.mark.parametrize("dense", [(), (4,), (0, 4, 5)])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("forms", [forms for forms in FORMS if forms])
@torch.no_grad()
def test_ranks_sum_to_the_whole_layer(forms, placement, dense):
    torch.manual_seed(0)
    whole, modules = layer(SharedCoreExperts, EXPERTS, forms, dense)
    for parameter in modules.parameters():
        parameter.normal_(std=0.3)
    x, weight = torch.randn(9, HIDDEN), torch.rand(9, 2)
    expert = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(9)])
    total = torch.zeros_like(x)
    for places in PLACEMENTS[placement]:
        share = share_of(places, dense)
        own, parts = layer(OwnExperts, len(share.experts), forms, share.dense_ids)
        state = {name: share.of(name, tensor) for name, tensor in modules.state_dict().items()}
        parts.load_state_dict({name: state[name] for name in parts.state_dict()})
        total += own(x, torch.tensor(places)[expert], weight)
    expected = naive_experts(whole, x, expert, weight)
    assert (total - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forms", [forms for forms in FORMS if forms])
@torch.no_grad()
def test_rank_without_rows_adds_nothing(forms, dtype):
    own, modules = layer(OwnExperts, 2, forms, ())
    modules.to(dtype)
    out = own(torch.randn(3, HIDDEN, dtype=dtype), torch.full((3, 2), -1), torch.rand(3, 2, dtype=dtype))
    assert out.dtype == dtype and not out.any()
