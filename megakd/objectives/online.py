"""Multi-component distillation from a frozen live teacher: what it says, what it holds inside, how it attends.

For a MoE teacher it may also choose how the teacher answers, by what the student can follow: how many experts a token
takes, which of them count more, and which positions do.
"""

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.config.objective import OnlineConfig
from megakd.data.records import IGNORED, Batch, Paired, Rows, Side, labelled, scored_spans
from megakd.errors import UserError
from megakd.losses.head import FusedHead
from megakd.losses.hidden import attention_loss, contrastive_loss, feature_loss, gap_weights, layer_map
from megakd.losses.per_token import kl_each
from megakd.losses.reference import DistillTerms
from megakd.losses.signals import Dense
from megakd.losses.spans import span_likelihoods, span_means, span_sizes
from megakd.models.routers import Router, find_routers
from megakd.models.routing import Counts, Routed, choices, experts_for, scheduled, weighed
from megakd.objectives.across import of_tokens, per_token, span_scores, units_of
from megakd.objectives.base import LossReport, Objective, check_spans, projection
from megakd.objectives.cached import fused_head
from megakd.objectives.live_head import LiveHead
from megakd.objectives.student_aware import Estimates, StudentAwareRouter, gap_shares
from megakd.system.dist import sum_over_ranks

KEEP = 0.9  # of what was remembered, each step


class Gap(NamedTuple):
    """KL at T = 1 of each unit, [B, N], and which of them count; of each token of the teacher, [B, U], and which do."""

    units: Rows
    units_BN: Tensor
    counted_BU: Tensor
    tokens_BU: Tensor


# CE and divergence weighted by the gap, named sums, and the gap where something asks for it.
Compared = tuple[Tensor, dict[str, Tensor], Gap | None]


class OnlineDistillation(Objective):
    """loss(batch) = sums of (1 - alpha) CE + alpha (kl T^2 D + feature F + attention A + layers L + contrastive C).

    D: `objective.divergence`, the KL if nothing else is asked for, over the whole vocabulary.
    F: normalised error of the last hidden states behind a projection; L: that of every layer of the student to the one
    that `layer_map` gives it, mean over layers, behind one projection for all (TinyBERT); A: KL of the attentions of
    the same layers, mean over layers; C: each position's last hidden state finds the teacher's among its window's.
    progressive_layers: of L's layers the lowest count alone, one more in equal parts of a stage, in the end all.
    A part with weight 0 costs nothing: attention maps, which need the eager attention, are made only when asked for.

    gap: positions count for D by (KL at T = 1)^gap, with mean 1 over a window.
    capacity: exp(-KL) a token, remembered over steps; with routing=capacity it says how far top_k has come.
    importance: an expert's routing weight counts by (its share of the gap)^importance, remembered over steps.
    routing=learned: heads on the student's hidden states expect capacity, gap and shares, and what they expect takes
    the place of what was measured: capacity token by token, shares window by window (student_aware.py).

    teacher_vocab_size: of a teacher with another tokenizer, whose batches are `Paired`. Then spans of text take the
    place of positions in all parts and in the gap, and T * span_likelihood_loss that of T^2 D (losses/spans.py).
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        config: OnlineConfig,
        vocab_size: int,
        teacher_vocab_size: int | None = None,
    ):
        super().__init__(student, config)
        self.online = online = config
        if teacher_vocab_size is not None:
            check_spans(config)
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
        theirs = fused_head(teacher, teacher_vocab_size or vocab_size)
        self.head = LiveHead(fused_head(student, vocab_size), theirs)
        self.held = (teacher, theirs)  # in a tuple: held, but no child
        self.found: list[Router] = []
        if online.routing != "trained" or online.importance:
            self.found = find_routers(
                teacher, teacher.name_or_path or teacher.config.model_type, online.router_patterns
            )
        self.memory = {"capacity": [0.0]} if online.routing == "capacity" else {}
        self.learned = online.routing == "learned"
        if self.learned:
            experts = [router.experts for router in self.found]
            self.heads = StudentAwareRouter(sizes[0], experts, online.router_lr, online.router_balance)
        elif online.importance:
            self.memory["importance"] = [1.0] * sum(router.experts for router in self.found)
        self.gap_sums: Tensor | None = None
        self.at(0.0)

    def at(self, share: float, step: int = 0) -> None:
        super().at(share, step)
        layers = len(self.layer_of)
        self.layer_count = min(int(share * layers) + 1, layers) if self.online.progressive_layers else layers
        if self.online.routing == "capacity":
            share = self.memory["capacity"][0]
        rule = self.online.routing, self.online.initial_top_k, self.online.final_top_k
        for router in self.found:
            # learned: the most that a token takes; each takes its own number
            shares = (0.0, 1.0) if self.learned else (share,)
            router.take(max(scheduled(router, *rule, each) for each in shares))

    def observe(self, sums: Mapping[str, float], tokens: int) -> None:
        """Remember a step's capacity and how the gap was shared among experts; the same on every rank.

        A gap that is not finite, which an update may have had whose loss does not hold it, is not remembered.
        """
        gap = sums["kl_t1"] if "kl_t1" in sums else sums["span_kl_t1"]
        if not math.isfinite(gap):
            self.forget_step()
            return
        if self.learned:
            self.heads.learn(tokens)
        if self.online.routing == "capacity":
            now = math.exp(-gap / tokens)
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

    def forget_step(self) -> None:
        self.gap_sums = None
        if self.learned:
            self.heads.gradient = None

    def loss(self, batch: Batch) -> LossReport:
        teacher, _ = self.held
        online, units = self.online, units_of(batch)
        own = self._ask(self.student, batch)
        expected = self._expect(own.last_hidden_state, batch) if self.learned else None
        counts = self._counts(expected, batch) if expected else None
        changed = self.found if online.importance or self.learned else []
        # choices refuses routers that take another number of experts than they were told
        with (
            torch.no_grad(),
            choices(self.found),
            weighed(changed, self._factors(batch.tokens.device, expected), counts) as routed,
        ):
            theirs = self._ask(teacher, batch if batch.paired is None else batch.paired.teacher)
        states = own.last_hidden_state, theirs.last_hidden_state
        if batch.paired is None:
            total, named, gap = self._over_positions(*states, batch, expected)
        else:
            total, named, gap = self._over_spans(*states, batch.paired, expected)
        if expected and counts and gap:
            named |= self._fit(expected, counts, gap, routed, (batch.labels != IGNORED).sum(1))
        elif gap and online.importance:
            self._add_gap(routed, gap)
        taken: dict[str, tuple[float, Tensor]] = {}
        if online.feature or online.contrastive:
            hidden, taught = self.projector(units.own(own.last_hidden_state)), units.theirs(theirs.last_hidden_state)
            if online.feature:
                taken["feature"] = online.feature, feature_loss(hidden, taught, units.counted)
            if online.contrastive:
                value = contrastive_loss(hidden, taught, units.counted, online.contrastive_temperature)
                taken["contrastive"] = online.contrastive, value
        if online.layers:
            pairs = zip(own.hidden_states[1:], (theirs.hidden_states[1 + i] for i in self.layer_of), strict=True)
            pairs = islice(pairs, self.layer_count)
            values = [
                feature_loss(self.layer_projector(units.own(s)), units.theirs(t), units.counted) for s, t in pairs
            ]
            taken["layers"] = online.layers, torch.stack(values).mean()
            if online.progressive_layers:
                named["layers_compared"] = (batch.labels != IGNORED).sum() * self.layer_count
        if online.attention:
            pairs = zip(own.attentions, (theirs.attentions[i] for i in self.layer_of), strict=True)
            values = [attention_loss(units.own_maps(s), units.their_maps(t), units.counted) for s, t in pairs]
            taken["attention"] = online.attention, torch.stack(values).mean()
        for name, (weight, value) in taken.items():
            total = total + self.alpha * weight * value
            named[name] = value.detach()
        tokens = (batch.labels != IGNORED).sum()
        if online.routing == "capacity":
            named["capacity"] = tokens * self.memory["capacity"][0]
        if online.routing in ("capacity", "top_m"):
            named["experts"] = tokens * (sum(router.taken for router in self.found) / len(self.found))
        return LossReport(total, named)

    def _over_positions(self, hidden: Tensor, taught: Tensor, batch: Batch, expected: Estimates | None) -> Compared:
        online = self.online
        gap_power = online.gap if online.gap or online.importance or expected else None
        form = {"alpha": self.alpha, "temperature": self.temperature, "divergence": self.divergence}
        form |= {"kl_weight": online.kl, "sizes_of": self.sizes_of}
        by = expected.gap() if expected else None
        terms, gap_BT = self.head(weighted_loss, hidden, Dense(self.held[1], taught), batch, gap_power, by, **form)
        named = {"ce": terms.ce, "kl": terms.kl, "kl_t1": terms.kl_t1, "teacher_ce": terms.teacher_ce}
        gap = None if gap_BT is None else Gap(labelled(batch), gap_BT, batch.labels != IGNORED, gap_BT)
        return terms.total, named, gap

    def _over_spans(self, hidden: Tensor, taught: Tensor, paired: Paired, expected: Estimates | None) -> Compared:
        settings = self.online
        scores = self.head(span_scores, self.held[1], hidden, taught, paired, self.sizes_of)
        sides, there = (scores.student_BS, scores.teacher_BS, scores.there), scores.there
        with torch.no_grad():
            gap_N = span_likelihoods(*sides, 1.0)
            gap_BS = there.place(gap_N)
        by = expected.gap() if expected else gap_BS
        weights_N = there.pick(gap_weights(by, there.place(torch.ones_like(gap_N)) > 0, settings.gap))
        likelihood = (weights_N * span_likelihoods(*sides, self.temperature)).sum()
        total = (1 - self.alpha) * scores.ce + self.alpha * settings.kl * self.temperature * likelihood
        named = {"ce": scores.ce.detach(), "span_kl": likelihood.detach(), "span_kl_t1": gap_N.sum()}
        named["teacher_ce"] = scores.teacher_ce
        # a span's gap, in equal parts, is that of the tokens whose labels are its own
        spans = paired.teacher.label_spans
        sizes_BS = span_sizes(spans, gap_BS.shape[1]).clamp(min=1)
        return total, named, Gap(there, gap_BS, spans >= 0, of_tokens(gap_BS / sizes_BS, spans))

    def _ask(self, model: Any, batch: Batch | Side) -> Any:
        wanted = {"output_hidden_states": self.online.layers > 0, "output_attentions": self.online.attention > 0}
        out = model.get_decoder()(batch.tokens, position_ids=batch.position_ids, use_cache=False, **wanted)
        if self.online.attention and (maps := len(out.attentions)) < (layers := model.config.num_hidden_layers):
            raise UserError(
                f"{model.name_or_path or model.config.model_type}: only {maps} of its {layers} layers give attention "
                "maps; set objective.attention=0 in a new run"
            )
        return out

    def _expect(self, hidden_BTD: Tensor, batch: Batch) -> Estimates:
        """What the heads expect of each position, or of each span from the states that predict its tokens."""
        if batch.paired is None:
            return self.heads.estimate(hidden_BTD, labelled(batch))
        scored = scored_spans(batch.paired)
        means_BSD, _ = span_means(hidden_BTD.detach(), batch.paired.student.label_spans, scored.length)
        return self.heads.estimate(means_BSD, scored)

    def _counts(self, expected: Estimates, batch: Batch) -> Counts:
        """Experts for each of the teacher's tokens by its capacity; of a token without a span, as at capacity 0."""
        capacity_BU, (first, last) = expected.capacity(), (self.online.initial_top_k, self.online.final_top_k)
        if batch.paired is not None:
            capacity_BU = of_tokens(capacity_BU, batch.paired.teacher.label_spans)
        return Counts(experts_for(capacity_BU, first, last).flatten(), min(first, last))

    def _factors(self, device: torch.device, expected: Estimates | None) -> list[Tensor] | None:
        """What each router's experts count, [E] each, in one copy to the device; by the heads [B, E]."""
        if not self.online.importance:
            return None
        if expected:
            return expected.importance(self.online.importance)
        importance = torch.tensor(self.memory["importance"]).to(device, non_blocking=True).clamp(min=1e-6)
        return [part**self.online.importance for part in importance.split([router.experts for router in self.found])]

    def _fit(
        self, expected: Estimates, counts: Counts, gap: Gap, routed: list[Routed], tokens_B: Tensor
    ) -> dict[str, Tensor]:
        """Have the heads learn from what was measured; named sums. tokens_B: of the student."""
        shares = gap_shares(routed, gap.counted_BU, gap.tokens_BU, self.heads.experts)
        named = self.heads.fit(expected, gap.units, gap.units_BN, shares)
        taken_BU = counts.tokens_N.view(gap.counted_BU.shape)
        each = [taken_BU.clamp(max=router.experts).float() for router in self.found]
        named["experts"] = (torch.stack(each).mean(0) * per_token(gap.counted_BU, tokens_B)).sum()
        return named

    def _add_gap(self, routed: list[Routed], gap: Gap) -> None:
        """Add up each expert's share of the gap: sum over the teacher's counted tokens of gap times routing weight."""
        counted_M1, gap_M1 = gap.counted_BU.flatten()[:, None], gap.tokens_BU.flatten()[:, None]
        sums = []
        for router, (weights, experts, _) in zip(self.found, routed, strict=True):
            share = weights.float() / weights.float().sum(-1, keepdim=True).clamp(min=1e-12)
            part = torch.where(counted_M1, share * gap_M1, 0.0)
            sums.append(share.new_zeros(router.experts).index_add(0, experts.flatten(), part.flatten()))
        found = torch.cat(sums)
        self.gap_sums = found if self.gap_sums is None else self.gap_sums + found


def weighted_loss(
    own: FusedHead,
    hidden_BTD: Tensor,
    everywhere: Dense,
    batch: Batch,
    gap_power: float | None,
    expected_BT: Tensor | None = None,
    **form: Any,
) -> tuple[DistillTerms, Tensor | None]:
    """The loss of `own` over the labelled positions, weighted by (KL at T = 1)^gap_power; that KL of each, [B, T].

    everywhere: the teacher at all positions, [B, T, G]. gap_power: None for equal weights, and no KL. expected_BT: a KL
    to weigh by instead. form: the settings of `FusedHead.forward`.
    """
    rows = labelled(batch)
    hidden_ND, taught_NG, labels_N = map(rows.pick, (hidden_BTD, everywhere.hidden_NG, batch.labels))
    teacher, gap_BT = Dense(everywhere.head, taught_NG), None
    if gap_power is not None:
        gap_BT = rows.place(kl_each(teacher.head, taught_NG, own, hidden_ND))
        by_BT = gap_BT if expected_BT is None else expected_BT
        weights_N = rows.pick(gap_weights(by_BT, batch.labels != IGNORED, gap_power))
        teacher = teacher._replace(weights_N=weights_N)
    return own(hidden_ND, labels_N, teacher, **form), gap_BT
