"""How alike student and teacher attend on the validation set: the overlap of their attention rows.

B windows, T positions, H heads of the student, G of the teacher.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megakd.data.batches import collate, to_device
from megakd.data.records import IGNORED, Batch
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.identity import packing_of
from megakd.losses.hidden import attention_rows, layer_map
from megakd.models.isolation import check_model
from megakd.system.logging import Progress


@torch.no_grad()
def attention_overlap(
    student: Any, teacher: Any, holdout: ShardSet, windows: int, device: torch.device, name: str
) -> float:
    """Mean of `row_overlap` over queries of the first windows, heads and the student's layers; 0 to 1, 1: alike.

    Each of the student's layers with the teacher's that `layer_map` gives it. A query counts where its label does; but
    the first position of a document, which sees itself alone and is 1 with any two models, does not.
    """
    windows = min(windows, len(holdout))
    progress = Progress(f"attention of {name}", windows, "windows")
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with _eager(student), _eager(teacher):
        for model, place in ((student, name), (teacher, "the teacher")):  # eager masks are not the others'
            check_model(model, place, packing_of(holdout.facts))
        for index in range(windows):
            sample = holdout[index]
            batch = collate([sample], len(sample.tokens) - 1)._replace(targets=None)
            counted_BT = (batch.labels != IGNORED) & (batch.position_ids > 0)
            count += int(counted_BT.sum())
            batch, counted_BT = to_device(batch, device), counted_BT.to(device)
            own, theirs = _maps(student, batch, name), _maps(teacher, batch, "the teacher")
            for mine, layer in zip(own, layer_map(len(own), len(theirs)), strict=True):
                total += row_overlap(mine(), theirs[layer](), counted_BT).double() / len(own)
            progress.update(1)
    progress.close()
    if not count:
        raise UserError(
            f"eval.attention: no labelled position of the first {windows} windows sees two keys; ask for more"
        )
    return total.item() / count


def row_overlap(student_BHTT: Tensor, teacher_BGTT: Tensor, counted_BT: Tensor) -> Tensor:
    """sum over counted queries of mean over heads of sum over keys of min(p, q), rows of probabilities.

    It is 1 - sum |p - q| / 2, 1 minus their total variation distance; computed so, equal rows give 1 even where
    bfloat16 lets them sum to something else. Unequal heads: as in `attention_loss`.
    """
    assert student_BHTT.shape[2:] == teacher_BGTT.shape[2:], (student_BHTT.shape, teacher_BGTT.shape)
    heads = math.gcd(student_BHTT.shape[1], teacher_BGTT.shape[1])
    p_NhT, q_NhT = (attention_rows(side, counted_BT, heads) for side in (teacher_BGTT, student_BHTT))
    return (1 - (p_NhT - q_NhT).abs().sum(-1) / 2).clamp(min=0).mean(-1).sum()


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """The model with the eager attention: the others never have the probabilities."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _maps(model: Any, batch: Batch, name: str) -> list[Callable[[], Tensor]]:
    """What gives the probabilities of each layer, [B, heads, T, T], by computing them again from the layer's input.

    So inputs are kept, [B, T, D] a layer, and no maps: of 48 layers of 32 heads at T = 4096 they are 52 GB in bfloat16.
    A layer's attention is the innermost module that answers with (its output, a map).
    """
    found: dict[Any, Callable[[], Tensor]] = {}
    square = batch.tokens.shape[1:] * 2

    def remember(module: Any, inputs: Any, named: Any, output: Any) -> None:
        second = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(second, Tensor) or second.ndim != 4 or second.shape[2:] != square:
            return
        if not any(inner in found for inner in module.modules()):  # blocks of older models hand the map on
            found[module] = lambda: module(*inputs, **named)[1]

    decoder = model.get_decoder()
    hooks = [module.register_forward_hook(remember, with_kwargs=True) for module in decoder.modules()]
    try:
        decoder(batch.tokens, position_ids=batch.position_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise UserError(f"{name}: a {type(model).__name__} gives no attention probabilities; set eval.attention=0")
    return list(found.values())
