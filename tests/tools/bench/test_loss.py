"""What the benchmark of the loss compares is one loss; its figures come from running it whole."""

import pytest
import torch

from megakd.losses import head as fused
from tests.tools.examples import tool

bench, show = tool("bench.loss"), tool("bench.rows").show


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 4 * 500 * 5)
    monkeypatch.setattr(bench, "VOCABULARY", 500)
    return bench.make_case(13, 8, "cpu", torch.float32, 500)


def gradients(case, step):
    step()
    return case.hidden_ND.grad.clone(), case.weight_VD.grad.clone()


def test_the_forms_of_one_loss_give_the_same_gradients(case):
    forms = bench.methods(case, {})
    mine, theirs = (gradients(case, forms[name]) for name in ("megakd, fused", "megakd, dense"))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    logits = torch.full((13, 500), -1e4).scatter(1, case.targets.ids.long(), case.targets.logprobs)
    truncated = bench.Dense(bench.FusedHead(torch.nn.Parameter(torch.eye(500), requires_grad=False), 500), logits)
    head = bench.FusedHead(case.weight_VD, 500)
    case.hidden_ND.grad = case.weight_VD.grad = None
    head(case.hidden_ND, case.labels_N, truncated, bench.ALPHA, bench.TEMPERATURE).total.backward()
    for a, b in zip(
        (case.hidden_ND.grad.clone(), case.weight_VD.grad.clone()),
        gradients(case, forms["densify + kl_div"]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_floor_is_three_products(case):
    """It gives the gradients of what it is a floor of where those would be the logits themselves."""
    calls = []
    real = torch.mm
    floor = bench.methods(case, {})["floor"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", lambda *a, **k: calls.append(a) or real(*a, **k))
        floor()
    assert len(calls) == 3 * 2 + 1  # three chunks of five; the head's gradient is added up after the first


def test_rows(case, monkeypatch):
    monkeypatch.setattr(bench, "others", lambda case: {})
    rows = bench.bench_loss(quick=True)
    values = {(row.case, row.metric): row.value for row in rows}
    assert values["D 256, floor", "time_over_floor"] == 1
    for name in ("floor", "megakd, fused", "megakd, dense", "densify + kl_div"):
        for metric in ("milliseconds", "time_over_floor", "peak_bytes", "peak_over_gradients"):
            assert values[f"D 256, {name}", metric] > 0
    assert values["D 256, floor", "peak_over_gradients"] == pytest.approx(1, rel=1e-3)
    assert "D 256, megakd, fused" in show(rows)


def test_peak_counts_what_is_held_at_once():
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(1000, 1000)

    def together() -> list[torch.Tensor]:
        return [torch.empty(1000, 1000) for _ in range(3)]

    assert bench.peak_bytes(one_after_the_other) == 4_000_000 and bench.peak_bytes(together) == 12_000_000


def test_what_is_not_installed_is_said(case, capsys):
    installed = bench.others(case)
    said = capsys.readouterr().out
    assert ("TRL GKD, JSD" in installed) != ("TRL's loss is skipped" in said)
    assert ("Liger JSD" in installed) != ("Liger's loss is skipped" in said)
