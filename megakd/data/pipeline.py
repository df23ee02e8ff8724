"""Sources to shards of packed tokens, resumable after every shard."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from megakd.config.data import DataConfig
from megakd.data.facts import agreed, sources_of, template_hash, token_facts
from megakd.data.mixture import Mixture, given_of
from megakd.data.records import Sample
from megakd.data.shard_writer import finished, known_manifest, shard_name, summary_of, write_manifest, write_shard
from megakd.data.tokenizers import bos_of, identify_tokenizer
from megakd.data.tokenizing import tokenizers
from megakd.data.windows import Reading, SourceWindows
from megakd.errors import UserError
from megakd.measured import record_rate
from megakd.run import Run
from megakd.system.files import settle
from megakd.system.logging import Progress, say
from megakd.system.machine import cpu_name
from megakd.system.text import short
from megakd.system.version import made_with


def tokenize_part(
    run: Run, part: str, budget: int, tokenizer: Any, tokenizer_folder: Path, commits: Sequence[str | None] = ()
) -> None:
    """Write the shards of a part, or those that are missing. commits: of each source, where it is on the hub."""
    data, folder = run.config.data, run.path("data", "tokens", part)
    texts = any(origin.format == "text" for origin in data.origins)
    bos = bos_of(tokenizer, data.bos) if texts else []  # conversations begin as the template says
    template = template_hash(tokenizer) if data.has_chats else None
    now = token_facts(data, part, identify_tokenizer(tokenizer), bos, commits, template)
    facts = agreed(folder, now)
    if known_manifest(folder, facts):
        say(f"tokenize {part}: finished")
        return
    settle(folder)
    length = data.sequence_length
    limit = -(-budget // length) * length  # whole sequences of tokens
    per_shard = max(data.shard_tokens // length, 1) * length
    shards: list[dict[str, Any]] = []
    recorded = None
    while found := finished(folder, shard_name(len(shards)), facts):
        shards.append(summary_of(shard_name(len(shards)), found))
        recorded = found["state"]
    done = sum(shard["tokens"] for shard in shards)
    progress, before, began = Progress(f"tokenize {part}", budget, "tokens", done=done), done, time.perf_counter()
    with ExitStack() as stack:
        workers = stack.enter_context(tokenizers(tokenizer, tokenizer_folder, data.workers, len(data.origins)))
        given = given_of(recorded, done, len(data.origins))
        sources = [
            stack.enter_context(closing(SourceWindows(origin, reading, workers, at.state)))
            for origin, reading, at in zip(data.origins, _readings(data, facts, tokenizer), given, strict=True)
        ]
        mixture = Mixture(sources, [origin.weight for origin in data.origins], [at.tokens for at in given], length)
        samples = _samples(mixture, progress)
        while done < limit:
            taken = _until(samples, min(per_shard, limit - done))
            first = next(taken, None)
            if first is None:
                break
            name = shard_name(len(shards))
            written = write_shard(folder, name, _chain(first, taken), facts, state=mixture.record)
            shards.append(summary_of(name, written))
            done += written["tokens"]
    state = mixture.state
    if not shards:
        _say_unused(part, data, mixture, shards)
        raise UserError(_nothing(mixture, part, data))
    if part == "holdout" and not state.documents:
        raise UserError(
            f"data.holdout_tokens: {budget:,} tokens end inside the first document of the validation set, which has "
            f"{sources[0].after.text_tokens:,}; evaluate needs a whole one; set at least as many in a new run"
        )
    shares = mixture.shares()
    write_manifest(folder, facts, shards, complete=True, **state.record(), **({"sources": shares} if shares else {}))
    what = "conversations" if all(origin.format != "text" for origin in data.origins) else "documents"
    progress.close(f"{state.documents} {what}, {short(state.text_bytes)}B of text, {len(shards)} shards")
    _say_unused(part, data, mixture, shards)
    for each in shares:
        say(
            f"tokenize {part}: {each['source']}: {each['tokens']:,} tokens, {each['share']:.2%} of {each['weight']:.2%}"
        )
    if done < limit:
        say(_ended(mixture, part, done, limit))
    seconds = time.perf_counter() - began
    record_rate(run.folder, "tokenize", cpu_name(), done - before, seconds, max(data.workers, 1), part=part)
    if data.packing == "documents" or data.has_chats:
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
        **({"bad_lines": bad} if (bad := state.bad_lines + state.refused) else {}),
        **({"shares": [each["share"] for each in shares]} if shares else {}),  # in the order of data.sources
    )


def _readings(data: DataConfig, facts: dict[str, Any], tokenizer: Any) -> Iterator[Reading]:
    """How this part is read from each source, by the facts that its shards are made with."""
    for number, (origin, own) in enumerate(zip(data.origins, sources_of(facts), strict=True)):
        yield Reading(
            facts["part"],
            f"data.sources.{number} {origin.source}" if data.sources else f"data.source {origin.source}",
            data.sequence_length,
            data.packing == "documents",
            data.has_chats,
            data.holdout_fraction,
            data.streaming,
            data.on_bad_line == "skip",
            own.get("commit", origin.revision),
            facts.get("bos", []),
            tokenizer.eos_token_id,
        )


def _samples(mixture: Mixture, progress: Progress) -> Iterator[Sample]:
    """The sequences that follow those which are packed already, numbered."""
    index = mixture.state.windows
    for window in mixture:
        progress.update(len(window.tokens) - 1)
        yield Sample(f"{index:09d}", window.tokens, window.starts, mask=window.mask)
        index += 1


def _until(samples: Iterator[Sample], tokens: int) -> Iterator[Sample]:
    """The next samples until they predict so many tokens, or there are no more."""
    while tokens > 0 and (sample := next(samples, None)) is not None:
        tokens -= len(sample.tokens) - 1
        yield sample


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


def _nothing(mixture: Mixture, part: str, data: DataConfig) -> str:
    source = mixture.sources[mixture.ended or 0]
    return (
        f"{source.reading.name} gives no {part} document (data.holdout_fraction is {data.holdout_fraction}, "
        f"{source.read} documents were read)"
    )


def _ended(mixture: Mixture, part: str, done: int, limit: int) -> str:
    """What to say where the data is less than asked for: which source ended, and what that means for the others."""
    if len(mixture.sources) == 1:
        return f"tokenize {part}: the source ended after {done:,} of {limit:,} tokens"
    assert mixture.ended is not None
    source = mixture.sources[mixture.ended]
    passes = source.source.passes if part == "train" else 1
    often = "" if passes == 1 else f", read {passes} times,"
    return (
        f"tokenize {part}: {source.reading.name}{often} ended after {mixture.tokens[mixture.ended]:,} tokens; the set "
        f"ends there, at {done:,} of {limit:,} tokens, so that the shares stay; for more, lower its weight or raise "
        "its passes"
    )


def _say_unused(part: str, data: DataConfig, mixture: Mixture, shards: Sequence[Mapping[str, Any]]) -> None:
    """How many labels count, and what of the sources was shortened or not used."""
    state = mixture.state
    if all(origin.format != "text" for origin in data.origins):
        tokens = sum(shard["tokens"] for shard in shards)
        say(f"tokenize {part}: the assistant speaks {state.text_tokens:,} of {tokens:,} tokens, the labels that count")
    reasons = (
        (state.shortened, "conversations lost their last messages: they are longer than data.sequence_length"),
        (
            state.too_long,
            "conversations are not used: they are longer than data.sequence_length before the assistant's first answer",
        ),
        (state.silent, "conversations are not used: nothing in them is spoken by the assistant"),
        (state.bad_lines, "bad lines were skipped (data.on_bad_line=skip)"),
        (state.refused, "conversations were skipped, for the chat template cannot be used (data.on_bad_line=skip)"),
    )
    for count, why in reasons:
        if count:
            say(f"tokenize {part}: {count:,} {why}")
