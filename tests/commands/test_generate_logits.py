"""Which part of a capture is done: --max-tokens, --part, --reread; whose work a run may touch."""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd import cli
from megakd.capture import pipeline as capture_pipeline
from megakd.capture import source as capture_source
from megakd.data.records import Sample
from megakd.data.shard_writer import shard_name, write_shard
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.identity import TeacherIdentity, fingerprint, sampled_files
from megakd.run import Run
from megakd.system.files import read_json, write_json
from megakd.system.text import clock as in_words
from tests.conftest import files


def megakd(*argv: object) -> None:
    """`megakd ARGV` in this process, which has loaded the libraries."""
    cli.run_verb([str(each) for each in argv])


@pytest.fixture
def empty(sibling) -> Run:
    """A run with tokens and without logits."""
    run = sibling()
    run.path("data", "logits").unlink()
    return run


@pytest.fixture
def owner(sibling) -> Run:
    """A run with logits of its own."""
    run = sibling()
    link = run.path("data", "logits")
    source = link.resolve()
    link.unlink()
    shutil.copytree(source, link)
    return run


def stored(run: Run) -> dict[str, bytes]:
    return files(run.path("data", "logits").resolve())


def manifest(run: Run) -> dict:
    return read_json(run.path("data", "logits", "train", "manifest.json"))


def test_the_first_tokens_then_the_rest(empty, prepared, capsys):
    """Two of five shards hold 3000 tokens; they are whole, and the later capture goes on from them."""
    megakd("generate-logits", empty.folder, "--max-tokens", "3e3")
    train = ShardSet(empty.path("data", "logits", "train"))
    assert train.names == ["shard-00000", "shard-00001"] and 3000 <= train.tokens < 3000 + 2000
    assert len(ShardSet(empty.path("data", "logits", "holdout"))) == len(
        ShardSet(prepared / "data" / "logits" / "holdout")
    )
    before = {name: os.stat(empty.path("data", "logits", "train", f"{name}.tar")).st_mtime_ns for name in train.names}
    for limit in ([], ["--max-tokens", "1e9"]):
        megakd("generate-logits", empty.folder, *limit)
        assert stored(empty) == files((prepared / "data" / "logits").resolve())
    for name, written in before.items():
        assert os.stat(empty.path("data", "logits", "train", f"{name}.tar")).st_mtime_ns == written


def test_parts_make_the_whole_in_any_order(empty, prepared, capsys):
    for part, left in (("2/3", 3), ("0/3", 1)):  # shards 2; 0 and 3; 1 and 4
        megakd("generate-logits", empty.folder, "--part", part)
        said = capsys.readouterr().err
        absent = {"2/3": "4 of 5 shards are missing, of workers 0, 1", "0/3": "2 of 5 shards are missing, of workers 1"}
        assert f"train: the share of worker {part[0]} of 3 is done; {absent[part]}\n" in said, left
        assert not manifest(empty)["complete"]
        planned = [(s["name"], s["samples"], s["tokens"]) for s in manifest(empty)["shards"]]
        whole = read_json(prepared / "data" / "logits" / "train" / "manifest.json")["shards"]
        assert planned == [(s["name"], s["samples"], s["tokens"]) for s in whole]
        with pytest.raises(UserError, match="not finished"):
            ShardSet(empty.path("data", "logits", "train"))
    megakd("generate-logits", empty.folder, "--part", "1/3")
    assert stored(empty) == files((prepared / "data" / "logits").resolve())


def test_a_worker_that_comes_late_takes_back_nothing(empty, prepared, monkeypatch):
    """Between another's look at the shards and what it writes of them, this one may finish all and say so."""
    megakd("generate-logits", empty.folder, "--part", "0/2")
    path = empty.path("data", "logits", "train", "manifest.json")
    written, original = path.stat().st_ino, capture_pipeline.write_manifest
    megakd("generate-logits", empty.folder, "--part", "0/2")
    assert path.stat().st_ino == written  # what says so already stays

    def then_late(folder, facts, shards, complete):
        original(folder, facts, shards, complete=complete)
        if complete:
            original(folder, facts, shards, complete=False)

    monkeypatch.setattr(capture_pipeline, "write_manifest", then_late)
    megakd("generate-logits", empty.folder)
    monkeypatch.undo()
    megakd("generate-logits", empty.folder, "--part", "0/2")  # the late one, at its end
    assert stored(empty) == stored(Run.open(prepared))


def test_reread_redoes_what_is_damaged_and_nothing_else(owner, prepared):
    train = owner.path("data", "logits", "train")
    tar = train / "shard-00001.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    megakd("generate-logits", owner.folder)
    assert tar.read_bytes() == bytes(data)  # its size is right: without --reread nobody looks
    before = {path.name: path.stat().st_mtime_ns for path in train.glob("*.tar")}
    megakd("generate-logits", owner.folder, "--reread")
    after = {path.name: path.stat().st_mtime_ns for path in train.glob("*.tar")}
    assert [name for name in sorted(before) if before[name] != after[name]] == ["shard-00001.tar"]
    assert stored(owner) == files((prepared / "data" / "logits").resolve())


def test_force_captures_again_and_leaves_the_run_that_the_logits_are_linked_from(sibling, prepared, capsys):
    run, before = sibling(), files((prepared / "data" / "logits").resolve())
    megakd("generate-logits", run.folder, "--force")
    logits = run.path("data", "logits")
    assert not logits.is_symlink() and files(logits) == before == files(prepared / "data" / "logits")
    [aside] = run.path("data").glob("logits-before-*")
    assert aside.is_symlink() and f"the old logits are {aside.name} now" in capsys.readouterr().err
    with pytest.raises(UserError, match="--force: each of 2 workers would set aside what the others write"):
        megakd("generate-logits", run.folder, "--force", "--part", "0/2")
    (logits / "train" / "shard-00002.json").unlink()
    capsys.readouterr()
    megakd("inspect", run.folder)
    megakd("plan", run.folder)
    shown = capsys.readouterr().out
    tokens = rf"^data/tokens/train +5 of 5 shards.*, in {prepared}/data/tokens/train *$"
    for row in (r"^data/logits/train +4 of 5 shards, [\d.]+k tokens *$", tokens):
        assert len(re.findall(row, shown, re.MULTILINE)) == 2


@pytest.mark.parametrize("content", ["{}", '{"format": "megakd-shards", "version": 1}', "edited"])
def test_a_damaged_manifest_is_written_again(owner, prepared, content):
    """The sidecars know all that it says."""
    path = owner.path("data", "logits", "train", "manifest.json")
    path.write_text(path.read_text().replace('"complete"', '"completed"') if content == "edited" else content)
    megakd("generate-logits", owner.folder)
    assert stored(owner) == files((prepared / "data" / "logits").resolve())


def test_progress_of_six_workers_counts_every_shard_once(tmp_path, monkeypatch):
    """In step, a sample every 6 s: 20 shards of 1 to 3 samples, shards 0 and 7 there, and two of other data."""
    window = Sample("0", np.zeros(11, np.int32), np.zeros(1, np.int32))
    sizes = {shard_name(i): 1 + i % 3 for i in range(20)}
    plan = [{"name": name, "tokens": 10 * size} for name, size in sizes.items()]
    for i, facts in ((0, {"a": 1}), (7, {"a": 1}), (3, {"a": 2}), (8, {"a": 2})):
        write_shard(tmp_path, shard_name(i), [window], facts)
    done, clock, total = {shard_name(0), shard_name(7)}, [0.0], 10 * sum(sizes.values())
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(watch, names: list[str]) -> Iterator[None]:
        for name in names:
            taken = []
            for sample in watch.count(iter([window] * sizes[name])):
                taken.append(sample)
                yield
            write_shard(tmp_path, name, taken, {"a": 1})

    shares = [[name for name in list(sizes)[w::6] if name not in done] for w in range(6)]
    watches = [capture_pipeline._Watch("x", tmp_path, {"a": 1}, plan, done, set(share)) for share in shares]
    assert [watch.progress.done for watch in watches] == [30] * 6
    left = {w: work(watches[w], shares[w]) for w in range(6)}
    shown = [30.0] * 6
    while left:
        left = {w: worker for w, worker in left.items() if next(worker, "ended") != "ended"}
        for w in left:
            progress, seconds = watches[w].progress, 6 * sum(sizes[name] for name in shares[w])
            assert shown[w] <= progress.done <= total
            shown[w] = progress.done
            assert clock[0] == 0 or f"ETA {in_words(seconds - clock[0])}" in progress.line()
        clock[0] += 6
    for watch in watches:
        watch.look()
        assert watch.progress.done == total and "100%" in watch.progress.line()


BAD = ["4/4", "5/4", "0/0", "-1/2", "1", "1/", "/2", "a/b", "1/2/3", "1.0/2", ""]


@pytest.mark.parametrize("part", BAD)
def test_bad_parts_are_refused(empty, part, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megakd", "generate-logits", str(empty.folder), f"--part={part}"])
    with pytest.raises(SystemExit) as ended:
        cli.run_command_line()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"megakd: --part {part}: expected I/N with I from 0 to N - 1, like 0/4\n"
    assert not empty.path("data", "logits").exists()


def test_a_part_in_superscript_is_refused(empty):
    with pytest.raises(UserError, match="expected I/N"):
        megakd("generate-logits", empty.folder, "--part=²/3")


def test_max_tokens_must_be_a_number(empty, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megakd", "generate-logits", str(empty.folder), "--max-tokens=many"])
    with pytest.raises(SystemExit) as ended:
        cli.run_command_line()
    assert ended.value.code == 2 and "--max-tokens" in capsys.readouterr().err
    assert not empty.path("data", "logits").exists()


@pytest.mark.parametrize("limit", ["0", "-5", "nan"])
def test_max_tokens_must_be_positive(empty, limit):
    with pytest.raises(UserError, match="--max-tokens"):
        megakd("generate-logits", empty.folder, f"--max-tokens={limit}")
    assert not empty.path("data", "logits").exists()


def test_a_smaller_limit_takes_nothing_away_from_what_is_captured(owner):
    megakd("generate-logits", owner.folder, "--max-tokens=100")
    assert len(manifest(owner)["shards"]) == 5


def test_a_sibling_with_another_seed_does_not_overwrite_the_draws_it_shares(empty, tmp_path):
    """Either the draws are shared, or they are its own: never does a capture write into another run's folder."""
    drawn = ["logits.profile=sampled", "logits.draws=5", "objective.tail=sampled", "objective.temperature=1.0"]
    first = Run.create(empty.folder, drawn, tmp_path / "first")
    megakd("generate-logits", first.folder)
    before = stored(first)
    second = Run.create(first.folder, ["seed=1"], tmp_path / "second")
    megakd("generate-logits", second.folder)
    assert stored(first) == before


@pytest.mark.parametrize("profile", ["topk", "sampled"])
def test_a_teacher_that_answers_nan_is_refused(sibling, teacher, prepared, tmp_path, profile):
    """As half precision does on overflow: for some tokens, far into the training set."""
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    write_json(broken / "config.json", {**read_json(broken / "config.json"), "tie_word_embeddings": False})
    tensors = load_file(broken / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    shards = {part: ShardSet(prepared / "data" / "tokens" / part) for part in ("holdout", "train")}
    windows = [s[i].tokens[:-1] for s in shards.values() for i in range(len(s))]
    rare = max(set(windows[-1]) | set(windows[-20]), key=lambda t: next(i for i, w in enumerate(windows) if t in w))
    tensors["lm_head.weight"], tensors["model.embed_tokens.weight"] = embedding, embedding.clone()
    tensors["model.embed_tokens.weight"][rare] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    tail = {"topk": "ghost"}.get(profile, profile)
    run = sibling(
        f"logits.profile={profile}", f"model.teacher={broken}", f"objective.tail={tail}", "objective.temperature=1.0"
    )
    run.path("data").mkdir()
    run.path("data", "tokens").symlink_to((prepared / "data" / "tokens").resolve())
    with pytest.raises(UserError, match="NaN"):
        megakd("generate-logits", run.folder)


def run_of_a_copy(recipe, teacher, prepared, tmp_path) -> tuple[Run, Path]:
    """A run over the tokens of `prepared` whose teacher is a copy, and that copy's config.json."""
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    run = Run.create(recipe, [f"model.teacher={folder}"], tmp_path / "run")
    run.path("data").mkdir()
    run.path("data", "tokens").symlink_to(prepared / "data" / "tokens")
    return run, folder / "config.json"


def test_a_teacher_whose_config_is_edited_in_mid_capture_is_refused(recipe, teacher, prepared, tmp_path):
    """One data set then held the answers of two teachers; what was captured stays as it was."""
    run, config = run_of_a_copy(recipe, teacher, prepared, tmp_path)
    megakd("generate-logits", run.folder, "--max-tokens", 2000)
    before = stored(run)
    write_json(config, read_json(config) | {"num_experts_per_tok": 1})
    with pytest.raises(UserError, match=r"its weights or its config\.json were changed"):
        megakd("generate-logits", run.folder)
    assert stored(run) == before


def test_a_teacher_edited_while_it_is_loaded_is_refused(recipe, teacher, prepared, tmp_path, monkeypatch):
    run, config = run_of_a_copy(recipe, teacher, prepared, tmp_path)
    real = capture_source.load_model

    def edit_and_load(*args):
        write_json(config, read_json(config) | {"num_experts_per_tok": 1})
        return real(*args)

    monkeypatch.setattr(capture_source, "load_model", edit_and_load)
    with pytest.raises(UserError, match=r"its weights or its config\.json were changed"):
        megakd("generate-logits", run.folder)
    assert not list(run.path("data").rglob("logits/*/*.tar"))


def test_a_capture_begun_by_an_older_version_goes_on(recipe, teacher, prepared, tmp_path, monkeypatch):
    """Its fingerprint is an old one, not another teacher's; and its logits train a student with a new one."""
    run, config = run_of_a_copy(recipe, teacher, prepared, tmp_path)
    with monkeypatch.context() as old:
        old.setattr(capture_source, "fingerprint", sampled_files)
        megakd("generate-logits", run.folder, "--max-tokens", 2000)
    done = stored(run)
    megakd("generate-logits", run.folder)
    after = stored(run)
    weights = manifest(run)["facts"]["teacher"]["weights"]
    assert weights == sampled_files(config.parent)
    assert {name for name in done if name.endswith(".tar") and after[name] == done[name]}
    captured = TeacherIdentity.of(manifest(run)["facts"]["teacher"])
    new = TeacherIdentity(str(config.parent), None, fingerprint(config.parent))
    assert captured == replace(new, weights=weights) and new.difference(captured) is None
    write_json(config, read_json(config) | {"num_experts_per_tok": 1})
    assert new.difference(captured)


def test_a_teacher_whose_experts_cannot_be_distributed_is_refused_by_plan(recipe, teacher, tmp_path):
    """Before the capture has loaded it."""
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    dense = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **dense})
    run = Run.create(recipe, [f"model.teacher={folder}", "logits.parallel=autoep"], tmp_path / "run")
    with pytest.raises(UserError, match=r"autoep: qwen3 has no experts with .*set logits\.parallel=zero3"):
        megakd("plan", run.folder)
