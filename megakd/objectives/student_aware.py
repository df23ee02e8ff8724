"""The student-aware router: heads on the student's hidden states that predict what is then measured.

They set how many of the teacher's experts answer at a token, which experts count more, and which positions do. Each
is fitted to its own measurement by its own loss. Hidden states come in without a graph and estimates leave without
one, so no gradient lets the heads make the teacher easy to follow, and none of theirs reaches the student. That is all:
what is measured still depends on how the teacher was made to answer.

B windows, N units of a window at most (positions, or spans of text), M counted ones, D features, H features of the
trunk, E experts of a router.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megakd.data.records import Rows
from megakd.models.routing import Routed
from megakd.system.dist import add_over_ranks

TRUNK = 64  # H
FIRST_GAP = 5.0  # nats: what the heads expect of every unit before they have learned, from a student that knows little
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam


class Estimates(NamedTuple):
    """What the heads expect, with a graph to `weights` alone.

    capacity_BN: logits of exp(-KL); gap_BN: log(1 + KL) of each unit; log_shares: of each router's experts, [B, E].
    """

    weights: Tensor
    capacity_BN: Tensor
    gap_BN: Tensor
    log_shares: list[Tensor]

    def capacity(self) -> Tensor:
        """exp(-KL) of each unit, [B, N]: how much of the teacher the student reaches there."""
        return self.capacity_BN.detach().sigmoid()

    def gap(self) -> Tensor:
        """KL of each unit, [B, N]."""
        return self.gap_BN.detach().expm1()

    def importance(self, power: float) -> list[Tensor]:
        """(E times an expert's share of the window's KL)^power, [B, E] each."""
        return [(log_share.detach() * power).exp() * log_share.shape[-1] ** power for log_share in self.log_shares]


class StudentAwareRouter(nn.Module):
    """Heads behind one trunk: z = silu(A [norm(h), 1]), and the outputs C [z, 1] as `Estimates` has them.

    Experts' shares are of the window: their outputs are those of the mean z over its counted units.
    Float32 buffers with an Adam of their own, which `learn` steps: engines neither cast nor clip nor shard them, so
    they have no part in the norm that clips the student's gradient. Checkpoints hold them like all buffers.
    """

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    updates: Tensor

    def __init__(self, width: int, experts: Sequence[int], lr: float, balance: float):
        super().__init__()
        self.experts, self.lr, self.balance = list(experts), lr, balance
        self.shapes = (TRUNK, width + 1), (2 + sum(experts), TRUNK + 1)
        weights = torch.cat([part.flatten() for part in self._first_weights()])
        self.register_buffer("weights", weights)
        self.register_buffer("exp_avg", torch.zeros_like(weights))
        self.register_buffer("exp_avg_sq", torch.zeros_like(weights))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.gradient: Tensor | None = None  # of the step's micro-batches so far

    def estimate(self, hidden_BND: Tensor, counted: Rows) -> Estimates:
        """From the student's hidden states of units. No `forward`: ZeRO-3's hooks have nothing to gather here."""
        hidden_BND = hidden_BND.detach().float()
        with torch.enable_grad(), torch.autocast(hidden_BND.device.type, enabled=False):
            weights = self.weights.detach().requires_grad_()
            trunk, outputs = (
                part.view(shape) for part, shape in zip(weights.split(self._sizes()), self.shapes, strict=True)
            )
            z_BNH = functional.silu(_affine(functional.layer_norm(hidden_BND, hidden_BND.shape[-1:]), trunk))
            capacity_BN, gap_BN = _affine(z_BNH, outputs[:2]).unbind(-1)
            parts = counted.pick(z_BNH).split(counted.sizes)
            mean_BH = torch.stack([part.sum(0) / max(len(part), 1) for part in parts])
            shares = _affine(mean_BH, outputs[2:]).split(self.experts, -1)
            return Estimates(weights, capacity_BN, functional.softplus(gap_BN), [s.log_softmax(-1) for s in shares])

    def fit(self, estimates: Estimates, counted: Rows, gap_BN: Tensor, shares: Sequence[Tensor]) -> dict[str, Tensor]:
        """Add the gradient of the heads' losses for `learn`; named sums over the counted units.

        gap_BN: the measured KL of each unit. shares: what `gap_shares` found of each router.
        """
        gap_M = counted.pick(gap_BN).float().clamp(min=0)
        tokens_B = counted.place(torch.ones_like(gap_M)).sum(1)
        with torch.enable_grad(), torch.autocast(gap_BN.device.type, enabled=False):
            losses = {
                "capacity_loss": functional.binary_cross_entropy_with_logits(
                    counted.pick(estimates.capacity_BN), (-gap_M).exp(), reduction="sum"
                ),
                "gap_loss": functional.smooth_l1_loss(counted.pick(estimates.gap_BN), gap_M.log1p(), reduction="sum"),
                "importance_loss": self._importance_loss(estimates, tokens_B, shares),
            }
            (gradient,) = torch.autograd.grad(torch.stack(list(losses.values())).sum(), estimates.weights)
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        log_shares = estimates.log_shares
        entropies = [-(s.exp() * s).sum(-1) / math.log(s.shape[-1]) for s in log_shares]
        named = {
            "capacity": counted.pick(estimates.capacity()).sum(),
            "importance_entropy": (torch.stack(entropies).mean(0) * tokens_B).sum(),
        }
        return {name: value.detach() for name, value in {**named, **losses}.items()}

    @torch.no_grad()
    def learn(self, tokens: int) -> None:
        """One step of Adam (Kingma, Ba 2015, algorithm 1) by the step's gradient per token; called by all ranks.

        A gradient that is not finite on some rank changes nothing.
        """
        gradient = torch.zeros_like(self.weights) if self.gradient is None else self.gradient
        self.gradient = None
        gradient = add_over_ranks(gradient) / tokens
        if not gradient.isfinite().all():
            return
        self.updates += 1
        for moment, beta, value in zip((self.exp_avg, self.exp_avg_sq), BETAS, (gradient, gradient**2), strict=True):
            moment.lerp_(value, 1 - beta)
        mean, square = (m / (1 - b**self.updates) for m, b in zip((self.exp_avg, self.exp_avg_sq), BETAS, strict=True))
        self.weights -= self.lr * mean / (square.sqrt() + EPS)

    def _importance_loss(self, estimates: Estimates, tokens_B: Tensor, shares: Sequence[Tensor]) -> Tensor:
        """sum over windows of their tokens times KL(target || estimate), mean over routers.

        target: measured shares, with a part balance / (1 + balance) that is the same for all experts.
        """
        values = []
        for log_share_BE, share_BE in zip(estimates.log_shares, shares, strict=True):
            experts = share_BE.shape[-1]
            target_BE = (share_BE + self.balance / experts) / (1 + self.balance)
            kl_B = functional.kl_div(log_share_BE, target_BE, reduction="none").sum(-1)
            values.append((kl_B * tokens_B).sum())
        return torch.stack(values).mean()

    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    def _first_weights(self) -> tuple[Tensor, Tensor]:
        """A random trunk, the same on every rank; outputs that expect FIRST_GAP everywhere, alike of all experts."""
        trunk, outputs = (torch.zeros(shape) for shape in self.shapes)
        if trunk.device.type != "meta":
            width = trunk.shape[1] - 1
            nn.init.normal_(trunk[:, :width], std=width**-0.5, generator=torch.Generator().manual_seed(0))
            outputs[0, -1] = -math.log(math.expm1(FIRST_GAP))  # sigmoid(-log(e^g - 1)) = e^-g
            outputs[1, -1] = math.log(FIRST_GAP)  # softplus(log(g)) = log(1 + g)
        return trunk, outputs


def gap_shares(routed: Sequence[Routed], counted_BU: Tensor, gap_BU: Tensor, experts: Sequence[int]) -> list[Tensor]:
    """Each expert's share of each window's KL, [B, E] per router: sum over counted tokens of KL times routing weight.

    By the weights without factors: else an expert that counts more would, by that alone, count for still more. Rows of
    windows without a gap are 0.
    """
    gap_BU1 = torch.where(counted_BU, gap_BU, 0.0).float().clamp(min=0)[..., None]
    found = []
    for each, size in zip(routed, experts, strict=True):
        windows = len(gap_BU)
        weights_BUk, experts_BUk = (part.view(*gap_BU.shape, -1) for part in (each.unchanged.float(), each.experts))
        part_BUk = gap_BU1 * weights_BUk / weights_BUk.sum(-1, keepdim=True).clamp(min=1e-12)
        sums_BE = part_BUk.new_zeros(windows, size).scatter_add(1, experts_BUk.flatten(1), part_BUk.flatten(1))
        found.append(sums_BE / sums_BE.sum(-1, keepdim=True).clamp(min=1e-12))
    return found


def _affine(values: Tensor, matrix: Tensor) -> Tensor:
    """The matrix times [values, 1]."""
    return functional.linear(values, matrix[:, :-1], matrix[:, -1])
