"""SAR-KD: a student learns from a MoE teacher that is there, and the teacher's routers alone learn with it.

Nothing else of the teacher changes. The routers get their gradient through the routing weights, from how well the
student can follow; what keeps them from the trivial way out (a teacher as bad as the student) are the terms of
losses/router.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megakd.config import ObjectiveConfig, SarConfig
from megakd.data.records import IGNORED, Batch
from megakd.errors import UserError
from megakd.losses.fused import FusedHead
from megakd.losses.live import kl_rows, live_loss
from megakd.losses.router import anchor, load_balance, routing_entropy
from megakd.models.routing import Choice, Router, choices, copies, find_routers, in_place_of, learns_nothing
from megakd.objectives.base import LossReport, Objective
from megakd.objectives.cached import fused_head

SEPARATOR = ":"
ROWS = 256  # of logits at once, where no gradient is needed


class SarDistillation(Objective):
    """forward(batch) = sums of (1 - alpha) CE + alpha T^2 KL and of the routers' terms, over labelled positions.

    student and routers are trained, and are all that engines see; the teacher around the routers is held, frozen.
    The teacher's part before its first router keeps nothing for the backward pass, for nothing there needs gradients.
    """

    def __init__(self, student: Any, teacher: Any, config: ObjectiveConfig, sar: SarConfig, vocab_size: int):
        super().__init__(student, config)
        self.sar, self.vocab_size = sar, vocab_size
        self.head = LiveHead(fused_head(student, vocab_size))
        teacher.requires_grad_(False).eval()
        self.found = find_routers(teacher, teacher.name_or_path or teacher.config.model_type, sar.router_patterns)
        check_schedule(self.found, sar)
        # in tuples: held, but no children, so that engines, optimizers and checkpoints see the routers alone
        self.held = (teacher, fused_head(teacher, vocab_size))
        self.initial = tuple(copies(self.found))
        # a module's name has no dots
        self.routers = nn.ModuleDict({router.name.replace(".", SEPARATOR): router.module for router in self.found})
        for parameter in self.routers.parameters():
            parameter.requires_grad_()
            parameter.no_decay = True  # type: ignore[attr-defined]  # the anchor holds them, not 0
        self.largest: float | None = None  # of the routers' gradients, in the first step
        self.hooks = [parameter.register_hook(self._note) for parameter in self.routers.parameters()]
        self.at(0.0)

    def at(self, share: float, step: int = 0) -> None:
        """Besides, how many experts a token takes; the second call looks at the first step's gradients."""
        super().at(share, step)
        self.step = step
        if self.hooks and self.largest is not None:
            self._check_gradient()
        for router in self.found:
            router.take(active_at(router, self.sar, share))

    def forward(self, batch: Batch) -> LossReport:
        teacher, _ = self.held
        counted = batch.labels != IGNORED
        hidden = self._hidden(self.student, batch)[counted]
        with choices(self.found) as chosen:
            taught = self._hidden(teacher, batch)[counted]
        terms = self.head(hidden, taught, batch.labels[counted], self)
        named = {"ce": terms.ce, "kl": terms.kl, "kl_t1": terms.kl_t1, "teacher_ce": terms.teacher_ce}
        total = terms.total
        for name, weight, value in self._router_terms(chosen, counted):
            total = total + weight * value
            named[name] = value.detach()
        if self.sar.drift_steps and self.step % self.sar.drift_steps == 0:
            named |= self._drift(batch, counted, hidden.detach(), taught.detach())
        return LossReport(total, named)

    def _hidden(self, model: Any, batch: Batch) -> Tensor:
        return model.get_decoder()(batch.tokens, position_ids=batch.position_ids, use_cache=False).last_hidden_state

    def _router_terms(self, chosen: list[Choice], counted: Tensor) -> list[tuple[str, float, Tensor]]:
        """(name, weight, sum over counted positions) of what holds the routers."""
        tokens_B = counted.sum(1)
        shape = counted.shape
        entropy = torch.stack([routing_entropy(c.logits)[counted.flatten()].sum() for c in chosen]).mean()
        windows = [load_balance(c.logits.view(*shape, -1), c.experts.view(*shape, -1), counted) for c in chosen]
        balance = (torch.stack(windows).mean(0) * tokens_B).sum()
        weights: list[Any] = [module.weight for module in self.routers.values()]
        moved = anchor(weights, [module.weight.to(weights[0].device) for module in self.initial])  # type: ignore
        return [
            ("router_anchor", self.sar.anchor, moved * tokens_B.sum()),
            ("router_certainty", self.sar.entropy, tokens_B.sum() - entropy),
            ("router_balance", self.sar.balance, balance),
        ]

    @torch.no_grad()
    def _drift(self, batch: Batch, counted: Tensor, hidden: Tensor, taught: Tensor) -> dict[str, Tensor]:
        """Sums of KL from the teacher as it was to the student, and to the teacher as it is, at T = 1."""
        teacher, head = self.held
        with in_place_of(self.found, self.initial):
            before = self._hidden(teacher, batch)[counted]
        return self.head.drift(before, hidden, taught, head)

    def _note(self, gradient: Tensor) -> None:
        self.largest = max(self.largest or 0.0, float(gradient.detach().abs().max()))

    def _check_gradient(self) -> None:
        """UserError when the first step left every router without a gradient; looked at once."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if not self.largest:
            raise UserError(
                "sar: the routers got no gradient in the first step; the student's loss does not reach them. With "
                "objective.alpha=0 the teacher has no part in the loss"
            )


class LiveHead(nn.Module):
    """The student's head and the loss behind it; a module, because ZeRO-3 gathers the weight while it runs."""

    def __init__(self, head: FusedHead):
        super().__init__()
        self.head = head

    def forward(self, hidden_ND: Tensor, taught_NG: Tensor, labels_N: Tensor, sar: SarDistillation) -> Any:
        _, teacher_head = sar.held
        return live_loss(
            self.head.logits, teacher_head.logits, hidden_ND, taught_NG, labels_N, sar.alpha, sar.temperature,
            sar.vocab_size,
        )  # fmt: skip

    def drift(self, before_NG: Tensor, hidden_ND: Tensor, taught_NG: Tensor, teacher: FusedHead) -> dict[str, Tensor]:
        """Sums of KL(teacher as it was || student) and of KL(teacher as it was || teacher as it is), at T = 1."""
        frozen, moved = [], []
        for before, hidden, taught in zip(
            before_NG.split(ROWS), hidden_ND.split(ROWS), taught_NG.split(ROWS), strict=True
        ):
            was = teacher.logits(before).float()
            frozen.append(kl_rows(was, self.head.logits(hidden).float()).sum())
            moved.append(kl_rows(was, teacher.logits(taught).float()).sum())
        return {"kl_frozen": torch.stack(frozen).sum(), "teacher_drift": torch.stack(moved).sum()}


def active_at(router: Router, sar: SarConfig, share: float) -> int:
    """Experts a token takes at this share of a stage, 0 to 1; never more than there are."""
    if sar.routing == "trained":
        return router.active
    if sar.routing == "all":
        return router.experts
    span = sar.final_top_k - sar.initial_top_k
    steps = min(int(share * (abs(span) + 1)), abs(span))
    return min(sar.initial_top_k + (steps if span > 0 else -steps), router.experts)


def check_schedule(routers: list[Router], sar: SarConfig) -> None:
    """UserError where routers can learn nothing: one expert a token, with normalised weights."""
    for router in routers:
        counts = {active_at(router, sar, share) for share in (0.0, 1.0)}
        if min(counts) > 1 or router.module.weight.device.type == "meta":
            continue
        before = router.holder.top_k
        router.take(1)
        nothing = learns_nothing(router)
        router.take(before)
        if nothing:
            raise UserError(
                f"sar.routing: {sar.routing} gives {router.name} one expert a token, and this family normalises the "
                "routing weights: the one weight is x / x = 1, so the router's gradient is exactly zero; set "
                "sar.routing=all, or top_m with sar.initial_top_k=2"
            )
