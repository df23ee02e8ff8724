"""Teacher logits → TeacherTargets: the top-k tokens, the tails, the label's NLL; never more than a chunk in float32."""

from typing import Any

import torch
from torch import Tensor

from megakd.data.records import IGNORED, Batch, TeacherTargets

CHUNK = 512  # positions in float32 at once: 0.6 GB at a vocabulary of 152k, with its copies


@torch.no_grad()
def teacher_targets(
    model: Any, batch: Batch, vocab_size: int, top_k: int, temperatures: tuple[float, ...]
) -> TeacherTargets:
    """Targets of every position of a batch (tensors [B, T, ..] on the CPU), over the first `vocab_size` logits.

    Padded vocabularies are cut before normalising: log-probabilities are those over real tokens.
    """
    device = next(model.parameters()).device
    logits = model(batch.tokens.to(device), position_ids=batch.position_ids.to(device), use_cache=False).logits
    logits_NV, labels_N = logits[..., :vocab_size].flatten(0, 1), batch.labels.flatten().to(device)
    chunks = zip(logits_NV.split(CHUNK), labels_N.split(CHUNK), strict=True)
    parts = [targets_from_logits(part.float(), labels, top_k, temperatures) for part, labels in chunks]
    fields = [torch.cat(field).unflatten(0, batch.tokens.shape).cpu() for field in zip(*parts, strict=True)]
    return TeacherTargets(*fields)


def targets_from_logits(
    logits_NV: Tensor, labels_N: Tensor, top_k: int, temperatures: tuple[float, ...]
) -> TeacherTargets:
    """Targets of N positions from their whole float logits.

    log_tails[n, m] = log of the sum over tokens outside the top k of p^(1/T_m): of powers, not the power of the sum.
    """
    log_z_N1 = logits_NV.logsumexp(-1, keepdim=True)
    values_NK, ids_NK = logits_NV.topk(top_k)
    rest_NV = logits_NV.scatter(-1, ids_NK, -torch.inf)
    log_tails = [(rest_NV / t).logsumexp(-1) - log_z_N1[:, 0] / t for t in temperatures]
    counted = labels_N != IGNORED
    label_logit_N = logits_NV.gather(-1, labels_N.clamp(min=0)[:, None])[:, 0]
    label_nll_N = torch.where(counted, log_z_N1[:, 0] - label_logit_N, 0.0)
    return TeacherTargets(ids_NK.int(), values_NK - log_z_N1, torch.stack(log_tails, 1), label_nll_N)
