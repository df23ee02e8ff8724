"""A folder of logit shards from a file of a foreign format, and what goes the other way.

`foreign_rows` says what the numbers of such a file mean. One that MegaKD's own tools wrote states its facts; nothing
else needs to be said about it.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filling import Plan, check_free, fill
from foreign_rows import NONE, Names, Reading, Row, sample_of

from megakd.config.data import DataConfig, LogitsConfig
from megakd.data import codec
from megakd.data.codebook import build_book
from megakd.data.records import Sample, TeacherTargets
from megakd.data.shard_writer import write_shard
from megakd.data.shards import ShardSet, label_masked, layout_of
from megakd.data.tokenizers import bos_of, identify_tokenizer, load_tokenizer
from megakd.errors import UserError
from megakd.identity import TeacherIdentity, TokenizerIdentity
from megakd.names import expand
from megakd.system.logging import say

BOOK_POSITIONS = 4096  # as in generate-logits
PMIN, LEVELS, DTYPE = LogitsConfig().pmin, LogitsConfig().levels, LogitsConfig().dtype
SHARD_TOKENS = DataConfig().shard_tokens
LONGEST, MOST_ENTRIES = 65535, 65535  # positions of a window and entries of a row that a record can count


class Source(Protocol):
    """An open foreign file; longest: tokens of its longest window."""

    path: Path
    names: Names
    facts: dict[str, Any] | None
    count: int
    longest: int
    top_k: int

    def rows(self, first: int) -> Iterator[Row]: ...

    def sha256(self) -> str: ...


def two_ways(doc: str | None, kind: str, out: str, source: str) -> tuple[argparse.ArgumentParser, ...]:
    """A command line with the commands `to` (shards → out) and `from` (source → shards); it, and those of each."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to = commands.add_parser("to", help=f"shards → {kind}")
    to.add_argument("shards", type=expand, help="a folder of logit shards")
    to.add_argument("out", type=expand, metavar=out)
    back = commands.add_parser("from", help=f"{kind} → shards")
    back.add_argument("source", type=expand, metavar=source)
    _from_arguments(back)
    return parser, to, back


def _from_arguments(parser: argparse.ArgumentParser) -> None:
    """What must be said about a file that states no facts, and what may be said about any."""
    unknown = '(default: "unknown", which train refuses)'
    add = parser.add_argument
    add("shards", type=expand, help="the folder to make; training reads RUN/data/logits/train")
    add("--tokenizer", type=expand, metavar="FOLDER", help="whose ids these are (needed if the file states no facts)")
    add("--values", choices=("logprobs", "logits"), help="what the numbers are (needed if the file states no facts)")
    add("--teacher", metavar="ID", help=f"as RUN/student-0/compress.json names it {unknown}")
    add("--revision", help="of the teacher, from the same place (default: none)")
    add("--weights", metavar="HASH", help=f"of the teacher, from the same place {unknown}")
    add("--dtype", choices=("float32", "bfloat16"), help=f"the teacher ran in (default: {DTYPE})")
    add("--pmin", type=float, help=f"entries below count with the tail (default: {PMIN:g}, or 0 if facts are stated)")
    add("--levels", type=int, help=f"as logits.levels (default: {LEVELS}, or as the stated facts say)")
    add("--temperatures", type=float, nargs="+", metavar="T", help="of the tails that the file holds (default: 1)")
    add("--pad", type=int, metavar="ID", help="cut a run of this id at the end of windows; of the end token one stays")
    add("--split-at-end", action="store_true", help="the teacher read documents apart: one begins after each end token")
    add("--sequence-length", type=int, help="data.sequence_length of the run (default: tokens of the longest window)")
    add("--shard-tokens", type=float, help=f"of a shard (default: {SHARD_TOKENS:,}, or as the stated facts say)")
    add("--part", help="which part of the data this is (default: train, or as the stated facts say)")


def unsaid(args: argparse.Namespace) -> list[str]:
    """The options that a file without facts needs, of those that the command line lacks."""
    needed = {"--tokenizer FOLDER": args.tokenizer, "--values logprobs (or logits)": args.values}
    return [option for option, given in needed.items() if given is None]


def needs(unsaid: Sequence[str]) -> str:
    """What has to be said about a file without facts, in words."""
    also = "train also wants --teacher ID and --weights HASH, as RUN/student-0/compress.json names them"
    verb = "is" if len(unsaid) == 1 else "are"
    return f"it states no facts about its numbers, so {' and '.join(unsaid)} {verb} needed ({also})"


def convert(source: Source, args: argparse.Namespace, title: str) -> None:
    """Write a source as a folder of logit shards with a codebook from its first positions."""
    check_free(args.shards)
    first = next(source.rows(0))
    if args.split_at_end and first.starts is not None:
        raise UserError(f"--split-at-end: {source.path} says itself where documents begin ({source.names.starts})")
    facts = _facts(source, first, args) if source.facts is None else _restated(source, source.facts, args)
    masked = label_masked(facts)
    if masked != (first.label_mask is not None):
        problem = "is missing: its facts are those of conversations" if masked else "needs the facts of conversations"
        raise UserError(f"{source.path}: {source.names.label_mask} {problem}")
    _check_limits(source, facts)
    length = facts["tokens"]["sequence_length"]
    reading = Reading(
        source.path, source.names, "logprobs" if facts["tails"] else "logits", tuple(facts["temperatures"]),
        facts["pmin"] if source.facts is None else args.pmin or 0.0, facts["vocab_size"], length, facts["top_k"],
        facts["tokens"]["tokenizer"]["eos"], args.pad, args.split_at_end,
    )  # fmt: skip
    rows = list(islice(source.rows(0), -(-BOOK_POSITIONS // length)))
    samples = [sample_of(row, reading) for row in rows]
    _describe(source, reading, rows, samples)
    named = [s.targets.ids[s.targets.logprobs > -np.inf] for s in samples if s.targets is not None]
    book = build_book(np.concatenate(named), facts["vocab_size"])
    facts |= {"codec": codec.MASKED_NAME if masked else codec.NAME, "book": book.digest}
    facts["converted"] = {
        "from": source.path.name,
        "sha256": source.sha256(),
        "values": reading.values,
        "label_nll": "stored" if first.label_nll is not None else "at least that of the least entry",
        "pad": args.pad,
        "split_at_end": args.split_at_end,
    }
    plan = Plan(facts, book, source.count, max(facts["tokens"]["shard_tokens"] // length, 1), {}, {})
    fill(
        args.shards, plan, title,
        lambda first: (sample_of(row, reading) for row in source.rows(first)),
        lambda name, items: write_shard(args.shards, name, items, facts, layout_of(facts, args.shards)),
    )  # fmt: skip


def check_stated(path: Path, facts: dict[str, Any]) -> None:
    """UserError when facts that a file states lack what reading it needs."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "vocab_size": int, "top_k": int, "pmin": (int, float), "levels": int, "temperatures": list, "tails": bool,
        "teacher": dict, "tokens": dict,
    }  # fmt: skip
    kinds |= {"tokens.tokenizer": dict, "tokens.sequence_length": int, "tokens.shard_tokens": int}
    kinds |= {"tokens.tokenizer.eos": int}
    for name, kind in kinds.items():
        value: Any = facts
        for key in name.split("."):
            value = value.get(key)
        if not isinstance(value, kind):
            raise UserError(
                f"{path}: the facts it states lack {name}; take them out of the file, and say instead what --tokenizer "
                "and --values ask for"
            )


def exported(shards: ShardSet) -> dict[str, Any]:
    """The facts that a foreign file made of MegaKD's shards states; UserError for what it has no place for."""
    facts = shards.facts
    if shards.layout is None:
        raise UserError(f"{shards.folder}: holds tokens alone; name a folder that generate-logits made")
    if not facts["top_k"]:
        raise UserError(f"{shards.folder}: holds draws alone (profile {facts['profile']}), which have no place there")
    if not facts["draws"]:
        return facts
    say(f"{shards.folder}: the draws are skipped, the head and its tails stay")
    return {**facts, "profile": "topk", "draws": 0, "draw_temperature": None, "draw_seed": None}


def sorted_head(targets: TeacherTargets) -> tuple[np.ndarray, np.ndarray]:
    """ids and logprobs with the most probable first in each row, as most foreign stores have them."""
    order = np.argsort(-targets.logprobs, axis=1, kind="stable")
    return np.take_along_axis(targets.ids, order, 1), np.take_along_axis(targets.logprobs, order, 1)


def _facts(source: Source, first: Row, args: argparse.Namespace) -> dict[str, Any]:
    """The facts of a file that states none, from what the command line says."""
    if missing := unsaid(args):
        raise UserError(f"{source.path}: {needs(missing)}")
    temperatures, tails = args.temperatures or [1.0], args.values == "logprobs"
    if first.log_tails is not None and not tails:
        raise UserError(f"--values logits: {source.path} has {source.names.log_tails}, which go with log-probabilities")
    columns = 1 if first.log_tails is None else first.log_tails.shape[1]
    if columns != len(temperatures):
        raise UserError(f"{source.path}: has tails at {columns} temperatures, --temperatures names {temperatures}")
    reader = load_tokenizer(args.tokenizer)
    tokenizer, bos = identify_tokenizer(reader), bos_of(reader)
    tokens = {
        "part": args.part or "train", "tokenizer": tokenizer.record(), "source": source.path.name,
        "subset": None, "split": None, "text_field": None, "sequence_length": args.sequence_length or source.longest,
        "shard_tokens": int(args.shard_tokens or SHARD_TOKENS), "holdout_fraction": None,
        "packing": "packed", "bos": bos if first.tokens[: len(bos)].tolist() == bos else [],
    }  # fmt: skip
    teacher = TeacherIdentity(args.teacher or "unknown", args.revision, args.weights or "unknown")
    if "unknown" in (teacher.id, teacher.weights):
        say(f"{source.path}: the teacher is unknown, so train will refuse these shards; see --teacher and --weights")
    return {
        "tokens": tokens,
        "teacher": teacher.record(),
        "vocab_size": tokenizer.vocab_size,
        "codec": codec.NAME,
        "book": None,
        "profile": "topk",
        "top_k": source.top_k,
        "pmin": PMIN if args.pmin is None else args.pmin,
        "levels": args.levels or LEVELS,
        "draws": 0,
        "draw_temperature": None,
        "draw_seed": None,
        "temperatures": temperatures,
        "tails": tails,
        "dtype": args.dtype or DTYPE,
    }


def _restated(source: Source, facts: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The facts that a file states; the command line may correct the teacher, the part, the rounding and the shards."""
    check_stated(source.path, facts)
    for option in ("values", "temperatures", "sequence_length", "dtype"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')}: {source.path} states it among its facts; leave it out")
    tokens, teacher = dict(facts["tokens"]), dict(facts["teacher"])
    if args.tokenizer is not None:
        made = TokenizerIdentity.of(tokens["tokenizer"])
        if different := made.difference(identify_tokenizer(load_tokenizer(args.tokenizer))):
            raise UserError(f"--tokenizer {args.tokenizer}: is another than {source.path} was made with: {different}")
    tokens["part"] = args.part or tokens.get("part")
    tokens["shard_tokens"] = int(args.shard_tokens or tokens["shard_tokens"])
    given = {"id": args.teacher, "revision": args.revision, "weights": args.weights}
    teacher |= {key: value for key, value in given.items() if value is not None}
    pmin = max(facts["pmin"], args.pmin or 0.0)
    levels = args.levels or facts["levels"]
    return {**facts, "tokens": tokens, "teacher": teacher, "pmin": pmin, "levels": levels}


def _check_limits(source: Source, facts: dict[str, Any]) -> None:
    """UserError for facts that no folder of shards can have."""
    length, top_k, vocab_size = facts["tokens"]["sequence_length"], facts["top_k"], facts["vocab_size"]
    temperatures: list[Any] = facts["temperatures"]
    if not all(isinstance(t, int | float) and t > 0 for t in temperatures) or temperatures[:1] != [1.0]:
        raise UserError(f"{source.path}: temperatures {temperatures}: expected positive numbers, the first one 1")
    if len(set(temperatures)) < len(temperatures):
        raise UserError(f"{source.path}: temperatures {temperatures}: one twice")
    if not 0 <= facts["pmin"] < 1:
        raise UserError(f"{source.path}: pmin {facts['pmin']:g} must be at least 0 and less than 1")
    if not 2 <= facts["levels"] <= 255:
        raise UserError(f"{source.path}: levels {facts['levels']} must be from 2 to 255")
    if facts["tokens"]["shard_tokens"] < 1:
        raise UserError(f"{source.path}: shards of {facts['tokens']['shard_tokens']} tokens hold nothing")
    if not 1 <= length <= LONGEST:
        raise UserError(f"{source.path}: a sequence length of {length} must be from 1 to {LONGEST}")
    if source.longest > length + 1:
        raise UserError(f"{source.path}: windows of {source.longest} tokens do not fit a sequence length of {length}")
    if not 1 <= top_k <= min(MOST_ENTRIES, vocab_size):
        raise UserError(f"{source.path}: {top_k} entries per row, the vocabulary of the tokenizer has {vocab_size} ids")


def _describe(source: Source, reading: Reading, rows: list[Row], samples: list[Sample]) -> None:
    """Say what was found in the first windows, and what looks as if it was meant otherwise."""
    positions = sum(len(s.tokens) - 1 if s.mask is None else int(s.mask.sum()) for s in samples)
    given = [row.values[: len(sample.tokens) - 1] for row, sample in zip(rows, samples, strict=True)]
    entries = sum(int((values > NONE).sum()) for values in given)
    kept = sum(int((s.targets.logprobs > -np.inf).sum()) for s in samples if s.targets)
    read, following = (sum(_among(sample, shift) for sample in samples) / positions for shift in (0, 1))
    say(
        f"{source.path}: {source.count} windows; in the first {len(rows)} of them {entries / positions:.1f} entries "
        f"per position, the next token among them at {following:.0%}, the token just read at {read:.0%}"
    )
    if kept < entries:
        say(f"{1 - kept / entries:.1%} of the entries are below {reading.pmin:g} and skipped; --pmin 0 keeps them")
    if read > max(following, 0.5):
        say("the entries name the token just read more often than the next one: are the rows shifted by one?")
    if reading.values == "logprobs" and source.facts is None and source.top_k < reading.vocab_size:
        sums = np.concatenate([np.exp(values.astype(np.float64)).sum(1) for values in given])
        if np.abs(sums - 1).max() < 0.002:
            say(f"every row of {reading.names.values} sums to 1; normalised over its entries? then --values logits")
        else:
            say(f"the entries hold {sums.mean():.1%} of the mass")


def _among(sample: Sample, shift: int) -> int:
    """At how many positions the token `shift` places on is among the entries."""
    targets, positions = sample.targets, len(sample.tokens) - 1
    assert targets is not None
    named = targets.ids == sample.tokens[shift : shift + positions, None]
    return int((named & (targets.logprobs > -np.inf)).any(1).sum())
