"""The demo, whole but shorter: the shipped teacher and text, ZeRO-3 on two ranks, the table, the page."""

import hashlib
import json
import re

import pytest

from megakd.files import resolve
from tests.conftest import megakd

SHORT = ["data.tokens=80000", "data.shard_tokens=20000", "data.holdout_tokens=8000", "optim.warmup_steps=4"]
SHORT += ["stages.0.tokens=65536", "stages.1.tokens=49152", "compress.sweeps=5", "log.wandb=disabled"]


def test_shipped_teacher_is_the_one_whose_training_is_recorded():
    folder = resolve("demo")
    record = json.loads((folder / "training.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["weights_sha256"]
    assert len(weights) <= 12e6
    assert record["held_out_loss"][-1][1] < 3.5 and "train_demo_teacher.py" in record["command"]


@pytest.mark.demo
@pytest.mark.ranks
def test_demo_ends_with_a_table_in_which_distillation_wins(tmp_path):
    output = megakd("demo", "--folder", tmp_path / "demo", *SHORT)
    rows = {}
    for run in ("kd", "ce"):
        lines = map(json.loads, (tmp_path / "demo" / run / "evals.jsonl").read_text().splitlines())
        rows[run] = {row["model"]: row for row in lines}
    before, after = rows["kd"]["student-0"], list(rows["kd"].values())[-1]
    alone = list(rows["ce"].values())[-1]
    assert after["tokens"] == alone["tokens"] > 0
    assert after["kl"] < 0.6 * before["kl"] and after["kl"] < alone["kl"]
    assert rows["kd"]["teacher"]["perplexity"] < after["perplexity"] < before["perplexity"]
    for name in ("teacher", "student, compressed", "student, after KD", "student, after CE alone"):
        assert re.search(rf"^{name}  ", output, re.MULTILINE), output
    assert f"{after['kl']:.4f}" in output and f"{alone['perplexity']:.2f}" in output
    page = (tmp_path / "demo" / "kd" / "report.html").read_text()
    assert "ce-alone" in page and page.count("<img") >= 9
    assert (tmp_path / "demo" / "kd" / "export-dense" / "model.safetensors").exists()
    events = [
        json.loads(line)["event"] for line in (tmp_path / "demo" / "kd" / "history.jsonl").read_text().splitlines()
    ]
    assert events.count("train") == 1 and "checkpoint" in events
