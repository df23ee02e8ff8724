"""Distillation from cached teacher targets: the student's forward and the loss, inside one module."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from megakd.config.checks import check_targets
from megakd.config.objective import CachedConfig
from megakd.data.records import Batch, TeacherTargets, labelled
from megakd.errors import UserError
from megakd.losses.head import FusedHead
from megakd.losses.signals import Sparse, Stored, Tail
from megakd.models.hub import model_of
from megakd.objectives.base import LossReport, Objective
from megakd.objectives.live_head import LiveHead


class CachedDistillation(Objective):
    """loss(batch) = sums of (1 - alpha) CE + alpha T^2 KL over the labelled positions of a batch.

    The loss sits inside forward because ZeRO-3 gathers a module's weights only while it runs; the student's decoder
    runs alone, and its head inside the loss (`FusedHead`), so that logits are never stored.
    facts: those of the targets' manifest; a loss that they do not support is refused, saying what to capture instead.
    Both distributions are cut to the real entries of the vocabulary, without the padding of the embedding.
    """

    def __init__(self, student: Any, config: CachedConfig, facts: dict[str, Any]):
        super().__init__(student, config)
        self.stored = stored_in(facts)
        self.tail: Tail = config.tail
        check_support(config, self.stored)
        # after the student, whose name its weight keeps
        self.head = LiveHead(fused_head(student, facts["vocab_size"]))
        self.at(0.0)

    def loss(self, batch: Batch) -> LossReport:
        if batch.targets is None:
            raise UserError("the samples carry no teacher targets; run: megakd generate-logits RUN")
        decoder = self.student.get_decoder()
        hidden = decoder(batch.tokens, position_ids=batch.position_ids, use_cache=False).last_hidden_state
        counted = labelled(batch)
        targets = TeacherTargets(*map(counted.pick, batch.targets))
        teacher = Sparse(targets, self.stored, self.tail)
        # a batch without labels passes through too: 0 with a live graph, so that every rank takes part in the backward
        rows = counted.pick(hidden), counted.pick(batch.labels)
        loss = teacher, self.alpha, self.temperature, self.divergence
        terms = self.head(FusedHead.forward, *rows, *loss, sizes_of=self.sizes_of)
        named = {"ce": terms.ce, "kl": terms.kl, "kl_t1": terms.kl_t1}
        if self.stored.head:
            named["stored_mass"] = targets.logprobs.double().exp().sum()
        return LossReport(terms.total, {name: value for name, value in named.items() if value is not None})


def fused_head(student: Any, vocab_size: int, check: bool = True) -> FusedHead:
    """The head of a student with its family's scale or cap of the logits; UserError when they are made otherwise.

    check: compare with the student's own logits; False where the caller does.
    """
    config, embeddings = student.config, student.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    head = FusedHead(embeddings.weight, vocab_size, scale, getattr(config, "final_logit_softcapping", None))
    refused = UserError(
        f"{config.model_type}: logits are not the output embeddings times the decoder's last hidden state; this family "
        "cannot be distilled yet"
    )
    path = decoder_path(student)
    if getattr(embeddings, "bias", None) is not None or not path or "." in path:
        raise refused
    if check and not _same_logits(*_with_weights(student, head)):
        raise refused
    return head


def _with_weights(student: Any, head: FusedHead) -> tuple[Any, FusedHead]:
    """The two as they are; of a student without weights a twin, with a head of 64 random rows."""
    weight = head.weight
    if weight.device.type != "meta":
        return student, head
    twin = model_of(student.config, student.config.model_type)
    rows = torch.randn(min(64, len(weight)), weight.shape[1], generator=torch.Generator().manual_seed(0))
    twin.get_output_embeddings().weight = nn.Parameter(rows, requires_grad=False)
    return twin, FusedHead(twin.get_output_embeddings().weight, len(rows), head.scale, head.softcap)


@torch.no_grad()
def _same_logits(student: Any, head: FusedHead) -> bool:
    """Whether the student makes of random hidden states the logits that `head` does; its decoder is not run."""
    weight = head.weight
    generator = torch.Generator().manual_seed(0)  # on the CPU, so that every device is asked the same
    hidden = torch.randn(1, 2, weight.shape[1], generator=generator, dtype=weight.dtype).to(weight.device)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
    with answering(student, hidden):
        theirs = student(tokens, use_cache=False).logits[..., : head.vocab_size].float()
    return torch.allclose(theirs, head.logits(hidden).float(), atol=1e-2 * float(theirs.abs().max()), rtol=0)


def decoder_path(model: Any) -> str:
    """The name of a causal LM's decoder among its modules; empty where it is the model itself."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


@contextmanager
def answering(model: Any, hidden_BTD: Tensor) -> Iterator[None]:
    """`model` with a decoder that returns these hidden states whatever it reads."""
    path, decoder = decoder_path(model), model.get_decoder()
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, _Answer(hidden_BTD))
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), child, decoder)


class _Answer(nn.Module):
    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return _OnlyHidden(last_hidden_state=self.hidden)  # type: ignore[arg-type]


class _OnlyHidden(MoeModelOutputWithPast):
    """Hidden states; None for all else that a family reads, such as Gemma 4's shared_kv_states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def stored_in(facts: dict[str, Any]) -> Stored:
    """What a manifest's facts say about its targets."""
    tails = tuple(facts["temperatures"]) if facts["tails"] else ()
    draws = facts["draw_temperature"] if facts["draws"] else None
    return Stored(facts["top_k"] > 0, tails, draws, facts["vocab_size"])


def check_support(config: CachedConfig, stored: Stored) -> None:
    """UserError when the targets do not hold what the loss needs."""
    check_targets(config, stored.head, stored.temperatures, stored.draw_temperature)
