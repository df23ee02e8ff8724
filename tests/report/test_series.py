"""Charts of what a run recorded: every logged number is in one, gaps and thinning as they are stated."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakd.models.shared_core import Form, stored_parameters
from megakd.report.series import (
    OTHER,
    STRETCHES,
    TERMS,
    Recorded,
    borders,
    compression_charts,
    quality_charts,
    router_charts,
    thinned,
    training_charts,
    wants_log,
    with_names,
)


def run(metrics: list[dict[str, Any]] = [], evals: list[dict[str, Any]] = [], name: str = "this") -> Recorded:  # noqa: B006
    return Recorded(name, Path("runs") / name, {"name": name}, metrics, evals, [])


def rows(keys: dict[str, Any], stages: list[str], count: int = 6) -> list[dict[str, Any]]:
    """Each key's function of the step's index gives its values."""
    return [
        {"step": s + 1, "stage": stages[s * len(stages) // count], "tokens": 100 * (s + 1)}
        | {key: value(s) for key, value in keys.items()}
        for s in range(count)
    ]


def by_title(charts: list[Any]) -> dict[str, Any]:
    return {chart.title: chart for chart in charts}


def test_every_logged_number_has_a_chart_known_or_not():
    keys = ["loss", "kl", "stored_mass", "memory_gb", "grad_norm", "grad_norm/x1", "update_norm/x1", "new_term", "a/b"]
    metrics = rows({key: lambda s: 1.0 / (s + 1) for key in keys}, ["all"])
    charts = by_title(training_charts([run(metrics)]))
    expected = [TERMS[key].title for key in ("loss", "kl", "grad_norm", "update_norm", "stored_mass", "memory_gb")]
    assert list(charts) == [*expected, "a", "new_term"]
    assert charts["new_term"].section == OTHER and charts["loss"].unit == "nats per token"
    assert [line.name for line in charts["gradient norm"].lines] == ["all", "x1"]
    for chart in charts.values():
        for line in chart.lines:
            assert line.y == [1.0 / s for s in line.x] and line.tokens == [100 * s for s in line.x]


def test_a_null_is_a_gap_that_the_title_counts_and_a_missing_key_is_no_point():
    metrics = rows({"loss": lambda s: [1.0, None, float("nan"), float("inf"), 2.0, 3.0][s]}, ["all"])
    del metrics[4]["loss"]
    [chart] = training_charts([run(metrics)])
    [line] = chart.lines
    assert line.x == [1, 2, 3, 4, 6] and line.y == [1.0, None, None, None, 3.0]
    assert chart.note == "3 of 5 steps: not finite"


def test_a_number_that_never_was_finite_is_said_though_nothing_is_drawn():
    [chart] = training_charts([run(rows({"loss": lambda s: None}, ["all"]))])
    assert chart.lines == [] and chart.note == "6 of 6 steps: not finite"


def test_text_and_truth_values_are_no_curves():
    assert training_charts([run(rows({"note": lambda s: "x", "flag": lambda s: True}, ["all"]))]) == []


def test_noise_has_its_mean_over_a_tenth_of_the_stage():
    metrics = rows({"loss": lambda s: float(s % 2), "lr": lambda s: 1e-3 * s}, ["a", "b"], 80)
    metrics[3]["loss"] = None
    loss, rate = training_charts([run(metrics)])
    assert [line.role for line in loss.lines] == ["raw", "mean"] and [line.role for line in rate.lines] == ["raw"]
    values = dict(zip(loss.lines[1].x, loss.lines[1].y, strict=True))
    assert values[5] == pytest.approx(np.mean([0.0, 1.0, 0.0])) or 4 not in values
    assert 41 not in values and 43 not in values and values[44] == 0.5  # a stage's mean begins anew
    assert values[80] == 0.5


def test_learning_rate_of_each_parameter_group():
    """The groups' norms name the multipliers; groups without weight decay have no rate of their own."""
    metrics = rows({"lr": lambda s: 1e-3, "grad_norm/x1": lambda s: 1.0}, ["a", "b"])
    for row in metrics[3:]:
        row |= {"grad_norm/x0.1-no-decay": 1.0, "update_norm/x0.1": 1.0}
    chart = by_title(training_charts([run(metrics)]))["learning rate"]
    found = {line.name: dict(zip(line.x, line.y, strict=True)) for line in chart.lines}
    assert found == {"x1": dict.fromkeys(range(1, 7), 1e-3), "x0.1": dict.fromkeys((4, 5, 6), 1e-4)}
    assert training_charts([run(rows({"lr": lambda s: 1e-3}, ["a"]))])[0].lines[0].name == "learning rate"


def test_long_lines_keep_extremes_gaps_and_ends():
    values = np.sin(np.arange(100_000) / 7).astype(float)
    values[[12_345, 54_321]] = 50.0, -50.0
    values[777] = np.nan
    kept = thinned(values)
    assert {0, 99_999, 777, 12_345, 54_321} <= set(kept.tolist()) and len(kept) <= 3 * STRETCHES + 2
    for stretch in np.array_split(np.arange(100_000), STRETCHES):
        mine = kept[(kept >= stretch[0]) & (kept <= stretch[-1])]
        assert np.nanmin(values[mine]) == np.nanmin(values[stretch])
        assert np.nanmax(values[mine]) == np.nanmax(values[stretch])
    assert len(thinned(values[: 2 * STRETCHES])) == 2 * STRETCHES


def test_logarithmic_axis_where_positive_values_span_much():
    def chart(values: list[float]) -> bool:
        return training_charts([run(rows({"kl": lambda s: values[s]}, ["a"]))])[0].log

    assert chart([10.0, 5.0, 1.0, 0.3, 0.1, 0.01]) and not chart([3.0, 2.9, 2.8, 2.5, 2.4, 2.3])
    assert not chart([10.0, 0.0, 1.0, 0.3, 0.1, 0.01]) and not wants_log([])


def test_stages_begin_after_the_last_step_of_the_one_before():
    metrics = rows({"loss": lambda s: 1.0}, ["experts", "all"])
    assert borders(metrics) == [("experts", 0, 0), ("all", 3, 300)] and borders([]) == []


def test_runs_of_one_name_are_told_apart_by_their_folders():
    a, b, c = (run(name="x")._replace(folder=Path(f"/runs/{f}")) for f in ("one", "two", "deep/two"))
    assert [each.name for each in with_names([a, run(name="y")])] == ["x", "y"]
    assert [each.name for each in with_names([a, b])] == ["x (one)", "x (two)"]
    assert [each.name for each in with_names([a, b, c])] == ["x (runs/one)", "x (runs/two)", "x (deep/two)"]
    assert len({each.name for each in with_names([a, a])}) == 2


def test_curves_of_several_runs_share_charts():
    metrics = rows({"loss": lambda s: float(s), "extra": lambda s: 1.0}, ["all"])
    other = [{key: value for key, value in row.items() if key != "extra"} | {"loss": 9.0} for row in metrics]
    charts = by_title(training_charts([run(metrics), run(other, name="other")]))
    assert [(line.name, line.run) for line in charts["loss"].lines] == [("this", 0), ("other", 1)]
    assert charts["loss"].lines[1].y == [9.0] * 6 and len(charts["extra"].lines) == 1


def evaluation(model: str, step: int, **numbers: Any) -> dict[str, Any]:
    return {"model": model, "step": step, "tokens": 100 * step, **numbers}


def test_measures_are_in_the_order_of_training_with_the_teachers_level():
    """Lines out of order, as several watches write them; the last line of a model counts."""
    evals = [
        evaluation("all/step-9", 9, perplexity=5.0),
        evaluation("teacher", 0, perplexity=3.0),
        evaluation("student-0", 0, perplexity=99.0),
        evaluation("all/step-4", 4, perplexity=None, kl=0.5),
        evaluation("student-0", 0, perplexity=9.0),
    ]
    charts = by_title(quality_charts([run([], evals)]))
    student, teacher = charts["held-out perplexity"].lines
    assert student.x == [0, 9] and student.y == [9.0, 5.0] and student.tokens == [0, 900]
    assert (teacher.name, teacher.role, teacher.y) == ("teacher", "level", [3.0])
    assert charts["held-out KL(teacher || student)"].lines[0].y == [0.5]
    assert quality_charts([run([], evals[1:3])]) == []  # one point makes no curve


def test_tasks_have_standard_errors_and_a_teacher():
    def tasks(value: float) -> dict[str, Any]:
        return {"piqa": {"acc,none": value, "acc_stderr,none": 0.02}, "lambada": {"perplexity,none": 10 * value}}

    evals = [
        evaluation("teacher", 0, tasks=tasks(0.9)),
        evaluation("student-0", 0),
        evaluation("s", 3, tasks=tasks(0.5)),
    ]
    charts = by_title(quality_charts([run([], evals)]))
    student, teacher = charts["piqa/acc"].lines
    assert student.y == [0.5] and student.errors == [0.02] and teacher.y == [0.9]
    assert charts["piqa/acc"].unit == "%" and charts["lambada/perplexity"].unit == ""
    assert charts["lambada/perplexity"].lines[0].errors is None


def test_errors_ranks_and_parameters_of_each_layer():
    form = {"shape": "wrappers", "input_rank": 4, "output_rank": 2, "groups": 1}
    parts = [
        {"layer": layer, "projection": p, "form": form, "errors": [0.1, 0.3], "weighted_errors": [0.01 * layer, 0.03]}
        for layer in (10, 2)
        for p in ("gate", "down")
    ]
    found = compression_charts({"rank": 4, "parts": parts}, (16, 8))
    weighted, weights, ranks, stored = found
    assert "which the fit minimised, rank 4" in weighted.title and weighted.lines[0].x == [2, 10]
    assert weighted.lines[0].y == pytest.approx([0.025, 0.065]) and weights.lines[1].y == pytest.approx([0.2, 0.2])
    assert {line.name: line.y for line in ranks.lines} == {
        "gate input": [4, 4], "gate output": [2, 2], "down input": [4, 4], "down output": [2, 2]
    }  # fmt: skip
    assert stored.lines[0].y == [stored_parameters(Form(**form), "gate", 2, 16, 8)] * 2
    bare = [{"layer": 0, "projection": "gate", "errors": [0.5]}]
    assert [chart.unit for chart in compression_charts({"parts": bare}, None)] == ["relative, mean over experts"]
    assert compression_charts(None, None) == []


def test_load_of_the_teachers_experts_at_first_and_at_last():
    def routers(busiest: float) -> dict[str, Any]:
        return {f"layers.{i}": {"busiest": busiest + i, "idle": i, "entropy": 0.5} for i in range(2)}

    evals = [evaluation(name, at, teacher_routers=routers(at)) for at, name in enumerate(("teacher", "a", "b"))]
    charts = router_charts(run([], evals))
    assert [chart.title for chart in charts][:1] == ["load of the busiest expert"] and len(charts) == 3
    assert [(line.name, line.y) for line in charts[0].lines] == [("teacher", [0, 1]), ("b", [2, 3])]
    assert router_charts(run([], [evaluation("teacher", 0)])) == []
