"""Permute the hidden units of experts that are copies of each other, so that a shared core can be one of them.

An expert is the same function whatever the order of its hidden units (rows of gate and up, columns of down). Experts
that were copied from one MLP and shuffled ("upcycled") become nearly equal again; natively trained ones have nothing to
be matched. E experts, D hidden, F expert hidden; a unit is its row of gate, of up and its column of down, [3D].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROUNDS = 4
SAMPLES = 2  # experts that are compared with the first one to decide
# Of `Likeness.excess`. Measured at 768 x 2048: natively trained experts have 0.000; copies with noise of 0.3, 1 and 2
# times the weights' deviation 0.88, 0.39 and 0.14. At 24 x 16: natives up to 0.03, noise of 0.3 and 1 0.85 and 0.27.
COPIES = 0.1


class Likeness(NamedTuple):
    """How much alike the units of two experts are, at best."""

    cosine: float  # mean over the units of the best matching
    chance: float  # the same where matching cannot succeed

    @property
    def excess(self) -> float:
        """Of what is possible beyond chance, the share that was found."""
        return (self.cosine - self.chance) / max(1.0 - self.chance, 1e-6)

    @property
    def copies(self) -> bool:
        return self.excess > COPIES


def alignment(gate: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
    """Permutations p [E, F] so that gate[e][p[e]], up[e][p[e]] and down[e][:, p[e]] of all experts match, or None.

    None: nothing is to be done, because the experts are not copies (`likeness` says) or are in order already.
    gate, up: [E, F, D], down: [E, D, F] of any floating type, read one expert at a time. The first expert keeps its
    order. Each of the others is assigned to the sum of those before it, maximising the summed inner products of units
    (Hungarian method; Kuhn 1955, as in Ainsworth et al. 2023, "Git Re-Basin", section 3.2), then again to the sum of
    all others, until nothing changes.
    """
    count, units = gate.shape[:2]
    if count < 2 or not likeness(gate, up, down).copies:
        return None
    found = torch.arange(units).repeat(count, 1)
    total_FD = _units(gate[0], up[0], down[0])
    for turn in range(ROUNDS):
        again = False
        for expert in range(1, count):
            unit_FD = _units(gate[expert], up[expert], down[expert])
            before = found[expert].clone()
            if turn > 0:
                total_FD -= unit_FD[before]
            found[expert], certain = _assign(total_FD @ unit_FD.T)
            total_FD += unit_FD[found[expert]]
            again |= not certain and not torch.equal(found[expert], before)
        if not again:  # where each unit's best match is its own, a better mean would not change it
            break
    return None if bool((found == torch.arange(units)).all()) else found


def match_units(first: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The order [F] in which the units of another expert match those of the first best; each (gate, up, down)."""
    return _assign(_units(*first) @ _units(*other).T)[0]


def likeness(gate: Tensor, up: Tensor, down: Tensor) -> Likeness:
    """Mean cosine of matched units between the first expert and some others, and what chance gives.

    The best of F rows of noise of dimension n has a cosine of about sqrt(2 ln F / n), 0.047 at 768 x 2048; matching all
    gets 0.8 to 1 of it, and far more where weights favour some directions (0.68 under a power law of slope 0.7). So
    chance is measured: the gate rows, up rows and down columns of the other expert are shuffled each on its own, which
    keeps all their statistics, but no unit is whole any more.
    """
    generator = torch.Generator().manual_seed(0)
    first_FD = _unit_length(_units(gate[0], up[0], down[0]))
    count, units = gate.shape[:2]
    cosines = []
    for expert in sorted({1 + (count - 2) * i // max(SAMPLES - 1, 1) for i in range(SAMPLES)}):
        whole = gate[expert], up[expert], down[expert]
        a, b, c = (torch.randperm(units, generator=generator) for _ in range(3))
        mixed = whole[0][a], whole[1][b], whole[2][:, c]
        cosines.append([_best_cosine(first_FD, _unit_length(_units(*parts))) for parts in (whole, mixed)])
    return Likeness(*torch.tensor(cosines, dtype=torch.float64).mean(0).tolist())


def _best_cosine(a_FD: Tensor, b_FD: Tensor) -> float:
    cosine_FF = a_FD @ b_FD.T
    return float(cosine_FF.gather(1, _assign(cosine_FF)[0][:, None].to(cosine_FF.device)).mean())


def _assign(similarity_FF: Tensor) -> tuple[Tensor, bool]:
    """The permutation p with the largest sum of similarity[i, p[i]]; whether every i has its own largest entry there.

    Then that is the permutation, and the assignment need not be solved.
    """
    best = similarity_FF.argmax(1).cpu()
    if len(best.unique()) == len(best):
        return best, True
    return torch.from_numpy(linear_sum_assignment(similarity_FF.cpu().numpy(), maximize=True)[1]), False


def _units(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The units of an expert as rows, [F, 3D] float32; each matrix counts the same, whatever its scale."""
    parts = [part.to(torch.float32) for part in (gate, up, down.T)]
    return torch.cat([part / part.norm().clamp(min=1e-30) for part in parts], 1)


def _unit_length(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
