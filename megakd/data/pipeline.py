"""Documents to shards of packed tokens, resumable after every shard."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megakd.config.data import DataConfig
from megakd.data.conversations import Columns, Origin, iter_conversations
from megakd.data.documents import SUFFIXES, find_files, held_out, hub_commit, iter_documents, source_files
from megakd.data.packing import pack, pack_whole
from megakd.data.records import Sample
from megakd.data.shard_writer import finished, known_manifest, shard_name, summary_of, write_manifest, write_shard
from megakd.data.shards import MANIFEST, SIDECAR, VERSIONS
from megakd.data.templates import Encoded, template_of
from megakd.data.tokenizers import bos_of, identify_tokenizer
from megakd.data.tokenizing import tokenized
from megakd.errors import UserError
from megakd.identity import TokenizerIdentity
from megakd.measured import record_rate
from megakd.run import Run
from megakd.system.files import read_sealed, settle
from megakd.system.logging import Progress, say
from megakd.system.machine import cpu_name
from megakd.system.text import short
from megakd.system.version import made_with


@dataclass(frozen=True)
class State:
    """Where a pass stands. Counts are those of documents packed to their end (`text_hash`: sum of their sha256).

    Of conversations: text_bytes and text_tokens are those that the assistant speaks. shortened: their last messages did
    not fit. too_long, silent: are not used, for their first answer does not fit, or there is none.
    """

    document: int = 0  # the next one to read from the source
    token: int = 0  # and the first of its tokens that is not packed yet
    windows: int = 0
    documents: int = 0
    text_bytes: int = 0
    text_tokens: int = 0
    text_hash: str = "0"
    shortened: int = 0
    too_long: int = 0
    silent: int = 0

    def record(self) -> dict[str, Any]:
        """As sidecars and manifests state it; what is counted of conversations only where there is any."""
        found = asdict(self)
        return {key: value for key, value in found.items() if value or key not in ("shortened", "too_long", "silent")}


def token_facts(
    data: DataConfig, part: str, tokenizer: TokenizerIdentity, bos: list[int], commit: str | None = None
) -> dict[str, Any]:
    """What a folder of token shards says of itself: everything its content depends on; `files` if there are any.

    bos: the ids that documents begin with. commit: of a source on the hub.
    """
    names = ("source", "subset", "split", "text_field", "sequence_length", "packing", "shard_tokens")
    names += ("holdout_fraction",)
    if data.format != "text":
        names = tuple(name for name in names if name != "text_field")
        names += ("format", *(f"{column}_field" for column in data.format.split("_")), "tools_field")
    facts = {"part": part, "tokenizer": tokenizer.record(), "bos": bos, **{name: getattr(data, name) for name in names}}
    files = source_files(data.source)
    return {**facts, **({"files": files} if files else {}), **({"commit": commit} if commit else {})}


def recorded_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of the shards that are in a folder; None when there are none that can be read."""
    for name, kind in (("manifest", MANIFEST), (shard_name(0), SIDECAR)):
        with suppress(UserError):  # missing or damaged: it is written again
            return read_sealed(folder / f"{name}.json", kind, *VERSIONS)["facts"]
    return None


def source_commit(run: Run) -> str | None:
    """The commit of the hub at which text is read: that of existing shards, else the one of now; None for files.

    Says which files or which commit it is.
    """
    data = run.config.data
    try:
        found = find_files(data.source)
    except UserError:  # a finished part needs its source no more; one that is not says what is missing
        return None
    if found.taken:
        say(f"data.source {data.source}: {found.counts(SUFFIXES)}{found.passed_over()}")
    if found.taken or data.source == "python-docs":
        return None
    recorded = [recorded_facts(run.path("data", "tokens", part)) or {} for part in ("holdout", "train")]
    known = [facts["commit"] for facts in recorded if "commit" in facts and facts["source"] == data.source]
    commit = known[0] if known else hub_commit(data.source, data.revision)
    at = f"read at commit {commit}" if commit else "its commit is unknown, for the hub cannot be asked"
    say(f"data.source {data.source}: {at}")
    return commit


def _agreed(folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The facts to go on with in a folder that may hold shards.

    UserError when they are of other files of this source: documents have moved. They stand as they are where one side
    names no files or commit: a finished part needs its source no more. Those without `bos` were made before there was
    that fact, and have none; those without `packing` are packed. Shards that differ otherwise are made again.
    """
    before = recorded_facts(folder)
    if before is None:
        return now
    older = {"packing": "packed", **before}
    names = {name for name in older.keys() | now.keys() if older.get(name) != now.get(name)}
    if names - {"files", "commit"} == {"bos"} and "bos" not in before:
        if now["bos"]:
            say(
                f"{folder}: documents there begin without a BOS token, as it was made before data.bos; a new run has it"
            )
        names -= {"bos"}
    if names - {"files", "commit"}:
        say(f"{folder}: shards there differ in {', '.join(sorted(names))} and are made again")
        return now
    was, has = before.get("files"), now.get("files")
    if was == has or not was or not has:
        return before
    was, has = (f"{files['count']} files of {files['bytes']:,} bytes ({files['digest']})" for files in (was, has))
    raise UserError(
        f"{folder}: was made from {was}, data.source {now['source']} has {has} now; restore those, or delete "
        f"{folder.parent} and run this again"
    )


def tokenize_part(
    run: Run, part: str, budget: int, tokenizer: Any, tokenizer_folder: Path, commit: str | None = None
) -> None:
    data, folder = run.config.data, run.path("data", "tokens", part)
    bos, template = bos_of(tokenizer, data.bos), {}
    if data.format != "text":  # it begins conversations as its template says
        bos, template = [], {"template": hashlib.sha256(template_of(tokenizer).encode()).hexdigest()[:16]}
    now = {**token_facts(data, part, identify_tokenizer(tokenizer), bos, commit), **template}
    facts = _agreed(folder, now)
    if known_manifest(folder, facts):
        say(f"tokenize {part}: finished")
        return
    settle(folder)
    length = data.sequence_length
    limit = -(-budget // length) * length  # whole windows of tokens
    per_shard = max(data.shard_tokens // length, 1) * length
    shards: list[dict[str, Any]] = []
    state = State()
    while found := finished(folder, shard_name(len(shards)), facts):
        shards.append(summary_of(shard_name(len(shards)), found))
        state = State(**found["state"])
    done = sum(shard["tokens"] for shard in shards)
    progress, before, began = Progress(f"tokenize {part}", budget, "tokens", done=done), done, time.perf_counter()
    with closing(_Windows(data, facts, tokenizer, tokenizer_folder, state)) as windows:
        while done < limit:
            samples = windows.take(min(per_shard, limit - done), progress)
            first = next(samples, None)
            if first is None:
                break
            name = shard_name(len(shards))
            written = write_shard(folder, name, _chain(first, samples), facts, state=lambda: windows.state.record())
            shards.append(summary_of(name, written))
            done += written["tokens"]
    state = windows.state
    if not shards:
        if data.format != "text":
            _say_conversations(part, windows.after, shards)
        raise UserError(
            f"data.source: {data.source} gives no {part} document (data.holdout_fraction is {data.holdout_fraction}, "
            f"{windows.read} documents were read)"
        )
    if part == "holdout" and not state.documents:
        raise UserError(
            f"data.holdout_tokens: {budget:,} tokens end inside the first document of the validation set, which has "
            f"{windows.after.text_tokens:,}; evaluate needs a whole one; set at least as many in a new run"
        )
    write_manifest(folder, facts, shards, complete=True, **state.record())
    what = "documents" if data.format == "text" else "conversations"
    progress.close(f"{state.documents} {what}, {short(state.text_bytes)}B of text, {len(shards)} shards")
    if data.format != "text":
        _say_conversations(part, state, shards)
    if done < limit:
        say(f"tokenize {part}: the source ended after {done:,} of {limit:,} tokens")
    seconds = time.perf_counter() - began
    record_rate(run.folder, "tokenize", cpu_name(), done - before, seconds, max(data.workers, 1), part=part)
    if data.packing == "documents" or data.format != "text":
        of = "of one document each" if data.packing == "documents" else "of whole conversations"
        mean = done / state.windows
        say(f"tokenize {part}: {state.windows:,} sequences {of}, of {mean:,.0f} tokens on average")
    run.record(
        "tokenize",
        part=part,
        documents=state.documents,
        windows=state.windows,
        tokens=done,
        wanted=limit,
        megakd=made_with(),
    )


def _say_conversations(part: str, state: State, shards: Sequence[Mapping[str, Any]]) -> None:
    """How many labels count, and which conversations were shortened or not used."""
    tokens = sum(shard["tokens"] for shard in shards)
    say(f"tokenize {part}: the assistant speaks {state.text_tokens:,} of {tokens:,} tokens, the labels that count")
    reasons = (
        (state.shortened, "lost their last messages: they are longer than data.sequence_length"),
        (state.too_long, "are not used: they are longer than data.sequence_length before the assistant's first answer"),
        (state.silent, "are not used: nothing in them is spoken by the assistant"),
    )
    for count, why in reasons:
        if count:
            say(f"tokenize {part}: {count:,} conversations {why}")


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


class _Windows:
    """The samples of one part from a State on; `state` is always what a resume after the last sample needs."""

    def __init__(self, data: DataConfig, facts: dict[str, Any], tokenizer: Any, tokenizer_folder: Path, state: State):
        self.data, self.facts, self.tokenizer, self.tokenizer_folder = data, facts, tokenizer, tokenizer_folder
        self.begin = self.before = self.after = self.state = state
        self.read = state.document
        apart = data.packing == "documents"
        if data.format == "text":
            self.windows = pack(self._documents(), data.sequence_length, state.token, apart)
        else:
            self.windows = pack_whole(self._conversations(), data.sequence_length, apart)

    def close(self) -> None:
        """End the workers; without it they would end with this process."""
        self.windows.close()

    def take(self, tokens: int, progress: Progress) -> Iterator[Sample]:
        """The next samples until they predict so many tokens, or the source ends."""
        while tokens > 0 and (window := next(self.windows, None)) is not None:
            tokens -= len(window.tokens) - 1
            index = self.state.windows
            document, token = window.after
            base = self.before if document == self.before.document else self.after
            self.state = replace(base, document=document, token=token, windows=index + 1)
            progress.update(len(window.tokens) - 1)
            yield Sample(f"{index:09d}", window.tokens, window.starts, mask=window.mask)

    def _documents(self) -> Iterator[tuple[int, list[int]]]:
        """(index in the source, tokens with BOS and end) of this part's documents; keeps the counts around each."""
        bos, end = self.facts.get("bos", []), self.tokenizer.eos_token_id
        for index, text, ids in tokenized(self._texts(), self.tokenizer, self.tokenizer_folder, self.data.workers):
            tokens = [*bos, *ids, end]
            self.before = replace(self.after, document=index)
            content = text.encode()
            self.after = State(
                document=index + 1,
                documents=self.before.documents + 1,
                text_bytes=self.before.text_bytes + len(content),
                text_tokens=self.before.text_tokens
                + len(ids)
                + 1,  # no BOS: it stands for no bytes, and is not predicted
                text_hash=_add_hashes(self.before.text_hash, hashlib.sha256(content).hexdigest()),
            )
            yield index, tokens

    def _conversations(self) -> Iterator[tuple[int, list[int], list[bool]]]:
        """(index in the source, tokens, spoken) of this part's conversations; no tokens for one that is not used."""
        limit = self.data.sequence_length + 1
        texts = tokenized(self._texts(), self.tokenizer, self.tokenizer_folder, self.data.workers, limit)
        for index, text, found in texts:
            self.before = replace(self.after, document=index)
            self.after = _counted(self.before, text, found)
            yield index, found.ids, found.spoken

    def _texts(self) -> Iterator[tuple[int, str]]:
        """(index in the source, text) of this part's documents from `begin` on, when those before it are the same."""
        data, begin = self.data, self.begin
        if begin.document:
            say(f"tokenize {self.facts['part']}: reads {begin.document:,} documents again, which are packed already")
        packed = "0"
        texts = _source_texts(data, self.facts.get("commit", data.revision))
        index = -1
        for index, text in enumerate(texts):
            mine = held_out(text, data.holdout_fraction) == (self.facts["part"] == "holdout")
            if index < begin.document:
                packed = _add_hashes(packed, hashlib.sha256(text.encode()).hexdigest()) if mine else packed
                continue
            if index == begin.document:
                self._check_packed(packed)
            self.read = index + 1
            if mine:
                yield index, text
        if index < begin.document:
            self._check_packed(packed if index + 1 == begin.document else "")

    def _check_packed(self, text_hash: str) -> None:
        """UserError when the documents before `begin` are not those that the finished shards hold."""
        if text_hash != self.begin.text_hash:
            raise UserError(
                f"data.source: {self.data.source} has changed: its first {self.begin.document:,} documents are not "
                "those that the finished shards hold; restore it, or delete RUN/data/tokens and run this again"
            )


def _source_texts(data: DataConfig, revision: str | None) -> Iterator[str]:
    """The documents of the source, or its conversations."""
    if data.format == "text":
        return iter_documents(data.source, data.subset, data.split, data.text_field, data.streaming, revision=revision)
    columns = Columns(data.format, data.messages_field, data.prompt_field, data.completion_field, data.tools_field)
    return iter_conversations(Origin(data.source, data.subset, data.split, data.streaming, revision), columns)


def _counted(state: State, text: str, found: Encoded) -> State:
    """The state after one more conversation."""
    return replace(
        state,
        document=state.document + 1,
        documents=state.documents + bool(found.ids),
        text_bytes=state.text_bytes + found.text_bytes,
        text_tokens=state.text_tokens + sum(found.spoken[1:]),
        text_hash=_add_hashes(state.text_hash, hashlib.sha256(text.encode()).hexdigest()),
        shortened=state.shortened + (found.shortened and bool(found.ids)),
        too_long=state.too_long + (not found.ids and not found.silent),
        silent=state.silent + found.silent,
    )


def _add_hashes(total: str, more: str) -> str:
    """The sum of two hex numbers modulo 2^256: a hash of a set of documents that can be resumed."""
    return f"{(int(total, 16) + int(more, 16)) % 2**256:x}"
