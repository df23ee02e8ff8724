"""What may be replaced where a user wants output."""

import json
import os
from pathlib import Path

import pytest

from megakd.errors import UserError
from megakd.outputs import MARKER, check_file, check_folder, check_place, producing

MARK = "megakd export"


def make(path: Path, text: str = "new", force: bool | None = False, mark: str = MARK) -> None:
    with producing(path, mark, force) as temporary:
        (temporary / "sub").mkdir(parents=True)
        for name in ("config.json", "sub/x"):
            (temporary / name).write_text(json.dumps(text))


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != MARKER}


def refused(path: Path, message: str, force: bool | None = False) -> None:
    """Making a folder at `path` is refused, and changes nothing anywhere next to it."""
    before = {p: p.read_bytes() for p in sorted(path.parent.rglob("*")) if p.is_file()}
    with pytest.raises(UserError, match=message) as caught:
        make(path, force=force)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert {p: p.read_bytes() for p in sorted(path.parent.rglob("*")) if p.is_file()} == before


def test_a_product_is_replaced_by_a_later_one_of_the_same_verb(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "deep" / "new", tmp_path / "empty"):
        for text in ("old", "new"):
            make(path, text)
            assert files(path) == {"config.json": f'"{text}"', "sub/x": f'"{text}"'}
    (tmp_path / "link").symlink_to("empty")
    make(tmp_path / "link", "through the link")
    assert (tmp_path / "link").is_symlink() and "through" in (tmp_path / "empty" / "config.json").read_text()


@pytest.mark.parametrize("force", [False, True, None])
def test_foreign_files_are_never_replaced(tmp_path, force):
    for name in ("precious", "product"):
        (tmp_path / name).mkdir()
    make(tmp_path / "product")
    for folder, inside in (("precious", "thesis.txt"), ("product", "sub/thesis.txt"), ("product", ".git/HEAD")):
        (tmp_path / folder / inside).parent.mkdir(exist_ok=True)
        (tmp_path / folder / inside).write_text("years of work")
        refused(tmp_path / folder, r"thesis\.txt|HEAD|exists already", force)
    (tmp_path / "file.txt").write_text("megakd export")
    refused(tmp_path / "file.txt", "exists already", force)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.bin").symlink_to(tmp_path / "file.txt")
    refused(tmp_path / "linked", r"model\.bin|exists already", force)


def test_another_model_is_replaced_by_force_alone(tmp_path):
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model-00001-of-00002.safetensors").write_text("weights")
    make(tmp_path / "by another", mark="megakd compress")
    for name in ("model", "by another"):
        refused(tmp_path / name, "add --force to replace a model")
        refused(tmp_path / name, "remove it or name another$", None)
        make(tmp_path / name, force=True)
        assert files(tmp_path / name) == {"config.json": '"new"', "sub/x": '"new"'}


@pytest.mark.parametrize("force", [False, True])
def test_runs_and_what_lies_in_them_are_never_replaced(tmp_path, monkeypatch, force):
    run = tmp_path / "runs" / "a"
    for name in ("student-0", "data/tokens", "checkpoints/all/step-1/weights"):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text("{}")
    (run / "config.json").write_text('{"stages": []}')
    for name in ("", "student-0", "data", "data/new", "checkpoints/all/step-1/weights", "export-dense", "report.html"):
        refused(run / name, "of the run", force)
    refused(tmp_path / "runs", "exists already|holds a", force)
    (tmp_path / "link").symlink_to(run / "student-0")
    refused(tmp_path / "link", "of the run", force)
    monkeypatch.chdir(tmp_path / "runs")
    for place in (Path(), Path(".."), Path("/")):
        with pytest.raises(UserError, match="working directory"):
            check_folder(place, MARK, force)
    own = run / "export"
    assert check_folder(own, MARK, force, own) == own and check_place(run / "data" / "new", part="data")
    make(run / "mine")  # a name that is no part of a run


def test_what_came_while_a_product_was_made_is_not_replaced(tmp_path):
    with pytest.raises(UserError, match="exists already"), producing(tmp_path / "x", MARK) as temporary:
        temporary.mkdir()
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "thesis.txt").write_text("mine")
    assert files(tmp_path) == {"x/thesis.txt": "mine"} and os.listdir(tmp_path) == ["x"]


def test_a_file_is_replaced_where_it_has_the_mark_alone(tmp_path):
    for text, fine in (("made by megakd report --png", True), ("notes on megakd report", False), ("", False)):
        (tmp_path / "x").write_text(text)
        if fine:
            assert check_file(tmp_path / "x", "made by megakd report --png") == tmp_path / "x"
        else:
            with pytest.raises(UserError, match="exists already"):
                check_file(tmp_path / "x", "made by megakd report --png")
    with pytest.raises(UserError, match="exists already"):
        check_file(tmp_path / "x")
    with pytest.raises(UserError, match="no file"):
        check_file(tmp_path, "x")


@pytest.mark.parametrize("content", ["", "[]", '{"made_by": 3}', '{"made_by": "megakd export", "files": 3}', "\x00"])
def test_a_broken_marker_marks_nothing(tmp_path, content):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / MARKER).write_text(content)
    refused(tmp_path / "x", "exists already")
