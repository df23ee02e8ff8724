import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megakd.commands import new
from megakd.errors import UserError
from megakd.run import Run
from megakd.system.files import read_json, read_json_lines, write_json

RECIPE = {
    "name": "test",
    "model": {"teacher": "demo", "dtype": "float32"},
    "stages": [{"name": "a", "tokens": 10}],
    "engine": {"kind": "local"},
}
MADE = ("student-0", "data/tokens", "data/logits")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    return path


@pytest.fixture
def made(recipe: Path, tmp_path: Path) -> Run:
    """A run with a file where the student, the tokens and the logits would be."""
    run = Run.create(recipe, [], tmp_path / "runs" / "a")
    for name in MADE:
        run.path(name).mkdir(parents=True)
        run.path(name, "file").write_text(name)
    return run


def history(run: Run) -> list[dict[str, Any]]:
    return read_json_lines(run.path("history.jsonl"))


def error_of(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_create_and_open(recipe, tmp_path):
    run = Run.create(recipe, ["optim.lr=0.5", "seed=3"], tmp_path / "deep" / "a")
    assert (run.config.optim.lr, run.config.seed, run.config.name) == (0.5, 3, "test")
    opened = Run.open(tmp_path / "deep" / "a")
    assert opened.config == run.config and opened.folder == run.folder
    assert read_json(run.path("config.json")) == run.config.model_dump(mode="json")  # in full, defaults too
    [event] = history(run)
    assert (event["event"], event["recipe"], event["overrides"]) == ("new", str(recipe), ["optim.lr=0.5", "seed=3"])
    assert event["fingerprint"] == run.config.fingerprint()


def test_the_recipe_is_read_once(recipe, tmp_path):
    run = Run.create(recipe, [], tmp_path / "a")
    recipe.write_text("{}")
    assert Run.open(tmp_path / "a").config == run.config


def test_shipped_recipe_by_name(tmp_path):
    assert Run.create("demo", [], tmp_path / "a").config.name == "demo"
    message = error_of(Run.create, "dmeo", [], tmp_path / "b")
    assert "dmeo" in message and "demo" in message.replace("dmeo", "")


def test_existing_run_is_refused_and_left_alone(recipe, made):
    before = made.path("config.json").read_bytes()
    assert str(made.folder) in error_of(Run.create, recipe, ["seed=9"], made.folder)
    assert made.path("config.json").read_bytes() == before and len(history(made)) == 1


def test_nothing_is_made_of_a_recipe_that_is_wrong(recipe, tmp_path):
    error_of(Run.create, recipe, ["compress.rank=-1"], tmp_path / "a")
    error_of(Run.create, tmp_path / "none.json", [], tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_missing_run_says_how_to_make_one(tmp_path):
    message = error_of(Run.open, tmp_path / "none")
    assert str(tmp_path / "none") in message and "megakd new" in message
    assert str(tmp_path) in error_of(Run.open, tmp_path)
    assert "config.json" in error_of(Run.create, tmp_path, [], tmp_path / "b")


def test_live_override_is_written_and_recorded(made):
    run = Run.open(made.folder, ["optim.micro_batch=4", "log.wandb=disabled", "eval.batch_size=8"])
    assert (run.config.optim.micro_batch, run.config.log.wandb) == (4, "disabled")
    assert Run.open(made.folder).config == run.config != made.config
    assert run.config.fingerprint() == made.config.fingerprint()
    event = history(run)[-1]
    assert event["event"] == "change"
    assert event["fields"] == {
        "optim.micro_batch": [1, 4],
        "log.wandb": ["offline", "disabled"],
    }  # eval.batch_size was 8 already


def test_override_that_changes_nothing_is_not_recorded(made):
    before = made.path("config.json").read_bytes()
    Run.open(made.folder, ["optim.micro_batch=1", "optim.lr=5e-5"])
    assert len(history(made)) == 1 and made.path("config.json").read_bytes() == before


def test_one_task_of_srun_alone_writes_the_configuration(made, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    for number in (3, 1, 0):
        monkeypatch.setenv("SLURM_PROCID", str(number))
        monkeypatch.setenv("SLURM_LOCALID", str(number))
        assert Run.open(made.folder, ["optim.micro_batch=4"]).config.optim.micro_batch == 4
        assert len([event for event in history(made) if event["event"] == "change"]) == (number == 0)


def test_only_rank_0_writes(made, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Run.open(made.folder, ["optim.micro_batch=4"]).config.optim.micro_batch == 4
    assert Run.open(made.folder).config.optim.micro_batch == 1 and len(history(made)) == 1


@pytest.mark.parametrize("override", ["optim.lr=0.1", "seed=5", "stages.0.tokens=11", "engine.config=zero2"])
def test_frozen_override_is_refused_with_the_way_to_a_sibling(made, override):
    before = made.path("config.json").read_bytes()
    message = error_of(Run.open, made.folder, ["log.every_steps=3", override])
    assert override.split("=")[0].split(".0")[0] in message and "frozen" in message
    assert f"megakd new {made.folder}-2 --from {made.folder}" in message and override in message
    assert made.path("config.json").read_bytes() == before and len(history(made)) == 1


def test_wrong_override_names_the_file(made):
    assert "config.json" in error_of(Run.open, made.folder, ["optim.micro_batch=0"])
    assert "config.json" in error_of(Run.open, made.folder, ["optim.microbatch=2"])


@pytest.mark.parametrize(
    "overrides, linked",
    [
        ([], MADE),
        (["optim.lr=0.1", "objective.alpha=1", "stages.0.tokens=5", "seed=1", "name=b"], MADE),
        (["logits.batch_size=2"], MADE),  # live: the logits do not depend on it
        (["logits.top_k=32"], ("student-0", "data/tokens")),
        (["data.tokens=1000"], ()),  # the student is calibrated on them
        (["compress.rank=8"], ("data/tokens", "data/logits")),
        (["compress.rank=8", "logits.top_k=32"], ("data/tokens",)),
        (["model.teacher=other"], ()),
        (["model.student=other"], ("data/tokens", "data/logits")),
        (["model.dtype=bfloat16"], ("data/tokens", "data/logits")),
    ],
)
def test_sibling_links_what_its_changes_do_not_touch(made, tmp_path, overrides, linked):
    sibling = Run.create(made.folder, overrides, tmp_path / "elsewhere" / "b")
    for name in MADE:
        assert sibling.path(name).exists() == (name in linked), name
        if name in linked:
            assert sibling.path(name, "file").read_text() == name and sibling.path(name).samefile(made.path(name))
    assert [event["event"] for event in history(sibling)] == ["new", "link"]
    event = history(sibling)[-1]
    assert event["linked"] == list(linked)
    assert set(event["not_linked"]) == set(MADE) - {*linked, *(["student-0"] if sibling.config.model.student else [])}
    for why in event["not_linked"].values():
        assert overrides[0].partition("=")[0] in why or overrides[-1].partition("=")[0] in why
    assert not sibling.path("metrics.jsonl").exists()


def test_a_student_that_was_not_calibrated_does_not_depend_on_data(recipe, tmp_path):
    run = Run.create(recipe, ["compress.calibration_tokens=0"], tmp_path / "a")
    run.path("student-0").mkdir()
    assert Run.create(run.folder, ["data.tokens=1000"], tmp_path / "b").path("student-0").exists()


def test_sibling_of_a_sibling_outlives_it(made, tmp_path):
    middle = Run.create(made.folder, ["seed=1"], tmp_path / "runs" / "b")
    last = Run.create(middle.folder / "config.json", ["seed=2"], tmp_path / "runs" / "c")
    shutil.rmtree(middle.folder)
    assert last.path("data", "tokens", "file").read_text() == "data/tokens"
    moved = (tmp_path / "runs").rename(tmp_path / "moved")  # links are relative
    assert (moved / "c" / "student-0" / "file").read_text() == "student-0"


def test_new_says_what_is_linked_and_why_the_rest_is_not(made, tmp_path, capsys):
    shutil.rmtree(made.path("student-0"))
    new.main(Namespace(recipe=str(made.folder), overrides=["logits.top_k=32"], run=str(tmp_path / "b")))
    said = capsys.readouterr().err
    assert f"data/tokens: linked from {made.folder}\n" in said
    assert f"data/logits: not linked from {made.folder}: logits.top_k is 32 instead of 64\n" in said
    assert f"student-0: not linked from {made.folder}: there is none\n" in said


def test_a_plain_recipe_links_nothing(recipe, made, tmp_path):
    run = Run.create(recipe, [], tmp_path / "runs" / "b")
    assert not run.path("student-0").exists() and not run.path("data").exists()


def test_training_starts_at_the_given_student_or_the_compressed_one(recipe, tmp_path):
    run = Run.create(recipe, [], tmp_path / "a")
    assert run.student_folder == tmp_path / "a" / "student-0"
    run = Run.create(recipe, [f"model.student={tmp_path / 'mine'}"], tmp_path / "b")
    assert run.student_folder == tmp_path / "mine"


def test_a_student_is_a_folder_or_a_hub_id(recipe, tmp_path, monkeypatch):
    asked = []

    def snapshot(name: str, revision: str | None = None, allow_patterns: object = None) -> str:
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    named = Run.create(recipe, ["model.student=owner/name"], tmp_path / "a")
    assert named.student_folder == named.student_folder == tmp_path and asked == ["owner/name"]
    for folder in (str(tmp_path), "./not/there", "/not/there"):
        assert Run.create(recipe, [f"model.student={folder}"], tmp_path / "b").student_folder == Path(folder)
        shutil.rmtree(tmp_path / "b")
    assert asked == ["owner/name"]


def test_routers_of_a_run_that_an_older_version_made_keep_their_rate(recipe, tmp_path):
    """It had no router_lr_multiplier, and trained them at the student's rate."""
    run = Run.create(recipe, ["objective.kind=sar"], tmp_path / "a")
    assert run.config.objective.router_lr_multiplier == 0.1
    frozen = read_json(run.path("config.json"))
    sar = frozen["objective"]  # 0.1 kept these fields in a section of their own
    frozen["objective"], frozen["online"] = {"kind": "sar", "alpha": 0.5, "tail": "ghost"}, {"kl": 0.7}
    frozen["sar"] = {key: sar[key] for key in ("routing", "anchor", "drift_steps", "router_patterns")}
    write_json(run.path("config.json"), frozen)
    assert Run.open(run.folder).config.objective.router_lr_multiplier == 1.0
    assert Run.create(run.folder, [], tmp_path / "b").config.objective.router_lr_multiplier == 0.1


def test_a_mutable_field_without_effect_is_not_written(recipe, tmp_path):
    run = Run.create(recipe, [], tmp_path / "a")
    before = run.path("config.json").read_bytes()
    message = error_of(Run.open, run.folder, ["sar.drift_steps=3"])
    assert "sar.drift_steps=3 has no effect: objective.kind=sar alone reads it; leave it out, or set" in message
    assert run.path("config.json").read_bytes() == before
