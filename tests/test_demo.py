"""The demo, whole but shorter: the shipped teacher and text, ZeRO-3 on two ranks, the table, the page."""

import hashlib
import json
import re
import shutil

import pytest

import megakd.commands.demo as module
from megakd.cli import run_verb
from megakd.names import resolve
from tests.conftest import forked, in_process

SHORT = ["data.tokens=33000", "data.shard_tokens=11000", "data.holdout_tokens=3000", "optim.warmup_steps=2"]
SHORT += ["stages.0.tokens=12288", "stages.1.tokens=18432", "optim.batch_tokens=2048", "optim.micro_batch=4"]
SHORT += ["compress.sweeps=3", "compress.calibration_tokens=8192", "log.wandb=disabled"]


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
    output = forked("demo", "--folder", tmp_path / "demo", *SHORT)
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
    assert "ce-alone" in page and page.count("<figure") >= 15
    assert (tmp_path / "demo" / "kd" / "export-dense" / "model.safetensors").exists()
    events = [
        json.loads(line)["event"] for line in (tmp_path / "demo" / "kd" / "history.jsonl").read_text().splitlines()
    ]
    assert events.count("train") == 1 and "checkpoint" in events


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """demo(*argv): the verb in a folder of its own, which makes runs and only names the other verbs; what it named."""
    monkeypatch.chdir(tmp_path)
    row = {"kl": 1.0, "nll": 2.0, "tokens": 3}
    rows = [{**row, "kl": 0.0, "nll": 1.0}, row, {**row, "kl": 0.5, "nll": 1.5}]
    monkeypatch.setattr(module, "evaluate", lambda run: rows)
    monkeypatch.setattr(module, "quality_table", lambda rows, names: "table")

    def start(*argv: str, code: int = 0) -> tuple[list[str], str]:
        named: list[str] = []

        def verb(argv: list[str]) -> None:
            named.append(argv[0])
            if argv[0] == "new":
                run_verb(argv)

        monkeypatch.setattr(module, "run_verb", verb)
        monkeypatch.setattr(
            module, "to_the_end", lambda run, until, here: named.append(f"{run.folder.name} until {until}")
        )
        return named, in_process("demo", *argv, code=code)

    return start


def test_a_second_demo_goes_on_in_the_folder_of_the_first(demo, tmp_path):
    """Its folder has the name of the recipe, `demo`, and lies in the working directory."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("mine")
    named, said = demo()
    assert named.count("new") == 2 and "goes on" not in said
    named, said = demo()
    assert "goes on in demo" in said
    assert named == ["kd until export", "ce until evaluate", "export", "report"]
    assert (tmp_path / "demo" / "thesis.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "demo" / "ce")  # as after a kill
    assert demo()[0].count("new") == 1
    for changes in (["seed=3"], ["--teacher", "org/other"]):
        assert "name another --folder" in demo(*changes, code=2)[1]


def test_a_demo_never_takes_foreign_folders(demo, tmp_path):
    for name, inside in (("kd", "thesis.txt"), ("ce", "config.json")):
        file = tmp_path / name / name / inside
        file.parent.mkdir(parents=True)
        file.write_text('{"model_type": "llama"}')
        named, said = demo("--folder", name, code=2)
        assert f"{name}/{name}: exists already and is no run of the demo" in said and named == []
        assert [path for path in (tmp_path / name).rglob("*") if path.is_file()] == [file]
    (tmp_path / "file").write_text("")
    assert "cannot be written" in demo("--folder", "file", code=2)[1]
