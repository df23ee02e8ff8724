"""The nouns of the data path: TeacherTargets, Sample, Batch."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = -100  # label of a position that counts for no loss (padding, document borders)


class TeacherTargets(NamedTuple):
    """What the teacher says about the next token at each position; numpy in samples, torch in batches.

    The head, K entries known exactly, in no particular order; a row with fewer repeats an id with log-probability -inf:
      ids         [.., T, K] int32
      logprobs    [.., T, K] float32 log p over the full vocabulary at temperature 1
      log_tails   [.., T, M] float32 log of the sum over all tokens outside the head of p^(1/T_m)
    D distinct draws from the whole distribution (K = 0) or from what is outside the head, at one temperature:
      draw_ids    [.., T, D] int32
      draw_shares [.., T, D] float32 how many of the draws fell on it, over their number; 0 fills a row
      entropy     [.., T]    float32 of the whole distribution at the draws' temperature; 0 where D = 0
    label_nll     [.., T]    float32 -log p(token t+1) at temperature 1; 0 where there is no label
    """

    ids: Any
    logprobs: Any
    log_tails: Any
    draw_ids: Any
    draw_shares: Any
    entropy: Any
    label_nll: Any


def by_probability(targets: TeacherTargets) -> TeacherTargets:
    """The same targets, numpy, each row's head ordered from the most probable entry; places without entry come last."""
    order = np.argsort(-targets.logprobs, axis=-1, kind="stable")
    ids, logprobs = (np.take_along_axis(field, order, -1) for field in (targets.ids, targets.logprobs))
    return targets._replace(ids=ids, logprobs=logprobs)


class Sample(NamedTuple):
    """One packed window of at most T+1 tokens; position t reads tokens[t] and predicts tokens[t+1].

    starts: offsets at which a document (or its continuation) begins, the first one 0. Attention, positions and
    labels never cross such an offset. Neighbouring windows share one token, so each token is predicted once.
    mask: [T] bool, whether the label at t, token t+1, counts; None: all do but those across a start. A position whose
    label does not count has no targets: no entry of the head, no draw.
    """

    key: str
    tokens: np.ndarray
    starts: np.ndarray
    targets: TeacherTargets | None = None
    mask: np.ndarray | None = None

    @property
    def label_count(self) -> int:
        """How many labels count."""
        return len(self.tokens) - len(self.starts) if self.mask is None else int(np.count_nonzero(self.mask))


class Rows(NamedTuple):
    """Which entries of a [B, L] array count, as places: a boolean mask would make a GPU's CPU wait for their number.

    Made on the CPU, before the batch goes to a device (`with_rows`).
    flat: places in the flattened array, ascending, [N] int64. sizes: how many are in each of the B rows. length: L.
    """

    flat: "torch.Tensor"
    sizes: tuple[int, ...]
    length: int

    def pick(self, values: "torch.Tensor") -> "torch.Tensor":
        """[B, L, ..] → [N, ..]; the same as values[mask], and so is its gradient."""
        return values.flatten(0, 1).index_select(0, self.flat)

    def place(self, values_N: "torch.Tensor") -> "torch.Tensor":
        """[N] → [B, L], 0 elsewhere."""
        shape = len(self.sizes), self.length
        return values_N.new_zeros(shape[0] * shape[1]).index_copy(0, self.flat, values_N).view(shape)


def rows_of(mask_BL: "torch.Tensor") -> Rows:
    """The places where a boolean mask is true; waits for a GPU when the mask is on one."""
    return Rows(mask_BL.flatten().nonzero()[:, 0], tuple(mask_BL.sum(1).tolist()), mask_BL.shape[1])


class Side(NamedTuple):
    """One model's view of a batch, shifted once like a Batch; all [B, L] int64.

    tokens, labels, position_ids: as in Batch; padding is a document without labels
    spans:       the span that tokens[b, t] belongs to, counted from 0 in its row; -1 in padding
    label_spans: the span of the label at t, token t+1; -1 where the label is IGNORED or its span cannot be scored
    counted:     the positions with a label; see `labelled`
    """

    tokens: "torch.Tensor"
    labels: "torch.Tensor"
    position_ids: "torch.Tensor"
    spans: "torch.Tensor"
    label_spans: "torch.Tensor"
    counted: Rows | None = None


class Paired(NamedTuple):
    """Both sides of a batch; their spans have the same numbers. span_count: [B] int64, spans in each row.

    shared, scored: of [B, S], S the most spans of a row: those with tokens on both sides, and those whose labels can be
    scored; see `shared_spans` and `scored_spans`.
    """

    student: Side
    teacher: Side
    span_count: "torch.Tensor"
    shared: Rows | None = None
    scored: Rows | None = None


class Batch(NamedTuple):
    """Samples side by side, shifted once: labels[b, t] is the token after tokens[b, t], or IGNORED. All [B, T].

    position_ids restart at every document: with no attention mask, transformers turns them into
    block-diagonal causal attention (see tests/data/test_batches.py).
    counted: the positions with a label; see `labelled`.
    paired: the same text for a teacher with another tokenizer; its student side is this batch.
    """

    tokens: "torch.Tensor"
    labels: "torch.Tensor"
    position_ids: "torch.Tensor"
    targets: TeacherTargets | None = None
    counted: Rows | None = None
    paired: Paired | None = None


def labelled(batch: Batch | Side) -> Rows:
    """The positions with a label, [B, T]: those that came with the batch, else found here."""
    return rows_of(batch.labels != IGNORED) if batch.counted is None else batch.counted


def shared_spans(paired: Paired) -> Rows:
    """The spans that have tokens on both sides, [B, S]: those that came with the pair, else found here."""
    if paired.shared is not None:
        return paired.shared
    return rows_of(_present(paired.student.spans, paired) & _present(paired.teacher.spans, paired))


def scored_spans(paired: Paired) -> Rows:
    """The spans whose labels can be scored, [B, S]: those that came with the pair, else found here."""
    return rows_of(_present(paired.student.label_spans, paired)) if paired.scored is None else paired.scored


def with_rows(batch: Batch) -> Batch:
    """The batch with all of its `Rows`; call it while the batch is on the CPU and nothing of it changes any more."""
    paired = batch.paired
    if paired is not None:
        student, teacher = (side._replace(counted=labelled(side)) for side in paired[:2])
        paired = Paired(student, teacher, paired.span_count, shared_spans(paired), scored_spans(paired))
    return batch._replace(counted=labelled(batch), paired=paired)


def _present(spans_BL: "torch.Tensor", paired: Paired) -> "torch.Tensor":
    """Which spans have a token, [B, S]; -1, no span, has a column of its own that is dropped."""
    count = int(paired.span_count.max()) if len(paired.span_count) else 0
    found = spans_BL.new_zeros(len(spans_BL), count + 1)
    return found.scatter_(1, spans_BL.clamp(min=-1) + 1, 1)[:, 1:] > 0
