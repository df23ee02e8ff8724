"""Wrong input: one clear line, exit 2, nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megakd import cli
from megakd.config.describe import parts
from megakd.errors import UserError
from megakd.run import Run
from megakd.system.files import read_json, write_json
from tests.conftest import files, make_teacher, megakd


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """fails("train", run): runs the command line, checks exit 2, a single line and no half-written file; the line."""

    def check(*argv: object) -> str:
        monkeypatch.setattr(sys, "argv", ["megakd", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run_command_line()
        errors = capsys.readouterr().err
        assert ended.value.code == 2, errors
        assert errors.count("\n") == 1 and errors.startswith("megakd: "), errors
        assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
        assert not list(tmp_path.rglob("checkpoints")) and not list(tmp_path.rglob("metrics.jsonl"))
        return errors

    return check


def copied(run: Run, name: str) -> Path:
    """Replace a linked part of a sibling run by a copy of its own that a test may damage."""
    target = run.path(name)
    source = target.resolve()
    target.unlink()
    shutil.copytree(source, target)
    return target


def test_missing_run(fails, tmp_path):
    assert "no run here" in fails("train", tmp_path / "nothing") and not (tmp_path / "nothing").exists()


def test_bad_json(fails, tmp_path):
    (tmp_path / "r.json").write_text('{"seed": 0,\n "model": }')
    assert "r.json:2:11: not valid JSON" in fails("new", tmp_path / "a", "--from", tmp_path / "r.json")
    assert not (tmp_path / "a").exists()


def test_unknown_key(fails, recipe, tmp_path):
    message = fails("new", tmp_path / "a", "--from", recipe, "optim.learning_rat=1")
    assert "optim.learning_rat" in message
    message = fails("new", tmp_path / "a", "--from", recipe, "compress.rnak=3")
    assert "did you mean 'rank'" in message and not (tmp_path / "a").exists()


def test_wrong_type(fails, recipe, tmp_path):
    assert "compress.rank" in fails("new", tmp_path / "a", "--from", recipe, "compress.rank=many")


def test_negative_rank(fails, recipe, tmp_path):
    assert "compress.rank: input should be greater than or equal to 1, got -3" in fails(
        "new", tmp_path / "a", "--from", recipe, "compress.rank=-3"
    )


def test_alpha_beyond_one(fails, recipe, tmp_path):
    assert "objective.alpha: input should be less than or equal to 1, got 2" in fails(
        "new", tmp_path / "a", "--from", recipe, "objective.alpha=2"
    )


def test_rule_that_matches_nothing(fails, sibling):
    run = sibling("stages.1.lr_multipliers.0.pattern=embedings")
    message = fails("train", run.folder)
    assert "'embedings' has no effect" in message and "stage 'all'" in message
    assert not run.path("metrics.jsonl").exists() and not run.path("checkpoints").exists()


def test_logits_of_another_teacher(fails, sibling, tokenizer, documents, tmp_path):
    other = make_teacher(tmp_path / "other", tokenizer, documents, seed=1, steps=0)
    run = sibling(f"model.teacher={other}")  # nothing is shared with another teacher
    megakd("compress", run.folder)
    donor = sibling()
    run.path("data").mkdir()
    run.path("data", "logits").symlink_to(donor.path("data", "logits").resolve())
    message = fails("train", run.folder)
    assert "logits made by" in message and str(other) in message and "generate-logits" in message


def test_other_tokenizer(fails, sibling, documents, tmp_path):
    from megakd.models.tiny import train_tokenizer

    run = sibling()
    student = copied(run, "student-0")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (student / name).unlink()
    train_tokenizer(documents, 350).save_pretrained(student)
    message = fails("train", run.folder)
    assert "tokenizer of 400 entries" in message and "one of 350" in message


def test_tokens_of_another_tokenizer(fails, sibling, documents, teacher, tmp_path):
    from megakd.models.tiny import train_tokenizer

    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    train_tokenizer(documents, 350).save_pretrained(other)
    run, donor = sibling(f"model.teacher={other}"), sibling()
    run.path("data").mkdir()
    run.path("data", "tokens").symlink_to(donor.path("data", "tokens").resolve())
    assert "tokenized with another tokenizer" in fails("generate-logits", run.folder)
    assert not run.path("data", "logits").exists()


def test_truncated_shard(fails, sibling):
    run = sibling()
    tar = copied(run, "data/logits") / "train" / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-3000])
    message = fails("train", run.folder)
    assert "shard-00001.tar" in message and "cut short" in message and "generate-logits" in message


def test_batch_that_does_not_divide(fails, sibling):
    run = sibling("engine.kind=deepspeed", "engine.config=zero2", "engine.ranks=3")
    message = fails("train", run.folder)
    assert "16 windows per step do not divide among 3 ranks" in message


def test_unwritable_folder(fails, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails("new", tmp_path / "file" / "run", "--from", recipe)
    assert (tmp_path / "file").read_text() == ""


def test_rank_above_the_matrix(fails, recipe, tmp_path):
    megakd("new", tmp_path / "a", "--from", recipe, "compress.rank=100")
    assert "compress.rank=100 exceeds the experts' smaller side, 24" in fails("compress", tmp_path / "a")
    assert not (tmp_path / "a" / "student-0").exists()


def test_training_before_compressing(fails, recipe, tmp_path):
    megakd("new", tmp_path / "a", "--from", recipe)
    assert "run: megakd compress" in fails("train", tmp_path / "a")


def test_temperature_without_its_tail(fails, sibling):
    """Of the run's own capture, and of one that holds less than its run asked for."""
    with pytest.raises(UserError, match="T = 1, 2, not 3"):
        sibling("objective.temperature=3.0")
    run = sibling()
    write_json(run.path("config.json"), {**read_json(run.path("config.json")), "objective": {"temperature": 3.0}})
    assert "T = 1, 2, not 3" in fails("train", run.folder)


def test_loss_that_the_stored_targets_do_not_support(fails, sibling):
    with pytest.raises(UserError, match=r"objective.tail: sampled needs draws.*logits.profile=sampled in a new run"):
        sibling("objective.tail=sampled")


def test_edited_manifest(fails, sibling):
    """The temperatures of the tails, say, to make a loss fit that was not captured for."""
    run = sibling()
    path = copied(run, "data/logits") / "train" / "manifest.json"
    manifest = read_json(path)
    manifest["facts"]["temperatures"] = [1.0, 3.0]
    write_json(path, manifest)
    message = fails("train", run.folder)
    assert str(path) in message and "changed after it was written" in message


def test_logits_of_an_older_format(fails, sibling):
    run = sibling()
    path = copied(run, "data/logits") / "train" / "manifest.json"
    write_json(path, {**read_json(path), "version": 1})
    assert "version 1 of 'megakd-shards', this MegaKD reads version 2" in fails("train", run.folder)


def test_logits_without_their_book(fails, sibling):
    run = sibling()
    [book] = (copied(run, "data/logits") / "train").glob("book-*.npy")
    book.unlink()
    message = fails("train", run.folder)
    assert str(book) in message and "copy it from where the shards were made" in message


def test_deepspeed_file_that_decides_what_the_run_decides(fails, sibling, tmp_path):
    write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}})
    run = sibling("engine.kind=deepspeed", f"engine.config={tmp_path / 'ds.json'}")
    message = fails("train", run.folder)
    assert "'optimizer' is decided by the run's optim" in message


def test_frozen_field(fails, sibling):
    run = sibling()
    before = files(run.folder)
    assert "make a sibling run: megakd new" in fails("train", run.folder, "optim.lr=1.0")
    assert files(run.folder) == before


def test_more_entries_than_the_vocabulary_has(fails, sibling):
    run, donor = sibling("logits.top_k=401"), sibling()
    if not run.path("data", "tokens").exists():
        run.path("data", "tokens").symlink_to(donor.path("data", "tokens").resolve())
    assert "logits.top_k: 401 exceeds the vocabulary of 400" in fails("generate-logits", run.folder)
    assert not run.path("data", "logits").exists()


def test_nan_weights(fails, recipe, teacher, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if "experts" in n and "down" in n)
    tensors[name].view(-1)[5] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    megakd("new", tmp_path / "a", "--from", recipe, f"model.teacher={broken}")
    assert f"model.safetensors: {name} holds NaN" in fails("compress", tmp_path / "a")


def test_help_does_not_import_torch():
    script = "import sys; from megakd import cli; cli.build_parser().format_help(); print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pydantic", "numpy"} & set(modules)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself_with_examples(verb, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megakd", verb, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.run_command_line()
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in text and f"megakd {verb}" in text
    named = re.findall(r"reads the sections ([\w, ]+) of RUN/config.json", text)
    assert bool(named) == (cli.VERBS[verb][1] and verb not in ("report", "serve"))  # which read what there is
    for section in named[0].split(", ") if named else ():
        assert parts(section), (verb, section)


def test_unknown_verb_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megakd", "destil"])
    with pytest.raises(SystemExit) as ended:
        cli.run_command_line()
    assert ended.value.code == 2 and "destil" in capsys.readouterr().err


def test_overrides_of_live_fields_are_recorded(sibling):
    run = sibling()
    Run.open(run.folder, ["optim.micro_batch=2"])
    last = json.loads(run.path("history.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "change" and last["fields"] == {"optim.micro_batch": [4, 2]}
    assert Run.open(run.folder).config.optim.micro_batch == 2


def test_wrong_world_size_is_one_line_not_a_crash_of_the_error_handler(fails, monkeypatch, sibling):
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert "WORLD_SIZE=x: expected a whole number" in fails("train", sibling().folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2 is set and RANK is not" in fails("train", sibling().folder, "optim.micro_batch=2")


def test_reader_of_standard_output_may_leave_early():
    """`megakd config | head -1` was a BrokenPipeError traceback."""
    command = [sys.executable, "-m", "megakd", "config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_another_pipe_that_breaks_is_an_error(monkeypatch):
    def verb(argv: list[str]) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "run_verb", verb)
    with pytest.raises(BrokenPipeError):
        cli.run_command_line()
