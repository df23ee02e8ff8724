"""SAR-KD as a run: trained, killed, resumed, on one process and on two ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megakd.api import run_distillation_training
from megakd.models.loading import load_model
from megakd.models.tiny import train_tokenizer
from megakd.run import Run
from tests.conftest import VOCABULARY, forked_ranks, in_process, kill_when, make_teacher, metrics
from tests.objectives.sar import sar_recipe
from tests.train.test_resume import steps_logged

GATES = [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, recipe, tokenizer) -> Path:
    """A run with tokens: SAR-KD needs nothing else."""
    folder = tmp_path_factory.mktemp("sar")
    in_process("new", folder / "run", "--from", sar_recipe(recipe, folder, tokenizer))
    in_process("tokenize", folder / "run")
    return folder / "run"


@pytest.fixture
def again(begun, tmp_path) -> Callable[..., Run]:
    count = iter(range(100))
    return lambda *overrides: Run.create(begun, overrides, tmp_path / f"run-{next(count)}")


@pytest.fixture(scope="module")
def trained(begun, tmp_path_factory) -> Run:
    run = Run.create(begun, [], tmp_path_factory.mktemp("trained") / "run")
    in_process("train", run.folder)
    return run


def beside(run: Run, checkpoint: str) -> dict[str, torch.Tensor]:
    return load_file(run.path("checkpoints", checkpoint, "auxiliary.safetensors"))


def test_student_and_routers_are_trained_and_nothing_else(trained, teacher):
    rows = metrics(trained.folder)
    assert len(rows) == 7 and rows[-1]["loss"] < rows[0]["loss"]
    assert {"ce", "kl", "kl_t1", "teacher_ce", "router_anchor", "router_certainty", "router_balance"} <= rows[0].keys()
    assert [("kl_frozen" in row) for row in rows] == [True, False, True, False, True, False, True]
    assert rows[0]["teacher_drift"] == pytest.approx(0, abs=1e-6) and rows[-1]["teacher_drift"] > 0
    assert rows[0]["router_anchor"] == 0 < rows[-1]["router_anchor"]
    # every 2 steps of a stage and at its end, of 3 and 4 steps
    measured = {row["step"]: row["validation_perplexity"] for row in rows if "validation_nll" in row}
    assert list(measured) == [2, 3, 5, 7] and measured[2] > measured[5] > measured[7]
    before = load_model(teacher, torch.float32).state_dict()
    found = beside(trained, "second/step-000007")
    assert sorted(found) == [f"routers.model:layers:{i}:mlp:gate.weight" for i in range(2)]
    for gate, tensor in zip(GATES, found.values(), strict=True):
        assert not torch.equal(tensor, before[gate]) and torch.allclose(tensor, before[gate], atol=0.05)
    folder = trained.path("checkpoints/second/step-000007/weights")
    assert load_model(folder, torch.float32).config.model_type == "llama"


@pytest.mark.ranks
def test_killed_it_goes_on_as_if_nothing_had_happened(trained, again):
    """Bit by bit: student, routers and every metric; also from the border of the stages."""
    killed = again("checkpoint.every_steps=1")
    whole = again("checkpoint.every_steps=1", "engine.offload_teacher=true")  # which changes nothing
    in_process("train", whole.folder)
    for steps in (1, 3, 5):
        kill_when(["train", killed.folder], lambda n=steps: steps_logged(killed) >= n)
    in_process("train", killed.folder)
    assert metrics(killed.folder) == metrics(whole.folder) == metrics(trained.folder)
    last = "second/step-000007"
    assert all(torch.equal(tensor, beside(whole, last)[name]) for name, tensor in beside(killed, last).items())
    weights = f"checkpoints/{last}/weights/model.safetensors"
    assert killed.path(weights).read_bytes() == whole.path(weights).read_bytes()


def test_a_border_is_crossed_in_another_process_alike(trained, again):
    cut = again("checkpoint.every_steps=3")
    in_process("train", cut.folder)
    for path in cut.path("checkpoints/second").iterdir():
        path.rename(path.with_name(path.name + ".away"))
    in_process("train", cut.folder)
    assert metrics(cut.folder) == metrics(trained.folder)


@pytest.mark.ranks
@pytest.mark.parametrize("zero, ranks, micro", [("zero2", 2, 4), ("zero3", 2, 2), ("zero2", 1, 8)])
def test_ranks_give_the_local_curve(trained, again, zero, ranks, micro):
    run = again("engine.kind=deepspeed", f"engine.config={zero}", f"engine.ranks={ranks}", f"optim.micro_batch={micro}")
    forked_ranks(ranks, "train", run.folder)
    found, expected = metrics(run.folder), metrics(trained.folder)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
        assert {name: mine[name] for name in numbers} == pytest.approx(numbers, rel=2e-4, abs=2e-5)


def test_what_does_not_fit_is_refused_in_one_line(again, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
        said = in_process("train", again("engine.activation_checkpointing=true").folder, code=2)
    assert "models of type llama cannot recompute activations" in said
    dense = again(f"model.teacher={again().config.model.student}")
    in_process("tokenize", dense.folder)
    assert "no module with a matrix [experts, hidden]" in in_process("train", dense.folder, code=2)
    assert "'odd' find no matrix" in in_process("train", again('objective.router_patterns=["odd"]').folder, code=2)


@pytest.fixture(scope="module")
def across(tmp_path_factory, recipe, documents, tokenizer) -> Path:
    """A run whose teacher cuts text in another way than its student."""
    folder = tmp_path_factory.mktemp("across")
    other = train_tokenizer([text.upper() + text for text in documents[:20]], VOCABULARY)
    make_teacher(folder / "teacher", other, documents, seed=3, steps=100)
    value = json.loads(sar_recipe(recipe, folder, tokenizer).read_text())
    value["model"]["teacher"] = str(folder / "teacher")
    (folder / "across.json").write_text(json.dumps(value))
    in_process("new", folder / "run", "--from", folder / "across.json")
    in_process("tokenize", folder / "run")
    in_process("train", folder / "run")
    return folder / "run"


def test_a_teacher_with_another_tokenizer_teaches_over_spans(across):
    shown = in_process("plan", across)
    assert "data/tokens/holdout" in shown and "data/logits" not in shown  # evaluate needs none
    rows = metrics(across)
    assert len(rows) == 7 and rows[-1]["loss"] < rows[0]["loss"]
    assert {"ce", "span_kl", "features", "teacher_ce", "teacher_drift"} <= rows[0].keys() and "kl" not in rows[0]
    assert rows[-1]["span_kl"] < rows[0]["span_kl"] and rows[-1]["features"] < rows[0]["features"]
    assert rows[0]["router_anchor"] == 0 < rows[-1]["router_anchor"]
    names = load_file(across / "checkpoints/second/step-000007/auxiliary.safetensors")
    assert sorted(names)[0] == "projector.weight" and len(names) == 3


@pytest.mark.ranks
def test_across_tokenizers_it_resumes_and_ranks_give_the_local_curve(across, tmp_path):
    whole = Run.create(across, ["checkpoint.every_steps=2"], tmp_path / "killed")
    kill_when(["train", whole.folder], lambda: steps_logged(whole) >= 4)
    in_process("train", whole.folder)
    assert metrics(whole.folder) == metrics(across)
    run = Run.create(across, ["engine.kind=deepspeed", "engine.config=zero2", "engine.ranks=2"], tmp_path / "ranks")
    forked_ranks(2, "train", run.folder)
    for mine, theirs in zip(metrics(run.folder), metrics(across), strict=True):
        assert mine.keys() == theirs.keys()
        numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
        assert {name: mine[name] for name in numbers} == pytest.approx(numbers, rel=2e-4, abs=2e-5)


def test_another_teacher_is_refused_on_the_way(across, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(Run.open(across).config.model.teacher, teacher)
    run = Run.create(across, [f"model.teacher={teacher}"], tmp_path / "run")
    in_process("tokenize", run.folder)
    shutil.copytree(across / "checkpoints", run.path("checkpoints"))
    shutil.rmtree(run.path("checkpoints/second"))
    history = run.path("history.jsonl").read_text() + (across / "history.jsonl").read_text()
    run.path("history.jsonl").write_text(history)
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    assert "its weights or its config.json were changed" in in_process("train", run.folder, code=2)
    shutil.copytree(Run.open(across).config.model.teacher, teacher, dirs_exist_ok=True)
    in_process("train", run.folder)
    assert metrics(run.folder)[-1]["loss"] == metrics(across)[-1]["loss"]


def test_slow_tokenizers_and_nothing_to_learn_are_refused(across, tmp_path):
    run = Run.create(across, ["objective.likelihood=0", "objective.features=0"], tmp_path / "run")
    assert "nothing is left to learn from the teacher" in in_process("train", run.folder, code=2)


def test_weights_of_spans_are_refused_where_there_is_one_tokenizer(again):
    """They were ignored: there are no spans."""
    said = in_process("train", again("objective.likelihood=0.5").folder, code=2)
    assert "objective.likelihood=0.5 has no effect: teacher and student have one tokenizer" in said


@pytest.mark.ranks
def test_many_parts_across_tokenizers_resume_and_ranks_give_the_local_curve(across, tmp_path):
    """objective.kind=online over spans: what it remembers comes back too."""
    parts = {"gap": 1, "importance": 0.5, "routing": "capacity", "initial_top_k": 2}
    objective = {"kind": "online", "alpha": 0.7, "temperature": 2.0, **parts}
    settings = [f"objective={json.dumps(objective)}", "stages.0.lr_multipliers=[]"]
    whole = Run.create(across, settings, tmp_path / "whole")
    assert run_distillation_training(whole) == whole.path("checkpoints/second/step-000007/weights")
    rows = metrics(whole.folder)
    assert {"span_kl", "feature", "attention", "layers", "contrastive", "capacity"} <= rows[0].keys()
    assert all(rows[-1][name] < rows[0][name] for name in ("loss", "span_kl_t1", "feature", "layers"))
    killed = Run.create(across, [*settings, "checkpoint.every_steps=2"], tmp_path / "killed")
    kill_when(["train", killed.folder], lambda: steps_logged(killed) >= 4)
    in_process("train", killed.folder)
    assert metrics(killed.folder) == rows
    ranks = ["engine.kind=deepspeed", "engine.config=zero3", "engine.ranks=2"]
    run = Run.create(across, [*settings, *ranks], tmp_path / "ranks")
    forked_ranks(2, "train", run.folder)
    for mine, theirs in zip(metrics(run.folder), rows, strict=True):
        assert mine.keys() == theirs.keys()
        numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
        assert {name: mine[name] for name in numbers} == pytest.approx(numbers, rel=2e-4, abs=2e-5)
