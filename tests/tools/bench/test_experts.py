"""The forms that the benchmark of experts compares are one function; its figures come from running it whole."""

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, run_to_end
from tests.tools.examples import tool

bench, show = tool("bench.experts"), tool("bench.rows").show


@pytest.fixture
def small(monkeypatch):
    for name, size in (("HIDDEN", 12), ("EXPERT_HIDDEN", 8), ("EXPERTS", 5), ("ACTIVE", 2)):
        monkeypatch.setattr(bench, name, size)
    torch.manual_seed(0)
    return torch.randn(9, 12), *reversed(torch.rand(9, 5).topk(2))


def whole(shared, projection, expert):
    """An expert's matrix multiplied out."""
    factors = {name: factor[expert] for name, factor in shared.wrappers.named_parameters()}
    inner, outer = (
        factors[f"{wrapper}_wrapper_{projection}_left"].T @ factors[f"{wrapper}_wrapper_{projection}_right"].T
        for wrapper in ("input", "output")
    )
    core = shared.core[f"{projection}_proj"].weight
    return core + core @ inner + outer if projection == "down" else core + outer @ core + inner


def test_all_forms_are_one_function(small):
    """The dense experts too, with the matrices that the shared core stands for; and their gradients by the input."""
    x, expert, weight = small
    shared = bench.SharedCore(3)
    forms = [shared, bench.Naive(shared), bench.dense("eager"), bench.dense("grouped_mm")]
    with torch.no_grad():
        for form in forms[2:]:
            matrices = {p: [whole(shared, p, e) for e in range(5)] for p in ("gate", "up", "down")}
            form.gate_up_proj.copy_(
                torch.stack([torch.cat(pair) for pair in zip(matrices["gate"], matrices["up"], strict=True)])
            )
            form.down_proj.copy_(torch.stack(matrices["down"]))
    outs = [form(x, expert, weight) for form in forms]
    x.requires_grad_()
    gradients = [torch.autograd.grad(form(x, expert, weight).square().sum(), x)[0] for form in forms]
    for out, gradient in zip(outs[1:], gradients[1:], strict=True):
        assert torch.allclose(out, outs[0], rtol=1e-4, atol=1e-5)
        assert torch.allclose(gradient, gradients[0], rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient(small):
    shared = bench.SharedCore(3)
    for form in (shared, bench.Naive(shared), bench.dense("eager")):
        gradients = torch.autograd.grad(form(*small).square().sum(), list(form.parameters()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_rows(small, monkeypatch):
    """Ratios are medians of each round's ratio; a row a metric."""
    taken = {"megakd": np.array([1.0, 2.0, 4.0]), "naive": np.array([3.0, 2.0, 8.0])}
    rows = bench.speeds("case", "forward_backward", taken)
    assert [(row.metric, row.value) for row in rows] == [
        ("milliseconds_forward_backward", 2000.0),
        ("speedup_vs_naive_forward_backward", 2.0),
    ]
    rows = bench.bench_experts(quick=True)
    values = {row.metric: row.value for row in rows}
    assert {row.case for row in rows} == {"R 64, 256 tokens"} and 0 <= values["max_rel_diff"] < 1e-5
    assert all(values[f"speedup_vs_{name}"] > 0 for name in ("naive", "dense", "dense_grouped_mm"))
    assert "R 64, 256 tokens" in show(rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["experts", "--real", "model"],
            "--real is for offline, store and temperatures: the other benchmarks need no model",
        ),
        (["experts", "--device", "cuda"], "--device cuda: torch sees no GPU here"),
        (
            ["store", "--device", "cuda"],
            "--device is for evaluate, experts, live, loss and step: the other benchmarks run on the CPU",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    assert run_to_end(1, ROOT / "tools" / "bench.py", *arguments, code=2) == f"bench: {message}\n"
