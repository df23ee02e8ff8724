"""Documents → token ids, in this process or in worker processes, always in order.

A worker has a pipe of its own and no lock or queue in common with the others. So one that dies closes its pipe, which
is seen at once, and when this process dies every worker sees its pipe closed and ends.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle, islice
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from megakd.data.templates import encode_conversation
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import UserError
from megakd.system.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 64  # documents tokenized at once: without workers, the fast tokenizers use all cores
AHEAD = 4  # batches a worker is given before its first answer is asked for


class Document(NamedTuple):
    """A text, or a conversation as conversations.py writes it, and which document of its source it is.

    place: where it is, for messages. bad: lines of the source before it that were skipped. passes: how often the source
    has been begun.
    """

    number: int
    text: str
    place: str = ""
    bad: int = 0
    passes: int = 1


class Tokenizers:
    """A tokenizer in this process, or in workers, for several sources at once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", workers: "Sequence[_Worker]", sources: int):
        self.tokenizer, self.workers = tokenizer, workers
        self.turns = cycle(range(len(workers)))
        self.ahead = max(AHEAD * len(workers) // sources, 1)  # batches of a source that are given before one is wanted
        self.asked: list[deque[int]] = [deque() for _ in workers]  # numbers of the batches that each has
        self.answers: dict[int, list[Any]] = {}
        self.count = 0

    def encode(self, documents: Iterable[Document], chat_limit: int | None = None) -> Iterator[tuple[Document, Any]]:
        """(document, ids) of every document, in their order and the same for any number of workers.

        chat_limit: documents are conversations of at most so many tokens, and in the place of ids is an Encoded.
        What reading `documents` raises comes after the batches read before it, so workers, who are given text ahead,
        do not meet it sooner.
        """
        batches = _batches(iter(documents))
        answered = self._ahead(batches, chat_limit) if self.workers else self._here(batches, chat_limit)
        for batch, ids in answered:
            yield from zip(batch, ids, strict=True)

    def _here(self, batches: Iterator[list[Document]], limit: int | None) -> Iterator[tuple[list[Document], list[Any]]]:
        for batch in batches:
            yield batch, _encode(self.tokenizer, _texts(batch), limit)

    def _ahead(
        self, batches: Iterator[list[Document]], limit: int | None
    ) -> Iterator[tuple[list[Document], list[Any]]]:
        pending: deque[tuple[int, int, list[Document]]] = deque()
        failure: Exception | None = None
        while True:
            batch: list[Document] = []
            try:
                batch = [] if failure else next(batches, [])
            except Exception as error:
                failure = error
            if batch:
                pending.append((*self._give(batch, limit), batch))
            if pending and (not batch or len(pending) == self.ahead):
                worker, number, oldest = pending.popleft()
                yield oldest, self._answer(worker, number)
            if not batch and not pending:
                break
        if failure:
            raise failure

    def _give(self, batch: list[Document], limit: int | None) -> tuple[int, int]:
        worker, self.count = next(self.turns), self.count + 1
        self.workers[worker].give((_texts(batch), limit))
        self.asked[worker].append(self.count)
        return worker, self.count

    def _answer(self, worker: int, number: int) -> list[Any]:
        """A worker answers in the order in which it was asked; what another source asked before is kept for it."""
        while number not in self.answers:
            answer = self.workers[worker].answer()
            self.answers[self.asked[worker].popleft()] = answer
        return self.answers.pop(number)


@contextmanager
def tokenizers(
    tokenizer: "PreTrainedTokenizerBase", folder: Path, workers: int, sources: int = 1
) -> Iterator[Tokenizers]:
    """workers: processes that load the tokenizer of `folder`, with `tokenizer`'s chat template; 0: `tokenizer` here."""
    template = getattr(tokenizer, "chat_template", None)
    with ExitStack() as stack:
        names = [f"{i + 1} of {workers}" for i in range(workers)]
        yield Tokenizers(tokenizer, [stack.enter_context(_worker(folder, name, template)) for name in names], sources)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, BATCH)):
        yield batch


def _texts(batch: list[Document]) -> list[str]:
    return [document.text for document in batch]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str], chat_limit: int | None) -> list[Any]:
    if chat_limit is not None:
        return [encode_conversation(tokenizer, text, chat_limit) for text in texts]
    # without attention masks it takes a fifth less time
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]  # type: ignore[return-value]


class _Failure(NamedTuple):
    """What a worker answers instead of ids: its error's text, and whether it was the user's mistake."""

    text: str
    mendable: bool


# neither torch's threads nor those of the fast tokenizers survive a fork; multiprocessing's spawn would run the user's
# script again in every worker, unless its calls are under `if __name__ == "__main__"`
WORKER = "import sys; sys.path[:] = {path!r}; from megakd.data.tokenizing import work; work({pipe}, {folder!r})"


@contextmanager
def _worker(folder: Path, name: str, template: Any) -> "Iterator[_Worker]":
    ours, theirs = Pipe()
    number = theirs.fileno()
    code = WORKER.format(path=sys.path, pipe=number, folder=str(folder))
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[number])
    except OSError as error:
        ours.close()
        raise UserError(f"data.workers: tokenizer worker {name} cannot be started: {error.strerror}") from error
    finally:
        theirs.close()  # the worker has it now; its pipe closes when it dies
    worker = _Worker(name, ours, process)
    try:
        worker.give(template)
        yield worker
    finally:
        process.kill()  # it has nothing to lose
        process.wait()
        ours.close()


class _Worker(NamedTuple):
    name: str
    pipe: Connection
    process: subprocess.Popen[bytes]

    def give(self, task: Any) -> None:
        """The chat template first, then (texts, limit of a conversation or None) of every batch."""
        try:
            self.pipe.send(task)
        except OSError:
            raise self._death() from None

    def answer(self) -> list[Any]:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(answer, _Failure):
            raise UserError(answer.text) if answer.mendable else RuntimeError(f"in a tokenizer worker\n{answer.text}")
        return answer

    def _death(self) -> UserError:
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return UserError(
            f"data.workers: tokenizer worker {self.name} {how}; if memory ran out, use fewer; "
            "the same command goes on after the last finished shard"
        )


def work(pipe_number: int, folder: str) -> None:
    """The life of a worker: ids for every batch of texts, until the pipe is closed at the other end."""
    pipe = Connection(pipe_number)
    # Ctrl-C reaches the whole group, Slurm's signals all processes of a job step; the parent ends its workers
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one thread of work
    inbox: SimpleQueue[Any] = SimpleQueue()
    reader = Thread(target=_read, args=(pipe, inbox), daemon=True)
    reader.start()
    try:
        tokenizer = load_tokenizer(Path(folder))
        tokenizer.chat_template = inbox.get()
        while True:
            pipe.send(_encode(tokenizer, *inbox.get()))
    except Exception as error:
        mendable = isinstance(error, UserError)
        with suppress(OSError):
            pipe.send(_Failure(str(error) if mendable else traceback.format_exc(), mendable))
    reader.join()


def _read(pipe: Connection, inbox: "SimpleQueue[Any]") -> None:
    """Keep the pipe empty, so that neither side waits for the other to read; its end is the end of the process."""
    try:
        while True:
            inbox.put(pipe.recv())
    finally:
        os._exit(1)
