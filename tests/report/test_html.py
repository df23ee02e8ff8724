import base64
import json
import re
from html.parser import HTMLParser
from typing import Any

import matplotlib.pyplot as plt
import pytest

from megakd.config.parsing import parse
from megakd.config.run import RunConfig
from megakd.report.html import TERMS, evaluation_panels, plot, render_report, training_panels, write_png
from megakd.report.tables import quality_table, ratio_table, teacher_table

TRAINING = [
    "loss",
    "cross entropy",
    "KL(teacher || student), T = 1",
    "learning rate",
    "gradient norm",
    "tokens/s",
]
EVALUATION = ["held-out perplexity", "held-out KL(teacher || student)", "top-1 agreement"]


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, cells of tables; tags must nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self.open[-1] if self.open else ""
        self.text[tag] = self.text.get(tag, "") + data
        if tag in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def images(self) -> dict[str, str]:
        """SVG source by title."""
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, data = attributes["src"].split(",", 1)
                assert kind == "data:image/svg+xml;base64"
                found[attributes["alt"]] = base64.b64decode(data, validate=True).decode()
        return found


def config(**changes: Any) -> dict[str, Any]:
    return RunConfig(**changes).model_dump(mode="json")


def metrics(stages: list[str]) -> list[dict[str, Any]]:
    keys = ("loss", "ce", "kl", "kl_t1", "lr", "grad_norm", "tokens_per_second", "data_wait_share")
    return [
        {"step": s + 1, "stage": stages[s * len(stages) // 6], "tokens": 100 * s, **{k: 1 / (s + 1) for k in keys}}
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
    return {"model": model, "tokens": tokens, "step": 0, "stage": None, "perplexity": perplexity, **numbers}


EVALS = [evaluation("teacher", 0, 11.11), evaluation("student-0", 0, 99.5), evaluation("all/step-000006", 600, 22.22)]
COMPRESS = {
    "rank": 7,
    "parts": [
        {"layer": layer, "projection": p, "errors": [0.1 * (i + 1), 0.3 + layer / 100]}
        for layer in (10, 2)
        for i, p in enumerate(("gate", "up", "down"))
    ],
}


def drawn(svg: str) -> set[str]:
    """Texts of a plot: matplotlib leaves each as a comment next to its outlines."""
    return set(re.findall(r"<!-- (.*?) -->", svg))


def test_page_needs_nothing_beside_it():
    page = render_report(config(), metrics(["experts", "all"]), EVALS, COMPRESS, ("other", EVALS[1:]))
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    for text in (page, *parsed.images.values()):
        assert not re.search(r"""\b(src|href|srcset|data)\s*=\s*["']?\s*(https?:|//)""", text, re.I)
        assert not re.search(r"@import|url\(\s*[\"']?(https?:|//)", text, re.I)
        assert "<script" not in text
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in parsed.tags)
    assert page.startswith("<!doctype html>") and 'charset="utf-8"' in page


def test_every_metric_is_drawn_with_every_stage():
    images = Page(render_report(config(), metrics(["experts", "all"]), EVALS, COMPRESS)).images
    assert list(images) == [*EVALUATION, *TRAINING, "relative weight error, rank 7, mean over experts"]
    for title in TRAINING:
        assert {"experts", "all", title, "step"} <= drawn(images[title])
    for title in EVALUATION:
        assert {"this run", title, "step"} <= drawn(images[title])
    assert "teacher" in drawn(images["held-out perplexity"])
    assert {"gate", "up", "down", "layer"} <= drawn(images[list(images)[-1]])


def test_terms_of_every_objective_are_drawn_where_they_were_logged():
    rows = [{**row, "span_kl": 0.1, "teacher_ce": 2.0, "unknown": 1.0} for row in metrics(["experts"])]
    rows[0]["teacher_drift"] = 0.0
    for row in rows:
        del row["kl_t1"]
    titles = [panel.title for panel in training_panels(rows)]
    assert titles[:4] == ["loss", "cross entropy", TERMS["span_kl"], TERMS["teacher_ce"]]
    assert TERMS["teacher_drift"] in titles and TERMS["kl_t1"] not in titles and "unknown" not in titles


def test_noise_has_its_mean_over_a_tenth_of_the_stage():
    rows = [{"step": i, "stage": "all", "loss": float(i % 2), "lr": 1e-3 * i} for i in range(40)]
    for panel, count in zip(training_panels(rows), (2, 1), strict=True):
        _, axes = plt.subplots()
        panel.draw(axes)
        lines: list[Any] = axes.get_lines()
        assert len(lines) == count and list(lines[0].get_ydata()) == [
            row["loss" if count == 2 else "lr"] for row in rows
        ]
        if count == 2:
            assert list(lines[1].get_ydata()) == [0.5] * 37 and lines[1].get_xdata()[0] == 3
        plt.close()


def test_all_panels_make_one_picture(tmp_path):
    panels = [*training_panels(metrics(["experts", "all"])), *evaluation_panels({"this run": EVALS})]
    write_png(tmp_path / "curves.png", panels)
    height, width, _ = plt.imread(tmp_path / "curves.png").shape
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (height, width) == (3 * 256, 3 * 448)  # nine panels, three in a row


def test_a_stage_that_was_not_reached_is_not_drawn():
    images = Page(render_report(config(), metrics(["experts"]), [], None)).images
    assert list(images) == TRAINING
    assert all("experts" in drawn(svg) and "all" not in drawn(svg) for svg in images.values())


def test_tables_hold_the_numbers():
    rows = Page(render_report(config(), [], EVALS, COMPRESS)).rows
    assert rows[0] == [
        "model",
        "tokens",
        "perplexity",
        "bits/byte",
        "KL to teacher",
        "top-1",
        "top-k",
        "parameters",
        "MB",
        "tokens/s",
    ]
    assert rows[1] == ["teacher", "0", "11.11", "1.500", "0.2500", "62.5%", "50.0%", "1,234,567", "2.5", "4,321"]
    assert [row[:3] for row in rows[2:4]] == [["student-0", "0", "99.50"], ["all/step-000006", "600", "22.22"]]
    # mean over experts of each layer, in the order of layers
    assert rows[4:] == [
        ["layer", "gate", "up", "down"],
        ["2", "0.2100", "0.2600", "0.3100"],
        ["10", "0.2500", "0.3000", "0.3500"],
    ]


def test_configuration_is_there_whole_and_escaped():
    nasty = """</pre><script>alert("1")</script>&amp;'é"""
    value = config(name=nasty, data={"source": "<b>/x"})
    page = render_report(value, [], [evaluation(nasty, 0, 1.0)], None, (nasty, [evaluation("<i>", 5, 1.0)]))
    parsed = Page(page)
    assert "<script" not in page and "<i>" not in page and "<b>" not in page
    assert nasty in parsed.text["h1"] and nasty in parsed.text["title"]
    assert parse(json.loads(parsed.text["pre"]), "report") == parse(value, "here")
    assert [row[0] for row in parsed.rows] == ["model", nasty, f"{nasty}: <i>"]


def test_a_run_with_nothing_recorded_says_so():
    page = render_report(config(name="empty"), [], [], None)
    parsed = Page(page)
    notes = parsed.text["p"]
    assert not parsed.images and not parsed.rows
    assert "megakd evaluate RUN" in notes and "No training step" in notes and "not made by compress" in notes
    assert parsed.text["h1"] == "MegaKD run: empty"


def test_before_training_there_is_a_table_but_no_curve():
    parsed = Page(render_report(config(), [], EVALS[:2], COMPRESS))
    assert len(parsed.images) == 1  # the compression's
    assert [row[0] for row in parsed.rows[:3]] == ["model", "teacher", "student-0"]


@pytest.mark.parametrize("own", [EVALS, []], ids=["both", "baseline alone"])
def test_a_baseline_is_drawn_and_listed_beside(own):
    parsed = Page(
        render_report(config(), metrics(["all"]), own, None, ("old run", [*EVALS[1:2], evaluation("x", 300, 33.33)]))
    )
    for title in EVALUATION:
        texts = drawn(parsed.images[title])
        assert "old run" in texts and ("this run" in texts) == bool(own)
        assert ("tokens trained on" if own else "step") in texts  # steps of two runs do not compare
    names = [row[0] for row in parsed.rows[1:]]
    assert names == [*(row["model"] for row in own), "old run: student-0", "old run: x"]


def with_tasks(row: dict[str, Any], value: float) -> dict[str, Any]:
    tasks = {
        "piqa": {"acc,none": value, "acc_stderr,none": 0.02, "acc_norm,none": value / 2, "samples": 60},
        "lambada": {"perplexity,none": 10 * value, "perplexity_stderr,none": None, "higher_is_better": {}},
    }
    return {**row, "tasks": tasks}


@pytest.mark.parametrize("baseline", [None, ("old run", [with_tasks(EVALS[2], 0.6)])])
def test_tasks_have_a_table_and_a_plot_each(baseline):
    """Lines out of order, as several watches write them; a model without tasks has no row."""
    evals = [with_tasks(evaluation("all/step-000009", 900, 20.0), 0.75), EVALS[0], with_tasks(EVALS[2], 0.5)]
    parsed = Page(render_report(config(), [], evals, None, baseline))
    assert {"piqa", "lambada"} <= set(parsed.images)
    expected = {"acc", "acc_norm"} if baseline is None else {"this run: acc", "old run: acc", "this run: acc_norm"}
    assert expected <= drawn(parsed.images["piqa"])
    assert ("step" if baseline is None else "tokens trained on") in drawn(parsed.images["piqa"])
    start = parsed.rows.index(["model", "piqa/acc", "piqa/acc_norm", "lambada/perplexity"])
    assert parsed.rows[start + 1] == ["all/step-000009", "0.75 ± 0.02", "0.375", "7.5"]
    assert parsed.rows[start + 2] == ["all/step-000006", "0.5 ± 0.02", "0.25", "5"]
    assert len(parsed.rows) == start + (3 if baseline is None else 4)


def test_a_baseline_without_evaluations_adds_nothing():
    parsed = Page(render_report(config(), [], EVALS, None, ("old run", [])))
    assert "old run" not in drawn(parsed.images[EVALUATION[0]]) and len(parsed.rows) == 4


def test_measures_that_some_lines_lack():
    """A run that trains without stored logits: targets came late; the teacher's routers are measured at checkpoints."""
    bare = [{name: value for name, value in row.items() if name not in ("kl", "top1", "topk")} for row in EVALS]
    routed = {"teacher_nll": 2.5, "teacher_perplexity": 12.18}
    parsed = Page(render_report(config(), [], [*bare[:2], {**bare[2], **routed}], None))
    teacher = "held-out perplexity of the teacher with its new routers"
    assert list(parsed.images) == ["held-out perplexity", teacher]
    assert {"this run", "teacher"} <= drawn(parsed.images[teacher])
    assert parsed.rows[0][-2:] == ["teacher's perplexity", "teacher's KL"]
    assert parsed.rows[1] == ["teacher", "0", "11.11", "1.500", *"---", "1,234,567", "2.5", "4,321", *"--"]
    assert parsed.rows[3][-2:] == ["12.18", "-"]
    later = {**EVALS[2], **routed, "teacher_kl": 0.015625, "model": "all/step-000009", "tokens": 900}
    parsed = Page(render_report(config(), [], [*bare, later], None, ("stored", EVALS[1:])))
    assert list(parsed.images) == [*EVALUATION, teacher, "held-out KL(teacher || teacher with its new routers)"]
    assert "stored" in drawn(parsed.images[EVALUATION[1]]) and "stored" not in drawn(parsed.images[teacher])
    assert [row[-1] for row in parsed.rows[1:5]] == ["-", "-", "-", "0.0156"]


def test_attention_is_drawn_where_some_line_has_it():
    rows = [*EVALS[:2], {**EVALS[2], "attention": 0.71875}]
    parsed = Page(render_report(config(), [], rows, None))
    title = "overlap of attention with the teacher's"
    assert list(parsed.images) == [*EVALUATION, title] and "this run" in drawn(parsed.images[title])
    column = parsed.rows[0].index("attention")
    assert [row[column] for row in parsed.rows[1:4]] == ["-", "-", "0.7188"]


def test_metrics_that_some_steps_lack():
    """Rows of an older version, or a metric only some objectives have."""
    rows = metrics(["all"])
    del rows[2]["kl_t1"]
    rows[3]["loss"] = float("nan")
    titles = ["loss (1 of 6 steps: not finite)", *TRAINING[1:]]
    assert list(Page(render_report(config(), rows, [], None)).images) == titles


def test_plot_escapes_its_title_and_shows_a_legend_of_labels():
    image = Page(plot("<a> & b", lambda axes: axes.plot([1, 2], [3, 4], label="line"), "x axis")).images
    assert list(image) == ["<a> & b"]
    assert {"line", "x axis"} <= drawn(image["<a> & b"])


def test_steps_without_a_finite_value_end_no_report():
    """Each float16 run whose loss scaler skipped a step has a null in metrics.jsonl, which no mean can be taken of."""
    rows = [{"step": step, "stage": "all", "loss": 1.0 / step, "grad_norm": 1.0} for step in range(1, 41)]
    rows[3]["grad_norm"], rows[7]["grad_norm"], rows[9]["loss"] = None, float("inf"), float("nan")
    del rows[11]["loss"]
    titles = [panel.title for panel in training_panels(rows)]
    assert titles == ["loss (1 of 39 steps: not finite)", "gradient norm (2 of 40 steps: not finite)"]
    images = Page(render_report(config(), rows, [], None)).images
    assert set(titles) <= images.keys() and all("nan" not in svg.lower() for svg in images.values())


@pytest.mark.parametrize("rows", [[], [{"step": 1, "stage": "all", "loss": None}], [{"step": 1, "stage": "all"}]])
def test_one_row_or_no_number_ends_no_report(rows):
    assert "nan" not in Page(render_report(config(), rows, [], None)).text.get("p", "")


def test_evaluation_without_a_number_ends_no_report():
    good = evaluation("student-0", 0, 30.0)
    lost = {**evaluation("all/step-2", 100, 20.0), "perplexity": None, "kl": float("nan")}
    bare = {"model": "all/step-4", "step": 4}
    rows = [evaluation("teacher", 0, 5.0) | {"kl": None, "perplexity": None}, good, lost, bare]
    cells = {row[0]: row[1:] for row in Page(render_report(config(), [], rows, None)).rows}
    assert cells["all/step-2"][1] == "-" and cells["all/step-2"][3] == "-"
    assert set(cells["all/step-4"]) == {"-"} and cells["student-0"][1] == "30.00"
    shown = quality_table(rows)
    assert "nan" not in shown and "None" not in shown and "30.00" in shown
    assert "nan" not in ratio_table(rows[0] | {"bytes": 0, "parameters": None}, rows) and teacher_table(rows)
