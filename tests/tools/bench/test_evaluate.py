"""The benchmark's own parts on a small model; its figures come from running it whole."""

import pytest
import torch

from megakd.data.batches import collate
from megakd.evals.holdout import evaluate_model
from tests.tools.examples import tool

bench = tool("bench.evaluate")
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "VOCABULARY", 500)
    monkeypatch.setattr(bench, "TOP_K", 8)
    return bench.Case(32, 1, 2, 2, 16)


def test_both_forms_measure_the_same(small):
    model, holdout = bench.random_model(small, CPU), bench.Windows(small)
    batch = collate(holdout.samples, small.length)
    nll, kl, top1, topk = bench.stored_sums(bench.forward(model, batch), batch)
    found = evaluate_model(model, holdout, 1.0, 2, CPU, "model")
    assert [found.nll * 32, found.kl * 32, found.top1 * 32, found.topk * 32] == pytest.approx(
        [nll, kl, top1, topk], rel=1e-6
    )


def test_rows_are_whole(small):
    rows = {(row.case, row.metric): row.value for row in bench.measure("small", small, 1, CPU)}
    forms = ("plain forward", "stored logits", "chunked head")
    metrics = (
        "seconds",
        "processor_seconds",
        "time_over_forward",
        "processor_over_forward",
        "peak",
        "peak_per_position",
    )
    assert set(rows) == {(f"small, {form}", metric) for form in forms for metric in metrics}
    assert all(value > 0 for value in rows.values()) and rows["small, plain forward", "time_over_forward"] == 1
