"""Names against paths, with folders of the shipped names in the working directory."""

import json
from pathlib import Path

import pytest

from megakd.config.parsing import load_recipe
from megakd.errors import UserError
from megakd.names import expand, find_recipe, holds_run, model_folder, resolve, shipped
from megakd.run import Run

DEMO = shipped("launch/recipes", "demo.json")
TEACHER = shipped("assets", "demo-teacher")
SMALL = {"model": {"teacher": "demo"}, "engine": {"kind": "local"}}


@pytest.fixture
def shadowed(tmp_path, monkeypatch) -> Path:
    """A working directory in which everything that is shipped has a namesake, and a home folder."""
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("demo", "python-docs", "zero2", "qwen3-30b-a3b-r64"):
        (tmp_path / "here" / name).mkdir()
    return tmp_path / "here"


def model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def run(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, "stages": [{"name": "here", "steps": 1}]}))
    return folder


def test_a_folder_never_shadows_a_shipped_recipe_or_model(shadowed):
    assert find_recipe("demo") == DEMO and resolve("demo") == TEACHER == model_folder("demo")
    run(shadowed / "demo")
    assert find_recipe("demo") == DEMO and find_recipe("./demo") == Path("demo/config.json")
    model(shadowed / "demo")
    assert resolve("demo") == TEACHER and resolve("./demo") == Path("demo")
    (shadowed / "demo.json").write_text(json.dumps(SMALL))
    assert find_recipe("demo.json") == Path("demo.json")


@pytest.mark.parametrize("kind", ["model", "empty"])
def test_a_folder_that_is_no_run_is_no_recipe(shadowed, kind):
    folder = model(shadowed / "it") if kind == "model" else shadowed / "demo"
    for text in (f"./{folder.name}", str(folder), folder):
        with pytest.raises(UserError, match=r"holds no run.*qwen3-30b"):
            find_recipe(text)


def test_a_folder_that_is_no_model_does_not_hide_a_hub_id(shadowed, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or "/got")
    (shadowed / "gpt2").mkdir()
    run(shadowed / "org" / "name")
    assert resolve("gpt2") == resolve("org/name") == Path("/got") and asked == ["gpt2", "org/name"]
    model(shadowed / "gpt2")
    assert resolve("gpt2") == Path("gpt2") and len(asked) == 2
    with pytest.raises(UserError, match="holds a run, no model"):
        resolve("./org/name")
    for text in ("", "./none", "a/b/c", "~/none"):
        with pytest.raises(UserError, match="not a model folder"):
            resolve(text)
    assert len(asked) == 2


def test_deepspeed_files_follow_the_same_rule(shadowed):
    recipe = shadowed / "sub" / "recipe.json"
    recipe.parent.mkdir()
    (recipe.parent / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    (shadowed.parent / "home" / "own.json").write_text('{"zero_optimization": {"stage": 1}}')
    for name, stage in (("zero2", 2), ("mine.json", 1), ("~/own.json", 1)):
        recipe.write_text(
            json.dumps({"engine": {"config": name}, "stages": [{"name": "a", "steps": 1, "config": name}]})
        )
        config = load_recipe(recipe)
        for found in (config.engine.deepspeed, config.stages[0].deepspeed):
            assert found is not None and found["zero_optimization"]["stage"] == stage
    for name in ("./zero2", "zero2/", "../here/zero2"):  # folders here, and no file
        recipe.write_text(json.dumps({"engine": {"config": name}}))
        with pytest.raises(UserError, match=r"engine\.config: .* is neither a file nor one of"):
            load_recipe(recipe)


def test_the_home_folder_is_expanded_wherever_a_path_is_given(shadowed):
    home = shadowed.parent / "home"
    (home / "recipe.json").write_text(json.dumps({**SMALL, "stages": [{"name": "a", "steps": 1}]}))
    model(home / "models")
    assert resolve("~/models") == home / "models"
    made = Run.create("~/recipe.json", ["model.student=~/models"], "~/run")
    assert made.folder == home / "run" and made.student_folder == home / "models"
    assert Run.open("~/run").folder == home / "run" and holds_run(home / "run")
    assert find_recipe("~/run") == home / "run" / "config.json"
    with pytest.raises(UserError, match="whole path"):
        expand("~no-such-user-here/x")


def test_a_student_is_a_shipped_model_too(shadowed):
    made = Run.create(DEMO, ["model.student=demo", "engine.kind=local"], shadowed / "run")
    assert made.student_folder == TEACHER


def test_a_shadowed_name_makes_the_run_it_makes_elsewhere(shadowed, tmp_path):
    """`megakd demo` leaves a folder demo/, and `megakd new X --from demo` must go on working."""
    run(shadowed / "demo")
    assert Run.create("demo", [], shadowed / "x").config == load_recipe(DEMO)
