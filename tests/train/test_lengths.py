"""One document a sequence, of any length: batches as wide as need be give what one sequence at a time gives."""

import json
from pathlib import Path

import numpy as np
import pytest

from megakd.data.shards import ShardSet
from megakd.run import Run
from megakd.train import data as train_data
from tests.conftest import forked_ranks, in_process, metrics


@pytest.fixture(scope="module")
def short(recipe: Path, prepared: Path, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run over documents of 2 to 60 characters."""
    folder = tmp_path_factory.mktemp("short")
    value = json.loads(recipe.read_text())
    text, chooser = " ".join(documents), np.random.default_rng(0)
    starts, sizes = chooser.integers(0, len(text) - 60, 1500), chooser.integers(2, 61, 1500)
    texts = [text[at : at + size] for at, size in zip(starts, sizes, strict=True)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    value["model"]["student"] = str(prepared / "student-0")
    del value["compress"]
    value["data"] |= {"source": str(folder / "text.jsonl"), "packing": "documents"}
    value["logits"]["batch_size"] = 4
    value["stream"] = {"group_by_length": 8}
    (folder / "recipe.json").write_text(json.dumps(value))
    run = Run.create(folder / "recipe.json", [], folder / "run")
    for verb in ("tokenize", "generate-logits", "train"):
        in_process(verb, run.folder)
    return run


def test_samples_are_written_in_their_order_with_the_targets_of_each_alone(short, tmp_path):
    alone = Run.create(short.folder, [], tmp_path / "alone")
    alone.path("data", "logits").unlink()
    in_process("generate-logits", alone.folder, "logits.batch_size=1")
    for part in ("holdout", "train"):
        tokens, many, one = (
            ShardSet(run.path("data", kind, part))
            for run, kind in ((short, "tokens"), (short, "logits"), (alone, "logits"))
        )
        assert len({tokens.length(index) for index in range(len(tokens))}) > 10
        assert [many.entry(i).key for i in range(len(many))] == [tokens.entry(i).key for i in range(len(tokens))]
        for index in range(len(many)):
            mine, theirs = many[index].targets, one[index].targets
            assert mine and theirs and np.allclose(mine.label_nll, theirs.label_nll, atol=2e-3)
            assert (mine.ids == theirs.ids).mean() > 0.9  # rounding puts neighbours in another order


@pytest.mark.ranks
def test_two_ranks_and_other_micro_batches_train_the_same(short, tmp_path):
    expected = metrics(short.folder)
    one = Run.create(short.folder, ["optim.micro_batch=1"], tmp_path / "one")
    in_process("train", one.folder)
    engine = ["engine.kind=deepspeed", "engine.config=zero3", "engine.ranks=2"]
    two = Run.create(short.folder, engine, tmp_path / "two")
    forked_ranks(2, "train", two.folder)
    for run in (one, two):
        found = metrics(run.folder)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for name in ("loss", "ce", "kl"):
            assert np.allclose([row[name] for row in found], [row[name] for row in expected], rtol=2e-5), name


@pytest.mark.ranks
def test_a_teacher_over_two_ranks_answers_sequences_of_any_length(short, tmp_path):
    run = Run.create(short.folder, [], tmp_path / "run")
    run.path("data", "logits").unlink()
    forked_ranks(2, "generate-logits", str(run.folder), "logits.parallel=zero3")
    mine, theirs = (ShardSet(each.path("data", "logits", "train")) for each in (run, short))
    for index in range(len(theirs)):
        a, b = mine[index], theirs[index]
        assert a.key == b.key and a.targets and b.targets
        assert np.allclose(a.targets.label_nll, b.targets.label_nll, atol=2e-3)


def test_plan_says_how_much_is_padding(short):
    dataset = ShardSet(short.path("data", "tokens", "train"))
    share = train_data.padding_share(short.config, short.config.stages[0], dataset)
    said = " ".join(in_process("plan", short.folder).split())
    assert f"one document per sequence; {share:.1%} of the positions that are computed is padding" in said
