import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.capture.targets import targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.config.objective import CachedConfig
from megakd.config.tails import DEFAULT
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch, TeacherTargets
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.losses.divergence import Divergence
from megakd.losses.reference import distill_loss, kl_to_targets
from megakd.losses.signals import Sparse, Stored
from megakd.models.loading import load_model
from megakd.models.shared_core import Form
from megakd.models.student import student_class, student_config
from megakd.objectives.cached import CachedDistillation, stored_in

VOCABULARY, TEMPERATURES = 400, [1.0, 2.0]
LENGTH = 37  # longer than the run's windows of 32, so that every row ends in padding
TAILS = ("ghost", "truncated", "sampled", "hybrid")


def facts(profile: str = "topk", draw_temperature: float = 2.0, **changes: Any) -> dict[str, Any]:
    """What a manifest says of its targets, as far as losses ask."""
    drawn = profile != "topk"
    value = {
        "vocab_size": VOCABULARY,
        "top_k": 0 if profile == "sampled" else 16,
        "draws": 12 if drawn else 0,
        "draw_temperature": draw_temperature if drawn else None,
        "temperatures": TEMPERATURES,
        "tails": profile != "sampled",
    }
    return value | changes


def profile_of(tail: str) -> str:
    return tail if tail in ("sampled", "hybrid") else "topk"


@pytest.fixture(scope="module")
def batch(dataset: ShardSet) -> Batch:
    """Five windows, at least one with two documents in it."""
    packed = [i for i in range(len(dataset)) if len(dataset[i].starts) > 1]
    return collate([dataset[i] for i in (packed[0], 1, packed[1], 3, len(dataset) - 1)], LENGTH)


@pytest.fixture(scope="module")
def student(prepared) -> Any:
    """In float64: what remains between it and a reference are mistakes."""
    return load_model(prepared / "student-0", torch.float64).eval()


@pytest.fixture(scope="module")
def teacher_logits(teacher, batch) -> Tensor:
    model = load_model(teacher, torch.float32).eval()  # transformers' experts have no float64
    with torch.no_grad():
        return model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits.double()


def exact(batch: Batch, teacher_logits: Tensor, tail: str = "ghost", temperature: float = 2.0, **changes: Any) -> Batch:
    """The batch with targets that were never rounded to be stored."""
    config = LogitsConfig(
        profile=profile_of(tail), top_k=16, draws=12, draw_temperature=temperature, pmin=1e-2,
        **{"temperatures": TEMPERATURES, **changes},
    )  # fmt: skip
    offsets = torch.rand(batch.labels.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = targets_from_logits(teacher_logits.flatten(0, 1), batch.labels.flatten(), config, offsets)
    return batch._replace(targets=TeacherTargets(*(field.unflatten(0, batch.labels.shape) for field in flat)))


def objective(
    student: Any,
    alpha: float = 0.7,
    temperature: float = 2.0,
    tail: str = "ghost",
    profile: str | None = None,
    **changes: Any,
) -> CachedDistillation:
    config = CachedConfig(alpha=alpha, temperature=temperature, tail=tail)
    return CachedDistillation(student, config, facts(profile or profile_of(tail), temperature, **changes))


def reference(
    student: Any, teacher_logits: Tensor, batch: Batch, alpha: float, temperature: float, tail: str
) -> dict[str, float]:
    """Position by position in Python floats, from both whole distributions; the cached logits say only which ids."""

    def kl(p_logits: Tensor, q_logits: Tensor, ids: list[int], draws: dict[int, float], t: float, tail: str) -> float:
        p, q = torch.softmax(p_logits / t, 0).tolist(), torch.softmax(q_logits / t, 0).tolist()
        mass = sum(p[i] for i in ids)
        if tail == "truncated":
            return sum(p[i] / mass * math.log(p[i] / mass / q[i]) for i in ids)
        p_rest, q_rest = (sum(x for i, x in enumerate(v) if i not in ids) for v in (p, q))
        if tail in ("sampled", "hybrid"):
            head = sum(p[i] * math.log(q[i]) for i in ids)
            drawn = sum(p_rest * share * math.log(q[i]) for i, share in draws.items())
            return -head - drawn + sum(x * math.log(x) for x in p)
        return sum(p[i] * math.log(p[i] / q[i]) for i in ids) + p_rest * math.log(p_rest / q_rest)

    with torch.no_grad():
        logits = student(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
    sums = {"ce": 0.0, "kl": 0.0, "kl_t1": 0.0} | ({} if tail == "sampled" else {"stored_mass": 0.0})
    for row, position in (batch.labels != IGNORED).nonzero().tolist():
        mine, theirs = logits[row, position], teacher_logits[row, position]
        ids, logprobs, _, draw_ids, shares, *_ = (field[row, position].tolist() for field in batch.targets)
        ids = [i for i, x in zip(ids, logprobs, strict=True) if x > -math.inf]
        draws = {i: share for i, share in zip(draw_ids, shares, strict=True) if share}
        sums["ce"] -= torch.log_softmax(mine, 0)[batch.labels[row, position]].item()
        sums["kl"] += kl(theirs, mine, ids, draws, temperature, tail)
        if "stored_mass" in sums:
            sums["stored_mass"] += sum(torch.softmax(theirs, 0)[ids].tolist())
        # the loss itself where it is at 1 and whole, else with a bucket, which needs a head
        sums["kl_t1"] += kl(theirs, mine, ids, draws, 1.0, "ghost" if ids and temperature != 1 else tail)
        if tail == "truncated" and temperature == 1:
            sums["kl_t1"] += kl(theirs, mine, ids, draws, 1.0, "ghost") - kl(theirs, mine, ids, draws, 1.0, tail)
    if tail == "sampled" and temperature != 1:
        del sums["kl_t1"]
    return sums | {"total": (1 - alpha) * sums["ce"] + alpha * temperature**2 * sums["kl"]}


def values(report: Any) -> dict[str, float]:
    return {"total": report.total.item()} | {name: value.item() for name, value in report.terms.items()}


def gradients(module: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    module.zero_grad()
    module(batch).total.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("alpha, temperature", [(0.7, 2.0), (1.0, 1.0), (0.0, 2.0)])
def test_sums_are_those_of_the_reference(student, batch, teacher_logits, alpha, temperature, tail):
    whole = exact(batch, teacher_logits, tail, temperature)
    found = values(objective(student, alpha, temperature, tail)(whole))
    # shares of draws are float32
    tolerance = 1e-9 if tail in ("ghost", "truncated") else 1e-6
    expected = reference(student, teacher_logits, whole, alpha, temperature, tail)
    assert found == pytest.approx(expected, rel=tolerance) and found.keys() == expected.keys()


def test_stored_targets_are_close_to_the_whole_teacher(student, batch, teacher_logits):
    """What the run stored, rounded to bytes; measured: 0.8 % of a KL of 4e-3 a token."""
    found = values(objective(student)(batch))
    assert found == pytest.approx(reference(student, teacher_logits, batch, 0.7, 2.0, "ghost"), rel=2e-2)


def test_batch_has_every_kind_of_position(batch):
    """Borders inside windows, padding after them, and labels: else the next tests would prove nothing."""
    border = (batch.labels[:, :-1] == IGNORED) & (batch.position_ids[:, 1:] == 0)
    assert border[:, :31].any() and (batch.labels[:, 32:] == IGNORED).all() and (batch.labels != IGNORED).sum() > 100


@pytest.mark.parametrize("tail", TAILS)
def test_positions_without_a_label_contribute_nothing(student, batch, teacher_logits, tail):
    """Neither value nor gradient: whatever their targets say, their logits get none."""
    batch = exact(batch, teacher_logits, tail)
    ignored = batch.labels == IGNORED
    spoiled = batch._replace(targets=TeacherTargets(*(field.clone() for field in batch.targets)))
    for field in spoiled.targets:
        field[ignored] = torch.nan if field.is_floating_point() else 7
    module = objective(student, tail=tail)
    assert values(module(spoiled)) == values(module(batch))
    before, after = gradients(module, batch), gradients(module, spoiled)
    assert all(torch.equal(before[name], after[name]) for name in before)
    seen: list[Tensor] = []
    handle = student.model.norm.register_forward_hook(lambda *args: seen.append(args[2]) or args[2].retain_grad())
    module(batch).total.backward()
    handle.remove()
    touched = seen[0].grad.abs().amax(-1) > 0
    assert torch.equal(touched, ~ignored)


def test_padding_and_company_do_not_change_a_window(student, dataset):
    """The sums of a batch are the sums over its windows, each without padding."""
    samples = [dataset[i] for i in range(4)]
    module = objective(student)
    whole = values(module(collate(samples, LENGTH)))
    parts = [values(module(collate([s], len(s.tokens) - 1))) for s in samples]
    assert whole == pytest.approx({name: sum(part[name] for part in parts) for name in whole}, rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_a_batch_without_labels_is_zero_with_a_live_graph(student, batch, teacher_logits, tail, temperature):
    """And it reports the same terms as any other batch: ranks add them up by name."""
    whole = exact(batch, teacher_logits, tail, temperature)
    module = objective(student, temperature=temperature, tail=tail)
    empty = whole._replace(labels=torch.full_like(batch.labels, IGNORED))
    report = module(empty)
    assert report.total.requires_grad and values(report) == dict.fromkeys(values(module(whole)), 0.0)
    assert list(report.terms) == list(module(whole).terms)
    module.zero_grad()
    report.total.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(
    "tail, temperature, profile, known",
    [
        ("ghost", 2.0, "topk", True),
        ("ghost", 2.0, "hybrid", True),
        ("truncated", 3.0, "topk", True),
        ("truncated", 3.0, "hybrid", True),
        ("hybrid", 2.0, "hybrid", True),
        ("sampled", 1.0, "sampled", True),
        ("sampled", 2.0, "sampled", False),
    ],
)
def test_kl_at_one_is_absent_only_where_it_cannot_be_known(
    student, batch, teacher_logits, tail, temperature, profile, known
):
    module = objective(student, temperature=temperature, tail=tail, profile=profile)
    whole = exact(batch, teacher_logits, profile if profile != "topk" else "ghost", temperature=2.0)
    names = ["ce", "kl", *(["kl_t1"] if known else []), *(["stored_mass"] if profile != "sampled" else [])]
    assert list(module(whole).terms) == names


def test_padding_of_the_vocabulary_has_no_effect(student, batch):
    torch.manual_seed(0)
    padded = copy.deepcopy(student)
    padded.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    with torch.no_grad():
        padded.get_input_embeddings().weight[VOCABULARY:].normal_(std=2.0)
    found = values(objective(padded)(batch))
    assert found == pytest.approx(values(objective(student)(batch)), rel=1e-12)
    wrong = values(objective(padded, vocab_size=VOCABULARY + 9)(batch))
    assert wrong["ce"] > 1.01 * found["ce"]


NO_TAIL = "objective.temperature: the logits carry tails for T = 1, 2, not 3"
NO_DRAWS = "objective.tail: {} needs draws, these logits hold none"
NO_HEAD = "objective.tail: {} needs the teacher's most probable tokens"
OTHER_DRAWS = "objective.temperature: the draws were made at T = {}, not {}"
TO_TRUNCATED = "1.33, 2, 4], for every T from 1 to 4, in a new run, or set objective.tail=truncated"
TO_GHOST = "set objective.tail=ghost, or capture with logits.profile={} in a new run"
TO_SAMPLED = "set objective.tail=sampled, or capture with logits.profile=topk or hybrid in a new run"
TO_OTHER_DRAWS = "capture with logits.draw_temperature={} in a new run"
REFUSED = [
    # what is stored, drawn at which T; tail, temperature; where the message begins, and what it says to do instead
    ("topk", 2.0, "ghost", 3.0, NO_TAIL, TO_TRUNCATED),
    ("hybrid", 2.0, "ghost", 3.0, NO_TAIL, TO_TRUNCATED),
    ("hybrid", 2.0, "hybrid", 3.0, NO_TAIL, "logits.temperatures"),
    ("topk", 2.0, "sampled", 2.0, NO_DRAWS.format("sampled"), TO_GHOST.format("sampled")),
    ("topk", 2.0, "hybrid", 2.0, NO_DRAWS.format("hybrid"), TO_GHOST.format("hybrid")),
    *(("sampled", 2.0, tail, 2.0, NO_HEAD.format(tail), TO_SAMPLED) for tail in ("ghost", "truncated", "hybrid")),
    ("sampled", 2.0, "sampled", 1.0, OTHER_DRAWS.format(2, 1), TO_OTHER_DRAWS.format(1)),
    ("hybrid", 1.0, "hybrid", 2.0, OTHER_DRAWS.format(1, 2), TO_OTHER_DRAWS.format(2)),
    ("hybrid", 2.0, "sampled", 2.0, "objective.tail: these draws are from what is outside the head",
     "set objective.tail=hybrid, or capture with logits.profile=sampled in a new run"),
]  # fmt: skip


@pytest.mark.parametrize("profile, drawn_at, tail, temperature, begins, advice", REFUSED)
def test_a_loss_that_the_targets_do_not_support_is_refused(
    student, profile, drawn_at, tail, temperature, begins, advice
):
    config = CachedConfig(temperature=temperature, tail=tail)
    with pytest.raises(UserError) as caught:
        CachedDistillation(student, config, facts(profile, drawn_at))
    message = str(caught.value)
    assert message.startswith(begins) and advice in message and "\n" not in message


def test_what_is_not_refused_is_supported(student, batch, teacher_logits):
    """Every tail, temperature and profile is either refused or gives a finite loss."""
    supported = []
    for profile in ("topk", "sampled", "hybrid"):
        for tail in TAILS:
            for temperature in (1.0, 2.0, 3.0):
                config = CachedConfig(temperature=temperature, tail=tail)
                try:
                    module = CachedDistillation(student, config, facts(profile, 2.0))
                except UserError:
                    continue
                whole = exact(batch, teacher_logits, profile if profile != "topk" else "ghost", 2.0)
                assert module(whole).total.isfinite()
                supported.append((profile, tail, temperature))
    topk = [("ghost", 1.0), ("ghost", 2.0), ("truncated", 1.0), ("truncated", 2.0), ("truncated", 3.0)]
    expected = {(p, *rest) for p in ("topk", "hybrid") for rest in topk}
    assert set(supported) == expected | {("sampled", "sampled", 2.0), ("hybrid", "hybrid", 2.0)}


def test_stored_in_reads_the_facts():
    assert stored_in(facts("topk")) == Stored(True, (1.0, 2.0), None, VOCABULARY)
    assert stored_in(facts("sampled")) == Stored(False, (), 2.0, VOCABULARY)
    assert stored_in(facts("hybrid", 1.0)) == Stored(True, (1.0, 2.0), 1.0, VOCABULARY)


def test_a_temperature_without_stored_tails_works_truncated(student, batch, teacher_logits):
    whole = exact(batch, teacher_logits)
    found = values(objective(student, 0.7, 3.0, "truncated")(whole))
    assert found == pytest.approx(reference(student, teacher_logits, whole, 0.7, 3.0, "truncated"), rel=1e-9)


def test_tails_are_taken_by_temperature_not_by_place(student, batch, teacher_logits):
    """Temperatures stored in another order: the column of T = 2 is found."""
    whole = exact(batch, teacher_logits, temperatures=(1.0, 4.0, 2.0))
    found = values(objective(student, temperatures=[1.0, 4.0, 2.0])(whole))
    assert found == pytest.approx(reference(student, teacher_logits, whole, 0.7, 2.0, "ghost"), rel=1e-9)


def test_alpha_zero_is_the_cross_entropy_of_transformers(student, batch):
    module = objective(student, alpha=0.0)
    count = (batch.labels != IGNORED).sum().item()
    found = gradients(module, batch)
    total = module(batch).total.item()
    module.zero_grad()
    out = student(
        batch.tokens, position_ids=batch.position_ids, labels=batch.labels, shift_labels=batch.labels, use_cache=False
    )
    assert total == pytest.approx(out.loss.item() * count, rel=1e-6)
    (out.loss * count).backward()
    assert all(
        torch.allclose(found[f"student.{name}"], p.grad, rtol=1e-4, atol=1e-4) for name, p in student.named_parameters()
    )


def test_samples_without_targets_are_refused(student, batch):
    with pytest.raises(UserError, match="generate-logits"):
        objective(student)(batch._replace(targets=None))


def test_terms_are_detached_and_total_is_not(student, batch):
    report = objective(student)(batch)
    assert report.total.requires_grad and not any(term.requires_grad for term in report.terms.values())


TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
}


def shared_core_student(family: str) -> Any:
    """A random student of a shared-core family, as its own model says it."""
    forms = {p: Form("wrappers", 2, 2) for p in ("gate", "up", "down")}
    return student_class(family)(student_config(tiny_config(family), {1: forms}))


def tiny_config(family: str) -> Any:
    experts = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    more = {"moe_intermediate_size": 24, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
    more |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    if family == "deepseek_v3":
        more["num_key_value_heads"] = 4
    return AutoConfig.for_model(family, **{**TINY, **experts, **more})


def dense_student(family: str, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **settings}))


SHARED_CORE = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3")
FAMILIES: dict[str, Callable[[], Any]] = {name: partial(shared_core_student, name) for name in SHARED_CORE}
FAMILIES |= {
    "llama": partial(dense_student, "llama"),
    "llama, tied": partial(dense_student, "llama", tie_word_embeddings=True),
    "qwen3": partial(dense_student, "qwen3"),
    "gemma2": partial(dense_student, "gemma2", final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "cohere": partial(dense_student, "cohere", logit_scale=0.25),
    "granite": partial(dense_student, "granite", logits_scaling=3.0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_loss_of_the_students_own_logits(family, batch, teacher_logits):
    """Decoder, head, scale and cap of every family: value and gradients of its whole forward and the dense loss."""
    torch.manual_seed(0)
    student = FAMILIES[family]().eval()
    for parameter in student.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    whole = exact(batch, teacher_logits)
    found = gradients(objective(student), whole)
    counted = batch.labels != IGNORED
    logits = student(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits[counted]
    targets = TeacherTargets(*(field[counted] for field in whole.targets))
    terms = distill_loss(logits, batch.labels[counted], Sparse(targets, stored_in(facts()), "ghost"), 0.7, 2.0)
    assert objective(student)(whole).total.item() == pytest.approx(terms.total.item(), rel=1e-5)
    student.zero_grad()
    terms.total.backward()
    for name, parameter in student.named_parameters():
        mine, theirs = found[f"student.{name}"], parameter.grad
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-4, name


@pytest.mark.parametrize("family", ["qwen3_moe", "llama, tied"])
def test_names_and_state_are_those_of_the_student(family):
    student = FAMILIES[family]()
    module = objective(student)
    assert [name for name, _ in module.named_parameters()] == [f"student.{n}" for n, _ in student.named_parameters()]
    assert module.state_dict().keys() == {f"student.{name}" for name in student.state_dict()}
    assert module.head.head.weight is student.get_output_embeddings().weight
    module.load_state_dict(module.state_dict())


@pytest.mark.parametrize("family, settings", [("hyperclovax", {"logits_scaling": 3.0}), ("phi", {})])
def test_a_student_whose_logits_are_made_otherwise_is_refused(family, settings):
    """One multiplies where others divide, one has a bias."""
    student = dense_student(family, **settings)
    decoder = student.get_decoder()
    with pytest.raises(UserError, match=f"{family}: logits are not the output embeddings times"):
        objective(student)
    assert student.get_decoder() is decoder


def test_alpha_and_temperature_may_run_over_the_stage(student, batch, teacher_logits):
    whole = exact(batch, teacher_logits, "truncated")
    config = CachedConfig(alpha=(0.9, 0.1), temperature=(4.0, 1.0), tail="truncated")
    module = CachedDistillation(student, config, facts())
    for share, alpha, temperature in ((None, 0.9, 4.0), (0.0, 0.9, 4.0), (0.25, 0.7, 3.25), (1.0, 0.1, 1.0)):
        if share is not None:
            module.at(share)
        assert values(module(whole)) == pytest.approx(
            reference(student, teacher_logits, whole, alpha, temperature, "truncated"), rel=1e-9
        )
    assert module.at(0.0) is None and module.alpha == 0.9
    constant = CachedConfig(alpha=(0.2, 0.4), temperature=(2.0, 2.0))
    assert CachedDistillation(student, constant, facts()).temperature == 2.0


@pytest.mark.parametrize("divergence, mix", [("reverse_kl", 0.5), ("jsd", 0.1), ("skew_kl", 0.1), ("tvd", 0.5)])
def test_other_divergences(student, batch, teacher_logits, divergence, mix):
    whole = exact(batch, teacher_logits)
    config = CachedConfig(alpha=1.0, divergence=divergence, mix=mix)
    report = CachedDistillation(student, config, facts())(whole)
    expected = CachedDistillation(student, CachedConfig(alpha=1.0), facts())(whole)
    counted = batch.labels != IGNORED
    with torch.no_grad():
        logits = student(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits[counted]
    targets = TeacherTargets(*(field[counted] for field in whole.targets))
    kl = (
        kl_to_targets(logits, Sparse(targets, stored_in(facts()), "ghost"), 2.0, Divergence(divergence, mix))
        .sum()
        .item()
    )
    assert report.terms["kl"].item() == pytest.approx(kl, rel=1e-9) != expected.terms["kl"].item()
    assert report.total.item() == pytest.approx(4 * kl, rel=1e-9)
    assert report.terms["kl_t1"].item() == pytest.approx(expected.terms["kl_t1"].item(), rel=1e-12)


def test_a_ramp_over_tails_between_the_declared_temperatures_trains(student, batch, teacher_logits):
    """What trains at each step of the ramp is what a run at that one temperature would have."""
    near = facts(temperatures=DEFAULT)
    config = LogitsConfig(top_k=16, temperatures=DEFAULT)
    labels, offsets = batch.labels.flatten(), torch.zeros(batch.labels.numel())
    captured = targets_from_logits(teacher_logits.flatten(0, 1).double(), labels, config, offsets)
    whole = batch._replace(targets=TeacherTargets(*(field.unflatten(0, batch.labels.shape) for field in captured)))
    ramp = CachedDistillation(student, CachedConfig(temperature=(4.0, 1.0), tail="ghost"), near)
    for share, temperature in ((0.0, 4.0), (0.25, 3.25), (0.9, 1.3), (1.0, 1.0)):
        ramp.at(share)
        alone = CachedDistillation(student, CachedConfig(temperature=temperature, tail="ghost"), near)
        assert values(ramp(whole)) == pytest.approx(values(alone(whole)), rel=1e-9)


DRAWS_ALONE = "objective.divergence: {} cannot be estimated from draws, kl alone can; set objective.divergence=kl"
REFUSED_FORMS: list[tuple[str, dict[str, Any], str]] = [
    *(("sampled", {"tail": "sampled", "divergence": d}, DRAWS_ALONE.format(d)) for d in ("jsd", "tvd")),
    ("hybrid", {"tail": "hybrid", "divergence": "reverse_kl"}, DRAWS_ALONE.format("reverse_kl")),
    ("topk", {"tail": "truncated", "divergence": "reverse_kl"}, "objective.divergence: reverse_kl is infinite where"),
    *(
        (profile, {"tail": tail, "temperature": (2.0, 1.0)}, f"objective.temperature: a ramp passes .* that {tail} has")
        for profile, tail in (("hybrid", "hybrid"), ("sampled", "sampled"))
    ),
    ("topk", {"tail": "ghost", "temperature": (2.0, 1.0)}, "carry tails for T = 1, 2, not 2 to 1, too far"),
]


@pytest.mark.parametrize("profile, form, message", REFUSED_FORMS)
def test_divergences_and_ramps_that_the_targets_do_not_support_are_refused(student, profile, form, message):
    with pytest.raises(UserError, match=message) as caught:
        CachedDistillation(student, CachedConfig(**form), facts(profile))
    assert "\n" not in str(caught.value) and "objective.tail=" in str(caught.value)
