"""Routers that lie inside what their family declares as its router: AFMoE, HunYuan, Gemma 4; and what is refused."""

import pytest
import torch

from megakd.config.objective import OnlineConfig, SarConfig
from megakd.data.records import Batch
from megakd.errors import UserError
from megakd.models.loading import load_model
from megakd.models.router_update import TeacherRouters, read_update, write_update
from megakd.models.routers import find_routers
from megakd.models.routing import choices, weighed
from megakd.objectives.online import OnlineDistillation
from megakd.objectives.sar import SarDistillation
from tests.models.families import TOKENS, small_model
from tests.models.test_router_update import FACTS, learned
from tests.objectives.sar import dense_student

INSIDE = {"afmoe": "mlp.router.gate", "hunyuan_v1_moe": "mlp.gate.wg", "gemma4_text": "router.proj"}
BATCH = Batch(TOKENS, TOKENS.roll(-1, 1), torch.arange(12).expand(2, 12))
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", INSIDE)
def test_a_matrix_inside_the_declared_router_is_found(family):
    """Its logits, not the probabilities that Gemma 4's router gives first."""
    model = small_model(family)
    found = find_routers(model, "teacher")
    expected = [name for name, _ in model.named_modules() if name.endswith(f".{INSIDE[family]}")]
    assert [router.name for router in found] == expected != []
    with choices(found) as chosen, torch.no_grad():
        model(TOKENS, use_cache=False)
    assert all(not torch.allclose(choice.logits.sum(-1), torch.ones(())) for choice in chosen)
    assert [choice.experts.shape for choice in chosen] == [(TOKENS.numel(), 2)] * len(found)


@pytest.mark.parametrize("family", INSIDE)
def test_only_the_matrix_learns_and_the_teacher_as_it_was_is_kept(family):
    teacher = small_model(family)
    objective = SarDistillation(dense_student(vocab_size=128), teacher, SarConfig(), 128)
    report = objective(BATCH)
    report.total.backward()
    assert report.terms["teacher_drift"].item() == report.terms["router_anchor"].item() == 0
    trained = {name for name, parameter in teacher.named_parameters() if parameter.requires_grad}
    assert trained == {f"{router.name}.weight" for router in objective.found}
    assert all(parameter.grad.any() for parameter in objective.routers.parameters())
    with torch.no_grad():
        for parameter in objective.routers.parameters():
            parameter.add_(torch.randn_like(parameter))
    terms = objective(BATCH).terms
    assert terms["teacher_drift"].item() > 0 and terms["router_anchor"].item() > 0
    assert terms["kl_frozen"].item() == pytest.approx(report.terms["kl_t1"].item(), rel=1e-5)


@pytest.mark.parametrize("family", INSIDE)
def test_routing_weights_change_by_factors(family):
    """A factor of 0 takes an expert away, whatever router gives the weights."""
    model = small_model(family)
    found = find_routers(model, "teacher")
    for router in found:
        router.take(4)
    factors = [torch.tensor([0.0, 1.0, 1.0, 1.0]) for _ in found]
    with weighed(found, factors) as routed, torch.no_grad():
        model(TOKENS, use_cache=False)
    for one in routed:
        assert (one.weights[one.experts == 0] == 0).all() and (one.unchanged[one.experts == 0] != 0).all()


@pytest.mark.parametrize("family", INSIDE)
def test_an_update_is_written_and_read_by_the_names_of_the_files(family, tmp_path):
    small_model(family).save_pretrained(tmp_path / "teacher")
    teacher = TeacherRouters(tmp_path / "teacher")
    parameters = dict(load_model(tmp_path / "teacher", torch.float32).named_parameters())
    assert teacher.stored and all(torch.equal(teacher.tensor(name), parameters[name]) for name in teacher.stored)
    tensors = learned(teacher)
    write_update(tmp_path / "update", tensors, teacher, FACTS)
    again = teacher.check(read_update(tmp_path / "update" / "router_update.safetensors"), "update")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "family, reason",
    [
        (
            "zaya",
            r"teacher: the router model\.layers\.0\.mlp\.gate \(ZayaRouter\) cannot be .* no matrix in it has one",
        ),
        ("longcat_flash", r"\(LongcatFlashTopkRouter\) cannot be trained alone: no matrix in it has one row for each"),
        ("llama4_text", r"\(Llama4Router\) cannot be trained alone: it does not give \(logits, weights, experts\)"),
        ("deepseek_v4", r"\(DeepseekV4HashRouter\) cannot be trained alone: transformers does not declare it"),
    ],
)
def test_other_routers_are_refused_by_name_and_reason(family, reason):
    with pytest.raises(UserError, match=reason):
        find_routers(small_model(family), "teacher")


def test_layers_without_fixed_routers_are_found_by_patterns():
    """The first layers of DeepSeek-V4 take experts by token id, the others by logits."""
    model = small_model("deepseek_v4")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.endswith(".mlp.gate")}
    free = [name for name, kind in kinds.items() if kind == "DeepseekV4TopKRouter"]
    found = find_routers(model, "teacher", [rf"^{name}$" for name in free])
    assert [router.name for router in found] == free != []


def test_phimoe_learns_nothing_and_takes_the_experts_that_it_always_took():
    """Its weights in evaluation are 1 whatever the logits, and its code chooses two experts for any top_k."""
    student = dense_student(vocab_size=128)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.router learns nothing: outside training"):
        SarDistillation(student, small_model("phimoe"), SarConfig(), 128)
    online = OnlineDistillation(student, small_model("phimoe"), OnlineConfig(routing="all"), 128)
    with pytest.raises(UserError, match=r"mlp\.router: a token takes 2 experts where top_k says 4"):
        online(BATCH)


def test_one_normalised_expert_with_a_small_number_in_the_sum_teaches_nothing():
    """LFM2 divides by the sum + 1e-6: a gradient of 1e-6 was taken for one."""
    with pytest.raises(UserError, match=r"gives model\.layers\.1\.feed_forward\.gate one expert a token"):
        SarDistillation(dense_student(vocab_size=128), small_model("lfm2_moe", num_experts_per_tok=1), SarConfig(), 128)
