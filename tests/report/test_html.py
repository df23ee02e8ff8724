"""The page of a run: what a browser reads of it holds the numbers that were recorded, and nothing of a user is run."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from plotly.offline import get_plotlyjs

from megakd.config.parsing import parse
from megakd.config.run import RunConfig
from megakd.report.figures import figure, timeline, write_png
from megakd.report.html import render_report
from megakd.report.series import (
    TERMS,
    Chart,
    Line,
    Recorded,
    borders,
    compression_charts,
    quality_charts,
    training_charts,
)
from megakd.report.tables import COLUMNS, quality_table, ratio_table, teacher_table
from tests.report.page import Page

KEYS = ("loss", "ce", "kl", "kl_t1", "lr", "grad_norm", "tokens_per_second", "data_wait_share")
TRAINING = [TERMS[key].title for key in KEYS]
EVALUATION = [
    "held-out perplexity",
    "held-out bits per byte",
    "held-out KL(teacher || student)",
    "top-1 agreement",
    "top-k agreement",
    "forward passes of the evaluation",
]


def config(**changes: Any) -> dict[str, Any]:
    return RunConfig(**changes).model_dump(mode="json")


def metrics(stages: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "step": s + 1,
            "stage": stages[s * len(stages) // 6],
            "tokens": 100 * (s + 1),
            **{k: 1 / (s + 1) for k in KEYS},
        }
        for s in range(6)
    ]


def evaluation(model: str, tokens: int, perplexity: float) -> dict[str, Any]:
    numbers = {
        "bits_per_byte": 1.5,
        "kl": 0.25,
        "top1": 0.625,
        "topk": 0.5,
        "parameters": 1234567,
        "bytes": 2469134,
        "tokens_per_second": 4321.0,
    }
    return {"model": model, "tokens": tokens, "step": tokens, "stage": None, "perplexity": perplexity, **numbers}


EVALS = [evaluation("teacher", 0, 11.11), evaluation("student-0", 0, 99.5), evaluation("all/step-000006", 600, 22.22)]
FORM = {"shape": "wrappers", "input_rank": 7, "output_rank": 7, "groups": 1}
COMPRESS = {
    "rank": 7,
    "parts": [
        {"layer": layer, "projection": p, "form": FORM, "errors": [0.1 * (i + 1), 0.3 + layer / 100]}
        for layer in (10, 2)
        for i, p in enumerate(("gate", "up", "down"))
    ],
}
MACHINE = {"device": "NVIDIA H200", "devices": 8, "memory_gb": 139.8, "cpus": 96, "libraries": ["torch 2.13.0"]}
HISTORY = [
    {"time": "2026-11-01T10:00:00Z", "event": "new", "megakd": {"version": "0.1.0", "commit": "abc1234"}},
    {"time": "2026-11-01T10:05:00Z", "event": "train", "ranks": 8, "resumed": None, "machine": MACHINE},
    {"time": "2026-11-01T10:06:00Z", "event": "skipped", "step": 3, "reason": "<b>spike</b> & more"},
    {"time": "2026-11-01T10:07:00Z", "event": "checkpoint", "step": 4, "machine_load": {"load": 3.0, "cpus": 96}},
    {"time": "2026-11-01T10:09:00Z", "event": "train", "ranks": 8, "resumed": "checkpoints/all/step-000004"},
]


def recorded(**parts: Any) -> Recorded:
    empty = {"config": config(), "metrics": [], "evals": [], "history": [], "compress": None, "folder": Path("runs/a")}
    given = {**empty, **parts}
    return Recorded(name=given["config"]["name"], **given)


def whole(stages: list[str], **parts: Any) -> Recorded:
    return recorded(metrics=metrics(stages), **{"evals": EVALS, "compress": COMPRESS, "history": HISTORY, **parts})


def named(name: str, **parts: Any) -> Recorded:
    return recorded(config=config(name=name), **parts)


def render(*others: Recorded, samples: Any = (), **parts: Any) -> str:
    return render_report(recorded(**parts), others, samples)


def test_page_needs_nothing_beside_it():
    page = render_report(whole(["experts", "all"]), [named("other", evals=EVALS[1:])])
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"link", "iframe", "object", "embed", "base", "img"})
    assert not any({"src", "href", "srcset"} & set(each) for tag, each in parsed.tags if tag != "a")
    assert all(str(each["href"]).startswith("#") for tag, each in parsed.tags if tag == "a")
    assert not re.search(r"@import|url\(|https?:|fetch\(|XMLHttp", parsed.own + parsed.data)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 3
    assert page.startswith("<!doctype html>") and 'charset="utf-8"' in page and 'name="viewport"' in page


def test_equal_inputs_make_equal_pages():
    assert render_report(whole(["experts", "all"])) == render_report(whole(["experts", "all"]))


def test_every_number_of_metrics_is_in_a_figure_with_the_borders_of_stages():
    run = whole(["experts", "all"])
    parsed = Page(render_report(run))
    errors = ["error of the weights, rank 7", "ranks of the wrappers"]
    assert list(parsed.figures) == [*EVALUATION, *TRAINING, *errors, "events over time"]
    for key, title in zip(KEYS, TRAINING, strict=True):
        [trace] = parsed.figures[title]["traces"]
        assert dict(zip(trace["x"], trace["y"], strict=True)) == {row["step"]: row[key] for row in run.metrics}
        assert trace["meta"] == {
            "role": "raw",
            "step": [r["step"] for r in run.metrics],
            "tokens": [r["tokens"] for r in run.metrics],
        }
        unit = parsed.figures[title]["layout"]["yaxis"]
        assert unit["title"]["text"] == TERMS[key].unit.replace("%", "") and ("%" in unit["tickformat"]) == (
            TERMS[key].unit == "%"
        )
    stages = [{"stage": "experts", "step": 0, "tokens": 0}, {"stage": "all", "step": 3, "tokens": 300}]
    assert json.loads(parsed.data)["borders"] == stages
    for title in EVALUATION:
        names = {"student", "teacher"} if title in (*EVALUATION[:2], EVALUATION[-1]) else {"student"}
        assert parsed.named(title) == names
    assert parsed.named(errors[0]) == {"gate", "up", "down"}


@pytest.mark.parametrize("log", [False, True])
def test_figures_are_what_plotly_takes(log):
    """Of every kind of line, with gaps, standard errors and shares; it raises at a field that it does not know."""
    from plotly.graph_objects import Figure

    kinds = [Line(role, [0, 1, 2], [0, 5, 9], [1.0, None, 2.0], role) for role in ("raw", "mean", "points")]
    measured = Line("piqa", [0, 2], None, [0.5, 0.6], "points", 1, [0.1, None])
    chart = Chart("title", "%", [*kinds, measured, Line("teacher", [], None, [1.5], "level")], log, note="some")
    run = whole(["experts", "all"])
    charts = [chart, *training_charts([run]), *quality_charts([run]), *compression_charts(COMPRESS, (8, 4))]
    for made in [*map(figure, charts), timeline(HISTORY)]:
        Figure(data=made["traces"], layout=made["layout"])
    made = figure(chart)
    assert made["traces"][3]["customdata"] == [" ± 10.0%", ""] and made["log"] == log
    assert made["traces"][4]["meta"] == {"role": "level", "step": [0, 2], "tokens": [0, 9]}


def test_all_charts_make_one_picture(tmp_path):
    run = whole(["experts", "all"])
    charts = [*quality_charts([run]), *training_charts([run])][4:8]
    write_png(tmp_path / "curves.png", charts, borders(run.metrics))
    height, width, _ = plt.imread(tmp_path / "curves.png").shape
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (height, width) == (2 * 256, 3 * 448)  # four charts, three in a row


def test_a_stage_that_was_not_reached_is_not_drawn():
    parsed = Page(render(metrics=metrics(["experts"])))
    assert list(parsed.figures) == TRAINING
    assert [border["stage"] for border in json.loads(parsed.data)["borders"]] == ["experts"]


def test_tables_hold_the_numbers():
    rows = Page(render(evals=EVALS, compress=COMPRESS)).rows
    assert rows[0] == ["model", "tokens", *(column.title for column in COLUMNS if column.only_with is None)]
    assert rows[1] == ["teacher", "0", "11.11", "1.500", "0.2500", "62.5%", "50.0%", "1,234,567", "2.5", "4,321"]
    assert [row[:3] for row in rows[2:4]] == [["student-0", "0", "99.50"], ["all/step-000006", "600", "22.22"]]
    # mean over experts of each layer, in the order of layers
    assert rows[4:] == [
        ["layer", "gate", "up", "down"],
        ["2", "0.2100", "0.2600", "0.3100"],
        ["10", "0.2500", "0.3000", "0.3500"],
    ]


def test_error_of_the_fit_stands_next_to_that_of_the_weights():
    parts = [{**part, "weighted_errors": [0.01, 0.03]} for part in COMPRESS["parts"]]
    parsed = Page(render(compress={**COMPRESS, "parts": parts}))
    assert parsed.rows[0] == [
        "layer",
        *(f"{kind} {p}" for kind in ("weighted", "weights") for p in ("gate", "up", "down")),
    ]
    assert parsed.rows[1] == ["2", "0.0200", "0.0200", "0.0200", "0.2100", "0.2600", "0.3100"]
    assert next(iter(parsed.figures)) == "weighted error, which the fit minimised, rank 7"


def test_summary_says_what_came_out_and_of_what_the_run_was_made():
    evals = [{**EVALS[0], "kl": 0.05, "bytes": 2469134 * 2}, {**EVALS[1], "kl": 0.45}, {**EVALS[2], "kl": 0.15}]
    text = Page(render_report(whole(["experts", "all"], evals=evals))).text
    for shown in ("75.0%", "22.22", "50.0%", "600"):
        assert shown in text["b"], text["b"]
    for shown in ("KL 0.4500 before, 0.1500 after; the teacher's own 0.0500", "teacher 11.11, before KD 99.50"):
        assert shown in text["small"]
    facts = text["dd"]
    assert "NVIDIA H200, 139.8 GiB, 8 of them per host, 96 CPU cores, 8 ranks" in facts and "torch 2.13.0" in facts
    assert "0.1.0 (abc1234)" in facts and "2026-11-01 10:00:00 UTC to 2026-11-01 10:09:00 UTC" in facts
    assert "machine shared" not in facts


def test_several_sources_are_listed_with_the_shares_that_were_asked_for_and_got():
    sources = [{"source": "a.jsonl", "weight": 3}, {"source": "b", "subset": "x", "weight": 1}]
    mixed = config(data={"sources": sources})
    assert "a.jsonl (share asked for: 75.00%), b / x (share asked for: 25.00%)" in Page(render(config=mixed)).text["dd"]
    shown = Page(render(config=mixed, shares=(0.7512, 0.2488))).text["dd"]
    assert "a.jsonl (75.12% of the tokens, asked for: 75.00%), b / x (24.88% of the tokens, asked for: 25.00%)" in shown


def test_speed_is_marked_where_the_machine_was_shared():
    busy = {"load": 120.0, "cpus": 96}
    history = [{**event, **({"machine_load": busy} if event["event"] == "checkpoint" else {})} for event in HISTORY]
    evals = [{**EVALS[0], "machine_load": busy}, {**EVALS[1], "machine_load": {"load": 1.0, "cpus": 96}}]
    parsed = Page(render_report(whole(["all"], history=history, evals=evals)))
    assert [row[9] for row in parsed.rows[1:3]] == ["4,321*", "4,321"]
    assert "load average 120.0 on 96 cores" in parsed.text["p"]
    assert "machine shared at 1 of 1 checkpoints: load average 120.0 on 96 cores" in parsed.text["dd"]


def test_history_is_drawn_and_listed():
    parsed = Page(render(history=HISTORY))
    events = parsed.figures["events over time"]
    kinds = {trace["name"]: trace for trace in events["traces"]}
    assert list(kinds) == ["new", "train", "skipped", "checkpoint", "resume"]
    assert kinds["skipped"]["x"] == ["2026-11-01 10:06:00"]
    assert "reason: &lt;b>spike&lt;/b> &amp; more" in kinds["skipped"]["text"][0]  # Plotly reads tags
    assert [row[1] for row in parsed.rows[1:]] == ["new", "train", "skipped", "checkpoint", "resume"]


def test_text_of_teacher_and_student_stands_side_by_side():
    sample = {"prompt": "<i>Once", "continuations": {"teacher": "upon", "student, all/step-6": "<u>in"}}
    page = render(samples=[sample])
    text = Page(page).text
    assert "<i>Once" in text["p"] and "upon" in text["p"] and "student, all/step-6" in text["b"]
    assert "<u>in" not in page and "Text samples" not in render()


def test_configuration_is_there_whole_and_escaped():
    nasty = """</pre><script>alert("1")</script>&amp;'é"""
    value = config(name=nasty, data={"source": "<b>/x"})
    rows = [{**row, nasty: 1.0, "stage": nasty} for row in metrics(["all"])]
    other = recorded(config=value, evals=[evaluation("<i>", 5, 1.0)], folder=Path("runs/<u>"))
    page = render(other, config=value, metrics=rows, evals=[evaluation(nasty, 0, 1.0)])
    parsed = Page(page)
    own = page.replace(get_plotlyjs(), "")
    assert not any(tag in own for tag in ("<i>", "<b>/x", "<u>", "<script>alert"))
    assert sum(tag == "script" for tag, _ in parsed.tags) == 3
    assert nasty in parsed.text["h1"] and nasty in parsed.text["title"]
    assert "<" in parsed.figures  # NAME of NAME/GROUP
    first = parsed.text["pre"][: parsed.text["pre"].index("}{") + 1]
    assert parse(json.loads(first), "report") == parse(value, "here")
    assert [row[0] for row in parsed.rows[1:]] == [f"{nasty} (a): {nasty}", f"{nasty} (<u>): <i>"]


def test_a_run_with_nothing_recorded_says_so():
    parsed = Page(render(config=config(name="empty")))
    notes = parsed.text["p"]
    assert not parsed.figures and not parsed.rows and not parsed.data
    assert "megakd evaluate RUN" in notes and "No training step" in notes and "not made by compress" in notes
    assert parsed.text["h1"] == "MegaKD run: empty"


def test_before_training_there_is_a_table_but_no_curve():
    parsed = Page(render(evals=EVALS[:2], compress=COMPRESS))
    assert len(parsed.figures) == 2  # the compression's
    assert [row[0] for row in parsed.rows[:3]] == ["model", "teacher", "student-0"]


@pytest.mark.parametrize("own", [EVALS, []], ids=["both", "baseline alone"])
def test_a_baseline_is_drawn_and_listed_beside(own):
    other = named("old run", metrics=metrics(["all"]), evals=[*EVALS[1:2], evaluation("x", 300, 33.33)])
    parsed = Page(render(other, config=config(name="new run"), metrics=metrics(["all"]), evals=own))
    for title in EVALUATION:
        assert {"old run", *(["new run"] if own else [])} <= parsed.named(title)
    for title in TRAINING:
        assert parsed.named(title) == {"new run", "old run"}
    names = [row[0] for row in parsed.rows[1:]]
    assert names == [*(f"new run: {row['model']}" for row in own), "old run: student-0", "old run: x"]


def with_tasks(row: dict[str, Any], value: float) -> dict[str, Any]:
    tasks = {
        "piqa": {"acc,none": value, "acc_stderr,none": 0.02, "acc_norm,none": value / 2, "samples": 60},
        "lambada": {"perplexity,none": 10 * value, "perplexity_stderr,none": None, "higher_is_better": {}},
    }
    return {**row, "tasks": tasks}


@pytest.mark.parametrize("baseline", [False, True])
def test_tasks_have_a_table_and_a_figure_for_each_metric(baseline):
    """Lines out of order, as several watches write them; a model without tasks has no row."""
    evals = [with_tasks(evaluation("all/step-000009", 900, 20.0), 0.75), EVALS[0], with_tasks(EVALS[2], 0.5)]
    others = [named("old run", evals=[with_tasks(EVALS[2], 0.6)])] if baseline else []
    parsed = Page(render(*others, config=config(name="new run"), evals=evals))
    assert {"piqa/acc", "piqa/acc_norm", "lambada/perplexity"} <= set(parsed.figures)
    assert parsed.named("piqa/acc") == ({"new run", "old run"} if baseline else {"student"})
    trace = parsed.figures["piqa/acc"]["traces"][0]
    assert trace["y"] == [0.5, 0.75] and trace["error_y"]["array"] == [0.02, 0.02]
    start = parsed.rows.index(["model", "piqa/acc", "piqa/acc_norm", "lambada/perplexity"])
    prefix = "new run: " if baseline else ""
    assert parsed.rows[start + 1] == [f"{prefix}all/step-000009", "75.0% ± 2.0%", "37.5%", "7.5"]
    assert parsed.rows[start + 2] == [f"{prefix}all/step-000006", "50.0% ± 2.0%", "25.0%", "5"]
    assert len(parsed.rows) == start + (4 if baseline else 3)


def test_a_baseline_without_records_adds_nothing():
    parsed = Page(render(named("old run"), evals=EVALS))
    assert "old run" not in parsed.named(EVALUATION[0]) and len(parsed.rows) == 4


def test_measures_that_some_lines_lack():
    """A run that trains without stored logits: targets came late; the teacher's routers are measured at checkpoints."""
    bare = [{name: value for name, value in row.items() if name not in ("kl", "top1", "topk")} for row in EVALS]
    routed = {"teacher_nll": 2.5, "teacher_perplexity": 12.18}
    parsed = Page(render(evals=[*bare[:2], {**bare[2], **routed}]))
    teacher = "held-out perplexity of the teacher with its new routers"
    assert list(parsed.figures) == [*EVALUATION[:2], teacher, EVALUATION[-1]]
    assert parsed.named(teacher) == {"student", "teacher"}
    assert parsed.rows[0][-2:] == ["teacher's perplexity", "teacher's KL"]
    assert parsed.rows[1] == ["teacher", "0", "11.11", "1.500", *"---", "1,234,567", "2.5", "4,321", "-", "-"]
    assert parsed.rows[3][-2:] == ["12.18", "-"]
    later = {**EVALS[2], **routed, "teacher_kl": 0.015625, "model": "all/step-000009", "tokens": 900}
    parsed = Page(render(named("stored", evals=EVALS[1:]), evals=[*bare, later]))
    drift = "held-out KL(teacher || teacher with its new routers)"
    assert list(parsed.figures) == [*EVALUATION[:-1], teacher, drift, EVALUATION[-1]]
    assert "stored" in parsed.named(EVALUATION[1]) and "stored" not in parsed.named(teacher)
    assert sorted(row[-1] for row in parsed.rows[1:5]) == ["-", "-", "-", "0.0156"]


def test_attention_is_drawn_where_some_line_has_it():
    parsed = Page(render(evals=[*EVALS[:2], {**EVALS[2], "attention": 0.71875}]))
    title = "overlap of attention with the teacher's"
    assert list(parsed.figures) == [*EVALUATION[:-1], title, EVALUATION[-1]] and parsed.named(title) == {"student"}
    assert [row[7] for row in parsed.rows[:4]] == ["attention", "-", "-", "71.9%"]


def test_metrics_that_some_steps_lack():
    """Rows of an older version, or a metric only some objectives have."""
    rows = metrics(["all"])
    del rows[2]["kl_t1"]
    rows[3]["loss"] = float("nan")
    titles = ["loss (1 of 6 steps: not finite)", *TRAINING[1:]]
    figures = Page(render(metrics=rows)).figures
    assert list(figures) == titles and figures[TERMS["kl_t1"].title]["traces"][0]["x"] == [1, 2, 4, 5, 6]


def test_steps_without_a_finite_value_end_no_report():
    """Each float16 run whose loss scaler skipped a step has a null in metrics.jsonl, which no mean can be taken of."""
    rows: list[dict[str, Any]] = [
        {"step": step, "stage": "all", "loss": 1.0 / step, "grad_norm": 1.0} for step in range(1, 41)
    ]
    rows[3]["grad_norm"], rows[7]["grad_norm"], rows[9]["loss"] = None, float("inf"), float("nan")
    del rows[11]["loss"]
    parsed = Page(render(metrics=rows))
    titles = ["loss (1 of 39 steps: not finite)", "gradient norm (2 of 40 steps: not finite)"]
    assert list(parsed.figures) == titles and "NaN" not in parsed.data and "Infinity" not in parsed.data
    assert [at for at, y in enumerate(parsed.figures[titles[1]]["traces"][0]["y"]) if y is None] == [3, 7]


@pytest.mark.parametrize("rows", [[], [{"step": 1, "stage": "all", "loss": None}], [{"step": 1, "stage": "all"}]])
def test_one_row_or_no_number_ends_no_report(rows):
    assert "nan" not in Page(render(metrics=rows)).text.get("p", "")


def test_evaluation_without_a_number_ends_no_report():
    good = evaluation("student-0", 0, 30.0)
    lost = {**evaluation("all/step-2", 100, 20.0), "perplexity": None, "kl": float("nan")}
    bare = {"model": "all/step-4", "step": 4}
    rows = [evaluation("teacher", 0, 5.0) | {"kl": None, "perplexity": None}, good, lost, bare]
    cells = {row[0]: row[1:] for row in Page(render(evals=rows)).rows}
    assert cells["all/step-2"][1] == "-" and cells["all/step-2"][3] == "-"
    assert set(cells["all/step-4"]) == {"-"} and cells["student-0"][1] == "30.00"
    shown = quality_table(rows)
    assert "nan" not in shown and "None" not in shown and "30.00" in shown
    assert "nan" not in ratio_table(rows[0] | {"bytes": 0, "parameters": None}, rows) and teacher_table(rows)
