import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from megakd.data import tokenizing
from megakd.data.tokenizers import load_tokenizer
from megakd.data.tokenizing import AHEAD, BATCH, Document, tokenizers
from megakd.errors import UserError
from tests.data.test_tokenizers import sentencepiece_folder


class LetterTokenizer:
    """A text's ids are its characters' numbers."""

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


class WorkerHere:
    """A worker without a process: takes batches and answers in the order that it was given them."""

    def __init__(self) -> None:
        self.given: deque[list[str]] = deque()

    def give(self, task: tuple[list[str], None]) -> None:
        texts, _ = task
        self.given.append(texts)
        assert len(texts) <= BATCH and len(self.given) <= AHEAD

    def answer(self) -> list[list[int]]:
        return LetterTokenizer()(self.given.popleft())["input_ids"]


@pytest.fixture
def workers_here(monkeypatch):
    @contextmanager
    def worker(folder: Path, name: str, template: None) -> Iterator[WorkerHere]:
        yield WorkerHere()

    monkeypatch.setattr(tokenizing, "_worker", worker)


def tokenized(
    documents: Iterable[tuple[int, str]], tokenizer: Any, folder: Path, workers: int
) -> Generator[tuple[int, str, list[int]], None, None]:
    with tokenizers(tokenizer, folder, workers) as made:
        for document, ids in made.encode(Document(*each) for each in documents):
            yield document.number, document.text, ids


def outcome(documents: Iterator[tuple[int, str]], workers: int) -> tuple[list[tuple[int, str, list[int]]], str]:
    """What came before the end or the error, and the error."""
    found = []
    try:
        for item in tokenized(documents, LetterTokenizer(), Path("nowhere"), workers):
            found.append(item)
    except OSError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("count", [0, 1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH, 23 * BATCH + 5])
@pytest.mark.parametrize("workers", [0, 1, 2, 5, 40])
def test_every_document_comes_once_and_in_order(workers_here, count, workers):
    documents = [(3 * i, f"text {i}") for i in range(count)]
    expected = [(index, text, [ord(letter) for letter in text]) for index, text in documents]
    assert outcome(iter(documents), workers) == (expected, "")


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_sources_share_workers_and_each_keeps_its_order(workers_here, workers):
    """Documents are taken from three sources in an irregular order, as a mixture does."""
    sizes, found = (5 * BATCH + 3, 40, 2 * BATCH), [[], [], []]
    with tokenizers(LetterTokenizer(), Path("nowhere"), workers, len(sizes)) as made:  # type: ignore[arg-type]
        texts = [[Document(i, f"{name} {i}") for i in range(size)] for name, size in enumerate(sizes)]
        sources = [made.encode(each) for each in texts]
        for turn in range(3 * max(sizes)):
            which = turn * turn % 3 if turn % 7 else 2
            found[which] += [(each.text, ids) for each, ids in islice(sources[which], 1 + turn % 5)]
        for which in range(3):
            found[which] += [(each.text, ids) for each, ids in sources[which]]
    for name, size in enumerate(sizes):
        assert found[name] == [(t, [ord(letter) for letter in t]) for t in (f"{name} {i}" for i in range(size))]


@pytest.mark.parametrize("count", [0, BATCH, 7 * BATCH + 5])
def test_a_source_that_breaks_does_so_at_the_same_place_for_any_number_of_workers(workers_here, count):
    def broken() -> Iterator[tuple[int, str]]:
        yield from ((i, f"text {i}") for i in range(count))
        raise OSError("the disk is gone")

    found, error = outcome(broken(), 0)
    assert len(found) == count // BATCH * BATCH and error == "the disk is gone"
    assert all(outcome(broken(), workers) == (found, error) for workers in (1, 2, 40))


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_is_read_ahead_than_the_workers_need(workers_here, workers):
    read = 0

    def endless() -> Iterator[tuple[int, str]]:
        nonlocal read
        while True:
            read += 1
            yield read, "text"

    taken = tokenized(endless(), LetterTokenizer(), Path("nowhere"), workers)
    for done in range(1, 20 * BATCH):
        next(taken)
        assert read <= done + (AHEAD * workers + 1) * BATCH


@pytest.fixture
def script_without_guard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process runs a user's script without `if __name__ == "__main__"`, which workers must not run again."""
    (tmp_path / "mine.py").write_text("raise SystemExit('the script ran again')")
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "mine.py")
    monkeypatch.setitem(sys.modules, "__main__", script)


@pytest.mark.parametrize("kind", ["fast", "sentencepiece"])
def test_worker_processes_give_what_each_document_gives_alone(script_without_guard, tmp_path, teacher, documents, kind):
    folder = teacher if kind == "fast" else sentencepiece_folder(tmp_path, documents, "SentencePieceBackend")
    tokenizer = load_tokenizer(folder)
    texts = [f"{document}\n{i} 東京 🙂" for i in range(4) for document in documents]
    expected = [(i, t, tokenizer(t, add_special_tokens=False)["input_ids"]) for i, t in enumerate(texts)]
    assert list(tokenized(enumerate(texts), tokenizer, folder, 2 if kind == "fast" else 1)) == expected
    assert list(tokenized(enumerate(texts), tokenizer, folder, 0)) == expected
    assert workers() == []


def workers() -> list[psutil.Process]:
    """Processes of this one that tokenize."""
    return [child for child in psutil.Process().children() if any("tokenizing" in word for word in child.cmdline())]


def test_a_killed_worker_is_an_error_that_says_so(tokenizer, teacher, documents):
    endless = ((i, documents[i % len(documents)]) for i in range(10**9))
    taken = tokenized(endless, tokenizer, teacher, 1)
    next(taken)
    (child,) = workers()
    child.kill()
    with pytest.raises(UserError, match=r"worker 1 of 1 was killed by SIGKILL") as caught:
        for _ in taken:
            pass
    assert "\n" not in str(caught.value)
    assert workers() == []


def test_an_error_in_a_worker_comes_out_here(tmp_path, tokenizer, teacher):
    with pytest.raises(UserError, match="no tokenizer that transformers can load") as caught:
        list(tokenized([(0, "text")], tokenizer, tmp_path, 1))
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(RuntimeError, match=r"in a tokenizer worker\nTraceback (.|\n)*_encode"):
        list(tokenized([(0, None)], tokenizer, teacher, 1))  # type: ignore[list-item]


def test_workers_end_when_their_tokens_are_no_longer_wanted(tokenizer, teacher, documents):
    endless = ((i, documents[i % len(documents)]) for i in range(10**9))
    taken = tokenized(endless, tokenizer, teacher, 1)
    next(taken)
    taken.close()
    assert workers() == []
