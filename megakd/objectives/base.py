"""What an objective is and returns: the one thing engines and the loop know about training."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megakd.config.objective import LossConfig
from megakd.config.precisions import Quantize
from megakd.data.records import IGNORED, Batch, Side, labelled
from megakd.errors import UserError
from megakd.losses.divergence import Divergence
from megakd.losses.head import Device
from megakd.losses.per_token import label_logprobs
from megakd.models.quantizing import fake_quantize, see_rounded
from megakd.objectives.live_head import LiveHead


class LossReport(NamedTuple):
    """Sums over the counted tokens of a batch. A NamedTuple: ZeRO-3's hooks look inside tuples and dicts only.

    total: what is differentiated. terms: named detached sums for the log.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """forward(Batch) -> LossReport. `student` and whatever else it registers is trained, by the stage's rules.

    A kind of objective has a `loss`, and a `head`: the student's output head, which held-out text is measured with.
    alpha, temperature: what is in force, by `at`. divergence: of the stage.
    memory: what steps leave for those after them; in checkpoints.
    sizes_of: the device whose sizes of chunks the loss takes; None: the tensors' own.
    """

    head: LiveHead

    def __init__(self, student: Any, config: LossConfig):
        super().__init__()
        self.student = student
        self.config = config
        self.divergence = Divergence(config.divergence, config.mix)
        self.memory: dict[str, list[float]] = {}
        self.sizes_of: Device | None = None

    def forward(self, batch: Batch, held_out: bool = False) -> LossReport:
        """`loss`; with held_out the student's alone: total, the sum of -log p over `labels` labelled positions.

        One forward for both, because ZeRO-3 gathers weights for calls of the module that the engine wraps alone.
        """
        if not held_out:
            return self.loss(batch)
        rows = labelled(batch)
        hidden_ND, labels_N = rows.pick(last_hidden(self.student, batch)), rows.pick(batch.labels)
        nll = -self.head(label_logprobs, hidden_ND, labels_N, self.sizes_of).double().sum()
        return LossReport(nll, {"labels": (batch.labels != IGNORED).sum()})

    def loss(self, batch: Batch) -> LossReport:
        """The sums of a training batch: what is differentiated, and what is logged."""
        raise NotImplementedError

    @torch.no_grad()
    def restore(self, auxiliary: Mapping[str, Tensor]) -> None:
        """Set what is trained besides the student, and its buffers, by name.

        What other stages train, and this one does not, becomes a buffer of that name: checkpoints keep it as it is.
        """
        mine = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, tensor in auxiliary.items():
            if name in mine:
                mine[name].copy_(tensor)
            else:
                _keep(self, name, tensor)

    def at(self, share: float, step: int = 0) -> None:
        """Set alpha and the temperature for this share of the stage, 0 to 1; step: those done in all. Once a step."""
        self.alpha, self.temperature = (
            value[0] + share * (value[1] - value[0]) if isinstance(value, tuple) else value
            for value in (self.config.alpha, self.config.temperature)
        )

    def quantize(self, said: Quantize, place: str) -> None:
        """Round the student's weights in every forward pass, those of its head for the loss too (`fake_quantize`)."""
        rules, head = fake_quantize(self.student, said, place), self.head.head
        if id(head.weight) in rules:
            see_rounded(self.head, head, {"weight": rules[id(head.weight)]})

    def checkpoint_activations(self) -> None:
        """Activation checkpointing of the student: recompute each layer's activations in the backward pass."""
        self.student.gradient_checkpointing_enable({"use_reentrant": False})

    def checkpoint_teacher(self) -> None:
        """The same for a teacher that gradients go through, and for nothing else."""

    def observe(self, sums: Mapping[str, float], tokens: int) -> None:
        """After an update: its step's sums over all ranks, and its counted tokens. Called by all ranks together."""

    def forget_step(self) -> None:
        """After a step whose update was skipped: drop what its forward passes left for `observe`."""

    def recall(self, memory: Mapping[str, list[float]]) -> list[str]:
        """Take the memory of a checkpoint; returns the names that are not finite, which begin anew.

        Older versions put what skipped steps had measured into the memory, NaN too.
        """
        damaged = [name for name, values in memory.items() if not all(map(math.isfinite, values))]
        self.memory |= {name: list(values) for name, values in memory.items() if name not in damaged}
        return damaged


def _keep(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a buffer by its whole name, below modules that hold nothing else."""
    *places, last = name.split(".")
    for place in places:
        if place not in module._modules:
            module.add_module(place, nn.Module())
        module = module.get_submodule(place)
    module.register_buffer(last, tensor)


def check_spans(config: LossConfig) -> None:
    """UserError for a divergence that spans of text, the units of two tokenizers, do not have."""
    if config.divergence != "kl":
        raise UserError(
            f"objective.divergence: {config.divergence} compares distributions over one vocabulary, but the teacher's "
            "tokenizer is not the student's: spans of text have the likelihood loss alone; set objective.divergence=kl"
        )


def last_hidden(model: Any, batch: Batch | Side) -> Tensor:
    return model.get_decoder()(batch.tokens, position_ids=batch.position_ids, use_cache=False).last_hidden_state


def projection(student: int, teacher: int) -> nn.Linear:
    """The student's hidden states in the teacher's width; the same on every rank."""
    linear = nn.Linear(student, teacher, bias=False)
    if linear.weight.device.type != "meta":
        nn.init.normal_(linear.weight, std=student**-0.5, generator=torch.Generator().manual_seed(0))
    return linear
