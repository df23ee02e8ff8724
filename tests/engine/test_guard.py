"""Which steps make no update, and when a run goes back: rules alone, and real runs over windows that fail."""

import json
import math
import random
import statistics
from typing import Any

import pytest
import torch

from megakd.cli import run_verb
from megakd.config.train import GuardConfig
from megakd.engine.guard import FEWEST, Health, after_step, wrong_with
from megakd.errors import UserError
from megakd.run import Run
from megakd.train import stage
from tests.conftest import metrics

NAN_OR_INF = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("window", [8, 20])
def test_a_spike_is_a_multiple_of_the_usual_loss(window):
    """Against the rule written out, over 300 random losses."""
    config, health, kept = GuardConfig(spike=2.0, window=window), Health(), []
    generator, left_out = random.Random(0), 0
    for _ in range(300):
        loss = generator.choice([1.0, 1.1, 0.9, 1.9, 2.5, 5.0, math.nan])
        usual = statistics.median(kept[-window:]) if len(kept) >= FEWEST else math.inf
        wrong = math.isnan(loss) or loss > 2.0 * usual
        assert bool(wrong_with(loss, health, config)) == wrong
        health = after_step(health, loss, "why" if wrong else "", config)
        left_out += wrong
        kept += [] if wrong else [loss]
        assert health.recent == tuple(kept[-window:]) and health.left_out == left_out
    assert left_out > 50


@pytest.mark.parametrize("usual, noise", [(-2.0, 0.1), (0.0, 0.5), (1e-4, 0.5)])
def test_losses_below_zero_are_no_spikes(usual, noise):
    """At alpha = 1 an estimate from draws may be negative: three times a negative median was below every loss."""
    config, health, generator = GuardConfig(spike=4.0), Health(), random.Random(1)
    for _ in range(50):
        loss = generator.uniform(usual - noise, usual + noise)
        assert not wrong_with(loss, health, config)
        health = after_step(health, loss, "", config)
    height = 3 * max(abs(usual), noise)
    assert wrong_with(usual + height + 0.1, health, config) and not wrong_with(usual - 10, health, config)


def test_without_a_spike_rule_only_what_is_not_finite_is_wrong():
    config, health = GuardConfig(), Health()
    for _ in range(20):
        health = after_step(health, 1.0, "", config)
    assert health == Health() and not wrong_with(1e9, health, config)
    assert all(wrong_with(loss, health, config) for loss in NAN_OR_INF)
    health = after_step(after_step(health, math.nan, "x", config), math.nan, "x", config)
    assert health == Health((), 2, 2) and after_step(health, 1.0, "", config) == Health((), 2, 0)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: dict[int, float]) -> None:
    """Multiply the loss of these steps (from 0), in every process-local training."""
    plain = stage.build_objective

    def build(*args: Any) -> Any:
        objective = plain(*args)
        forward = objective.forward

        def spoiled(batch: Any, held_out: bool = False) -> Any:
            report = forward(batch, held_out)
            if held_out:
                return report
            factor = steps.get(objective.global_step, 1.0)
            return report._replace(total=report.total * factor)

        objective.forward = spoiled
        return objective

    def seed(seed: int, step: int, rank: int) -> None:
        objectives[-1].global_step = step
        torch.manual_seed(step)

    objectives: list[Any] = []

    def remember(*args: Any) -> Any:
        objectives.append(build(*args))
        objectives[-1].global_step = -1
        return objectives[-1]

    monkeypatch.setattr(stage, "build_objective", remember)
    monkeypatch.setattr(stage, "seed_step", seed)


def run(run: Run, *overrides: str) -> list[dict[str, Any]]:
    run_verb(["train", str(run.folder), *overrides])
    return metrics(run.folder)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_training_stops_before_weights_are_lost_and_goes_on_without_the_step(sibling, monkeypatch, factor):
    spoil(monkeypatch, {5: factor})
    stopped = sibling()
    with pytest.raises(UserError, match=r"step 6: its loss is (nan|inf); the weights are .*guard.nonfinite=skip"):
        run(stopped)
    assert len(metrics(stopped.folder)) == 5
    rows = run(stopped, "guard.nonfinite=skip")
    assert len(rows) == 10 and rows[5]["loss"] is None and rows[5]["left_out_updates"] == 1
    assert "left_out_updates" not in rows[4] and all(math.isfinite(row["loss"]) for row in rows[6:])
    assert json.loads((stopped.folder / "metrics.jsonl").read_text().splitlines()[5])["loss"] is None
    assert [event["step"] for event in Run.open(stopped.folder).events("skipped")] == [6, 6]


def test_spikes_are_left_out_and_a_run_goes_back(sibling, monkeypatch):
    """Steps 9 and 10 jump: after two in a row, weights are those of the last checkpoint of the stage (step 7)."""
    spoil(monkeypatch, {8: 50.0, 9: 50.0})
    longer = sibling("stages.1.tokens=4608", "guard.window=8")  # 4 and 9 steps
    rows = run(longer, "guard.spike=3", "guard.rollback=2", "checkpoint.every_steps=3")
    assert len(rows) == 13 and rows[9]["left_out_updates"] == 2 and rows[12]["left_out_updates"] == 2
    (event,) = Run.open(longer.folder).events("rollback")
    assert event["step"] == 10 and event["to"].endswith("step-000007")


def test_resumed_runs_know_what_is_usual(sibling, monkeypatch):
    """The losses behind the median are in the checkpoint: a run that was cut skips the same steps."""
    settings = ["guard.spike=3", "guard.window=8", "guard.nonfinite=skip", "checkpoint.every_steps=1"]
    spoil(monkeypatch, {9: 40.0, 3: math.nan})
    whole, cut = sibling(), sibling()
    expected = run(whole, *settings)
    assert [row.get("left_out_updates", 0) for row in expected] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 2]
    run(cut, *settings)
    for path in cut.path("checkpoints").glob("*/step-*"):
        if path.name > "step-000008":
            path.rename(path.with_name(path.name + ".away"))
    assert run(cut) == expected
