"""What the benchmark of a step compares are the same steps; its figures come from running it whole."""

import subprocess

import numpy as np
import pytest
import torch

from megakd.data.shards import ShardSet
from megakd.engine.checkpoint import Progress
from megakd.measured import NAME, read_rates
from tests.tools.examples import tool

bench, show = tool("bench.step"), tool("bench.rows").show
SMALL = {"vocab_size": 300, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_experts": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch):
    found = bench.Case(SMALL, 2, 24, 4, 2)
    monkeypatch.setattr(bench, "CASES", {"demo, quick": found, "1.1 B": found})
    return found


def test_shards_are_those_of_a_teacher(case, tmp_path):
    bench.write_shards(tmp_path, case, steps=2)
    with_targets = ShardSet(tmp_path)
    assert len(with_targets) == 8
    with_targets.verify()
    for sample in (with_targets[i] for i in range(8)):
        mass = np.exp(sample.targets.logprobs).sum(-1) + np.exp(sample.targets.log_tails[:, 0])
        assert np.allclose(mass, 1, atol=0.01)
        assert all(len(set(row)) == bench.ENTRIES for row in sample.targets.ids)


def test_alpha_0_is_the_step_of_transformers(case, tmp_path):
    """Both update the weights alike; with a teacher they are updated otherwise."""
    bench.write_shards(tmp_path, case)
    dataset = ShardSet(tmp_path)
    config, world = bench.configuration(case, False), bench.World(0, 1, torch.device("cpu"))
    step = next(iter(bench.stage_data(config, dataset, Progress(), 1, world)))
    found = {}
    for form in ("plain", 0.0, 0.5):
        objective = bench.build(config, bench.make_student(case), None, dataset.facts)
        optimizer = bench.build_optimizer(objective, (), config.optim)
        engine = bench.LocalEngine(objective, optimizer, config.optim.clip_norm, "float32", world.device)
        if form == "plain":
            bench.plain_step(engine, step)
        else:
            objective.alpha = form
            engine.step(step.micro_batches, step.tokens, 1.0)
        moments = [optimizer.state[p]["exp_avg"] for p in engine.trained]
        found[form] = torch.cat([moment.flatten() for moment in moments])
    torch.testing.assert_close(found["plain"], found[0.0], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(found["plain"], found[0.5], rtol=1e-3, atol=1e-6)


def test_rows(case, monkeypatch):
    """Ratios are medians of each round's ratio; efficiency is that of the rates of a turn."""
    taken = {"KD": np.array([1.0, 2.0, 4.0]), "transformers": np.array([2.0, 2.0, 2.0])}
    values = {(row.case, row.metric): row.value for row in bench.ratios("a", taken)}
    assert values == {
        ("a, KD", "milliseconds"): 2000,
        ("a, transformers", "milliseconds"): 2000,
        ("a, transformers", "kd_over_ce"): 1,
    }
    found = {
        1: {"tokens": 100, "seconds": 1.0, "cpu_seconds": 0.9},
        2: {"tokens": 160, "seconds": 1.0, "cpu_seconds": 1.6},
    }
    monkeypatch.setattr(bench, "launch", lambda name, folder, steps, ranks: found[ranks])
    rows = bench.bench_step(quick=True)
    values = {(row.case, row.metric): row.value for row in rows}
    for form in ("transformers", "alpha = 0"):
        assert values[f"demo, quick, {form}", "kd_over_ce"] > 0
    assert 0 <= values["demo, quick, a run", "data_wait_share"] < 1
    assert values["demo, quick, a run", "tokens_per_second"] > 0
    assert values["demo, quick, zero2, ranks: 2", "efficiency"] == pytest.approx(0.8)
    assert values["demo, quick, zero2, ranks: 2", "cpu_efficiency"] == pytest.approx(0.9)
    assert "demo, quick, KD" in show(rows)


@pytest.mark.ranks
def test_ranks_of_the_benchmark_train(tmp_path):
    bench.write_shards(tmp_path, bench.CASES["demo, quick"], steps=1)
    found = bench.launch("demo, quick", tmp_path, 1, 2)
    assert found["tokens"] == 4 * 256 and found["seconds"] > 0 and found["cpu_seconds"] > 0


def test_ranks_that_fail_are_said(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "KeyError: nothing")
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(bench.UserError, match="1 ranks ended with exit code 1: KeyError: nothing"):
        bench.launch("nothing", tmp_path, 1, 1)


def test_the_rate_of_a_run_is_recorded_for_plan(case, tmp_path):
    bench.write_shards(tmp_path / "shards", case)
    bench.wait("demo, quick", tmp_path / "shards", 2, "cpu", tmp_path)
    (rate,) = read_rates(tmp_path / NAME)
    assert rate["verb"] == "train" and rate["tokens"] == 2 * 4 * 24 and rate["flops_per_token"] > 1000
