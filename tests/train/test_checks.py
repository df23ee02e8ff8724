"""What config.json and tokenizers alone tell of a run's models, and which student a run was begun with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.errors import UserError
from megakd.models.checks import check_models, check_student, student_identity
from megakd.models.tiny import train_tokenizer
from megakd.run import Run
from megakd.system.files import read_json, write_json
from tests.conftest import VOCABULARY, in_process

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def student(tmp_path, tokenizer) -> Path:
    """A small Llama with the teacher's tokenizer."""
    config = LlamaConfig(vocab_size=VOCABULARY, eos_token_id=0, bos_token_id=0, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def edited(folder: Path, **changes: Any) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)


def run_with(recipe: Path, folder: Path, *overrides: str) -> Run:
    return Run.create(recipe, overrides, folder)


@pytest.mark.parametrize("verb", ["plan", "tokenize"])
def test_a_student_of_fewer_rows_than_ids_is_told_by_plan_and_tokenize(verb, recipe, student, tmp_path):
    edited(student, vocab_size=VOCABULARY - 1)
    run = run_with(recipe, tmp_path / "run", f"model.student={student}")
    said = in_process(verb, run.folder, code=2)
    assert "ids go up to 399, the embedding has 399 rows" in said and not run.path("data").exists()


def test_a_student_of_fewer_rows_than_ids_is_refused_by_train_and_evaluate(recipe, prepared, student, tmp_path):
    """Its shards were there already; the embedding was an IndexError, under CUDA an assertion on the device."""
    run = run_with(recipe, tmp_path / "run", f"model.student={student}")
    run.path("data").symlink_to(prepared / "data")
    resized = LlamaForCausalLM.from_pretrained(student)
    resized.resize_token_embeddings(VOCABULARY - 1)
    resized.save_pretrained(student)
    for verb in (["train", run.folder], ["evaluate", run.folder, "--model", student]):
        assert "the embedding has 399 rows" in in_process(*verb, code=2)


def test_compress_refuses_tokens_of_another_tokenizer(recipe, prepared, teacher, documents, tmp_path):
    """Calibration would look up other ids, or ids beyond the embedding."""
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    train_tokenizer(documents, 300).save_pretrained(folder)
    run = run_with(recipe, tmp_path / "run", f"model.teacher={folder}", "compress.calibration_tokens=500")
    run.path("data").symlink_to(prepared / "data")
    assert "tokenized with another tokenizer" in in_process("compress", run.folder, code=2)


@pytest.mark.parametrize("verb", ["plan", "tokenize"])
def test_positions_beyond_the_trained_ones_are_said_by_plan_and_tokenize(verb, recipe, teacher, tmp_path):
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    edited(folder, max_position_embeddings=16)
    run = run_with(recipe, tmp_path / "run", f"model.teacher={folder}", "data.tokens=600")
    assert "max_position_embeddings is 16, sequences have 32" in in_process(verb, run.folder)


def test_a_quantization_config_is_told_before_anything_is_made(recipe, teacher, student, tmp_path):
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}}
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    edited(folder, **quantized)
    with pytest.raises(UserError, match="compress needs float weights"):
        check_models(run_with(recipe, tmp_path / "a", f"model.teacher={folder}").config)
    edited(student, **quantized)
    with pytest.raises(UserError, match="training needs float weights"):
        check_models(run_with(recipe, tmp_path / "b", f"model.student={student}").config)


def test_a_student_with_another_tokenizer_is_told_before_a_capture(recipe, student, documents, tmp_path):
    train_tokenizer(documents, 300).save_pretrained(student)
    with pytest.raises(UserError, match="cached targets need one tokenizer"):
        check_models(run_with(recipe, tmp_path / "run", f"model.student={student}").config)


def test_a_student_changed_since_training_began_is_refused(recipe, student, tmp_path):
    """Checkpoints take its config.json: a run resumed after an edit had weights of one model, config of another."""
    run = run_with(recipe, tmp_path / "run", f"model.student={student}")
    run.record("train", step=0, student=student_identity(run).record())
    check_student(run, started=True)
    edited(student, rms_norm_eps=0.1)
    with pytest.raises(UserError, match=r"another student than .* was begun with: fingerprint v2:"):
        check_student(run, started=True)


def test_a_student_of_another_commit_since_tokenize_is_refused(recipe, student, tmp_path, monkeypatch):
    first, second = (Path(shutil.copytree(student, tmp_path / "snapshots" / name)) for name in ("c1", "c2"))
    run = run_with(recipe, tmp_path / "run", "model.student=owner/name", "model.student_revision=main")
    revisions = []

    def resolve(name: str, revision: str | None = None, weights: bool = True) -> Path:
        revisions.append(revision)
        return first if len(revisions) == 1 else second

    monkeypatch.setattr("megakd.run.resolve", resolve)
    torch.save({}, second / "unused.bin")  # no weights of the model
    run.record("tokenize", student=student_identity(run).record())
    assert json.loads(run.path("history.jsonl").read_text().splitlines()[-1])["student"]["commit"] == "c1"
    with pytest.raises(UserError, match="commit c2 instead of c1"):
        check_student(Run.open(run.folder), started=False)
    assert revisions == ["main", "main"]
