"""The two calls of the Python API of a system that MegaKD unites, as its document shows them."""

import json
import re
import subprocess
import sys

import pytest

from megakd.errors import UserError
from megakd.integrations.pipeline import run_distillation_training, setup_distillation_pipeline
from tests.forks import Forked


def forked_verb(words: list[str]) -> int:
    """In the place of `python -m megakd VERB RUN` a process forked from one that has loaded the libraries."""
    assert words[:3] == [sys.executable, "-m", "megakd"]
    return Forked(*words[2:], stderr=sys.__stderr__).wait()


def test_the_documented_calls_run_as_pasted(prepared, recipe, tmp_path, monkeypatch, capfd):
    """Set up, train through both stages, save; set up again goes on, and a forced capture keeps the old one aside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "call", forked_verb)
    config = json.loads(recipe.read_text())
    teacher_path = config["model"].pop("teacher")
    config["output"] = {"dir": "outputs"}
    for stage in config["stages"]:
        stage.pop("tokens", None)
        stage["steps"] = 1
    config["data"]["tokens"] = 2000
    config["optim"]["warmup_steps"] = 7
    config["eval"] = {"every_steps": 1, "attention": 3}
    config["checkpoint"] = {"every_steps": 50, "keep": 2}
    student_path = prepared / "student-0"

    def set_up(force: bool):
        return setup_distillation_pipeline(
            config=config,
            teacher_model_path=teacher_path,
            student_model_path=student_path,
            force_regenerate_logits=force,
        )

    student_model, train_dataset, eval_dataset, tokenizer = set_up(False)
    trainer = run_distillation_training(
        config=config,
        student_model=student_model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        tokenizer=tokenizer,
    )
    assert trainer.state.global_step == 1 and (tmp_path / "outputs/config.json").exists()
    said = capfd.readouterr().err
    assert re.search(r"no effect in Trainer, .*: .*eval\.attention.*; megakd train obeys", said), said
    assert "optim.warmup_steps=7 is more than half of its 1 steps; warmup takes 0" in said
    assert [round(row["eval_loss"], 9) > 0 for row in trainer.state.log_history if "eval_loss" in row] == [True]
    assert trainer.args.save_steps == 50 and trainer.args.save_total_limit == 2
    trainer.save_model("./final_model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "final_model").iterdir()
    }
    assert len(set_up(True)[1]) == len(train_dataset)
    assert re.search(r"captured again; the old logits are logits-before-", capfd.readouterr().err)
    assert len(list((tmp_path / "outputs/data").glob("logits-before-*"))) == 1
    config["seed"] = 5
    with pytest.raises(UserError, match="a run of another configuration; give another folder="):
        set_up(False)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(UserError, match="a dict, an OmegaConf object, a path or a RunConfig, not int"):
        setup_distillation_pipeline(3)
    with pytest.raises(UserError, match="does not follow its defaults; give the path"):
        setup_distillation_pipeline({"defaults": ["_self_"], "output": {"dir": "a"}})
    with pytest.raises(UserError, match=r"names no training\.output_dir or output\.dir"):
        setup_distillation_pipeline({"output": {"temp_dir": "a"}})
