import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakd.commands.train import build_objective
from megakd.config import LrRule, OptimConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch
from megakd.data.shards import ShardSet
from megakd.engine.local import LocalEngine
from megakd.engine.optim import build_optimizer
from megakd.objectives.cached import CachedDistillation
from megakd.run import Run

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

    def engine(rules: tuple[LrRule, ...] = (), optim: OptimConfig = OPTIM, dtype: str = "float32") -> LocalEngine:
        objective = build_objective(run.config, run.student_folder, dataset)
        return LocalEngine(objective, build_optimizer(objective, rules, optim), optim.clip_norm, dtype, CPU)

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
