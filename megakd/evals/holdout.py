"""How good a model is on the validation set: perplexity, bits per byte, KL to the teacher, agreement, size, speed.

B sequences, T positions, N labelled ones of a batch, n of a chunk, K stored tokens of the teacher, V real vocabulary.

Logits exist a chunk at a time, on the model's device. Peak memory beyond the model's activations and its hidden states
[B, T, D]: one [n, V] of CHUNK_BYTES (three where the family caps or scales its logits) and some of BLOCK_BYTES.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.data.batches import collate, prefetch
from megakd.data.lengths import longest_first
from megakd.data.records import IGNORED, Batch
from megakd.data.shards import ShardSet
from megakd.data.spans import pair
from megakd.data.tokenizers import vocabulary_size
from megakd.errors import UserError
from megakd.losses.divergence import divergence_terms
from megakd.losses.head import CHUNK_BYTES
from megakd.losses.hidden import wide
from megakd.losses.per_token import perplexity
from megakd.losses.reference import KL, buckets, teacher_buckets
from megakd.models.tables import check_tables
from megakd.objectives.heads import streamed_head
from megakd.system.logging import Progress, say

# Of the rows that are compared at once: what they need stays in the caches of one core (220 rows at once take 2.5 times
# as long as 7), and keeps a GPU busy.
BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}
NO_TOKEN = 2**62  # sorts behind every id


class Tokenizers(NamedTuple):
    """Of a model that reads the validation set's text in its own tokens: the set's tokenizer, and the model's.

    bos: the ids that documents begin with in the validation set and for the model.
    """

    text: Any
    model: Any
    bos: tuple[list[int], list[int]] = ([], [])


class Quality(NamedTuple):
    """Means over the labelled positions of the validation set; kl, top1 and topk are None where it has no targets.

    kl: KL(teacher || model) at T = 1 in nats, tokens that are not stored as one bucket: a lower bound of the full KL.
    top1: share of positions where the model's first token is a first one of the teacher: rounding in storage makes
        neighbours equal, and every token whose stored probability is the largest of its position counts as first.
    topk: share of the teacher's n stored tokens of a position that are among the model's first n.
    bits_per_byte: NLL in bits times tokens a byte of text; comparable across tokenizers.
    """

    perplexity: float
    bits_per_byte: float
    kl: float | None
    top1: float | None
    topk: float | None
    nll: float
    positions: int
    parameters: int
    bytes: int
    tokens_per_second: float


@torch.no_grad()
def evaluate_model(
    model: Any,
    holdout: ShardSet,
    tokens_per_byte: float,
    batch_size: int,
    device: torch.device,
    name: str,
    *,
    tokenizers: Tokenizers | None = None,
    after: Callable[[Batch], None] | None = None,
) -> Quality:
    """Run `model` over a validation set, with the teacher's targets or without; UserError where nothing is labelled.

    tokenizers: where the model's is not the validation set's. Then positions are those of its own tokens, and there are
    no targets; bits per byte are of the same text. after: called with each batch when the model has read it.
    tokens_per_second: of forward passes alone, the head's product included. What is not finite is inf or NaN here.
    """
    model = model.eval().to(device)
    stored, facts = holdout.layout is not None, holdout.facts
    assert not (stored and tokenizers), holdout.folder  # targets are of the validation set's tokens
    vocab_size = facts["vocab_size"] if stored else facts["tokenizer"]["vocab_size"]
    vocab_size = vocabulary_size(tokenizers.model) if tokenizers else vocab_size
    length = (facts["tokens"] if stored else facts)["sequence_length"]
    progress = Progress(f"evaluate {name}", len(holdout), "windows")
    sums, forward, head = torch.zeros(4, dtype=torch.float64), Stopwatch(device), None
    tokens = positions = text_tokens = longest = 0
    with closing(prefetch(_batches(holdout, batch_size, length, tokenizers))) as prepared:  # a signal may end it early
        for batch, labels in prepared:
            inputs = batch.tokens.to(device), batch.position_ids.to(device)
            if tokenizers and inputs[0].shape[1] > longest:  # the same text in tokens of its own: as many as it takes
                longest = inputs[0].shape[1]
                check_tables(model, name, 0, longest)
            if head is None:
                head = streamed_head(model, vocab_size, *inputs)
                if head.own:
                    say(f"{name}: the logits of {model.config.model_type} are made by its own code, a chunk at a time")
            with forward:
                hidden_BTD = head.decoder(inputs[0], position_ids=inputs[1], use_cache=False).last_hidden_state
            if after:
                after(batch)
            sums += batch_sums(head.logits, hidden_BTD, batch, vocab_size, forward).cpu()  # the batch's one transfer
            tokens += batch.tokens.numel()
            positions += int((batch.labels != IGNORED).sum())
            text_tokens += labels
            forward.seconds()  # frees the events; the sums were waited for
            progress.update(len(batch.tokens))
    progress.close()
    if not positions:
        raise UserError(f"{holdout.folder}: no position of the validation set has a label; raise data.holdout_tokens")
    nll, *compared = (sums / positions).tolist()
    if math.isnan(nll):  # an order of logits among which are NaN says nothing
        compared = [math.nan] * 3
    kl, top1, topk = compared if stored else (None, None, None)
    bits_per_byte = nll / math.log(2) * tokens_per_byte * (positions / text_tokens)
    parameters = {p.data_ptr(): p for p in model.parameters()}.values()
    return Quality(
        perplexity=perplexity(nll),
        bits_per_byte=bits_per_byte,
        kl=kl,
        top1=top1,
        topk=topk,
        nll=nll,
        positions=positions,
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        tokens_per_second=tokens / forward.seconds(),
    )


def _batches(
    holdout: ShardSet, batch_size: int, length: int, tokenizers: Tokenizers | None
) -> Iterator[tuple[Batch, int]]:
    """What the model reads, and how many labels the validation set itself has for the same text."""
    order = longest_first(holdout, range(len(holdout)))
    for start in range(0, len(order), batch_size):
        samples = [holdout[i] for i in order[start : start + batch_size]]
        if tokenizers is None:
            batch = labels = collate(samples, length)
        else:
            sizes = length, length + length // 4, 2**31
            paired = pair(samples, tokenizers.text, tokenizers.model, *sizes, bos=tokenizers.bos)
            batch, labels = Batch(*paired.teacher[:3]), paired.student
        yield batch, int((labels.labels != IGNORED).sum())


def batch_sums(
    logits: Callable[[Tensor], Tensor], hidden_BTD: Tensor, batch: Batch, vocab_size: int, forward: "Stopwatch"
) -> Tensor:
    """Sums over labelled positions of (NLL, KL at T = 1, top-1 agreement, top-k overlap), float64 [4].

    logits: makes those of some hidden states, [n, V] of [n, D]; forward: is told how long that takes. The batch is on
    the CPU, the sums are on the model's device. Without targets the last three are 0.
    """
    device = hidden_BTD.device
    rows_N = (batch.labels.flatten() != IGNORED).nonzero()[:, 0]  # on the CPU: a mask on the GPU would be waited for
    targets = batch.targets

    def labelled(values: Tensor) -> Tensor:
        return values.flatten(0, 1)[rows_N].to(device, non_blocking=True)

    fields = [labelled(batch.labels)]
    if targets is not None:
        fields += [labelled(targets.ids), labelled(targets.logprobs), labelled(targets.log_tails[..., 0])]
    hidden_ND = hidden_BTD.flatten(0, 1)[rows_N.to(device)]
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    most = max(_of(CHUNK_BYTES, device) // (4 * vocab_size), 1)
    chunk = -(-len(rows_N) // max(-(-len(rows_N) // most), 1))  # equal ones: the product of a short one is slow
    if not chunk:
        return sums
    for hidden_nD, *parts in zip(*(values.split(chunk) for values in (hidden_ND, *fields)), strict=True):
        with forward:
            logits_nV = logits(hidden_nD)
        sums += _chunk_sums(logits_nV, parts)
        del logits_nV  # before the next one is made
    return sums


def _chunk_sums(logits_nV: Tensor, fields: Sequence[Tensor]) -> Tensor:
    """Of a chunk, some rows at a time; overwrites the logits."""
    rows = max(_of(BLOCK_BYTES, logits_nV.device) // (4 * logits_nV.shape[1]), 1)
    parts = zip(*(values.split(rows) for values in (logits_nV, *fields)), strict=True)
    return torch.stack([_row_sums(*part) for part in parts]).sum(0)


def _row_sums(
    logits_nV: Tensor,
    labels_n: Tensor,
    ids_nK: Tensor | None = None,
    logprobs_nK: Tensor | None = None,
    log_tail_n: Tensor | None = None,
) -> Tensor:
    logits_nV = wide(logits_nV)
    if ids_nK is None or logprobs_nK is None or log_tail_n is None:
        nll_n = torch.nn.functional.cross_entropy(logits_nV, labels_n, reduction="none")
        return torch.nn.functional.pad(nll_n.double().sum()[None], (0, 3))
    ids_nK = ids_nK.long()
    kept_nK = logprobs_nK > -torch.inf
    first_nK = logprobs_nK == logprobs_nK.amax(1, keepdim=True)
    values_nK, mine_nK = logits_nV.topk(ids_nK.shape[1])
    # in place, for a new tensor of n x V takes as long as the arithmetic
    logits_nV.sub_(values_nK[:, :1].clone())  # so that float32 keeps the digits of logarithms near 0
    stored_nK, label_n1 = logits_nV.gather(1, ids_nK), logits_nV.gather(1, labels_n[:, None])
    log_rest_n1 = logits_nV.scatter_(1, ids_nK, -torch.inf).logsumexp(1, keepdim=True)
    log_q_nB, log_z_n = buckets(stored_nK, log_rest_n1, kept_nK)
    nll_n = log_z_n - label_n1[:, 0]
    log_p_nB = teacher_buckets(wide(logprobs_nK), log_tail_n, 1.0, "ghost", KL)
    kl_n = divergence_terms(KL, log_p_nB, log_q_nB).sum(-1)
    top1_n = ((ids_nK == mine_nK[:, :1]) & first_nK).any(1)
    kept_n1 = kept_nK.sum(1, keepdim=True)
    # as many of the model's first as the teacher has stored at the position
    counted_nK = torch.arange(ids_nK.shape[1], device=ids_nK.device) < kept_n1
    ranked_nK = mine_nK.masked_fill(~counted_nK, NO_TOKEN).sort(1).values
    places_nK = torch.searchsorted(ranked_nK, ids_nK).clamp(max=ids_nK.shape[1] - 1)
    among_nK = ranked_nK.gather(1, places_nK) == ids_nK
    overlap_n = (among_nK & kept_nK).sum(1) / kept_n1[:, 0]
    return torch.stack([each.double().sum() for each in (nll_n, kl_n, top1_n, overlap_n)])


def _of(sizes: dict[str, int], device: torch.device) -> int:
    return sizes["cpu" if device.type == "cpu" else "cuda"]


class Stopwatch:
    """Adds up how long the work inside `with` takes; on a GPU by events, which nothing waits for."""

    def __init__(self, device: torch.device):
        self.events: list[Any] | None = [] if device.type == "cuda" else None
        self.taken = self.start = 0.0

    def __enter__(self) -> None:
        if self.events is None:
            self.start = time.perf_counter()
        else:
            self.events.append(self._event())

    def __exit__(self, *error: object) -> None:
        if self.events is None:
            self.taken += time.perf_counter() - self.start
        else:
            self.events.append(self._event())

    def seconds(self) -> float:
        """Of all that was measured so far; waits for the GPU."""
        if self.events:
            torch.cuda.synchronize()
            pairs = zip(self.events[::2], self.events[1::2], strict=True)
            self.taken += sum(start.elapsed_time(end) for start, end in pairs) / 1e3
            self.events.clear()
        return self.taken

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
