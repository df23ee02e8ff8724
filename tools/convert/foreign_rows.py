"""A window of a foreign file as a sample: what its numbers mean, and every check of them.

A foreign file holds windows of tokens and, for each position t, K ids with numbers about the token after token t:
  logprobs   log p over the whole vocabulary; what is outside the K has mass 1 - sum p, so there is a tail at T = 1
  logits     raw, without their normaliser: nothing is known of the tail, rows are normalised over the K
A row for the last token of a window is skipped: what comes after it is not in the window. An entry of -inf, or below
NONE, is none. With a label mask, a row whose label does not count is not read.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from megakd.data.records import Sample, TeacherTargets
from megakd.errors import UserError

NONE = -9999.0  # what masks write for -inf: -1e4, -65504, -1e9, …
# Half precision moves a log-probability by 2^-11 of its size: a row of the flattest teacher sums to 1 within 0.004.
SUM_TOLERANCE = 0.02


class Names(NamedTuple):
    """What a format calls its parts, for messages."""

    tokens: str
    ids: str
    values: str
    starts: str
    log_tails: str
    label_nll: str
    label_mask: str = "label_mask"


class Row(NamedTuple):
    """Window `number` of a file: tokens [L]; ids, values [P, K], log_tails [P, M], label_nll [P] with P = L or L - 1.

    starts, log_tails, label_nll, label_mask [P]: None where the file has none.
    """

    number: int
    tokens: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    starts: np.ndarray | None
    log_tails: np.ndarray | None
    label_nll: np.ndarray | None
    label_mask: np.ndarray | None = None


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


def sample_of(row: Row, reading: Reading) -> Sample:
    """A window with its targets; UserError naming file, part, sample, position and entry at the first fault."""
    tokens = _tokens(row, reading)
    starts = _starts(row, tokens, reading)
    mask = _mask(row, len(tokens) - 1, reading)
    if mask is not None:
        row = _certain(row, ~mask)
    ids, values = _entries(row, len(tokens) - 1, reading)
    if reading.values == "logits":
        logprobs = values - _log_sum(values)[:, None]
        log_tails = np.full((len(values), len(reading.temperatures)), -np.inf)
    else:
        logprobs, log_tails = values, _tails(row, values, reading)
    nll = _label_nll(row, tokens, starts, ids, logprobs, reading)
    logprobs, log_tails = _drop_below(reading.pmin, logprobs, log_tails, reading)
    if mask is not None:
        logprobs[~mask] = -np.inf  # a label that does not count has no entry
    best = np.take_along_axis(ids, logprobs.argmax(1)[:, None], 1)
    ids = np.where(logprobs > -np.inf, ids, best)
    none = np.zeros((len(ids), 0))
    targets = TeacherTargets(
        _wide(ids, reading.top_k, best).astype(np.int32),
        _wide(logprobs, reading.top_k, -np.inf).astype(np.float32),
        log_tails.astype(np.float32),
        none.astype(np.int32), none.astype(np.float32), np.zeros(len(ids), np.float32), nll.astype(np.float32),
    )  # fmt: skip
    return Sample(f"{row.number:09d}", tokens, starts, targets, mask)


def _mask(row: Row, positions: int, reading: Reading) -> np.ndarray | None:
    if row.label_mask is None:
        return None
    mask = row.label_mask[:positions].astype(bool)
    if len(mask) < positions:
        _refuse(reading, row, reading.names.label_mask, f"{len(mask)} values, expected at least {positions}")
    return mask


def _certain(row: Row, rows: np.ndarray) -> Row:
    """The window with one entry of probability 1 at `rows`, so that all else is checked where it stands."""
    at = rows.nonzero()[0]
    at = at[at < len(row.values)]
    width = max(row.values.shape[1], 1)
    ids, values = _wide(row.ids, width, 0), _wide(row.values, width, -np.inf)
    ids[at], values[at] = 0, -np.inf
    values[at, 0] = 0.0
    log_tails, label_nll = (None if each is None else each.copy() for each in (row.log_tails, row.label_nll))
    if log_tails is not None:
        log_tails[at] = -np.inf
    if label_nll is not None:
        label_nll[at] = 0.0
    return row._replace(ids=ids, values=values, log_tails=log_tails, label_nll=label_nll)


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
        _refuse(reading, row, names.ids, f"{len(row.ids)} rows next to {len(row.tokens)} tokens, expected as many")
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
