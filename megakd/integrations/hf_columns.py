"""A `datasets.Dataset` with tokens and the teacher's top-k logits in columns, as samples of the cached loss.

A row is one sequence of L tokens:
  input_ids       [L]
  topk_indices    [L or L-1, K]  token ids; row t is about the token after input_ids[t]
  topk_logprobs   like it        log p over the whole vocabulary: what is missing to 1 is the tail's mass at T = 1
  topk_values     like it        or raw logits: with `tail_mass` the same, without it nothing is known of the tail
  tail_mass       [L or L-1]     probability outside the K entries, at T = 1
  attention_mask  [L]            0 on padding, at either end
  labels          [L]            input_ids, or -100 where the token counts for no loss; not shifted, as in Trainer
  position_ids    [L]            restart at 0 where a document begins
The last four may be missing. Values may be float16; entries of -inf, or below NONE, are none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import datasets
import numpy as np
import pyarrow.compute as arrow
from torch.utils.data import Dataset

from megakd.config.objective import CachedConfig
from megakd.config.tails import reaches_all
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Sample, TeacherTargets, with_rows
from megakd.errors import UserError
from megakd.system.logging import say

NONE = -9999.0  # what masks write for -inf: -1e4, -65504, …
SUM_TOLERANCE = 0.02  # float16 moves the sum of a flat row's probabilities by 0.004
LEAST_TAIL = 1e-7  # a tail that vanished by rounding would make divergences infinite
TOKENS, IDS, LOGPROBS, LOGITS, TAIL = "input_ids", "topk_indices", "topk_logprobs", "topk_values", "tail_mass"
PER_TOKEN = ("attention_mask", "labels", "position_ids")


class Row(NamedTuple):
    """A sample, and which of its positions have a label that counts for no loss, [T] bool."""

    sample: Sample
    masked: np.ndarray


class TopKDataset(Dataset[Row]):
    """The rows of a `datasets.Dataset`, checked when they are read. name: of the argument, for messages.

    vocab_size: real entries of the vocabulary. facts: as a manifest of logits states them.
    """

    def __init__(self, dataset: datasets.Dataset, vocab_size: int, name: str = "train_dataset"):
        self.name, self.vocab_size = name, vocab_size
        self.values = _check_columns(dataset.column_names, name)
        if not len(dataset):
            raise UserError(f"{name}: has no rows")
        optional = [column for column in (*PER_TOKEN, TAIL) if column in dataset.column_names]
        used = [TOKENS, IDS, self.values, *optional]
        if unread := [column for column in dataset.column_names if column not in used]:
            say(f"{name}: columns that are not read: {', '.join(unread)}")
        self.dataset = dataset.select_columns(used).with_format("numpy")
        self.top_k = self._targets_of(0, self.dataset[0])[0].shape[1]
        self.tails = self.values == LOGPROBS or TAIL in optional
        length = int(arrow.max(arrow.list_value_length(dataset.data.column(TOKENS))).as_py())  # type: ignore[attr-defined]
        packing = "packed" if "position_ids" in optional else "documents"
        self.facts: dict[str, Any] = {
            "vocab_size": vocab_size, "top_k": self.top_k, "temperatures": [1.0], "tails": self.tails, "draws": 0,
            "draw_temperature": None,
            "tokens": {"sequence_length": length - 1, "packing": packing},
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        row = self.dataset[index]
        tokens, first = self._tokens_of(index, row)
        ids, values, tails = self._targets_of(index, row)
        here = slice(first, first + len(tokens) - 1)
        starts, masked = self._starts_of(index, row, tokens, first), self._masked(index, row, tokens, first)
        counted = ~masked
        counted[starts[1:] - 1] = False
        targets = self._checked_targets(
            index, ids[here], values[here], tails[here] if tails is not None else None, counted
        )
        return Row(Sample(f"{index:09d}", tokens.astype(np.int32), starts.astype(np.int32), targets), masked)

    def supported(self, config: CachedConfig) -> CachedConfig:
        """The loss that the columns can give: truncated instead of ghost, said aloud, where they know no tail."""
        if config.tail in ("sampled", "hybrid"):
            raise UserError(f"distillation_tail: {config.tail} needs draws, columns have none; give ghost or truncated")
        start, end = config.temperature if isinstance(config.temperature, tuple) else (config.temperature,) * 2
        if config.tail != "ghost" or reaches_all((1.0,) if self.tails else (), start, end):
            return config
        why = (
            f"the tail's mass is known at T = 1 alone, not at T = {end:g}; give distillation_temperature=1 to use it"
            if self.tails
            else f"{LOGITS} without {TAIL}: nothing is known of the tokens outside the {self.top_k} stored"
        )
        say(f"{self.name}: {why}; distillation_tail=truncated: the teacher is renormalised over the stored tokens")
        return config.model_copy(update={"tail": "truncated"})

    def blank(self) -> Row:
        """A row of one position without a label."""
        sample = Sample("blank", np.zeros(2, np.int32), np.array([0, 1], np.int32), _targets(1, self.top_k))
        return Row(sample, np.zeros(1, bool))

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What `Answering.forward` takes; padded to the longest row."""
        batch = collate([row.sample for row in rows], max(len(row.masked) for row in rows))
        for labels, row in zip(batch.labels, rows, strict=True):
            labels[: len(row.masked)][row.masked] = IGNORED
        return dict(
            zip(("input_ids", "labels", "position_ids", "targets", "counted"), with_rows(batch)[:5], strict=True)
        )

    def _refuse(self, index: int, column: str, problem: str) -> NoReturn:
        raise UserError(f"{self.name}: row {index}, {column}: {problem}")

    def _tokens_of(self, index: int, row: dict[str, Any]) -> tuple[np.ndarray, int]:
        """The tokens without padding, and the place of the first."""
        tokens = np.asarray(row[TOKENS])
        for column in PER_TOKEN:
            if column in row and np.shape(row[column]) != tokens.shape:
                self._refuse(index, column, f"{len(row[column])} entries next to {len(tokens)} {TOKENS}")
        kept = np.flatnonzero(row.get("attention_mask", np.ones(len(tokens))))
        if len(kept) < 2:
            self._refuse(index, TOKENS, f"{len(kept)} tokens, a sequence needs 2")
        if kept[-1] - kept[0] + 1 != len(kept):
            self._refuse(index, "attention_mask", "0 between tokens; padding is at the ends alone")
        tokens = tokens[kept]
        beyond = (tokens < 0) | (tokens >= self.vocab_size)
        if beyond.any():
            self._refuse(index, TOKENS, f"id {tokens[beyond][0]} is beyond the vocabulary of {self.vocab_size}")
        return tokens, int(kept[0])

    def _targets_of(self, index: int, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Ids, values [P, K] and tail masses [P], of equal lengths."""
        ids, values = np.asarray(row[IDS]), np.asarray(row[self.values])
        length = len(row[TOKENS])
        for column, array in ((IDS, ids), (self.values, values)):
            if array.ndim != 2 or array.dtype == object:
                self._refuse(index, column, "expected as many numbers for every token")
            if len(array) not in (length, length - 1):
                self._refuse(index, column, f"{len(array)} rows next to {length} {TOKENS}, expected as many")
        if ids.shape != values.shape:
            self._refuse(
                index,
                IDS,
                f"{ids.shape[0]} x {ids.shape[1]} next to {self.values} of {values.shape[0]} x {values.shape[1]}",
            )
        if ids.shape[1] != getattr(self, "top_k", ids.shape[1]):
            self._refuse(index, IDS, f"{ids.shape[1]} entries per token, row 0 has {self.top_k}")
        if not np.issubdtype(ids.dtype, np.integer):
            self._refuse(index, IDS, f"numbers of type {ids.dtype}, expected integers")
        tails = np.asarray(row[TAIL]) if TAIL in row else None
        if tails is not None and tails.shape != (len(ids),):
            self._refuse(index, TAIL, f"{len(tails)} entries next to {len(ids)} rows of {IDS}")
        return ids, values.astype(np.float64), tails

    def _starts_of(self, index: int, row: dict[str, Any], tokens: np.ndarray, first: int) -> np.ndarray:
        if "position_ids" not in row:
            return np.zeros(1, np.int64)
        positions = np.asarray(row["position_ids"])[first : first + len(tokens)]
        starts = np.flatnonzero(positions == 0)
        places = np.arange(len(tokens))
        began = np.maximum.accumulate(np.where(positions == 0, places, 0))
        if positions[0] != 0 or (positions != places - began).any():
            self._refuse(
                index, "position_ids", "expected 0, 1, 2, … from the first token on, again from 0 at a document"
            )
        return starts

    def _masked(self, index: int, row: dict[str, Any], tokens: np.ndarray, first: int) -> np.ndarray:
        if "labels" not in row:
            return np.zeros(len(tokens) - 1, bool)
        labels = np.asarray(row["labels"])[first + 1 : first + len(tokens)]
        wrong = (labels != IGNORED) & (labels != tokens[1:])
        if wrong.any():
            at = first + 1 + int(np.flatnonzero(wrong)[0])
            problem = (
                f"{labels[wrong][0]} at place {at}, where {TOKENS} has {tokens[1:][wrong][0]}; expected the token "
            )
            self._refuse(index, "labels", problem + f"itself, or {IGNORED}: labels are not shifted")
        return labels == IGNORED

    def _checked_targets(
        self, index: int, ids: np.ndarray, values: np.ndarray, tails: np.ndarray | None, counted: np.ndarray
    ) -> TeacherTargets:
        """Targets of the positions that count; those of others are never looked at, and may be anything."""
        targets = _targets(len(ids), self.top_k)
        ids, values = ids[counted], values[counted]
        if np.isnan(values).any() or (values == np.inf).any():
            self._refuse(index, self.values, "NaN or infinity")
        there = values > NONE
        if not there.any(1).all():
            self._refuse(index, self.values, "a token without an entry")
        values = np.where(there, values, -np.inf)
        beyond = there & ((ids < 0) | (ids >= self.vocab_size))
        if beyond.any():
            self._refuse(index, IDS, f"id {ids[beyond][0]} is beyond the vocabulary of {self.vocab_size}")
        ordered = np.sort(np.where(there, ids, -1 - np.arange(ids.shape[1])), axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            self._refuse(index, IDS, "an id twice for one token")
        logprobs, log_tails = self._normalised(index, values, tails[counted] if tails is not None else None)
        best = np.take_along_axis(ids, logprobs.argmax(1)[:, None], 1)
        targets.ids[counted] = np.where(there, ids, best)
        targets.logprobs[counted], targets.log_tails[counted, 0] = logprobs, log_tails
        return targets

    def _normalised(self, index: int, values: np.ndarray, tails: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """log p of the entries, and log of the tail's mass: each row sums to 1; -inf where nothing is known of it."""
        total = np.logaddexp.reduce(values, axis=1)
        if self.values == LOGPROBS:
            if (total > np.log1p(SUM_TOLERANCE)).any():
                problem = (
                    f"exponentials that sum to e^{total.max():.3g}; rename the column to {LOGITS} if it has raw logits"
                )
                self._refuse(index, LOGPROBS, problem)
            tails = 1 - np.exp(total) if tails is None else tails
        if tails is None:
            return values - total[:, None], np.full(len(values), -np.inf)
        wrong = ~((tails > -SUM_TOLERANCE) & (tails < 1))
        if wrong.any():
            self._refuse(index, TAIL, f"{tails[wrong][0]:.4g} is no probability below 1")
        tails = np.maximum(tails, LEAST_TAIL)
        return values - (total - np.log1p(-tails))[:, None], np.log(tails)


def _targets(positions: int, top_k: int) -> TeacherTargets:
    """Of positions that count for nothing: one certain token; without draws."""
    logprobs, zeros = np.full((positions, top_k), -np.inf, np.float32), np.zeros(positions, np.float32)
    logprobs[:, 0] = 0
    ids, none = np.zeros((positions, top_k), np.int32), np.zeros((positions, 0), np.float32)
    tails = np.full((positions, 1), -np.inf, np.float32)
    return TeacherTargets(ids, logprobs, tails, none.astype(np.int32), none, zeros, zeros)


def _check_columns(names: Sequence[str], place: str) -> str:
    """The column of values; UserError naming what is missing, or stands twice."""
    values = [column for column in (LOGPROBS, LOGITS) if column in names]
    missing = [column for column in (TOKENS, IDS) if column not in names]
    missing += [] if values else [f"{LOGPROBS} or {LOGITS}"]
    if missing:
        raise UserError(
            f"{place}: no column {', '.join(missing)}; it has {', '.join(names) or 'none'}: rename what it calls "
            "otherwise (rename_columns), or give a folder of shards"
        )
    if len(values) == 2:
        raise UserError(f"{place}: has {LOGPROBS} and {LOGITS}; remove one of both (remove_columns)")
    return values[0]
