"""BOS from the tokenizer to the capture, the plan and training: what data states and what the tokenizers do."""

import json
import shutil
from pathlib import Path

import pytest

from megakd.cli import run_verb
from megakd.data.shards import ShardSet
from megakd.data.tokenizers import bos_of, check_bos, load_tokenizer, pair_bos
from megakd.errors import UserError
from megakd.run import Run
from megakd.system.files import write_sealed
from tests.conftest import begin_texts_with_bos


@pytest.fixture(scope="module")
def recipe_with_bos(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The recipe with a teacher whose tokenizer begins texts with <s>, which has a row of its table."""
    folder = tmp_path_factory.mktemp("bos")
    value = json.loads(recipe.read_text())
    shutil.copytree(value["model"]["teacher"], folder / "teacher")
    take_over_a_word(folder / "teacher")
    value["model"]["teacher"] = str(folder / "teacher")
    value["data"] |= {"tokens": 2000, "holdout_tokens": 1000}
    (folder / "recipe.json").write_text(json.dumps(value))
    return folder / "recipe.json"


def take_over_a_word(folder: Path) -> None:
    """Make room for BOS in an embedding of as many rows as there are tokens: the last merge goes."""
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    last = max(value["model"]["vocab"], key=value["model"]["vocab"].get)
    del value["model"]["vocab"][last]
    value["model"]["merges"] = [m for m in value["model"]["merges"] if "".join(m) != last]
    path.write_text(json.dumps(value))
    begin_texts_with_bos(folder)


def test_plan_says_what_documents_begin_with(recipe_with_bos, tmp_path, capsys):
    for rule, text in (
        ("auto", "with '<s>' (id 399) (data.bos=auto)"),
        ("never", "without a BOS token (data.bos=never)"),
    ):
        run = Run.create(recipe_with_bos, [f"data.bos={rule}"], tmp_path / rule)
        run_verb(["plan", str(run.folder)])
        assert text in capsys.readouterr().out


def test_a_capture_of_documents_begun_otherwise_is_refused_or_named(recipe_with_bos, tmp_path, capsys):
    teacher = Path(shutil.copytree(json.loads(recipe_with_bos.read_text())["model"]["teacher"], tmp_path / "teacher"))
    run = Run.create(recipe_with_bos, [f"model.teacher={teacher}"], tmp_path / "run")
    run_verb(["tokenize", str(run.folder)])
    settings = json.loads((teacher / "tokenizer.json").read_text())
    (teacher / "tokenizer.json").write_text(json.dumps({**settings, "post_processor": None}))
    # the vocabulary and the ids of every text are the same: the hash of the tokenizer does not tell
    with pytest.raises(UserError, match=r"begin with '<s>' \(id 399\), but by data.bos=auto those of .* begin without"):
        run_verb(["generate-logits", str(run.folder)])
    (teacher / "tokenizer.json").write_text(json.dumps(settings))
    for path in run.path("data", "tokens").rglob("*.json"):  # as an older version wrote them
        value = json.loads(path.read_text())
        del value["facts"]["bos"], value["seal"]
        write_sealed(path, value)
    capsys.readouterr()
    run_verb(["generate-logits", str(run.folder)])
    assert "these shards were made before data.bos" in capsys.readouterr().err
    assert "bos" not in ShardSet(run.path("data", "logits", "train")).facts["tokens"]


def test_which_ids_a_rule_gives(recipe_with_bos, tokenizer, teacher):
    own = load_tokenizer(Path(json.loads(recipe_with_bos.read_text())["model"]["teacher"]))
    plain = load_tokenizer(teacher)
    assert [bos_of(own, rule) for rule in ("auto", "always", "never")] == [[399], [399], []]
    assert [bos_of(plain, rule) for rule in ("auto", "never")] == [[], []]
    with pytest.raises(UserError, match=r"data.bos=always: the tokenizer of .* has no BOS token"):
        bos_of(plain, "always")
    assert pair_bos({"bos": []}, own, "auto") == ([], [399]) and pair_bos({}, own, "auto") == ([], [])
    assert check_bos({"bos": [399]}, own, "auto", "here") is None is check_bos({}, plain, "auto", "here")


@pytest.mark.parametrize("verb", ["plan", "tokenize"])
@pytest.mark.parametrize(("batch", "stage"), [(250, {}), (16, {}), (512, {"batch_tokens": 100})])
def test_a_batch_of_no_whole_sequences_is_refused_before_a_capture(recipe, tmp_path, verb, batch, stage):
    value = json.loads(recipe.read_text())
    value["optim"]["batch_tokens"] = batch
    value["stages"][1]["optim"] = stage
    (tmp_path / "recipe.json").write_text(json.dumps(value))
    run = Run.create(tmp_path / "recipe.json", [], tmp_path / "run")
    with pytest.raises(UserError, match=r"optim.batch_tokens: \d+ is no multiple of data.sequence_length 32; set \d+"):
        run_verb([verb, str(run.folder)])
    assert not run.path("data").exists()


def test_a_revision_of_files_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"data.revision=.* has no effect: data.source names files"):
        Run.create(recipe, ["data.revision=v1"], tmp_path / "run")
