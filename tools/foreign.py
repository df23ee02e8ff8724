"""Samples from arrays of foreign formats: what their numbers mean, every check of them, and the folder they become.

A foreign file holds windows of tokens and, for each position t, K ids with numbers about the token after token t:
  logprobs   log p over the whole vocabulary; what is outside the K has mass 1 - sum p, so there is a tail at T = 1
  logits     raw, without their normaliser: nothing is known of the tail, rows are normalised over the K
A row for the last token of a window is left out: what comes after it is not in the window. An entry of -inf, or below
NONE, is none. A file that MegaKD's own tools wrote states its facts; nothing else needs to be said about it.
"""

import argparse
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from filling import Plan, check_free, fill

from megakd.config import DataConfig, LogitsConfig
from megakd.data import codec
from megakd.data.book import build_book
from megakd.data.records import Sample, TeacherTargets
from megakd.data.shards import ShardSet, layout_of, write_shard
from megakd.data.tokens import load_tokenizer, tokenizer_facts
from megakd.errors import UserError
from megakd.log import say

BOOK_POSITIONS = 4096  # as in generate-logits
PMIN, LEVELS, DTYPE = LogitsConfig().pmin, LogitsConfig().levels, LogitsConfig().dtype
SHARD_TOKENS = DataConfig().shard_tokens
NONE = -9999.0  # what masks write for -inf: -1e4, -65504, -1e9, …
# Half precision moves a log-probability by 2^-11 of its size: a row of the flattest teacher sums to 1 within 0.004.
SUM_TOLERANCE = 0.02
LONGEST, MOST_ENTRIES = 65535, 65535  # positions of a window and entries of a row that a record can count


class Names(NamedTuple):
    """What a format calls its parts, for messages."""

    tokens: str
    ids: str
    values: str
    starts: str
    log_tails: str
    label_nll: str


class Row(NamedTuple):
    """Window `number` of a file: tokens [L]; ids, values [P, K], log_tails [P, M], label_nll [P] with P = L or L - 1.

    starts, log_tails, label_nll: None where the file has none.
    """

    number: int
    tokens: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    starts: np.ndarray | None
    log_tails: np.ndarray | None
    label_nll: np.ndarray | None


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


class Reading(NamedTuple):
    """What the numbers of a file mean and which of them are kept; positions, top_k: at most, in a window and a row."""

    path: Path
    names: Names
    values: str
    temperatures: tuple[float, ...]
    pmin: float
    vocab_size: int
    positions: int
    top_k: int
    end: int
    pad: int | None
    split_at_end: bool


def from_arguments(parser: argparse.ArgumentParser) -> None:
    """What must be said about a file that states no facts, and what may be said about any."""
    unknown = '(default: "unknown", which train refuses)'
    add = parser.add_argument
    add("shards", type=Path, help="the folder to make; training reads RUN/data/logits/train")
    add("--tokenizer", type=Path, metavar="FOLDER", help="whose ids these are (needed if the file states no facts)")
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


def convert(source: Source, args: argparse.Namespace, title: str) -> None:
    """Write a source as a folder of logit shards with a book from its first positions."""
    check_free(args.shards)
    first = next(source.rows(0))
    if args.split_at_end and first.starts is not None:
        raise UserError(f"--split-at-end: {source.path} says itself where documents begin ({source.names.starts})")
    facts = _facts(source, first, args) if source.facts is None else _restated(source, source.facts, args)
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
    facts |= {"codec": codec.NAME, "book": book.digest}
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


def sample_of(row: Row, reading: Reading) -> Sample:
    """A window with its targets; UserError naming file, part, sample, position and entry at the first fault."""
    tokens = _tokens(row, reading)
    starts = _starts(row, tokens, reading)
    ids, values = _entries(row, len(tokens) - 1, reading)
    if reading.values == "logits":
        logprobs = values - _log_sum(values)[:, None]
        log_tails = np.full((len(values), len(reading.temperatures)), -np.inf)
    else:
        logprobs, log_tails = values, _tails(row, values, reading)
    nll = _label_nll(row, tokens, starts, ids, logprobs, reading)
    logprobs, log_tails = _drop_below(reading.pmin, logprobs, log_tails, reading)
    best = np.take_along_axis(ids, logprobs.argmax(1)[:, None], 1)
    ids = np.where(logprobs > -np.inf, ids, best)
    none = np.zeros((len(ids), 0))
    targets = TeacherTargets(
        _wide(ids, reading.top_k, best).astype(np.int32),
        _wide(logprobs, reading.top_k, -np.inf).astype(np.float32),
        log_tails.astype(np.float32),
        none.astype(np.int32), none.astype(np.float32), np.zeros(len(ids), np.float32), nll.astype(np.float32),
    )  # fmt: skip
    return Sample(f"{row.number:09d}", tokens, starts, targets)


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
    """The facts that a foreign file made of these shards states; UserError when it has no place for what they hold."""
    facts = shards.facts
    if shards.layout is None:
        raise UserError(f"{shards.folder}: holds tokens alone; name a folder that generate-logits made")
    if not facts["top_k"]:
        raise UserError(f"{shards.folder}: holds draws alone (profile {facts['profile']}), which have no place there")
    if not facts["draws"]:
        return facts
    say(f"{shards.folder}: the draws are left out, the head and its tails stay")
    return {**facts, "profile": "topk", "draws": 0, "draw_temperature": None, "draw_seed": None}


def sorted_head(targets: TeacherTargets) -> tuple[np.ndarray, np.ndarray]:
    """ids and logprobs with the most probable first in each row, as most foreign stores have them."""
    order = np.argsort(-targets.logprobs, axis=1, kind="stable")
    return np.take_along_axis(targets.ids, order, 1), np.take_along_axis(targets.logprobs, order, 1)


def _facts(source: Source, first: Row, args: argparse.Namespace) -> dict[str, Any]:
    """The facts of a file that states none, from what the command line says."""
    if args.tokenizer is None or args.values is None:
        missing = "--tokenizer FOLDER" if args.tokenizer is None else "--values logprobs (or logits)"
        raise UserError(f"{source.path}: states no facts about its numbers, so {missing} is needed")
    temperatures, tails = args.temperatures or [1.0], args.values == "logprobs"
    if first.log_tails is not None and not tails:
        raise UserError(f"--values logits: {source.path} has {source.names.log_tails}, which go with log-probabilities")
    columns = 1 if first.log_tails is None else first.log_tails.shape[1]
    if columns != len(temperatures):
        raise UserError(f"{source.path}: has tails at {columns} temperatures, --temperatures names {temperatures}")
    tokenizer = tokenizer_facts(load_tokenizer(args.tokenizer))
    tokens = {
        "part": args.part or "train", "tokenizer": tokenizer, "source": source.path.name, "subset": None, "split": None,
        "text_field": None, "sequence_length": args.sequence_length or source.longest,
        "shard_tokens": int(args.shard_tokens or SHARD_TOKENS), "holdout_fraction": None,
    }  # fmt: skip
    teacher = {"id": args.teacher or "unknown", "revision": args.revision, "weights": args.weights or "unknown"}
    if "unknown" in teacher.values():
        say(f"{source.path}: the teacher is unknown, so train will refuse these shards; see --teacher and --weights")
    return {
        "tokens": tokens,
        "teacher": teacher,
        "vocab_size": tokenizer["vocab_size"],
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
    if args.tokenizer is not None and tokenizer_facts(load_tokenizer(args.tokenizer)) != tokens["tokenizer"]:
        raise UserError(f"--tokenizer {args.tokenizer}: is another than {source.path} was made with")
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
        raise UserError(f"{source.path}: {top_k} entries a row, the vocabulary of the tokenizer has {vocab_size} ids")


def _tokens(row: Row, reading: Reading) -> np.ndarray:
    tokens, name = row.tokens, reading.names.tokens
    if reading.pad is not None:
        used = int((tokens != reading.pad).nonzero()[0].max(initial=-1)) + 1
        tokens = tokens[: used + (reading.pad == reading.end)]  # the last document's own end stays
    if len(tokens) < 2:
        _refuse(reading, row, name, f"{len(tokens)} tokens, a window needs 2")
    if len(tokens) > reading.positions + 1:
        _refuse(reading, row, name, f"{len(tokens)} tokens do not fit a sequence length of {reading.positions}")
    beyond = (tokens < 0) | (tokens >= reading.vocab_size)
    if beyond.any():
        problem = f"id {tokens[beyond][0]} is beyond the vocabulary of {reading.vocab_size}"
        _refuse(reading, row, name, problem + (" (is it padding? see --pad)" if beyond[-1] else ""), beyond)
    return tokens.astype(np.int32)


def _starts(row: Row, tokens: np.ndarray, reading: Reading) -> np.ndarray:
    if row.starts is None:
        ends = (tokens[:-1] == reading.end).nonzero()[0] if reading.split_at_end else []
        return np.array([0, *(end + 1 for end in ends)], np.int32)
    starts = row.starts
    if not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(tokens):
        _refuse(reading, row, reading.names.starts, f"not 0 and then ascending offsets below {len(tokens)}")
    return starts.astype(np.int32)


def _entries(row: Row, positions: int, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 and values float64 [positions, K], checked: what is not -inf is a number of a distinct real id."""
    names = reading.names
    if len(row.ids) not in (len(row.tokens), len(row.tokens) - 1):
        _refuse(reading, row, names.ids, f"{len(row.ids)} rows beside {len(row.tokens)} tokens, expected as many")
    if row.ids.shape[1] > reading.top_k:
        _refuse(reading, row, names.ids, f"a row of {row.ids.shape[1]} entries where {reading.top_k} are the most")
    ids, values = row.ids[:positions].astype(np.int64), row.values[:positions].astype(np.float64)
    _check_numbers(reading, row, names.values, values)
    there = values > NONE
    values = np.where(there, values, -np.inf)
    if not there.any(1).all():
        _refuse(reading, row, names.values, "a row without an entry", ~there.any(1))
    beyond = there & ((ids < 0) | (ids >= reading.vocab_size))
    if beyond.any():
        problem = f"id {ids[beyond][0]} is beyond the vocabulary of {reading.vocab_size}"
        _refuse(reading, row, names.ids, problem, beyond)
    ordered = np.where(there, ids, -1 - np.arange(ids.shape[1]))
    ordered.sort(axis=1)
    again = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if again.any():
        _refuse(reading, row, names.ids, "an id twice in one row", again)
    return ids, values


def _tails(row: Row, logprobs: np.ndarray, reading: Reading) -> np.ndarray:
    """log of the sum of p^(1/T) outside the entries, [P, M]: the file's own, or at T = 1 what is missing to 1."""
    names = reading.names
    if (logprobs > 0.01).any():
        problem = f"{logprobs.max():.4g} is no log-probability; are these raw logits? then say --values logits"
        _refuse(reading, row, names.values, problem, logprobs > 0.01)
    head = np.exp(logprobs).sum(1)
    if row.log_tails is None:
        if (head > 1 + SUM_TOLERANCE).any():
            problem = f"probabilities that sum to {head.max():.4g}; are these raw logits? then say --values logits"
            _refuse(reading, row, names.values, problem, head > 1 + SUM_TOLERANCE)
        if len(reading.temperatures) > 1:
            _refuse(reading, row, names.log_tails, f"missing; the facts name tails at T = {reading.temperatures}")
        with np.errstate(divide="ignore"):
            return np.log(np.maximum(1 - head, 0))[:, None]
    log_tails = row.log_tails[: len(logprobs)].astype(np.float64)
    if log_tails.shape != (len(logprobs), len(reading.temperatures)):
        expected = f"{len(logprobs)} rows of {len(reading.temperatures)}"
        _refuse(reading, row, names.log_tails, f"shape {row.log_tails.shape}, expected at least {expected}")
    _check_numbers(reading, row, names.log_tails, log_tails)
    total = head + np.exp(log_tails[:, 0])
    off = np.abs(total - 1) > SUM_TOLERANCE
    if off.any():
        problem = f"with the entries' probabilities it sums to {total[off][0]:.4g}, not 1"
        _refuse(reading, row, names.log_tails, problem, off)
    return log_tails


def _label_nll(
    row: Row, tokens: np.ndarray, starts: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, reading: Reading
) -> np.ndarray:
    """The file's own; else from the entries, where a label among none of them is as improbable as the least."""
    positions = len(tokens) - 1
    if row.label_nll is not None:
        nll = row.label_nll[:positions].astype(np.float64)
        if len(nll) < positions:
            _refuse(reading, row, reading.names.label_nll, f"{len(nll)} numbers, expected at least {positions}")
        wrong = ~(np.isfinite(nll) & (nll > -0.01))
        if wrong.any():
            _refuse(reading, row, reading.names.label_nll, f"{nll[wrong][0]} is no negative log-probability", wrong)
        return np.maximum(nll, 0)
    label = (ids == tokens[1:, None]) & (logprobs > -np.inf)
    own = np.where(label, logprobs, -np.inf).max(1)
    least = np.where(logprobs > -np.inf, logprobs, 0.0).min(1)
    nll = np.maximum(np.where(label.any(1), -own, -least), 0)
    nll[starts[1:] - 1] = 0  # no label there
    return nll


def _drop_below(
    pmin: float, logprobs: np.ndarray, log_tails: np.ndarray, reading: Reading
) -> tuple[np.ndarray, np.ndarray]:
    """Entries below pmin, but for the best of a row, become -inf; a tail that is known takes them in."""
    dropped = (logprobs < (math.log(pmin) if pmin else -np.inf)) & (logprobs > -np.inf)
    dropped[np.arange(len(logprobs)), logprobs.argmax(1)] = False
    if not dropped.any():
        return logprobs, log_tails
    if reading.values == "logprobs":
        taken = [_log_sum(np.where(dropped, logprobs / t, -np.inf)) for t in reading.temperatures]
        log_tails = np.logaddexp(log_tails, np.stack(taken, 1))
    return np.where(dropped, -np.inf, logprobs), log_tails


def _log_sum(values: np.ndarray) -> np.ndarray:
    """logsumexp of each row; -inf for a row of -inf."""
    most = values.max(1)
    with np.errstate(divide="ignore"):
        return np.where(np.isfinite(most), most, 0) + np.log(
            np.exp(values - np.where(np.isfinite(most), most, 0)[:, None]).sum(1)
        )


def _wide(values: np.ndarray, width: int, filler: Any) -> np.ndarray:
    """The rows filled up to `width` entries."""
    out = np.empty((len(values), width), values.dtype)
    out[:] = filler
    out[:, : values.shape[1]] = values
    return out


def _check_numbers(reading: Reading, row: Row, name: str, values: np.ndarray) -> None:
    wrong = np.isnan(values) | (values == np.inf)
    if wrong.any():
        _refuse(reading, row, name, f"{values[wrong][0]} is no number", wrong)


def _refuse(reading: Reading, row: Row, name: str, problem: str, where: Any = None) -> NoReturn:
    """where: a mask over (positions, entries), or positions; its first place is named."""
    place = [] if where is None else np.argwhere(where)[0].tolist()
    words = [f"sample {row.number}", *(f"{kind} {at}" for kind, at in zip(("position", "entry"), place, strict=False))]
    raise UserError(f"{reading.path}: {name}, {', '.join(words)}: {problem}")


def _describe(source: Source, reading: Reading, rows: list[Row], samples: list[Sample]) -> None:
    """Say what was found in the first windows, and what looks as if it was meant otherwise."""
    positions = sum(len(sample.tokens) - 1 for sample in samples)
    given = [row.values[: len(sample.tokens) - 1] for row, sample in zip(rows, samples, strict=True)]
    entries = sum(int((values > NONE).sum()) for values in given)
    kept = sum(int((s.targets.logprobs > -np.inf).sum()) for s in samples if s.targets)
    read, following = (sum(_among(sample, shift) for sample in samples) / positions for shift in (0, 1))
    say(
        f"{source.path}: {source.count} windows; in the first {len(rows)} of them {entries / positions:.1f} entries a "
        f"position, the next token among them at {following:.0%}, the token just read at {read:.0%}"
    )
    if kept < entries:
        say(f"{1 - kept / entries:.1%} of the entries are below {reading.pmin:g} and left out; --pmin 0 keeps them")
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
