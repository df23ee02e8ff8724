"""Runs in the copy of tests/test_contributing.py: the new objective and the new measures in a run."""

import json

import pytest
import torch

from megakd.data.batches import collate
from megakd.data.records import IGNORED
from megakd.models.loading import load_model
from megakd.objectives.build import build
from megakd.run import Run
from tests.conftest import in_process, metrics


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    changes = ("objective.kind=smooth", "objective.smoothing=0.3", "eval.best=double_nll")
    return Run.create(prepared, changes, tmp_path_factory.mktemp("smooth") / "run")


def test_loss_of_the_new_objective_is_that_of_a_dense_float64_reference(run, dataset):
    model = load_model(run.student_folder, torch.float32)
    batch = collate([dataset[0], dataset[1]], 32)
    report = build(run.config, model, None, dataset.facts)(batch)
    with torch.no_grad():
        logits = model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits.double()
    expected = 0.0
    for row, label in zip(logits.flatten(0, 1), batch.labels.flatten().tolist(), strict=True):
        if label != IGNORED:
            logs = row - row.exp().sum().log()
            expected -= float(0.7 * logs[label] + 0.3 * logs.mean())
    assert report.total.item() == pytest.approx(expected, rel=1e-5)


def test_run_with_the_new_objective_logs_and_draws_the_new_metric_and_measure(run):
    in_process("train", run.folder)
    rows = metrics(run.folder)
    assert all(0 < row["sharpness"] < 1 for row in rows) and rows[-1]["loss"] < rows[0]["loss"]
    said = in_process("evaluate", run.folder)
    lines = [json.loads(line) for line in (run.folder / "evals.jsonl").read_text().splitlines()]
    assert [line["double_nll"] for line in lines] == pytest.approx([2 * line["nll"] for line in lines])
    assert "2 NLL" in said
    in_process("report", run.folder)
    page = (run.folder / "report.html").read_text()
    assert "probability of the first token" in page and "twice the held-out NLL" in page and "<th>2 NLL</th>" in page


def test_new_fields_are_in_the_list_of_fields():
    said = in_process("config")
    assert "objective, kind=smooth" in said and "smoothing" in said
