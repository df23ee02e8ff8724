"""FineWeb's files → shards: against the plain way of doing it, with workers, and killed at bad moments."""

import json
import shutil
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from megakd.commands import tokenize
from megakd.data import facts
from megakd.data import pipeline as token_pipeline
from megakd.data.batches import collate
from megakd.data.documents import held_out, python_documents
from megakd.data.records import Sample
from megakd.data.shards import ShardSet
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import UserError
from megakd.models.tiny import END_OF_DOCUMENT, train_tokenizer
from megakd.run import Run
from megakd.system.files import write_sealed
from tests.conftest import begin_texts_with_bos, files, in_process
from tests.forks import Forked

FRACTION = 0.1


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """360 pieces of real English, some shorter than a window, some as long as fifty."""
    pieces = [d[i : i + 20000] for d in python_documents() for i in range(0, len(d), 20000)]
    found = [piece[: (40 + 37 * i % 500) if i % 9 else 20000] for i, piece in enumerate(islice(pieces, 360))]
    assert len(found) == 360 and not any(END_OF_DOCUMENT in text for text in found)
    return found


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A folder as the hub's: sample/10BT/000_00000.parquet and so on, with FineWeb's nine columns."""
    folder = tmp_path_factory.mktemp("fineweb")
    (folder / "sample" / "10BT").mkdir(parents=True)
    (folder / "sample" / "100BT").mkdir()
    names = ("sample/100BT/000_00000", "sample/10BT/000_00000", "sample/10BT/001_00000", "sample/10BT/010_00000")
    for number, name in enumerate(names):
        part = texts[number * 90 : (number + 1) * 90]
        rows = {
            "text": part,
            "id": [f"<urn:uuid:{number}-{i}>" for i in range(90)],
            "dump": ["CC-MAIN-2024-10"] * 90,
            "url": [f"https://example.org/{number}/{i}" for i in range(90)],
            "date": ["2024-02-29T12:00:00Z"] * 90,
            "file_path": ["s3://commoncrawl/crawl-data/part.warc.gz"] * 90,
            "language": ["en"] * 90,
            "language_score": [0.97] * 90,
            "token_count": [len(text.split()) for text in part],
        }
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / f"{name}.parquet", row_group_size=40)
    return folder


@pytest.fixture(scope="module")
def recipe_of_text(tmp_path_factory: pytest.TempPathFactory, fineweb: Path, texts: list[str]) -> Path:
    """What tokenize needs of a teacher is its tokenizer; 64-token windows, 60 a shard, all the text there is."""
    folder = tmp_path_factory.mktemp("recipe-of-text")
    teacher = folder / "teacher"
    train_tokenizer(texts[::5], 600).save_pretrained(teacher)
    (teacher / "config.json").write_text('{"model_type": "qwen3_moe"}')
    data = {"source": str(fineweb), "sequence_length": 64, "tokens": 10**8, "shard_tokens": 64 * 60}
    value = {
        "model": {"teacher": str(teacher)},
        "data": {**data, "holdout_fraction": FRACTION, "holdout_tokens": 10**8},
        "engine": {"kind": "local"},
    }
    (folder / "recipe.json").write_text(json.dumps(value))
    return folder / "recipe.json"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe_of_text: Path) -> Run:
    run = Run.create(recipe_of_text, [], tmp_path_factory.mktemp("runs") / "undisturbed")
    tokenize.main(run, Namespace())
    return run


def documents_of(shards: ShardSet, end: int, cut: bool = False) -> Iterator[list[int]]:
    """The documents that windows were cut from: one that goes on begins the next window with its last token.

    cut: the last one may lack its end.
    """
    document: list[int] = []
    for sample in (shards[i] for i in range(len(shards))):
        bounds = [*sample.starts.tolist(), len(sample.tokens)]
        assert bounds[0] == 0
        for start, stop in pairwise(bounds):
            tokens = sample.tokens[start:stop].tolist()
            assert not document or tokens[0] == document[-1]
            document += tokens[1:] if document else tokens
            if document[-1] == end:
                yield document
                document = []
    assert cut or not document


def test_shards_hold_every_document_of_fineweb_once_with_its_end(undisturbed, texts):
    """Against the plain way: each document tokenized alone, its end token behind it, in the order of the files."""
    tokenizer = load_tokenizer(Path(undisturbed.config.model.teacher))
    count = 0
    for part in ("holdout", "train"):
        mine = [text for text in texts if held_out(text, FRACTION) == (part == "holdout")]
        expected = [[*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for t in mine]
        shards = ShardSet(undisturbed.path("data", "tokens", part))
        assert list(documents_of(shards, tokenizer.eos_token_id)) == expected
        assert shards.manifest["documents"] == len(mine)
        assert shards.manifest["text_tokens"] == sum(map(len, expected))
        assert shards.manifest["text_bytes"] == sum(len(text.encode()) for text in mine)
        count += len(mine)
        shards.close()
    assert count == len(texts)  # in both parts together, each once
    assert len(shards.names) > 5


def test_the_budget_gives_the_first_windows_of_the_whole(undisturbed, recipe_of_text, tmp_path):
    run = Run.create(recipe_of_text, ["data.tokens=7000", "data.holdout_tokens=128"], tmp_path / "run")
    tokenize.main(run, Namespace())
    for part, windows in (("train", 110), ("holdout", 2)):
        whole, less = (ShardSet(r.path("data", "tokens", part)) for r in (undisturbed, run))
        assert len(less) == windows
        for i in range(windows):
            assert whole[i].tokens.tolist() == less[i].tokens.tolist()
            assert whole[i].starts.tolist() == less[i].starts.tolist()


def test_a_killed_worker_costs_no_finished_shard_and_three_go_on(undisturbed, recipe_of_text, tmp_path, monkeypatch):
    """Killed while a shard is half written; then with another number of workers to the same bytes."""
    run = Run.create(recipe_of_text, ["data.workers=1"], tmp_path / "run")
    tokens = run.path("data", "tokens")
    write_shard = token_pipeline.write_shard

    def killing(folder: Path, name: str, samples: Iterable[Sample], *rest: Any, **named: Any) -> Any:
        def dying() -> Iterator[Sample]:
            for number, sample in enumerate(samples):
                if number == 20 and (folder.name, name) == ("train", "shard-00002"):
                    (worker,) = workers()
                    worker.kill()
                yield sample

        return write_shard(folder, name, dying(), *rest, **named)

    monkeypatch.setattr(token_pipeline, "write_shard", killing)
    with pytest.raises(UserError, match=r"worker 1 of 1 was killed by SIGKILL"):
        tokenize.main(run, Namespace())
    monkeypatch.undo()
    assert workers() == []
    before = files(tokens)
    expected = files(undisturbed.path("data", "tokens"))
    assert {name for name in before if name.startswith("train")} >= {"train/shard-00001.json", "train/shard-00001.tar"}
    assert before.items() <= expected.items()  # whole files only

    seen: list[token_pipeline.Progress] = []

    class Watched(token_pipeline.Progress):
        def __init__(self, *arguments: Any, **named: Any):
            super().__init__(*arguments, **named)
            seen.append(self)

    monkeypatch.setattr(token_pipeline, "Progress", Watched)
    tokenize.main(Run.open(run.folder, ["data.workers=3"]), Namespace())
    assert files(tokens) == expected
    (progress,) = seen  # the validation set was finished
    finished = sum(name.startswith("train") and name.endswith(".tar") for name in before)
    assert progress.before == finished * 60 * 64 and progress.done == ShardSet(tokens / "train").tokens


@pytest.mark.ranks
def test_workers_end_with_a_killed_parent(undisturbed, recipe_of_text, tmp_path):
    """kill -9 of the process that the user started, of that alone; then none of its workers is left, and it resumes."""
    run, tokens = tmp_path / "run", tmp_path / "run" / "data" / "tokens"
    in_process("new", run, "--from", recipe_of_text)
    process = Forked("megakd", "tokenize", run, "data.workers=2")
    family: list[psutil.Process] = []
    while len(family) < 2 or not (tokens / "holdout" / "shard-00000.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        family = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.002)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, family)):
        assert time.monotonic() < deadline, family
        time.sleep(0.01)
    assert not (tokens / "train" / "manifest.json").exists()
    tokenize.main(Run.open(run, ["data.workers=0"]), Namespace())
    left = {name: content for name, content in files(tokens).items() if ".tmp-" not in name}
    assert left == files(undisturbed.path("data", "tokens"))


def workers() -> list[psutil.Process]:
    """The tokenizer workers of this process."""
    return [p for p in psutil.Process().children() if alive(p) and "megakd.data.tokenizing" in " ".join(p.cmdline())]


def alive(process: psutil.Process) -> bool:
    """A process that ended and that nobody has asked for its exit code yet is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_source_without_a_held_out_document_says_how_many_were_read(recipe_of_text, texts, tmp_path):
    run = Run.create(recipe_of_text, ["data.holdout_fraction=1e-9"], tmp_path / "run")
    with pytest.raises(UserError, match=f"no holdout document .* {len(texts)} documents were read"):
        tokenize.main(run, Namespace())


def copied(fineweb: Path, recipe_of_text: Path, tmp_path: Path) -> tuple[Path, Run]:
    """A run over a source of its own."""
    source = Path(shutil.copytree(fineweb, tmp_path / "fineweb"))
    return source, Run.create(recipe_of_text, [f"data.source={source}"], tmp_path / "run")


CHANGES = {
    "added": lambda sample: shutil.copy(sample / "10BT" / "000_00000.parquet", sample / "10BT" / "000_00001.parquet"),
    "removed": lambda sample: (sample / "100BT" / "000_00000.parquet").unlink(),
    "renamed": lambda sample: (sample / "10BT" / "010_00000.parquet").rename(sample / "10BT" / "000_5.parquet"),
    "grown": lambda sample: (sample / "10BT" / "010_00000.parquet").write_bytes(b"longer" * 100_000),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_files_in_the_source_are_refused_whether_finished_or_not(
    fineweb, recipe_of_text, tmp_path, monkeypatch, change
):
    source, run = copied(fineweb, recipe_of_text, tmp_path)
    write_shard = token_pipeline.write_shard

    def dies(folder: Path, name: str, *rest: Any, **named: Any) -> Any:
        if (folder.name, name) == ("train", "shard-00002"):
            raise KeyboardInterrupt
        return write_shard(folder, name, *rest, **named)

    monkeypatch.setattr(token_pipeline, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        tokenize.main(run, Namespace())
    monkeypatch.undo()
    tokens, teacher = run.path("data", "tokens"), Path(run.config.model.teacher)
    before, aside = files(tokens), Path(shutil.copytree(source, tmp_path / "aside"))
    CHANGES[change](source / "sample")
    for part in ("holdout", "train"):  # finished, and cut short
        match = (
            rf"/{part}: was made from 4 files of [0-9,]+ bytes \(.*\), data.source {source} has .* delete {tokens} and"
        )
        with pytest.raises(UserError, match=match):
            token_pipeline.tokenize_part(run, part, 10**8, load_tokenizer(teacher), teacher)
        assert files(tokens) == before
    shutil.rmtree(source)
    aside.rename(source)
    tokenize.main(run, Namespace())
    assert ShardSet(tokens / "train").facts["files"]["count"] == 4


def test_a_finished_part_needs_its_source_no_more(fineweb, recipe_of_text, tmp_path, capsys):
    source, run = copied(fineweb, recipe_of_text, tmp_path)
    tokenize.main(run, Namespace())
    made = files(run.path("data", "tokens"))
    shutil.rmtree(source)
    tokenize.main(run, Namespace())
    assert capsys.readouterr().err.endswith("tokenize holdout: finished\ntokenize train: finished\n")
    assert files(run.path("data", "tokens")) == made
    (run.path("data", "tokens", "train") / "manifest.json").unlink()
    (run.path("data", "tokens", "train") / "shard-00001.json").unlink()
    with pytest.raises(UserError, match=f"no file at {source}"):
        tokenize.main(run, Namespace())


def test_a_source_whose_packed_documents_changed_is_refused(recipe_of_text, texts, tmp_path, monkeypatch):
    """Same name, same size: only reading again what was packed shows it."""
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:60]))
    run = Run.create(recipe_of_text, [f"data.source={source}"], tmp_path / "run")
    interrupted(monkeypatch, run, "shard-00001")
    before, content = files(run.path("data", "tokens")), source.read_text()
    source.write_text(content.replace("assert", "asserT", 1))
    with pytest.raises(UserError, match=rf"{source} has changed: its first \d+ documents are not those that"):
        tokenize.main(run, Namespace())
    source.write_text(content)
    tokenize.main(run, Namespace())
    assert before.items() <= files(run.path("data", "tokens")).items()


def interrupted(monkeypatch: pytest.MonkeyPatch, run: Run, shard: str) -> None:
    """Tokenize as if killed when the train part begins that shard."""
    write_shard = token_pipeline.write_shard

    def dies(folder: Path, name: str, *rest: Any, **named: Any) -> Any:
        if (folder.name, name) == ("train", shard):
            raise KeyboardInterrupt
        return write_shard(folder, name, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(token_pipeline, "write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            tokenize.main(run, Namespace())


def test_a_hub_set_with_empty_rows_is_resumed_at_its_commit(recipe_of_text, texts, tmp_path, monkeypatch, capsys):
    """Rows counted as documents repeated 40 documents; a moved branch would have mixed two data sets."""
    rows = [{"text": value} for text in texts[:60] for value in (text, "", None)]
    asked: list[Any] = []

    def load_dataset(*_: Any, revision: Any, **__: Any) -> Any:
        asked.append(revision)
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    commits = iter(["a" * 40, "a" * 40, "b" * 40])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(facts, "hub_commit", lambda source, revision: next(commits))
    whole = Run.create(recipe_of_text, ["data.source=some/set"], tmp_path / "whole")
    tokenize.main(whole, Namespace())
    run = Run.create(recipe_of_text, ["data.source=some/set"], tmp_path / "run")
    interrupted(monkeypatch, run, "shard-00002")
    tokenize.main(run, Namespace())
    assert files(run.path("data", "tokens")) == files(whole.path("data", "tokens"))
    assert set(asked) == {"a" * 40} and next(commits) == "b" * 40  # shards that are there say which
    assert ShardSet(run.path("data", "tokens", "train")).facts["commit"] == "a" * 40
    assert f"data.source some/set: read at commit {'a' * 40}" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n', '{"text": "x"}\n'])
def test_a_source_too_small_for_both_parts_is_one_line(recipe_of_text, tmp_path, content):
    (tmp_path / "text").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "text" / name).write_text(content)
    run = Run.create(recipe_of_text, [f"data.source={tmp_path / 'text'}"], tmp_path / "run")
    with pytest.raises(UserError, match=r"gives no (holdout|train) document"):
        tokenize.main(run, Namespace())
    assert not list(run.path("data").rglob("*.tar")) and not list(run.path("data").rglob("manifest.json"))


def test_a_hold_out_that_ends_inside_its_first_document_is_refused(recipe_of_text, tmp_path):
    run = Run.create(recipe_of_text, ["data.holdout_tokens=64"], tmp_path / "run")
    with pytest.raises(
        UserError, match=r"64 tokens end inside the first document of the validation set, which has 86; .* set"
    ):
        tokenize.main(run, Namespace())
    assert not run.path("data", "tokens", "holdout", "manifest.json").exists()
    enough = Run.create(recipe_of_text, ["data.holdout_tokens=86", "data.tokens=64"], tmp_path / "enough")
    tokenize.main(enough, Namespace())
    assert ShardSet(enough.path("data", "tokens", "holdout")).manifest["documents"] == 1


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory, recipe_of_text: Path) -> Path:
    """The recipe with a tokenizer that puts a token of its own before every text, as Llama's and Gemma's do."""
    folder = tmp_path_factory.mktemp("with-bos")
    value = json.loads(recipe_of_text.read_text())
    shutil.copytree(value["model"]["teacher"], folder / "teacher")
    begin_texts_with_bos(folder / "teacher")
    value["model"]["teacher"] = str(folder / "teacher")
    value["data"] |= {"tokens": 20000, "holdout_tokens": 5000}
    (folder / "recipe.json").write_text(json.dumps(value))
    return folder / "recipe.json"


def test_documents_begin_as_the_tokenizers_own_texts_do(with_bos, texts, tmp_path, capsys):
    run = Run.create(with_bos, [], tmp_path / "run")
    tokenize.main(run, Namespace())
    assert "tokenize: documents begin with '<s>' (id 600) (data.bos=auto)" in capsys.readouterr().err
    tokenizer = load_tokenizer(Path(run.config.model.teacher))
    assert tokenizer("x")["input_ids"][0] == 600
    shards = ShardSet(run.path("data", "tokens", "holdout"))
    mine = [text for text in texts if held_out(text, FRACTION)]
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in mine]
    assert list(documents_of(shards, tokenizer.eos_token_id, cut=True)) == expected[: shards.manifest["documents"]]
    assert shards.facts["bos"] == [600]
    # what bits per byte are computed with: the tokens of the text, each predicted once
    whole = expected[: shards.manifest["documents"]]
    assert shards.manifest["text_tokens"] == sum(map(len, whole)) - len(whole)
    # position 0 of a document is BOS, and no position has BOS as its label
    for sample in (shards[i] for i in range(len(shards))):
        labels = collate([sample], 64).labels
        assert 600 not in labels and (sample.tokens[sample.starts[1:]] == 600).all()


@pytest.mark.parametrize(("rule", "bos"), [("never", []), ("always", [600]), ("auto", [600])])
def test_the_rule_of_bos_is_stated_in_the_manifest(with_bos, tmp_path, rule, bos):
    run = Run.create(with_bos, [f"data.bos={rule}", "data.tokens=640"], tmp_path / "run")
    tokenize.main(run, Namespace())
    shards = ShardSet(run.path("data", "tokens", "train"))
    assert shards.facts["bos"] == bos and int((shards[0].tokens == 600).sum()) == len(shards[0].starts) * len(bos)


def test_shards_from_before_bos_was_a_fact_stay_without_it(with_bos, tmp_path, capsys):
    """A run of an older version: neither config nor shards name BOS; the second half must be as the first."""
    run = Run.create(with_bos, ["data.bos=never"], tmp_path / "run")
    tokenize.main(run, Namespace())
    whole = files(run.path("data", "tokens"))
    for path in run.path("data", "tokens").rglob("*.json"):
        value = json.loads(path.read_text())
        del value["facts"]["bos"], value["seal"]
        write_sealed(path, value, compact=path.name != "manifest.json")
    old = files(run.path("data", "tokens"))
    config = json.loads((run.folder / "config.json").read_text())
    del config["data"]["bos"], config["data"]["revision"]
    (run.folder / "config.json").write_text(json.dumps(config))
    for name in ("manifest.json", "shard-00003.json"):
        run.path("data", "tokens", "train", name).unlink()
    tokenize.main(Run.open(run.folder), Namespace())
    assert files(run.path("data", "tokens")) == old
    assert {name: content for name, content in old.items() if name.endswith(".tar")}.items() <= whole.items()
    assert "documents there begin without a BOS token, as it was made before data.bos" in capsys.readouterr().err
