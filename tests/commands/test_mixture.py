"""Several sources in one data set: shares in every stretch, the same bytes for any workers and after a kill."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megakd.commands import tokenize
from megakd.data import facts
from megakd.data.records import Sample
from megakd.data.shards import ShardSet
from megakd.data.tokenizers import load_tokenizer
from megakd.run import Run
from megakd.system.files import read_json
from tests.commands.test_tokenize import interrupted
from tests.conftest import files, in_process
from tests.data.chats import said

LENGTH, FRACTION = 32, 0.1
WEIGHTS = {"a": 5.0, "b": 3.0, "c": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of words of their own, in three kinds of files and other columns; one has very long documents."""
    made, chooser = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)

    def texts(letter: str, count: int, longest: int) -> list[str]:
        return [f"{letter}{i} " + f"{letter} " * int(chooser.integers(3, longest)) for i in range(count)]

    a, b, c = texts("a", 900, 60), texts("b", 60, 700), texts("c", 500, 80)
    (made / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in a))
    pyarrow.parquet.write_table(pyarrow.table({"body": pyarrow.array(b, pyarrow.large_string())}), made / "b.parquet")
    (made / "c.txt").write_text("\n\n\n".join(c))
    return made


def sources(folder: Path, **more: Any) -> str:
    """The override of data.sources; more: fields of all of them."""
    names = {"a": "a.jsonl", "b": "b.parquet", "c": "c.txt"}
    each = [{"source": str(folder / names[name]), "weight": weight, **more} for name, weight in WEIGHTS.items()]
    each[1]["text_field"] = "body"
    return f"data.sources={json.dumps(each)}"


@pytest.fixture(scope="module")
def recipe_of_sources(recipe: Path, folder: Path) -> Path:
    value = json.loads(recipe.read_text())
    value["data"] |= {"sequence_length": LENGTH, "tokens": 40_000, "holdout_tokens": 600, "shard_tokens": 4096}
    value["data"] |= {"holdout_fraction": FRACTION}
    (folder / "recipe.json").write_text(json.dumps(value))
    return folder / "recipe.json"


@pytest.fixture(scope="module")
def mixed(recipe_of_sources: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    run = Run.create(recipe_of_sources, [sources(folder)], tmp_path_factory.mktemp("runs") / "mixed")
    return run, in_process("tokenize", run.folder)


def letters(run: Run, part: str = "train") -> list[str]:
    """Which source each token that is predicted is of, in the order of the data."""
    tokenizer, shards = load_tokenizer(Path(run.config.model.teacher)), ShardSet(run.path("data", "tokens", part))
    found = []
    for sample in (shards[index] for index in range(len(shards))):
        text = tokenizer.decode(sample.tokens)
        (letter,) = {letter for letter in "abc" if letter in text}
        found += [letter] * (len(sample.tokens) - 1)
    return found


def test_shares_are_those_asked_for_in_every_stretch(mixed):
    run, said = mixed
    found = np.array(letters(run))
    assert len(found) >= 40_000
    for name, weight in WEIGHTS.items():
        share = weight / sum(WEIGHTS.values())
        assert abs((found == name).mean() - share) < 1e-3
        for start in range(0, len(found) - 2000, 997):  # any stretch: off by a sequence at both ends
            assert abs((found[start : start + 2000] == name).sum() - 2000 * share) <= 3 * LENGTH
    manifest = read_json(run.path("data", "tokens", "train", "manifest.json"))
    for each, (name, weight) in zip(manifest["sources"], WEIGHTS.items(), strict=True):
        assert each["tokens"] == (found == name).sum() and each["weight"] == weight / 10
        assert each["share"] == pytest.approx(each["tokens"] / len(found)) and f"{each['share']:.2%} of" in said
    assert manifest["documents"] == sum(each["documents"] for each in manifest["sources"])
    assert "50.00%" in in_process("inspect", run.path("data", "tokens", "train"))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_a_kill_make_no_difference(mixed, recipe_of_sources, folder, tmp_path, monkeypatch, workers):
    again = Run.create(recipe_of_sources, [sources(folder)], tmp_path / "again")
    interrupted(monkeypatch, again, "shard-00004")
    in_process("tokenize", again.folder, f"data.workers={workers}")
    assert files(again.path("data", "tokens")) == files(mixed[0].path("data", "tokens"))


def test_each_source_alone_is_in_its_own_order(mixed, recipe_of_sources, folder, tmp_path):
    """The sequences of a source are those of the source alone, one after the other."""
    own = json.loads(sources(folder).partition("=")[2])[0]
    alone = Run.create(recipe_of_sources, [f"data.source={own['source']}"], tmp_path / "alone")
    tokenize.main(alone, Namespace())
    tokenizer = load_tokenizer(Path(alone.config.model.teacher))
    whole, single = (ShardSet(run.path("data", "tokens", "train")) for run in (mixed[0], alone))
    mine = [s for s in (whole[i] for i in range(len(whole))) if "a" in tokenizer.decode(s.tokens)]

    def content(sample: Sample) -> tuple[list[int], list[int]]:
        return sample.tokens.tolist(), sample.starts.tolist()

    assert [content(sample) for sample in mine] == [content(single[i]) for i in range(len(mine))]
    assert "sources" not in single.facts and "sources" not in single.manifest


def test_a_source_that_runs_dry_ends_the_set_aloud_and_repeats_only_as_told(recipe_of_sources, folder, tmp_path):
    run = Run.create(recipe_of_sources, [sources(folder), "data.tokens=1e6"], tmp_path / "once")
    said = in_process("tokenize", run.folder)
    manifest = read_json(run.path("data", "tokens", "train", "manifest.json"))
    dry = min(manifest["sources"], key=lambda each: each["share"] - each["weight"])
    assert f"{dry['source']} ended after {dry['tokens']:,} tokens; the set ends there" in said
    assert all(abs(each["share"] - each["weight"]) < 1e-3 for each in manifest["sources"])
    assert "begins" not in said and all("passes" not in each for each in manifest["sources"])
    twice = Run.create(recipe_of_sources, [sources(folder, passes=2), "data.tokens=1e6"], tmp_path / "twice")
    said = in_process("tokenize", twice.folder)
    again = read_json(twice.path("data", "tokens", "train", "manifest.json"))
    assert "documents; pass 2 of 2 begins" in said and ", read 2 times, ended after" in said
    repeated = next(each for each in again["sources"] if each["source"] == dry["source"])
    assert repeated["passes"] == 2 and repeated["documents"] == 2 * dry["documents"]
    parts = [ShardSet(each.path("data", "tokens", "holdout")).manifest for each in (run, twice)]
    assert [part["documents"] for part in parts] == [parts[0]["documents"]] * 2  # each once


def test_text_among_conversations_counts_every_label(mixed, recipe_of_sources, folder, teacher, tmp_path):
    tokenizer = load_tokenizer(teacher)
    template = "{%- for m in messages -%}{{ m.role + '\\n' + m.content + eos_token }}{%- endfor -%}"
    (tmp_path / "chat.jinja").write_text(template + "{%- if add_generation_prompt -%}{{ 'assistant\\n' }}{%- endif -%}")
    rows = [{"messages": said(f"question {i}", f"answer {i}")} for i in range(400)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = [
        {"source": str(folder / "a.jsonl"), "weight": 2},
        {"source": str(tmp_path / "chats.jsonl"), "format": "messages"},
    ]
    overrides = [f"data.sources={json.dumps(both)}", f"data.chat_template={tmp_path / 'chat.jinja'}"]
    run = Run.create(recipe_of_sources, [*overrides, "data.tokens=9000", "data.holdout_tokens=300"], tmp_path / "run")
    tokenize.main(run, Namespace())
    shards = ShardSet(run.path("data", "tokens", "train"))
    kinds = set()
    for sample in (shards[index] for index in range(len(shards))):
        assert sample.mask is not None and shards.masked
        chat = "question" in tokenizer.decode(sample.tokens)
        kinds.add(chat)
        assert (sample.label_count < len(sample.tokens) - len(sample.starts)) == chat
    assert kinds == {True, False}


def test_sets_of_the_hub_are_read_at_the_revision_of_each(recipe_of_sources, tmp_path, monkeypatch):
    """Also where one set stands there twice: a run that went on after the validation set read both at one commit."""
    commits = {"v1": "a" * 40, "v2": "b" * 40, None: "c" * 40}
    asked: list[tuple[Any, ...]] = []

    def load_dataset(source: str, subset: Any, split: str, revision: Any, streaming: bool) -> Any:
        asked.append((source, subset, split, revision, streaming))
        rows = [{"text": f"{revision[0]}{i} " + f"{revision[0]} " * 30} for i in range(400)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(facts, "hub_commit", lambda source, revision: commits[revision])
    each = [{"source": "some/set", "revision": "v1"}, {"source": "some/set", "revision": "v2", "split": "test"}]
    each.append({"source": "other/set", "subset": "x"})
    settings = [f"data.sources={json.dumps(each)}", "data.tokens=4096", "data.holdout_tokens=300"]
    whole = Run.create(recipe_of_sources, settings, tmp_path / "whole")
    tokenize.main(whole, Namespace())
    expected = {("some/set", None, "train", "a" * 40, True), ("some/set", None, "test", "b" * 40, True)}
    assert set(asked) == expected | {("other/set", "x", "train", "c" * 40, True)}
    recorded = ShardSet(whole.path("data", "tokens", "train")).facts["sources"]
    assert [source["commit"] for source in recorded] == ["a" * 40, "b" * 40, "c" * 40]
    run = Run.create(recipe_of_sources, settings, tmp_path / "run")
    interrupted(monkeypatch, run, "shard-00000")
    monkeypatch.setattr(facts, "hub_commit", lambda source, revision: "d" * 40)  # all branches have moved on
    tokenize.main(run, Namespace())
    assert files(run.path("data", "tokens")) == files(whole.path("data", "tokens"))
