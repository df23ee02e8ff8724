"""How good a model is on the hold-out: perplexity, bits per byte, KL to the teacher, agreement, size, speed."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.data.align import pair
from megakd.data.batches import collate, prefetch
from megakd.data.records import IGNORED, Batch
from megakd.data.shards import ShardSet
from megakd.data.tokens import vocabulary_size
from megakd.log import Progress
from megakd.losses.distill import topk_kl


class Tokenizers(NamedTuple):
    """Of a model that reads the hold-out's text in its own tokens: the hold-out's tokenizer, and the model's."""

    text: Any
    model: Any


class Quality(NamedTuple):
    """Means over the labelled positions of the hold-out; kl, top1 and topk are None where it has no targets.

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
    tokenizers: Tokenizers | None = None,
    after: Callable[[Batch], None] | None = None,
) -> Quality:
    """Run `model` over a hold-out, with the teacher's targets or without; tokens_per_second: of forward passes alone.

    tokenizers: where the model's is not the hold-out's. Then positions are those of its own tokens, and there are no
    targets; bits per byte are of the same text. after: called with each batch when the model has read it.
    """
    model = model.eval().to(device)
    stored, facts = holdout.layout is not None, holdout.facts
    assert not (stored and tokenizers), holdout.folder  # targets are of the hold-out's tokens
    vocab_size = facts["vocab_size"] if stored else facts["tokenizer"]["vocab_size"]
    vocab_size = vocabulary_size(tokenizers.model) if tokenizers else vocab_size
    length = (facts["tokens"] if stored else facts)["sequence_length"]
    batches = _batches(holdout, batch_size, length, tokenizers)
    progress = Progress(f"evaluate {name}", len(holdout), "windows")
    sums, seconds, tokens, text_tokens = torch.zeros(5, dtype=torch.float64), 0.0, 0, 0
    with closing(prefetch(batches)) as prepared:  # a signal may end it early
        for batch, labels in prepared:
            start = time.perf_counter()
            logits = model(batch.tokens.to(device), position_ids=batch.position_ids.to(device), use_cache=False).logits
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            if after:
                after(batch)
            tokens += batch.tokens.numel()
            text_tokens += labels
            sums += batch_sums(logits[..., :vocab_size].cpu(), batch)
            progress.update(len(batch.tokens))
    progress.close()
    nll, *compared, positions = *(sums / sums[4]).tolist()[:4], int(sums[4])
    kl, top1, topk = compared if stored else (None, None, None)
    bits_per_byte = nll / math.log(2) * tokens_per_byte * (positions / text_tokens)
    parameters = {p.data_ptr(): p for p in model.parameters()}.values()
    return Quality(
        math.exp(nll), bits_per_byte, kl, top1, topk, nll, positions,
        sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters), tokens / seconds,
    )  # fmt: skip


def _batches(
    holdout: ShardSet, batch_size: int, length: int, tokenizers: Tokenizers | None
) -> Iterator[tuple[Batch, int]]:
    """What the model reads, and how many labels the hold-out itself has for the same text."""
    for start in range(0, len(holdout), batch_size):
        samples = [holdout[i] for i in range(start, min(start + batch_size, len(holdout)))]
        if tokenizers is None:
            batch = labels = collate(samples, length)
        else:
            # as long as training lets the teacher's side be
            paired = pair(samples, tokenizers.text, tokenizers.model, length, length + length // 4)
            batch, labels = Batch(*paired.teacher[:3]), paired.student
        yield batch, int((labels.labels != IGNORED).sum())


def batch_sums(logits: Tensor, batch: Batch) -> Tensor:
    """Sums over labelled positions of (NLL, KL at T = 1, top-1 agreement, top-k overlap, 1), float64 [5].

    Without targets the three in the middle are 0.
    """
    counted = batch.labels != IGNORED
    logits_NV, labels_N, targets = logits[counted].float(), batch.labels[counted], batch.targets
    nll = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    if targets is None:
        zero = nll.new_zeros((), dtype=torch.float64)
        return torch.stack([nll.double(), zero, zero, zero, counted.sum().double()])
    ids_NK, logprobs_NK = targets.ids[counted].long(), targets.logprobs[counted]
    kl = topk_kl(logits_NV, ids_NK, logprobs_NK, targets.log_tails[..., 0][counted], 1.0, "ghost").sum()
    mine_NK = logits_NV.topk(ids_NK.shape[-1]).indices
    first_NK = logprobs_NK == logprobs_NK.amax(1, keepdim=True)
    top1 = ((ids_NK == mine_NK[:, :1]) & first_NK).any(1).sum()
    kept_NK = logprobs_NK > -torch.inf
    kept_N1 = kept_NK.sum(1, keepdim=True)
    # as many of the model's first as the teacher has stored at the position
    counted_NK = (torch.arange(ids_NK.shape[1]) < kept_N1).to(logits_NV.dtype)
    among_NK = torch.zeros_like(logits_NV).scatter(1, mine_NK, counted_NK).gather(1, ids_NK)
    overlap = ((among_NK * kept_NK).sum(1) / kept_N1[:, 0]).sum()
    return torch.stack([nll.double(), kl.double(), top1.double(), overlap.double(), counted.sum().double()])
