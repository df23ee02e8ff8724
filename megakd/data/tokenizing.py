"""Texts → token ids, in this process or in worker processes, always in order.

A worker has a pipe of its own and no lock or queue in common with the others. So one that dies closes its pipe, which
is seen at once, and when this process dies every worker sees its pipe closed and ends.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
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

Documents = list[tuple[int, str]]


def tokenized(
    documents: Iterable[tuple[int, str]],
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    workers: int,
    chat_limit: int | None = None,
) -> Iterator[tuple[int, str, Any]]:
    """(index, text, ids) of every (index, text), in their order and the same for any number of workers.

    chat_limit: documents are conversations of at most so many tokens, and in the place of ids is an Encoded.
    workers: processes that load the tokenizer of `folder`; 0: `tokenizer` in this one. What reading `documents`
    raises comes after the batches read before it, so workers, who are given text ahead, do not meet it sooner.
    """
    batches = _batches(iter(documents))
    encoded = (
        _in_workers(batches, folder, workers, chat_limit)
        if workers
        else ((b, _encode(tokenizer, _texts(b), chat_limit)) for b in batches)
    )
    for batch, ids in encoded:
        yield from ((index, text, found) for (index, text), found in zip(batch, ids, strict=True))


def _batches(documents: Iterator[tuple[int, str]]) -> Iterator[Documents]:
    while batch := list(islice(documents, BATCH)):
        yield batch


def _texts(batch: Documents) -> list[str]:
    return [text for _, text in batch]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str], chat_limit: int | None) -> list[Any]:
    if chat_limit is not None:
        return [encode_conversation(tokenizer, text, chat_limit) for text in texts]
    # without attention masks it takes a fifth less time
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def _in_workers(
    batches: Iterator[Documents], folder: Path, count: int, chat_limit: int | None
) -> Iterator[tuple[Documents, list[Any]]]:
    pending: deque[tuple[_Worker, Documents]] = deque()
    failure: Exception | None = None
    with ExitStack() as stack:
        turns = cycle([stack.enter_context(_worker(folder, f"{i + 1} of {count}", chat_limit)) for i in range(count)])
        while True:
            batch: Documents = []
            try:
                batch = next(batches, [])
            except Exception as error:
                failure = error
            if batch:
                worker = next(turns)
                worker.give(_texts(batch))
                pending.append((worker, batch))
            if pending and (not batch or len(pending) == AHEAD * count):
                worker, oldest = pending.popleft()
                yield oldest, worker.answer()
            if not batch and not pending:
                break
    if failure:
        raise failure


class _Failure(NamedTuple):
    """What a worker answers instead of ids: its error's text, and whether it was the user's mistake."""

    text: str
    mendable: bool


# neither torch's threads nor those of the fast tokenizers survive a fork; multiprocessing's spawn would run the user's
# script again in every worker, unless its calls are under `if __name__ == "__main__"`
WORKER = (
    "import sys; sys.path[:] = {path!r}; from megakd.data.tokenizing import work; work({pipe}, {folder!r}, {limit})"
)


@contextmanager
def _worker(folder: Path, name: str, chat_limit: int | None) -> "Iterator[_Worker]":
    ours, theirs = Pipe()
    number = theirs.fileno()
    code = WORKER.format(path=sys.path, pipe=number, folder=str(folder), limit=chat_limit)
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[number])
    except OSError as error:
        ours.close()
        raise UserError(f"data.workers: tokenizer worker {name} cannot be started: {error.strerror}") from error
    finally:
        theirs.close()  # the worker has it now; its pipe closes when it dies
    try:
        yield _Worker(name, ours, process)
    finally:
        process.kill()  # it has nothing to lose
        process.wait()
        ours.close()


class _Worker(NamedTuple):
    name: str
    pipe: Connection
    process: subprocess.Popen[bytes]

    def give(self, texts: list[str]) -> None:
        try:
            self.pipe.send(texts)
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


def work(pipe_number: int, folder: str, chat_limit: int | None) -> None:
    """The life of a worker: ids for every batch of texts, until the pipe is closed at the other end."""
    pipe = Connection(pipe_number)
    # Ctrl-C reaches the whole group, Slurm's signals all processes of a job step; the parent ends its workers
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one thread of work
    inbox: SimpleQueue[list[str]] = SimpleQueue()
    reader = Thread(target=_read, args=(pipe, inbox), daemon=True)
    reader.start()
    try:
        tokenizer = load_tokenizer(Path(folder))
        while True:
            pipe.send(_encode(tokenizer, inbox.get(), chat_limit))
    except Exception as error:
        mendable = isinstance(error, UserError)
        with suppress(OSError):
            pipe.send(_Failure(str(error) if mendable else traceback.format_exc(), mendable))
    reader.join()


def _read(pipe: Connection, inbox: "SimpleQueue[list[str]]") -> None:
    """Keep the pipe empty, so that neither side waits for the other to read; its end is the end of the process."""
    try:
        while True:
            inbox.put(pipe.recv())
    finally:
        os._exit(1)
