"""Multi-component distillation from a frozen teacher that is there: what it says, what it holds inside, how it attends.

For a MoE teacher it may also choose how the teacher answers, by what the student can follow: how many experts a token
takes, which of them count more, and which positions do.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megakd.config import ObjectiveConfig, OnlineConfig
from megakd.data.records import IGNORED, Batch
from megakd.dist import sum_over_ranks
from megakd.losses.fused import FusedHead
from megakd.losses.hidden import attention_loss, contrastive_loss, feature_loss, gap_weights, layer_map
from megakd.losses.live import LiveTerms, live_loss
from megakd.models.routing import Router, find_routers, scheduled, weighed
from megakd.objectives.base import LossReport, Objective, projection
from megakd.objectives.cached import fused_head
from megakd.objectives.sar import kl_each

KEEP = 0.9  # of what was remembered, each step


class OnlineDistillation(Objective):
    """forward(batch) = sums of (1 - alpha) CE + alpha (kl T^2 KL + feature F + attention A + layers L + contrastive C).

    F: normalised error of the last hidden states behind a projection; L: that of every layer of the student to the one
    that `layer_map` gives it, mean over layers, behind one projection for all (TinyBERT); A: KL of the attentions of
    the same layers, mean over layers; C: each position's last hidden state finds the teacher's among its window's.
    A part with weight 0 costs nothing: attention maps, which need the eager attention, are made only when asked for.

    gap: positions count for the KL by (KL at T = 1)^gap, with mean 1 over a window.
    capacity: exp(-KL) a token, remembered over steps; with routing=capacity it says how far top_k has come.
    importance: an expert's routing weight counts by (its share of the gap)^importance, remembered over steps.
    """

    def __init__(self, student: Any, teacher: Any, config: ObjectiveConfig, online: OnlineConfig, vocab_size: int):
        super().__init__(student, config)
        self.online, self.vocab_size = online, vocab_size
        teacher.requires_grad_(False).eval()
        if online.attention:
            for model in (student, teacher):
                model.set_attn_implementation("eager")  # the others never have the probabilities
        sizes = student.config.hidden_size, teacher.config.hidden_size
        if online.feature or online.contrastive:
            self.projector = projection(*sizes)
        if online.layers:
            self.layer_projector = projection(*sizes)
        self.layer_of = layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
        self.head = OnlineHead(fused_head(student, vocab_size))
        self.held = (teacher, fused_head(teacher, vocab_size))  # in a tuple: held, but no child
        self.found: list[Router] = []
        if online.routing != "trained" or online.importance:
            self.found = find_routers(
                teacher, teacher.name_or_path or teacher.config.model_type, online.router_patterns
            )
        self.memory = {"capacity": [0.0]} if online.routing == "capacity" else {}
        if online.importance:
            self.memory["importance"] = [1.0] * sum(router.experts for router in self.found)
        self.gap_sums: Tensor | None = None
        self.at(0.0)

    def at(self, share: float, step: int = 0) -> None:
        super().at(share, step)
        if self.online.routing == "capacity":
            share = self.memory["capacity"][0]
        rule = self.online.routing, self.online.initial_top_k, self.online.final_top_k
        for router in self.found:
            router.take(scheduled(router, *rule, share))

    def observe(self, sums: Mapping[str, float], tokens: int) -> None:
        """Remember a step's capacity and how the gap was shared among experts; the same on every rank."""
        if "capacity" in self.memory:
            now = math.exp(-sums["kl_t1"] / tokens)
            self.memory["capacity"] = [KEEP * self.memory["capacity"][0] + (1 - KEEP) * now]
        if self.gap_sums is not None:
            found = torch.tensor(sum_over_ranks(self.gap_sums.double().flatten().tolist(), self.gap_sums.device))
            parts = found.split([router.experts for router in self.found])
            shares = torch.cat([part * len(part) / part.sum().clamp(min=1e-12) for part in parts])
            before = self.memory["importance"]
            self.memory["importance"] = [
                KEEP * b + (1 - KEEP) * n for b, n in zip(before, shares.tolist(), strict=True)
            ]
            self.gap_sums = None

    def forward(self, batch: Batch) -> LossReport:
        teacher, teacher_head = self.held
        online, counted = self.online, batch.labels != IGNORED
        own = self._ask(self.student, batch)
        with torch.no_grad(), weighed(self.found, self._factors()) as chosen:
            theirs = self._ask(teacher, batch)
        hidden, taught = own.last_hidden_state, theirs.last_hidden_state
        terms, gap_N = self.head(self, hidden, taught, batch.labels, teacher_head)
        if online.importance:
            self._add_gap(chosen, counted, gap_N)
        named = {"ce": terms.ce, "kl": terms.kl, "kl_t1": terms.kl_t1, "teacher_ce": terms.teacher_ce}
        taken: dict[str, tuple[float, Tensor]] = {}
        if online.feature:
            taken["feature"] = online.feature, feature_loss(self.projector(hidden), taught, counted)
        if online.contrastive:
            value = contrastive_loss(self.projector(hidden), taught, counted, online.contrastive_temperature)
            taken["contrastive"] = online.contrastive, value
        if online.layers:
            pairs = zip(own.hidden_states[1:], (theirs.hidden_states[1 + i] for i in self.layer_of), strict=True)
            values = [feature_loss(self.layer_projector(s), t, counted) for s, t in pairs]
            taken["layers"] = online.layers, torch.stack(values).mean()
        if online.attention:
            pairs = zip(own.attentions, (theirs.attentions[i] for i in self.layer_of), strict=True)
            taken["attention"] = online.attention, torch.stack([attention_loss(s, t, counted) for s, t in pairs]).mean()
        total = terms.total
        for name, (weight, value) in taken.items():
            total = total + self.alpha * weight * value
            named[name] = value.detach()
        if "capacity" in self.memory:
            named["capacity"] = counted.sum() * self.memory["capacity"][0]
        return LossReport(total, named)

    def _ask(self, model: Any, batch: Batch) -> Any:
        wanted = {"output_hidden_states": self.online.layers > 0, "output_attentions": self.online.attention > 0}
        return model.get_decoder()(batch.tokens, position_ids=batch.position_ids, use_cache=False, **wanted)

    def _factors(self) -> list[Tensor] | None:
        """What each router's experts count, [E] each."""
        if not self.online.importance:
            return None
        importance = torch.tensor(self.memory["importance"]).clamp(min=1e-6)
        return [part**self.online.importance for part in importance.split([router.experts for router in self.found])]

    def _add_gap(self, chosen: list[tuple[Tensor, Tensor]], counted: Tensor, gap_N: Tensor) -> None:
        """Add up each expert's share of the positions' gap: sum over tokens of gap times routing weight."""
        sums = []
        for router, (weights, experts) in zip(self.found, chosen, strict=True):
            weights, experts = weights[counted.flatten()], experts[counted.flatten()]
            share = weights.float() / weights.float().sum(-1, keepdim=True).clamp(min=1e-12)
            found = share.new_zeros(router.experts)
            sums.append(found.index_add(0, experts.flatten(), (share * gap_N[:, None]).flatten()))
        found = torch.cat(sums)
        self.gap_sums = found if self.gap_sums is None else self.gap_sums + found


class OnlineHead(nn.Module):
    """The student's head and what stands behind it; a module, because ZeRO-3 gathers the weight while it runs."""

    def __init__(self, head: FusedHead):
        super().__init__()
        self.head = head

    def forward(
        self, online: OnlineDistillation, hidden: Tensor, taught: Tensor, labels: Tensor, teacher: FusedHead
    ) -> tuple[LiveTerms, Tensor | None]:
        """`live_loss`, the KL weighted by the gap; and the gap, KL at T = 1 of each counted position, [N]."""
        counted, settings = labels != IGNORED, online.online
        hidden_ND, taught_NG, labels_N = hidden[counted], taught[counted], labels[counted]
        weights_N = gap_N = None
        if settings.gap or settings.importance:
            gap_N = kl_each(teacher, taught_NG, self.head, hidden_ND)
            gap_BT = gap_N.new_zeros(labels.shape).masked_scatter(counted, gap_N)
            weights_N = gap_weights(gap_BT, counted, settings.gap)[counted]
        terms = live_loss(
            self.head.logits, teacher.logits, hidden_ND, taught_NG, labels_N, online.alpha, online.temperature,
            online.vocab_size, weights_N, settings.kl,
        )  # fmt: skip
        return terms, gap_N
