"""What the benchmark of a live teacher compares are the same steps; its figures come from running it whole."""

import numpy as np
import pytest
import torch

from tests.tools.examples import tool

bench, show = tool("bench.live"), tool("bench.rows").show
CASE = bench.CASES["V 2,048, quick"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("form", bench.FORMS)
def test_by_hand_it_is_the_same_step(form):
    """Student and routers get the same moments from both; frozen routers none."""
    learn, away = bench.FORMS[form]
    batch, found = bench.random_batch(CASE, CPU), []
    for by_hand in (False, True):
        engine = bench.make_engine(CASE, learn, away and not by_hand, CPU)
        for group in engine.optimizer.param_groups:
            group["weight_decay"] = 0.0
        if by_hand:
            bench.step_by_hand(engine, batch)
        else:
            engine.step([batch], batch.tokens.numel(), 1.0)
        assert len(engine.trained) == len(list(engine.objective.student.parameters())) + learn
        found.append(torch.cat([engine.optimizer.state[p]["exp_avg"].flatten() for p in engine.trained]))
    torch.testing.assert_close(*found, rtol=2e-3, atol=1e-6)
    assert np.isfinite(found[0].numpy()).all() and found[0].abs().max() > 0


def test_rows_have_times_peaks_and_ratios(monkeypatch):
    monkeypatch.setattr(bench, "CASES", {"V 2,048, quick": CASE})
    rows = bench.bench_live(quick=True)
    values = {(row.case, row.metric): row.value for row in rows}
    for form in ("frozen", "routers learn"):
        name = f"V 2,048, quick, {form}"
        peaks = values[name, "peak"], values[f"{name}, by hand", "peak"]
        assert values[name, "peak_over_by_hand"] == pytest.approx(peaks[0] / peaks[1])
        rate = CASE.windows * CASE.length / values[name, "milliseconds"] * 1e3
        assert values[name, "tokens_per_second"] == pytest.approx(rate)
        assert values[name, "over_by_hand"] > 0
    assert values["V 2,048, quick, routers learn, offloaded", "milliseconds"] > 0
    assert "over_by_hand" in show(rows)
