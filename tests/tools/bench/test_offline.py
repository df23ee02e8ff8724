"""The benchmark of cached against live teachers compares one step in two forms; figures come from running it whole."""

import pytest
import torch

from megakd.models.tiny import tiny_moe_config
from tests.tools.examples import tool

bench = tool("bench.offline")


def test_both_forms_start_from_the_same_student_and_get_nearly_the_same_gradient():
    """The cached targets are the live teacher's own: what differs is the tail outside of the head."""
    ((_, pair),) = bench.pairs(quick=True, real=None)
    torch.manual_seed(0)
    teacher = bench.AutoModelForCausalLM.from_config(pair.teacher).eval()
    batch, found = bench.batch_of(pair, teacher), []
    for held in (teacher, None):
        engine = bench.make_engine(pair, held)
        engine.objective.alpha = 0.5
        report = engine.objective(batch)
        report.total.backward()
        found.append((report.terms["ce"].item(), report.total.item()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=0.02)


def test_rows_have_times_memory_and_ratios():
    values = {(row.case, row.metric): row.value for row in bench.bench_offline(quick=True)}
    live, cached = values["toy, live", "memory"], values["toy, cached", "memory"]
    assert values["toy, cached", "memory_over_live"] == pytest.approx(cached / live)
    assert cached < live
    assert values["toy, cached", "speed_over_live"] > 0


def test_prediction_leaves_out_the_teachers_weights():
    teacher = tiny_moe_config(2048, num_hidden_layers=1)
    rows = bench.predict("tiny", teacher, 4, 64)
    values = {(row.case, row.metric): row.value for row in rows}
    assert 0 < values["tiny, cached", "memory"] < values["tiny, live", "memory"]
