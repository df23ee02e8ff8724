import copy
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import Qwen3MoeForCausalLM

from megakd.config.objective import SarConfig
from megakd.config.train import LrRule, OptimConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch
from megakd.engine.base import saved_buffers
from megakd.engine.optim import build_optimizer
from megakd.errors import UserError
from megakd.losses.divergence import Divergence, divergence_terms
from megakd.models.loading import load_model
from megakd.models.offload import offload, offloaded
from megakd.models.tiny import tiny_moe_config
from megakd.objectives.sar import SarDistillation
from tests.conftest import SMALL, VOCABULARY
from tests.models.students import FAMILIES, make_model
from tests.objectives.sar import dense_student

LENGTH = 37  # longer than the windows, so that every row ends in padding


@pytest.fixture(scope="module")
def batch(dataset) -> Batch:
    packed = [i for i in range(len(dataset)) if len(dataset[i].starts) > 1]
    return collate([dataset[i] for i in (packed[0], 1, packed[1])], LENGTH, whole=True)._replace(targets=None)


@pytest.fixture
def made(teacher):
    """made(objective fields, sar fields): the objective over the tests' teacher, in float32."""

    def make(config: dict[str, Any] | None = None, teach: Any = None, **sar: Any) -> SarDistillation:
        fields = SarConfig(**{"alpha": 0.7, "temperature": 2.0, "anchor": 0.0, **(config or {}), **sar})
        model = load_model(teacher, torch.float32) if teach is None else teach
        return SarDistillation(dense_student(), model, fields, VOCABULARY)

    return make


def logits(model: Any, batch: Batch) -> Any:
    out = model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
    return out[batch.labels != IGNORED][:, :VOCABULARY].double()


def reference(objective: SarDistillation, batch: Batch) -> Any:
    """The formula on whole logits."""
    student, teacher = logits(objective.student, batch), logits(objective.held[0], batch)
    labels = batch.labels[batch.labels != IGNORED]
    ce = functional.cross_entropy(student, labels, reduction="sum")
    p, q = (each.div(2.0).log_softmax(-1) for each in (teacher, student))
    return 0.3 * ce + 0.7 * 4 * (p.exp() * (p - q)).sum()


def gradients(total: Any, objective: SarDistillation) -> dict[str, Any]:
    named = dict(objective.named_parameters())
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def test_loss_and_gradients_are_those_of_the_formula(made, batch):
    objective = made()
    report = objective(batch)
    expected = reference(objective, batch)
    assert report.total.item() == pytest.approx(expected.item(), rel=1e-6)
    found, wanted = gradients(report.total, objective), gradients(expected, objective)
    routers = [name for name in found if name.startswith("routers.")]
    assert routers == [f"routers.model:layers:{i}:mlp:gate.weight" for i in range(2)]
    for name, gradient in found.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=2e-5 * wanted[name].abs().max().item())


def test_nothing_of_the_teacher_but_its_routers_is_trained(made, batch):
    objective = made(anchor=0.5, entropy=0.1, balance=0.1)
    report = objective(batch)
    report.total.backward()
    teacher = objective.held[0]
    trained = {name for name, p in teacher.named_parameters() if p.grad is not None or p.requires_grad}
    assert trained == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert not any(name.startswith("held") for name in objective.state_dict())


def test_nothing_before_the_first_router_is_kept_for_backward(made, batch):
    """The teacher's embedding and its first attention record no graph."""
    objective, seen = made(drift_steps=0), {}
    layers = objective.held[0].model.layers
    layers[0].self_attn.register_forward_hook(lambda m, i, out: seen.update(first=out[0].requires_grad))
    layers[1].self_attn.register_forward_hook(lambda m, i, out: seen.update(second=out[0].requires_grad))
    objective(batch)
    assert seen == {"first": False, "second": True}


def test_forgotten_activations_change_nothing(made, batch):
    plain, frugal = made(entropy=0.1, balance=0.1), made(entropy=0.1, balance=0.1)
    frugal.checkpoint_activations()
    frugal.student.train()
    kept: list[int] = []
    for objective in (plain, frugal):
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective(batch).total.backward()
        kept.append(total)
    assert kept[1] < 0.8 * kept[0]
    for (name, one), (_, other) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("again", [False, True])
def test_an_offloaded_teacher_teaches_the_same(made, batch, again):
    """Also where its activations are forgotten, and with the teacher as it was in its place (drift_steps)."""
    plain, away = made(entropy=0.1, drift_steps=1), made(entropy=0.1, drift_steps=1)
    teacher = away.held[0]
    offload(teacher, torch.device("cpu"))
    (away.checkpoint_activations if again else away.checkpoint_teacher)()
    away.student.train()
    reports = [objective(batch) for objective in (plain, away)]
    for report in reports:
        report.total.backward()
    assert reports[0].terms == reports[1].terms and "teacher_drift" in reports[0].terms
    for (name, one), (_, other) in zip(plain.named_parameters(), away.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert not offloaded(teacher) & {id(parameter) for parameter in away.parameters()}


def test_terms_of_the_routers(made, batch):
    """Their sums over counted positions, and their weights in the total."""
    plain, weighted = made(), made(anchor=0.5, entropy=0.25, balance=0.125)
    with torch.no_grad():
        for objective in (plain, weighted):
            for module in objective.routers.values():
                module.weight.mul_(1.5)
    base, report = plain(batch), weighted(batch)
    counted = (batch.labels != IGNORED).sum().item()
    anchor, certainty, balance = (
        report.terms[f"router_{n}"].item() / counted for n in ("anchor", "certainty", "balance")
    )
    assert anchor == pytest.approx(0.25, rel=1e-5)  # |0.5 W0|^2 / |W0|^2
    assert 0 < certainty < 1 < balance < 4
    extra = counted * (0.5 * anchor + 0.25 * certainty + 0.125 * balance)
    assert report.total.item() == pytest.approx(base.total.item() + extra, rel=1e-6)


def test_alarms_compare_with_the_teacher_as_it_was(made, batch):
    objective = made(drift_steps=3)
    terms = objective(batch).terms
    assert terms["teacher_drift"] == pytest.approx(0.0, abs=1e-3) and terms["kl_frozen"] == pytest.approx(
        terms["kl_t1"].item(), rel=1e-5
    )
    expected = functional.cross_entropy(
        logits(objective.held[0], batch), batch.labels[batch.labels != IGNORED], reduction="sum"
    )
    assert terms["teacher_ce"].item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        for module in objective.routers.values():
            module.weight.neg_()
    objective.at(0.0, 1)
    assert "kl_frozen" not in objective(batch).terms
    objective.at(0.0, 3)
    moved = objective(batch).terms
    assert moved["kl_frozen"].item() == pytest.approx(terms["kl_frozen"].item(), rel=1e-5)
    assert moved["teacher_drift"] > 1 and moved["kl_t1"] != terms["kl_t1"]
    assert made(drift_steps=0)(batch).terms.keys() == moved.keys() - {"kl_frozen", "teacher_drift"}


def test_padding_has_no_say(made, batch):
    objective = made(anchor=0.5, entropy=0.1, balance=0.1)
    last = (batch.labels != IGNORED).int().cumsum(1).argmax(1)
    padded = torch.arange(LENGTH) > last[:, None] + 1
    assert padded.any()
    changed = batch._replace(tokens=torch.where(padded, 7, batch.tokens))
    assert not torch.equal(changed.tokens, batch.tokens)
    one, other = objective(batch), objective(changed)
    assert one.total.item() == pytest.approx(other.total.item(), rel=1e-6)
    for name in one.terms:
        assert one.terms[name].item() == pytest.approx(other.terms[name].item(), rel=1e-5, abs=1e-5), name


def test_windows_count_the_same_alone_and_together(made, batch):
    objective = made(anchor=0.5, entropy=0.1, balance=0.1)
    whole = objective(batch)
    parts = [objective(Batch(*(field[i : i + 1] for field in batch[:3]))) for i in range(3)]
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-6)
    for name, value in whole.terms.items():
        assert sum(part.terms[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-5, abs=1e-4), name


def test_a_batch_without_labels_is_zero_with_a_live_graph(made, batch):
    objective = made(anchor=0.5, entropy=0.1, balance=0.1)
    report = objective(batch._replace(labels=torch.full_like(batch.labels, IGNORED)))
    assert report.total.item() == 0
    assert all(not gradient.any() for gradient in gradients(report.total, objective).values())


@pytest.mark.parametrize(
    "routing, counts",
    [
        ({"routing": "trained"}, [2, 2, 2]),
        ({"routing": "all"}, [4, 4, 4]),
        ({"routing": "top_m", "initial_top_k": 2, "final_top_k": 4}, [2, 3, 4]),
        ({"routing": "top_m", "initial_top_k": 4, "final_top_k": 2}, [4, 3, 2]),
        ({"routing": "top_m", "initial_top_k": 2, "final_top_k": 9}, [2, 4, 4]),
    ],
)
def test_experts_a_token_follow_the_rule(made, routing, counts):
    objective, found = made(**routing), []
    for share in (0.0, 0.5, 1.0):
        objective.at(share)
        found.append({router.taken for router in objective.found})
    assert found == [{count} for count in counts]


@pytest.mark.parametrize("normalised", [True, False])
def test_one_normalised_expert_is_refused_with_the_reason(made, normalised):
    torch.manual_seed(0)
    single = Qwen3MoeForCausalLM(tiny_moe_config(VOCABULARY, **{**SMALL, "norm_topk_prob": normalised}))
    single.config.num_experts_per_tok = 1
    for layer in single.model.layers:
        layer.mlp.gate.top_k = 1
        torch.nn.init.normal_(layer.mlp.gate.weight)
    if not normalised:
        assert made(teach=single).routers
        return
    with pytest.raises(UserError, match=r"routing: trained gives model.layers.0.mlp.gate one expert .* x / x = 1"):
        made(teach=copy.deepcopy(single))
    assert made(teach=single, routing="all").routers


def test_routers_without_a_gradient_end_the_run_after_a_step(made, batch):
    objective = made()
    objective.at(0.0, 0)
    (0 * objective(batch).total).backward()
    with pytest.raises(UserError, match=r"the routers got no gradient in the first step"):
        objective.at(0.1, 1)
    fine = made()
    fine.at(0.0, 0)
    fine(batch).total.backward()
    fine.at(0.1, 1)
    assert not fine.hooks


def test_without_the_teachers_part_routers_learn_by_their_own_terms(made, batch):
    """alpha=0, and the start of a ramp from 0, are no error; the first step with a part of the teacher is looked at."""
    objective, stronger = made({"alpha": (0.0, 0.9)}, entropy=0.1), made({"alpha": 0.0}, entropy=0.2)
    objective.at(0.0, 0)
    report = objective(batch)
    for total in (report.total, stronger(batch).total):
        total.backward()
    for one, other in zip(objective.routers.parameters(), stronger.routers.parameters(), strict=True):
        assert one.grad.any() and torch.allclose(2 * one.grad, other.grad, rtol=1e-4, atol=1e-9)
    ce, certainty = report.terms["ce"].item(), report.terms["router_certainty"].item()
    assert report.total.item() == pytest.approx(ce + 0.1 * certainty, rel=1e-6)
    objective.at(0.5, 1)
    assert objective.hooks
    objective(batch).total.backward()
    objective.at(0.6, 2)
    assert not objective.hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_routers_learn_and_are_restored(family):
    """Buffers too: a correction bias of DeepSeek-V3 is in a checkpoint with its router."""
    teacher, student = make_model(family), dense_student(vocab_size=61)
    objective = SarDistillation(student, teacher, SarConfig(routing="all"), 61)
    tokens = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, tokens.roll(-1, 1), torch.arange(9).expand(2, 9))
    objective(batch).total.backward()
    named = {name: p for name, p in objective.named_parameters() if not name.startswith("student.")}
    assert named and all(p.grad is not None and p.grad.any() for p in named.values())
    saved = {**named, **dict(saved_buffers(objective))}
    beside = {name: torch.full_like(tensor, 0.25) for name, tensor in saved.items() if name.startswith("routers.")}
    objective.restore(beside)
    for name, tensor in (*objective.routers.named_parameters(), *objective.routers.named_buffers()):
        assert (tensor == 0.25).all(), name
    assert ("e_score_correction_bias" in " ".join(beside)) == (family == "deepseek_v3")


@pytest.mark.parametrize("kind, mix", [("reverse_kl", 0.5), ("jsd", 0.3), ("skew_kl", 0.1), ("tvd", 0.5)])
def test_the_divergence_that_is_asked_for_is_trained(made, batch, kind, mix):
    """It was accepted, and the KL trained instead."""
    objective = made({"divergence": kind, "mix": mix})
    student, teacher = logits(objective.student, batch), logits(objective.held[0], batch)
    log_p, log_q = (each.div(2.0).log_softmax(-1) for each in (teacher, student))
    expected = divergence_terms(Divergence(kind, mix), log_p, log_q).sum()
    report, plain = objective(batch), made()(batch)
    assert report.terms["kl"].item() == pytest.approx(expected.item(), rel=1e-5)
    total = 0.3 * report.terms["ce"].item() + 0.7 * 4 * expected.item()
    assert report.total.item() == pytest.approx(total, rel=1e-5) != plain.total.item()
    assert report.terms["kl_t1"].item() == plain.terms["kl_t1"].item()
    slopes = gradients(report.total, objective)
    assert all(slopes[name].any() for name in slopes if name.startswith("routers."))


def test_a_divergence_across_tokenizers_is_refused_by_name(teacher):
    with pytest.raises(UserError, match=r"^objective.divergence: jsd compares .* set objective.divergence=kl"):
        config = SarConfig(divergence="jsd")
        SarDistillation(dense_student(), load_model(teacher, torch.float32), config, VOCABULARY, 61)


@pytest.mark.parametrize(
    "rules, own, expected",
    [
        ((), 0.1, 0.1),  # a teacher whose routers learn at the student's rate collapses
        ((("norm", 1.0),), 0.3, 0.3),
        ((("^routers", 0.5),), 0.1, 0.5),
        ((("^routers", 0.0),), 0.1, None),
        ((), 0.0, None),
    ],
)
def test_routers_without_a_rule_learn_slowly(made, rules, own, expected):
    objective = made(**({} if own == 0.1 else {"router_lr_multiplier": own}))
    rules = tuple(LrRule(pattern=pattern, lr_multiplier=multiplier) for pattern, multiplier in rules)
    optimizer = build_optimizer(objective, rules, OptimConfig(lr=1e-2))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {rates.get(id(p)) for p in objective.routers.parameters()}
    assert len(found) == 1 and found.pop() == (None if expected is None else pytest.approx(1e-2 * expected))
    assert {rates[id(p)] for p in objective.student.parameters()} == {1e-2}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_router_gradients_that_are_not_finite_are_not_called_none(made, batch, value):
    """The engine makes no update of such a step; the first one with finite gradients tells whether there are any."""
    objective = made()
    for step, factor in enumerate((value, value, 1.0)):
        objective.at(0.1 * step, step)
        assert objective.hooks
        (objective(batch).total * factor).backward()
    objective.at(0.3, 3)
    assert not objective.hooks

    none = made()
    for step, factor in enumerate((value, 1.0)):
        none.at(0.0, step)
        router = next(iter(none.routers.parameters()))
        (0 * none(batch).total + factor * (0.0 * router).sum()).backward()
    with pytest.raises(UserError, match=r"the routers got no gradient in the first step"):
        none.at(0.1, 2)
