"""What tails at temperatures between the declared ones cost, and what the same tails cost when they are stored."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.rows import Row
from bench.store import LENGTH, TOP_K, real_logits
from megakd.capture.targets import targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.config.tails import DEFAULT
from megakd.data import codec
from megakd.data.codebook import build_book
from megakd.data.records import Sample, TeacherTargets
from megakd.losses.signals import Stored
from megakd.losses.tails import log_tail_at

DEMO = Path(__file__).parents[2] / "megakd/assets/demo-teacher"
DECLARED = (DEFAULT, (1.0, 1.25, 1.75, 2.5, 4.0))
GRID = (1.05, 1.1, 1.2, 1.5, 1.75, 2.25, 2.5, 3.0, 3.5)


def bench_temperatures(quick: bool, real: Path | None) -> list[Row]:
    """KL(exact || interpolated) over head and tail with rounded tails; `stored`: the same where T is declared."""
    folder, rows = real or DEMO, []
    chunks = list(real_logits(folder, 1024 if quick else LENGTH))
    for declared in DECLARED:
        found: dict[tuple[str, float], list[Tensor]] = {}
        for logits, labels in chunks:
            for temperature, kl in _errors(logits.double(), labels, declared):
                found.setdefault(("interpolated", temperature), []).append(kl)
            for temperature, kl in _errors(logits.double(), labels, (1.0, *GRID)):
                found.setdefault(("stored", temperature), []).append(kl)
        for (how, temperature), parts in found.items():
            kl, case = torch.cat(parts), f"{', '.join(f'{t:g}' for t in declared)}: T = {temperature:g}"
            rows.append(Row("temperatures", case, f"{how}_mean", kl.mean().item(), "nats"))
            rows.append(Row("temperatures", case, f"{how}_p99", kl.quantile(0.99).item(), "nats"))
    return rows


def _errors(logits_NV: Tensor, labels_N: Tensor, declared: tuple[float, ...]) -> list[tuple[float, Tensor]]:
    """At every T of GRID the KL of each position, from what a record with tails at `declared` gives back."""
    offsets, vocabulary = torch.zeros(len(labels_N)), logits_NV.shape[1]
    kept, exact = (
        targets_from_logits(logits_NV, labels_N, LogitsConfig(top_k=TOP_K, temperatures=each), offsets)
        for each in (declared, GRID)
    )
    arrays = TeacherTargets(*(field.numpy() for field in kept))
    book = build_book(arrays.ids[arrays.logprobs > -np.inf], vocabulary)
    layout = codec.Layout(TOP_K, 0, 238, declared, LENGTH, book)
    tokens = np.concatenate([labels_N[:1].numpy(), labels_N.numpy()]).astype(np.int32)
    read = codec.decode("", codec.encode(Sample("", tokens, np.array([0]), arrays), layout), layout).targets
    assert read is not None
    targets, stored = TeacherTargets(*map(torch.as_tensor, read)), Stored(True, declared, None, vocabulary)
    found = []
    for column, temperature in enumerate(GRID, 1):  # 1 is always declared, first
        pairs = ((kept, exact.log_tails[:, column]), (targets, log_tail_at(targets, stored, temperature)))
        p, q = (tail.double() - (each.logprobs.double() / temperature).logsumexp(-1) for each, tail in pairs)
        log = torch.nn.functional.logsigmoid
        found.append((temperature, p.sigmoid() * (log(p) - log(q)) + (-p).sigmoid() * (log(-p) - log(-q))))
    return found
