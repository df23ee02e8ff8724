"""Every verb with values that are not finite, with nothing, with one of each, and over outputs that exist already.

Each ends with exit code 0, or with 2 and one line; nothing half-written is left, and what existed is as it was.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megakd.commands import demo
from megakd.run import Run
from tests.conftest import files, in_process, make_teacher
from tests.report.page import Page

ONE_WINDOW = ["data.tokens=32", "data.shard_tokens=32", "optim.batch_tokens=32", "optim.micro_batch=1"]
ONE_STEP = 'stages=[{"name": "all", "steps": 1}]'


def one_line(said: str) -> str:
    """The message of a verb that ended with 2: its last line, and no more than that."""
    lines = [line for line in said.splitlines() if line.startswith("megakd: ")]
    assert len(lines) == 1 and len(lines[0]) < 1500, said
    assert "Traceback" not in said
    return lines[0]


def spoil(folder: Path, pick: Callable[[str], bool], value: float = float("nan")) -> None:
    """Write a value that is not finite into the first weight whose name `pick` takes."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if pick(name))
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})


def own(run: Run, name: str) -> Path:
    """A copy of what a run shares with the one it was made from, to be changed."""
    folder = run.path(name)
    source = folder.resolve()
    folder.unlink()
    shutil.copytree(source, folder)
    return folder


@pytest.fixture
def changed(recipe, tmp_path) -> Callable[..., Path]:
    """changed(text, "section.key=value", …): a run of its own, over a text of its own."""

    def make(text: str | None, *overrides: str, teacher: Path | None = None) -> Path:
        given = list(overrides)
        if text is not None:
            (tmp_path / "odd.jsonl").write_text(text)
            given.append(f"data.source={tmp_path / 'odd.jsonl'}")
        if teacher is not None:
            given.append(f"model.teacher={teacher}")
        in_process("new", tmp_path / "odd", "--from", recipe, *given)
        return tmp_path / "odd"

    return make


@pytest.fixture(scope="module")
def damaged_teacher(tmp_path_factory, teacher) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "teacher"
    shutil.copytree(teacher, folder)
    spoil(folder, lambda name: "experts" in name)
    return folder


@pytest.fixture(scope="module")
def smallest_teacher(tmp_path_factory, tokenizer, documents) -> Path:
    """One layer of one expert."""
    folder = tmp_path_factory.mktemp("smallest") / "teacher"
    return make_teacher(
        folder, tokenizer, documents, seed=1, steps=5, num_hidden_layers=1, num_experts=1, num_experts_per_tok=1
    )


@pytest.fixture(scope="module")
def smallest(tmp_path_factory, recipe, smallest_teacher) -> Path:
    """A run of one window, one held-out document, one step, one layer, one expert and rank 1."""
    run = tmp_path_factory.mktemp("one") / "run"
    short = "".join(json.dumps({"text": f"The river carries {i} stones."}) + "\n" for i in range(40))
    (run.parent / "short.jsonl").write_text(short)
    one = [
        f"model.teacher={smallest_teacher}",
        f"data.source={run.parent / 'short.jsonl'}",
        *ONE_WINDOW,
        ONE_STEP,
        "data.holdout_tokens=32",
        "compress.rank=1",
    ]
    in_process("new", run, "--from", recipe, *one)
    return run


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    in_process("new", run, "--from", prepared, ONE_STEP)
    in_process("train", run)
    in_process("evaluate", run)
    return run


# one of each


def test_every_verb_over_one_of_each(smallest, tmp_path):
    """One window, step, layer and expert, from `new` to `report`, each verb twice."""
    verbs = [
        "plan",
        "tokenize",
        "plan",
        "compress",
        "generate-logits",
        "inspect",
        "train",
        "evaluate",
        "watch",
        "export",
    ]
    for verb in [*verbs, "report", "inspect"]:
        in_process(verb, smallest)
        in_process(verb, smallest)
    rows = [json.loads(line) for line in (smallest / "evals.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["teacher", "student-0", "all/step-000001"]
    assert in_process("inspect", smallest / "data/logits/train")
    in_process("export", smallest, "--dense", "--out", tmp_path / "dense")


# nothing


@pytest.mark.parametrize("text", ["", "\n\n", '{"text": ""}\n', '{"text": null}\n'], ids=repr)
def test_tokenize_over_a_source_without_text(changed, text):
    run = changed(text)
    assert str(run.parent / "odd.jsonl") in one_line(in_process("tokenize", run, code=2))
    assert not list(run.rglob("*.tmp*")) and not list(run.rglob("shard-*"))


@pytest.mark.parametrize(
    "verb, asks_for",
    [
        ("compress", None),  # weights alone are needed
        ("generate-logits", "tokenize"),
        ("train", "compress"),
        ("evaluate", "generate-logits"),
        ("watch", "generate-logits"),
        ("export", "compress"),
    ],
)
def test_a_verb_before_its_time_names_the_one_that_is_missing(changed, verb, asks_for):
    run = changed(None)
    said = in_process(verb, run, code=2 if asks_for else 0)
    assert asks_for is None or f"megakd {asks_for}" in one_line(said)


def test_verbs_that_look_at_a_run_without_anything_in_it(changed):
    run = changed(None)
    assert "student" in in_process("plan", run)
    assert str(run) in in_process("inspect", run)
    in_process("report", run)
    assert "<html" in (run / "report.html").read_text()


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "\x00"], ids=repr)
def test_new_from_an_empty_recipe(tmp_path, content):
    """An empty object is a recipe of defaults; nothing at all is none."""
    (tmp_path / "empty.json").write_text(content)
    said = in_process("new", tmp_path / "run", "--from", tmp_path / "empty.json", code=0 if content == "{}" else 2)
    assert content == "{}" or "empty.json" in one_line(said)
    assert (tmp_path / "run" / "config.json").exists() == (content == "{}")


def test_inspect_of_an_empty_folder_and_of_none(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        assert name in one_line(in_process("inspect", tmp_path / name, code=2))


def test_empty_records_of_a_run_are_no_traceback(prepared, tmp_path):
    """Files of length 0, as a full disk leaves them."""
    run = tmp_path / "run"
    in_process("new", run, "--from", prepared)
    for name in ("metrics.jsonl", "evals.jsonl"):
        (run / name).write_text("")
    for verb, word in (("report", "report.html"), ("plan", "steps of"), ("inspect", str(run))):
        assert word in in_process(verb, run)


# not finite


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_new_takes_no_number_that_is_not_finite(recipe, tmp_path, value):
    for override in (f"optim.lr={value}", f"objective.alpha={value}", f"guard.spike={value}", f"seed={value}"):
        one_line(in_process("new", tmp_path / "run", "--from", recipe, override, code=2))
    (tmp_path / "bad.json").write_text(recipe.read_text().replace('"lr": 0.001', f'"lr": {value}'))
    assert "optim.lr" in one_line(in_process("new", tmp_path / "run", "--from", tmp_path / "bad.json", code=2))
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_finite_is_refused_by_each_verb(changed, damaged_teacher):
    run = changed(None, teacher=damaged_teacher)
    in_process("tokenize", run)
    for verb in ("compress", "generate-logits"):
        message = one_line(in_process(verb, run, code=2))
        assert "NaN" in message and str(damaged_teacher) in message
    assert not (run / "student-0").exists() and not list((run / "data").rglob("*.tmp*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_student_that_is_not_finite_trains_no_step(sibling, value):
    run = sibling(ONE_STEP)
    spoil(own(run, "student-0"), lambda name: name == "model.norm.weight", value)
    assert "weights are as they were" in one_line(in_process("train", run.folder, code=2))
    assert not run.path("checkpoints").exists() or not list(run.path("checkpoints").rglob("*.safetensors"))


def test_a_student_that_is_not_finite_is_exported_by_no_verb(sibling):
    run = sibling(ONE_STEP)
    spoil(own(run, "student-0"), lambda name: "norm" in name)
    for flags in ([], ["--dense"]):
        assert "NaN" in one_line(in_process("export", run.folder, *flags, code=2))
    assert not list(run.folder.glob("export*"))


def test_records_that_are_not_finite_are_reported(trained, tmp_path):
    """null is what the log writes for them."""
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    for name in ("metrics.jsonl", "evals.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        nothing = [{k: None if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in [*rows, *nothing, *rows, *nothing] * 8)
        (run / name).write_text(text)
    for verb in ("report", "inspect", "plan"):
        in_process(verb, run)
    page = Page((run / "report.html").read_text())
    assert page.figures and "NaN" not in page.data
    assert "None" not in page.own and "nan" not in page.own.partition("<figure")[0]


def test_inspect_names_a_tensor_that_is_not_finite(damaged_teacher):
    assert "NaN" in in_process("inspect", damaged_teacher, "--experts", code=2)


# outputs that exist


def foreign(folder: Path) -> dict[str, bytes]:
    """Make a folder of somebody's own files."""
    (folder / "chapter").mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    (folder / "chapter" / "1.txt").write_text("one")
    return files(folder)


Arguments = Callable[[Path, Path], list[Any]]
OVER: dict[str, Arguments] = {
    "new": lambda run, out: ["new", out, "--from", run],
    "export": lambda run, out: ["export", run, "--out", out],
    "export --dense": lambda run, out: ["export", run, "--dense", "--out", out],
    "export --force": lambda run, out: ["export", run, "--out", out, "--force"],
    "report --png": lambda run, out: ["report", run, "--png", out],
}


@pytest.mark.parametrize("verb", OVER)
@pytest.mark.parametrize("what", ["foreign files", "a run"])
def test_no_verb_replaces_what_is_not_its_own(trained, tmp_path, verb, what):
    out = tmp_path / "out"
    if what == "a run":
        in_process("new", out, "--from", trained)
        before = files(out)
    else:
        before = foreign(out)
    code = 0 if (verb, what) == ("new", "foreign files") else 2  # a run may begin in a folder that has other files
    said = in_process(*OVER[verb](trained, out), code=code)
    assert code == 0 or "out" in one_line(said)
    after = files(out)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("verb", [name for name in OVER if name != "new" and "force" not in name])
def test_a_verb_replaces_its_own_earlier_product(trained, tmp_path, verb):
    out = tmp_path / "out"
    for _ in range(2):
        in_process(*OVER[verb](trained, out))
    assert out.exists()


@pytest.mark.parametrize("place", ["student-0", "data/tokens", "data/logits", "checkpoints"])
def test_files_in_the_place_of_a_product_are_named(changed, place):
    """A file where a folder belongs: one line, and the file stays."""
    run = changed(None)
    verbs = ("tokenize", "compress", "generate-logits", "train")
    stops = dict(zip(("data/tokens", "student-0", "data/logits", "checkpoints"), verbs, strict=True))[place]
    (run / place).parent.mkdir(parents=True, exist_ok=True)
    (run / place).write_text("mine")
    for verb in verbs:
        said = in_process(verb, run, code=2 if verb == stops else 0)
        if verb == stops:
            assert place in one_line(said)
            break
    assert (run / place).read_text() == "mine"


def test_demo_touches_no_folder_that_it_did_not_make(tmp_path, monkeypatch):
    before = foreign(tmp_path / "demo" / "kd")
    monkeypatch.setattr(demo, "run_verb", lambda argv: pytest.fail(f"went on with {argv}"))
    said = in_process("demo", "--folder", tmp_path / "demo", code=2)
    assert "demo" in one_line(said) and files(tmp_path / "demo" / "kd") == before
