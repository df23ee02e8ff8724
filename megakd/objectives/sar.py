"""SAR-KD: a student learns from a MoE live teacher, and the teacher's routers alone learn with it.

Nothing else of the teacher changes. The routers get their gradient through the routing weights, from how well the
student can follow; what keeps them from the trivial way out (a teacher as bad as the student) are the terms of
losses/router.py.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from megakd.config.objective import SarConfig
from megakd.data.records import IGNORED, Batch, Paired, Side, labelled, shared_spans
from megakd.errors import UserError
from megakd.losses.head import FusedHead
from megakd.losses.per_token import kl_each
from megakd.losses.router import anchor, load_balance, routing_entropy
from megakd.losses.signals import Dense
from megakd.losses.spans import span_feature_loss, span_likelihood_loss, span_means
from megakd.models.routers import Router, find_routers
from megakd.models.routing import Choice, choices, copies, in_place_of, learns_nothing, scheduled
from megakd.objectives.across import per_token, span_scores
from megakd.objectives.base import LossReport, Objective, check_spans, last_hidden, projection
from megakd.objectives.cached import fused_head
from megakd.objectives.live_head import LiveHead
from megakd.system.dist import sum_over_ranks

SEPARATOR = ":"


class SarDistillation(Objective):
    """loss(batch) = sums of (1 - alpha) CE + alpha T^2 D and of the routers' terms, over labelled positions.

    D: `objective.divergence`, the KL if nothing else is asked for, over the whole vocabulary.

    student and routers are trained, and are all that engines see; the teacher around the routers is held, frozen.
    The teacher's part before its first router keeps nothing for the backward pass, for nothing there needs gradients.

    teacher_vocab_size: of a teacher with another tokenizer, whose batches are `Paired`. Then D is a sum over spans:
    likelihood * T * span_likelihood_loss + features * span_feature_loss (losses/spans.py).
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        config: SarConfig,
        vocab_size: int,
        teacher_vocab_size: int | None = None,
    ):
        super().__init__(student, config)
        self.settings, self.teacher_vocab_size = config, teacher_vocab_size
        if teacher_vocab_size is not None:
            check_spans(config)
        self.head = LiveHead(fused_head(student, vocab_size))
        teacher.requires_grad_(False).eval()
        self.found = find_routers(teacher, teacher.name_or_path or teacher.config.model_type, config.router_patterns)
        check_schedule(self.found, config)
        # in tuples: held, but no children, so that engines, optimizers and checkpoints see the routers alone
        self.held = (teacher, fused_head(teacher, teacher_vocab_size or vocab_size))
        self.initial = tuple(copies(self.found))
        # a module's name has no dots
        self.routers = nn.ModuleDict({router.name.replace(".", SEPARATOR): router.module for router in self.found})
        for parameter in self.routers.parameters():
            parameter.requires_grad_()
            parameter.no_decay = True  # type: ignore[attr-defined]  # the anchor holds them, not 0
            parameter.lr_multiplier = config.router_lr_multiplier  # type: ignore[attr-defined]  # where no rule is theirs
        if teacher_vocab_size is not None and config.features:
            self.projector = projection(student.config.hidden_size, teacher.config.hidden_size)
        self.largest: Tensor | None = None  # of this rank's router gradients, in the first step whose are finite
        self.hooks = [parameter.register_hook(self._note) for parameter in self.routers.parameters()]
        self.at(0.0)

    def at(self, share: float, step: int = 0) -> None:
        """Besides, how many experts a token takes; the second call looks at the first step's gradients.

        All ranks call it together.
        """
        if self.hooks and self.largest is not None:
            self._check_gradient()
        super().at(share, step)
        self.step = step
        rule = self.settings.routing, self.settings.initial_top_k, self.settings.final_top_k
        for router in self.found:
            router.take(scheduled(router, *rule, share))

    def checkpoint_activations(self) -> None:
        super().checkpoint_activations()
        self.checkpoint_teacher()

    def checkpoint_teacher(self) -> None:
        teacher = self.held[0]
        teacher.gradient_checkpointing_enable({"use_reentrant": False})
        for module in teacher.modules():
            # a layer does so only while it trains; what is inside it goes on without dropout and noise
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    def loss(self, batch: Batch) -> LossReport:
        teacher, _ = self.held
        theirs = batch if batch.paired is None else batch.paired.teacher  # what the teacher reads
        rows, rows_there, counted_there = labelled(batch), labelled(theirs), theirs.labels != IGNORED
        tokens_B = (batch.labels != IGNORED).sum(1)
        hidden = last_hidden(self.student, batch)
        with choices(self.found) as chosen:
            taught = last_hidden(teacher, theirs)
        if batch.paired is None:
            signal = Dense(self.held[1], rows.pick(taught))
            picked = rows.pick(hidden), rows.pick(batch.labels)
            form = self.alpha, self.temperature, self.divergence
            terms = self.head(FusedHead.forward, *picked, signal, *form, sizes_of=self.sizes_of)
            named = {"ce": terms.ce, "kl": terms.kl, "kl_t1": terms.kl_t1, "teacher_ce": terms.teacher_ce}
            total = terms.total
        else:
            total, named = self._over_spans(hidden, taught, batch.paired)
        for name, weight, value in self._router_terms(chosen, counted_there, tokens_B):
            total = total + weight * value
            named[name] = value.detach()
        if self.settings.drift_steps and self.step % self.settings.drift_steps == 0:
            alike = rows.pick(hidden).detach() if batch.paired is None else None
            named |= self._drift(theirs, alike, rows_there.pick(taught).detach(), tokens_B)
        return LossReport(total, named)

    def _over_spans(self, hidden_BTD: Tensor, taught_BUG: Tensor, paired: Paired) -> tuple[Tensor, dict[str, Tensor]]:
        """CE and divergence over spans of text, for a teacher with another tokenizer; named sums."""
        scores = self.head(span_scores, self.held[1], hidden_BTD, taught_BUG, paired, self.sizes_of)
        likelihood = span_likelihood_loss(scores.student_BS, scores.teacher_BS, scores.there, self.temperature)
        divergence = self.settings.likelihood * self.temperature * likelihood
        named = {"ce": scores.ce, "span_kl": likelihood, "teacher_ce": scores.teacher_ce}
        if self.settings.features:
            there = shared_spans(paired)
            student_BSD, _ = span_means(hidden_BTD, paired.student.spans, there.length)
            teacher_BSG, _ = span_means(taught_BUG, paired.teacher.spans, there.length)
            features = span_feature_loss(self.projector(student_BSD), teacher_BSG, there)
            divergence = divergence + self.settings.features * features
            named["features"] = features
        total = (1 - self.alpha) * scores.ce + self.alpha * divergence
        return total, {name: value.detach() for name, value in named.items()}

    def _router_terms(self, chosen: list[Choice], counted: Tensor, tokens_B: Tensor) -> list[tuple[str, float, Tensor]]:
        """(name, weight, sum over the student's counted tokens) of what holds the routers.

        counted: positions of the teacher; a window's mean over them counts for each of the student's tokens in it.
        """
        shape = counted.shape
        share = per_token(counted, tokens_B)
        certainty = torch.stack([((1 - routing_entropy(c.logits).view(shape)) * share).sum() for c in chosen]).mean()
        windows = [load_balance(c.logits.view(*shape, -1), c.experts.view(*shape, -1), counted) for c in chosen]
        balance = (torch.stack(windows).mean(0) * tokens_B).sum()
        weights: list[Any] = [module.weight for module in self.routers.values()]
        moved = anchor(weights, self._initial_weights(weights[0].device), self.settings.anchor_form)
        return [
            ("router_anchor", self.settings.anchor, moved * tokens_B.sum()),
            ("router_certainty", self.settings.entropy, certainty),
            ("router_balance", self.settings.balance, balance),
        ]

    def _initial_weights(self, device: torch.device) -> list[Tensor]:
        """The routers' weights as they were; of an offloaded teacher they come to the device in the first step."""
        found: list[Any] = [module.weight for module in self.initial]
        for weight in found:
            if weight.device != device:
                weight.data = weight.data.to(device)
        return found

    @torch.no_grad()
    def _drift(
        self, theirs: Batch | Side, hidden_ND: Tensor | None, taught_NG: Tensor, tokens_B: Tensor
    ) -> dict[str, Tensor]:
        """KL(teacher as it was || student) and KL(teacher as it was || teacher as it is) at T = 1.

        A window's mean counts for each of the student's tokens in it (tokens_B). hidden_ND: None for a student with
        another tokenizer, which no KL compares with.
        """
        (teacher, head), rows = self.held, labelled(theirs)
        with in_place_of(self.found, self.initial):
            before_NG = rows.pick(last_hidden(teacher, theirs))
        share_N = rows.pick(per_token(theirs.labels != IGNORED, tokens_B))
        named = {"teacher_drift": (share_N * kl_each(head, before_NG, head, taught_NG)).sum()}
        if hidden_ND is not None:
            named["kl_frozen"] = (share_N * kl_each(head, before_NG, self.head.head, hidden_ND)).sum()
        return named

    def _note(self, gradient: Tensor) -> None:
        # torch.maximum keeps NaN, and waits for no device
        largest = gradient.detach().abs().max()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def _check_gradient(self) -> None:
        """UserError when the first step left every router of all ranks without a gradient; looked at once.

        The next step counts where the teacher had no part in the loss (alpha 0), and where gradients are not finite:
        the engine makes no update then.
        """
        assert self.largest is not None
        if not self.alpha:
            self.largest = None
            return
        (largest,) = sum_over_ranks([self.largest.item()], self.largest.device)
        self.largest = None
        if not math.isfinite(largest):
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if not largest:
            raise UserError(
                "sar: the routers got no gradient in the first step; the student's loss does not reach them; "
                "to learn from a frozen teacher, make a new run with objective.kind=online"
            )


def check_schedule(routers: list[Router], sar: SarConfig) -> None:
    """UserError where routers can learn nothing, as with one expert a token and normalised weights."""
    for router in routers:
        counts = {scheduled(router, sar.routing, sar.initial_top_k, sar.final_top_k, share) for share in (0.0, 1.0)}
        if router.module.weight.device.type == "meta":
            continue
        before = router.taken
        router.take(min(counts))
        nothing = learns_nothing(router)
        router.take(before)
        if nothing and min(counts) > 1:
            raise UserError(
                f"{router.name} learns nothing: outside training its family's routing weights do not depend on its "
                "logits; to learn from a frozen teacher, make a new run with objective.kind=online"
            )
        if nothing:
            raise UserError(
                f"objective.routing: {sar.routing} gives {router.name} one expert a token, and this family normalises "
                "the "
                "routing weights: the one weight is x / x = 1, so the router's gradient is exactly zero; set "
                "objective.routing=all, or top_m with objective.initial_top_k=2"
            )
