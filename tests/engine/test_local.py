import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakd.config.train import LrRule, OptimConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch
from megakd.data.shards import ShardSet
from megakd.engine.base import MOMENTS
from megakd.engine.guard import GRADIENT, REJECTED, SCALE
from megakd.engine.local import LocalEngine
from megakd.engine.optim import build_optimizer
from megakd.objectives.cached import CachedDistillation
from megakd.run import Run
from megakd.system.dist import World
from megakd.train.build import build_engine, build_objective

CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, clip_norm=0.5)
RULES = (
    LrRule(pattern="embed_tokens|layers.0.self_attn", lr_multiplier=0.0),
    LrRule(pattern="wrapper", lr_multiplier=0.5),
)


@pytest.fixture(scope="module")
def make(prepared, dataset):
    """make(rules, optim, dtype): a new engine over the run's student."""
    run = Run.open(prepared)

    def engine(
        rules: tuple[LrRule, ...] = (),
        optim: OptimConfig = OPTIM,
        dtype: str = "float32",
        updates: dict[str, int] | None = None,
    ) -> LocalEngine:
        objective = build_objective(run.config, run.student_folder, dataset.facts)
        return LocalEngine(objective, build_optimizer(objective, rules, optim, updates), optim.clip_norm, dtype, CPU)

    return engine


def windows(dataset: ShardSet, indices: range, micro_batch: int) -> list[Batch]:
    """The windows as micro-batches."""
    return [
        collate([dataset[i] for i in indices[s : s + micro_batch]], 32) for s in range(0, len(indices), micro_batch)
    ]


def labels(batches: list[Batch]) -> int:
    return sum(int((batch.labels != IGNORED).sum()) for batch in batches)


def run_steps(engine: LocalEngine, dataset: ShardSet, steps: range, micro_batch: int = 8) -> list[Any]:
    """Steps of 8 windows each, with a rate that falls."""
    reports = []
    for step in steps:
        batches = windows(dataset, range(8 * step, 8 * step + 8), micro_batch)
        reports.append(engine.step(batches, labels(batches), 1 / (1 + step)))
    return reports


def weights(engine: LocalEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights()}


def adamw(module: nn.Module, settings: dict[str, tuple[float, float]], optim: OptimConfig):
    """AdamW written out (Loshchilov and Hutter 2019, algorithm 2) in float64; step(gradients, factor) moves the module.

    settings: (lr, weight decay) of each trained parameter.
    """
    named = {name: p for name, p in module.named_parameters() if name in settings}
    first, second = ({name: torch.zeros_like(p).double() for name, p in named.items()} for _ in range(2))
    count = 0

    def step(gradients: dict[str, Tensor], factor: float) -> float:
        nonlocal count
        count += 1
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        for name, p in named.items():
            lr, decay = settings[name]
            gradient = gradients[name].double() * min(1.0, optim.clip_norm / (norm + 1e-6))
            first[name] = optim.betas[0] * first[name] + (1 - optim.betas[0]) * gradient
            second[name] = optim.betas[1] * second[name] + (1 - optim.betas[1]) * gradient**2
            m, v = first[name] / (1 - optim.betas[0] ** count), second[name] / (1 - optim.betas[1] ** count)
            rate = lr * factor
            with torch.no_grad():
                p.copy_((1 - rate * decay) * p.double() - rate * m / (v.sqrt() + optim.eps))
        return norm

    return step


@pytest.mark.parametrize("clip_norm", [0.05, 1e3], ids=["clipped", "not clipped"])
def test_steps_are_those_of_the_documented_formula(make, dataset, clip_norm):
    optim = OPTIM.model_copy(update={"clip_norm": clip_norm})
    engine, other = make(RULES, optim), make(RULES, optim).objective
    start = weights(engine)
    settings = {}
    for name, p in other.named_parameters():
        if "embed_tokens" not in name and "layers.0.self_attn" not in name:
            settings[name] = (1e-3 * (0.5 if "wrapper" in name else 1.0), 0.1 if p.ndim > 1 else 0.0)
    step = adamw(other, settings, optim)
    for number, found in enumerate(run_steps(engine, dataset, range(3), micro_batch=4)):
        batches = windows(dataset, range(8 * number, 8 * number + 8), 4)
        tokens = labels(batches)
        other.zero_grad()
        reports = [other(batch) for batch in batches]
        (torch.stack([report.total for report in reports]).sum() / tokens).backward()
        norm = step({name: p.grad for name, p in other.named_parameters() if name in settings}, 1 / (1 + number))
        assert found.grad_norm == pytest.approx(norm, rel=1e-4)
        assert (norm > clip_norm) == (clip_norm < 1)
        expected = {"total": sum(r.total.item() for r in reports)} | {
            n: sum(r.terms[n].item() for r in reports) for n in reports[0].terms
        }
        assert found.sums == pytest.approx(expected, rel=1e-5)
    moved = weights(engine)
    for name, p in other.named_parameters():
        assert torch.allclose(moved[name], p, rtol=0, atol=2e-6), name
        assert torch.equal(moved[name], start[name]) == (name not in settings), name


def test_accumulation_does_not_change_the_step(make, dataset):
    """1, 2, 4 and 8 micro-batches of the same 8 windows: the same sums, and weights within 2e-6."""
    whole = make()
    expected = run_steps(whole, dataset, range(2), 8)
    for micro_batch in (4, 2, 1):
        parts = make()
        found = run_steps(parts, dataset, range(2), micro_batch)
        for a, b in zip(found, expected, strict=True):
            assert a.sums == pytest.approx(b.sums, rel=1e-5) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        theirs = weights(whole)
        for name, tensor in parts.weights():
            assert torch.allclose(tensor, theirs[name], rtol=0, atol=2e-6), name


def test_micro_batches_may_be_an_iterator_and_one_may_be_empty(make, dataset):
    """A micro-batch without labels changes nothing; losses are divided by the tokens of the step."""
    batches = windows(dataset, range(8), 4)
    empty = batches[0]._replace(labels=torch.full_like(batches[0].labels, IGNORED))
    one, two = make(), make()
    expected = one.step(batches, labels(batches), 1.0)
    found = two.step(iter([empty, *batches]), labels(batches), 1.0)
    assert found.sums == pytest.approx(expected.sums, rel=1e-6)
    theirs = weights(one)
    assert all(torch.allclose(tensor, theirs[name], rtol=0, atol=2e-6) for name, tensor in two.weights())


def test_gradients_are_divided_by_the_tokens_given(make, dataset):
    """`tokens` counts all ranks: twice as many make half the gradient, and the same sums."""
    batches = windows(dataset, range(8), 8)
    one, two = make().step(batches, labels(batches), 1.0), make().step(batches, 2 * labels(batches), 1.0)
    assert two.sums == one.sums
    assert two.grad_norm == pytest.approx(one.grad_norm / 2, rel=1e-4)


def test_training_lowers_the_loss(make, dataset):
    engine = make()
    batches = windows(dataset, range(8), 8)
    losses = [engine.step(batches, labels(batches), 1.0).sums["total"] for _ in range(8)]
    assert losses[-1] < 0.95 * losses[0]


def test_a_saved_engine_goes_on_bit_equal(make, dataset, tmp_path: Path):
    straight = make(RULES)
    run_steps(straight, dataset, range(2))
    straight.save(tmp_path / "state")
    expected = run_steps(straight, dataset, range(2, 4))
    resumed = make(RULES)
    resumed.load(tmp_path / "state")
    assert run_steps(resumed, dataset, range(2, 4)) == expected
    theirs = weights(straight)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resumed.weights())
    fresh = make(RULES)  # weights alone are not enough: without Adam's state the path is another
    fresh.objective.load_state_dict(torch.load(tmp_path / "state" / "local.pt", weights_only=True)["objective"])
    run_steps(fresh, dataset, range(2, 4))
    assert not all(torch.equal(tensor, theirs[name]) for name, tensor in fresh.weights())


def test_weights_are_all_parameters_under_the_objectives_names(make):
    engine = make(RULES)
    found = dict(engine.weights())
    assert isinstance(engine.objective, CachedDistillation)
    expected = {f"student.{name}": p for name, p in engine.objective.student.named_parameters()}
    assert found.keys() == expected.keys()  # frozen ones too, tied ones once
    assert all(torch.equal(tensor, expected[name]) and not tensor.requires_grad for name, tensor in found.items())


def test_bfloat16_keeps_float32_weights(make, dataset):
    """Autocast alone: weights are their own masters, and the loss is close to that of float32."""
    engine, exact = make(dtype="bfloat16"), make()
    found, expected = run_steps(engine, dataset, range(1))[0], run_steps(exact, dataset, range(1))[0]
    assert found.sums["ce"] != expected.sums["ce"]  # it did run in another precision
    assert found.sums == pytest.approx(expected.sums, rel=2e-2)
    assert {tensor.dtype for _, tensor in engine.weights()} == {torch.float32}


def test_float16_scales_its_loss_and_leaves_out_what_overflows(make, dataset, tmp_path: Path):
    """The scale begins at 65,536: while it is too large updates are skipped and it is halved; a resume keeps it."""
    engine, exact = make(dtype="float16"), make()
    engine.scaler._init_scale = 2.0**40  # type: ignore[attr-defined]
    start, reports = weights(engine), []
    while not reports or reports[-1].left_out:
        batches = windows(dataset, range(8), 8)
        reports.append(engine.step(batches, labels(batches), 1.0))
        if reports[-1].left_out:
            assert reports[-1].left_out == SCALE
            assert all(torch.equal(tensor, start[name]) for name, tensor in engine.weights())
    assert 1 < len(reports) < 40 and engine.scaler.get_scale() == 2.0 ** (41 - len(reports))
    expected = run_steps(exact, dataset, range(1))[0]
    assert reports[-1].sums == pytest.approx(expected.sums, rel=5e-3)
    assert reports[-1].grad_norm == pytest.approx(expected.grad_norm, rel=5e-2)
    engine.save(tmp_path / "state")
    resumed = make(dtype="float16")
    resumed.load(tmp_path / "state")
    assert run_steps(resumed, dataset, range(1, 3)) == run_steps(engine, dataset, range(1, 3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_refused_update_changes_nothing(make, dataset, dtype):
    """Weights, moments and counts stay; the next step is the one that would have come first."""
    engine, other = make(RULES, dtype=dtype), make(RULES, dtype=dtype)
    run_steps(engine, dataset, range(2)), run_steps(other, dataset, range(2))
    batches = windows(dataset, range(8), 4)
    seen: list[float] = []
    before = weights(engine)
    report = engine.step(batches, labels(batches), 1.0, lambda sums: bool(seen.append(sums["total"])))
    assert report.left_out == REJECTED and seen == [report.sums["total"]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.weights())
    assert run_steps(engine, dataset, range(2, 4)) == run_steps(other, dataset, range(2, 4))


def test_a_gradient_that_is_not_finite_changes_nothing(make, dataset):
    engine = make()
    before, weight = weights(engine), engine.objective.student.model.norm.weight
    hook = weight.register_hook(lambda gradient: gradient * torch.nan)
    assert run_steps(engine, dataset, range(1))[0].left_out == GRADIENT
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.weights())
    hook.remove()
    assert run_steps(engine, dataset, range(1)) == run_steps(make(), dataset, range(1))


def test_norms_are_those_of_gradients_and_of_how_far_weights_moved(make, dataset):
    optim = OPTIM.model_copy(update={"clip_norm": 1e3})
    engine = make(RULES, optim)
    run_steps(engine, dataset, range(2))
    before = weights(engine)
    labels_of = {id(p): group["label"] for group in engine.optimizer.param_groups for p in group["params"]}
    gradients: dict[str, float] = {}

    def keep(label: str, gradient: Tensor) -> None:
        gradients[label] = gradients.get(label, 0.0) + gradient.double().square().sum().item()

    for p in engine.trained:
        p.register_post_accumulate_grad_hook(lambda p: keep(labels_of[id(p)], p.grad))
    batches = windows(dataset, range(8), 8)
    report = engine.step(batches, labels(batches), 0.7, norms=True)
    moved: dict[str, float] = {}
    for name, p in engine.objective.named_parameters():
        if p.requires_grad:
            square = (p.double() - before[name].double()).square().sum().item()
            moved[labels_of[id(p)]] = moved.get(labels_of[id(p)], 0.0) + square
    expected = {f"grad_norm/{label}": value**0.5 for label, value in gradients.items()}
    expected |= {f"update_norm/{label}": value**0.5 for label, value in moved.items()}
    assert report.norms == pytest.approx(expected, rel=1e-3) and len(expected) == 2 * len(moved) > 4
    assert report.grad_norm == pytest.approx(math.sqrt(sum(gradients.values())), rel=1e-5)


def test_moments_cross_a_stage_border(make, dataset):
    """What goes on training goes on as if there were no border; what begins starts at its first update."""
    experts = (LrRule(pattern="wrapper|shared_core", lr_multiplier=1.0), LrRule(pattern=".*", lr_multiplier=0.0))
    first, start = make(experts), weights(make(experts))
    run_steps(first, dataset, range(3))
    carried = first.export_state()
    names = {name for name, p in first.objective.named_parameters() if p.requires_grad}
    assert carried.tensors.keys() == names and set(carried.updates.values()) == {3}
    second = make((), updates=carried.updates)
    second.objective.load_state_dict(first.objective.state_dict())
    second.import_state(carried)
    for name, p in second.objective.named_parameters():
        state = second.optimizer.state.get(p)
        if name in names:
            assert all(
                torch.equal(state[m], first.optimizer.state[q][m])
                for m in MOMENTS
                for q in [dict(first.objective.named_parameters())[name]]
            )
        else:
            assert not state and torch.equal(p, start[name])  # it was frozen
    run_steps(second, dataset, range(3, 5))
    steps = {float(second.optimizer.state[p]["step"]) for p in second.trained}
    assert steps == {2.0, 5.0}
    # a border at which nothing changes is none
    straight, before = make(experts), make(experts)
    expected = run_steps(straight, dataset, range(4))[2:]
    run_steps(before, dataset, range(2))
    after = make(experts, updates=before.export_state().updates)
    after.objective.load_state_dict(before.objective.state_dict())
    after.import_state(before.export_state())
    assert run_steps(after, dataset, range(2, 4)) == expected


def test_activation_checkpointing_computes_the_same(prepared, dataset):
    run = Run.open(prepared)
    reports = []
    for checkpointing in (False, True):
        engine_config = run.config.engine.model_copy(update={"activation_checkpointing": checkpointing})
        config = run.config.model_copy(update={"engine": engine_config})
        world = World(0, 1, CPU)
        objective = build_objective(config, run.student_folder, dataset.facts)
        engine: Any = build_engine(config, objective, config.stages[1], world)
        assert engine.objective.student.is_gradient_checkpointing == checkpointing
        reports.append(run_steps(engine, dataset, range(2)))
    for plain, again in zip(*reports, strict=True):
        assert again.sums == pytest.approx(plain.sums, rel=1e-6)
        assert again.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
