"""Stream documents, tokenize and pack them: RUN/data/tokens/train and RUN/data/tokens/holdout.

Documents are assigned to the hold-out by a hash of their text, so that no run ever trains on them. Killed and started
again, it goes on after the last finished shard and writes what an undisturbed pass would have written. So it does with
another number of workers: they tokenize, this process reads and packs in the order of the documents.

examples:
  megakd tokenize runs/a
  megakd tokenize runs/a data.workers=8     eight processes beside this one
"""

import argparse
import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megakd.config import DataConfig
from megakd.data.documents import held_out, iter_documents, source_files
from megakd.data.records import Sample
from megakd.data.shards import (
    MANIFEST,
    SIDECAR,
    VERSION,
    finished,
    known_manifest,
    shard_name,
    summary_of,
    write_manifest,
    write_shard,
)
from megakd.data.tokenizing import tokenized
from megakd.data.tokens import load_tokenizer, pack, tokenizer_facts
from megakd.errors import UserError
from megakd.files import read_sealed, resolve, settle
from megakd.log import Progress, say, short
from megakd.preflight import check_models, student_identity
from megakd.run import Run


@dataclass(frozen=True)
class State:
    """Where a pass stands. Counts are those of documents packed to their end (`text_hash`: sum of their sha256)."""

    document: int = 0  # the next one to read from the source
    token: int = 0  # and the first of its tokens that is not packed yet
    windows: int = 0
    documents: int = 0
    text_bytes: int = 0
    text_tokens: int = 0
    text_hash: str = "0"


def main(run: Run, args: argparse.Namespace) -> None:
    check_models(run)
    model = run.config.model
    if model.student:
        run.record("tokenize", student=student_identity(run)._asdict())
    if run.config.objective.kind != "cached" and model.student:  # the teacher reads the same text in its own way
        folder = run.student_folder
    else:
        folder = resolve(model.teacher, model.revision, weights=False)
    tokenizer = load_tokenizer(folder)
    for part, budget in (("holdout", run.config.data.holdout_tokens), ("train", run.config.data.tokens)):
        _tokenize_part(run, part, budget, tokenizer, folder)


def token_facts(data: DataConfig, part: str, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What a folder of token shards says of itself: everything its content depends on; `files` if there are any."""
    names = ("source", "subset", "split", "text_field", "sequence_length", "shard_tokens", "holdout_fraction")
    facts = {"part": part, "tokenizer": tokenizer, **{name: getattr(data, name) for name in names}}
    files = source_files(data.source)
    return {**facts, "files": files} if files else facts


def _tokenize_part(run: Run, part: str, budget: int, tokenizer: Any, tokenizer_folder: Path) -> None:
    data, folder = run.config.data, run.path("data", "tokens", part)
    facts = _same_files(folder, token_facts(data, part, tokenizer_facts(tokenizer)))
    if known_manifest(folder, facts):
        say(f"tokenize {part}: finished")
        return
    settle(folder)
    limit = -(-budget // data.sequence_length)
    per_shard = max(data.shard_tokens // data.sequence_length, 1)
    shards: list[dict[str, Any]] = []
    state = State()
    while found := finished(folder, shard_name(len(shards)), facts):
        shards.append(summary_of(shard_name(len(shards)), found))
        state = State(**found["state"])
    progress = Progress(f"tokenize {part}", budget, "tokens", done=state.windows * data.sequence_length)
    with closing(_Windows(data, part, tokenizer, tokenizer_folder, state)) as windows:
        while windows.state.windows < limit:
            samples = windows.take(min(per_shard, limit - windows.state.windows), progress)
            first = next(samples, None)
            if first is None:
                break
            name = shard_name(len(shards))
            written = write_shard(folder, name, _chain(first, samples), facts, state=lambda: asdict(windows.state))
            shards.append(summary_of(name, written))
    state = windows.state
    if not shards:
        raise UserError(
            f"data.source: {data.source} gives no {part} document (data.holdout_fraction is {data.holdout_fraction}, "
            f"{windows.read} documents were read)"
        )
    write_manifest(folder, facts, shards, complete=True, **asdict(state))
    progress.close(f"{state.documents} documents, {short(state.text_bytes)}B of text, {len(shards)} shards")
    if state.windows < limit:
        say(f"tokenize {part}: the source ended after {state.windows} of {limit} windows")
    run.record("tokenize", part=part, documents=state.documents, windows=state.windows, wanted=limit)


def _same_files(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts to go on with; UserError when shards are there of other files of this source: documents have moved.

    Shards stand as they are where one side names no files: a finished part needs its source no more.
    """
    for name, kind in (("manifest", MANIFEST), (shard_name(0), SIDECAR)):
        try:
            found = read_sealed(folder / f"{name}.json", kind, VERSION)["facts"]
        except UserError:  # missing or damaged: it is written again
            continue
        before, now = found.get("files"), facts.get("files")
        if before == now or {**found, "files": None} != {**facts, "files": None}:
            continue
        if not before or not now:
            return found
        was, has = (
            f"{files['count']} files of {files['bytes']:,} bytes ({files['digest']})" for files in (before, now)
        )
        raise UserError(
            f"{folder}: was made from {was}, data.source {facts['source']} has {has} now; restore those, or delete "
            f"{folder.parent} and run this again"
        )
    return facts


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


class _Windows:
    """The samples of one part from a State on; `state` is always what a resume after the last sample needs."""

    def __init__(self, data: DataConfig, part: str, tokenizer: Any, tokenizer_folder: Path, state: State):
        self.data, self.part, self.tokenizer, self.tokenizer_folder = data, part, tokenizer, tokenizer_folder
        self.before = self.after = self.state = state
        self.read = state.document
        self.windows = pack(self._documents(), data.sequence_length, state.token)

    def close(self) -> None:
        """End the workers; without it they would end with this process."""
        self.windows.close()

    def take(self, count: int, progress: Progress) -> Iterator[Sample]:
        for window in islice(self.windows, count):
            index = self.state.windows
            document, token = window.after
            base = self.before if document == self.before.document else self.after
            self.state = replace(base, document=document, token=token, windows=index + 1)
            progress.update(len(window.tokens) - 1)
            yield Sample(f"{index:09d}", window.tokens, window.starts)

    def _documents(self) -> Iterator[tuple[int, list[int]]]:
        """(index in the source, tokens with the end token) of this part's documents; keeps the counts around each."""
        found = tokenized(self._texts(), self.tokenizer, self.tokenizer_folder, self.data.workers)
        for index, text, ids in found:
            tokens = [*ids, self.tokenizer.eos_token_id]
            self.before = replace(self.after, document=index)
            content = text.encode()
            self.after = State(
                document=index + 1,
                documents=self.before.documents + 1,
                text_bytes=self.before.text_bytes + len(content),
                text_tokens=self.before.text_tokens + len(tokens),
                text_hash=_add_hashes(self.before.text_hash, hashlib.sha256(content).hexdigest()),
            )
            yield index, tokens

    def _texts(self) -> Iterator[tuple[int, str]]:
        """(index in the source, text) of this part's documents."""
        data, skip = self.data, self.state.document
        texts = iter_documents(data.source, data.subset, data.split, data.text_field, data.streaming, skip)
        for index, text in enumerate(texts, skip):
            self.read = index + 1
            if held_out(text, data.holdout_fraction) == (self.part == "holdout"):
                yield index, text


def _add_hashes(total: str, more: str) -> str:
    """The sum of two hex numbers modulo 2^256: a hash of a set of documents that can be resumed."""
    return f"{(int(total, 16) + int(more, 16)) % 2**256:x}"
