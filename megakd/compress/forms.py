"""Which forms a projection may be stored in, and what each costs in parameters and FLOPs.

E experts, A active experts per token, D hidden, F expert hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

from megakd.models.shared_core import Form, free_and_core_rank, make_form, stored_parameters

LEAST, MOST = 0.03, 0.95  # shares of the dense parameters between which forms are considered
RANK_STEP = 8  # grouped matrix products want rows of 16 bytes, 8 numbers of bfloat16
TINY = 128  # expert hidden sizes below it may have any rank
GROUPS = 8  # of experts, each with a basis of its own, at most
USUAL = ("wrappers", "additive", "basis")  # shapes that are considered unless others are named
FINENESS = 6  # wrappers: steps of either rank are its 6th part


class Sizes(NamedTuple):
    """E, A, D and F of a layer."""

    experts: int
    active: int
    hidden: int
    expert_hidden: int


class Candidate(NamedTuple):
    """A form of one projection, all its experts: numbers stored, FLOPs per token, share of the energy lost."""

    form: Form
    parameters: int
    flops: float
    error: float


def candidate(form: Form, projection: str, sizes: Sizes, error: float) -> Candidate:
    """A form with its costs, and an error that was predicted or measured."""
    experts, active, hidden, expert_hidden = sizes
    stored = stored_parameters(form, projection, experts, hidden, expert_hidden)
    return Candidate(form, stored, form_flops(form, projection, active, hidden, expert_hidden), error)


def form_flops(form: Form, projection: str, active: int, hidden: int, expert_hidden: int) -> float:
    """FLOPs of one projection a token: what is shared runs once, the factors of A active experts once each.

    A coefficient of a mixture is multiplied with the k numbers of its basis.
    """
    found = 2.0 * stored_parameters(form, projection, active, hidden, expert_hidden)
    if form.shape == "mixture":
        found += 2.0 * active * form.groups * (free_and_core_rank(form, projection)[1] - 1)
    return found


def dense_flops(active: int, hidden: int, expert_hidden: int) -> float:
    """FLOPs of one projection a token as the teacher computes it: A matrices [F, D]."""
    return 2.0 * active * hidden * expert_hidden


def candidates(projection: str, sizes: Sizes, shapes: Sequence[str] = USUAL, groups: int = GROUPS) -> list[Form]:
    """Forms of between 3 and 95 % of the dense parameters; ranks are multiples of 8, of 1 in tiny layers.

    groups: a basis is considered in 1, 2, 4 … groups up to this many, mixtures of up to twice as many. All of them run
    for every token: more than one only where that takes no more FLOPs than the teacher.
    """
    experts, active, d, f = sizes
    step = RANK_STEP if min(f, d) >= TINY else 1
    forms = []
    if "additive" in shapes:
        forms += [make_form("additive", projection, r, 0) for r in range(step, min(f, d) + 1, step)]
    if "wrappers" in shapes:
        forms += [make_form("wrappers", projection, free, core) for free, core in _wrapper_ranks(step, f, d)]
    if "basis" in shapes:
        for count in _powers(min(groups, experts // 2)):
            most = min(d, experts // count * f)
            forms += [make_form("basis", projection, 0, k, count) for k in range(step, most + 1, step)]
    dense = experts * f * d

    if "mixture" in shapes:
        for count in _powers(min(2 * groups, experts // 2))[1:]:
            forms += [make_form("mixture", projection, 0, k, count) for k in range(step, min(d, f) + 1, step)]

    def fits(form: Form) -> bool:
        if form.groups > 1 and form_flops(form, projection, active, d, f) > dense_flops(active, d, f):
            return False
        return LEAST <= stored_parameters(form, projection, experts, d, f) / dense <= MOST

    return [form for form in forms if fits(form)]


def _wrapper_ranks(step: int, f: int, d: int) -> list[tuple[int, int]]:
    """(free rank, core rank) of the wrappers to consider.

    Two wrappers of f ranks together give any matrix. Far from the fits, with hardly a free one or more than a third of
    all ranks on the core, predictions flatter by 10 to 25 %; other splits were about as good there.
    """
    ranks, most = _ranks(step, min(f, d)), min(f, d)
    pairs = [(free, core) for free in ranks for core in ranks]
    return [(free, core) for free, core in pairs if free + core <= most and core <= min(2 * free, f / 3)]


def _ranks(step: int, most: int) -> list[int]:
    """Multiples of `step`, ever further apart: two dimensions of them must not be too many."""
    found = [step]
    while (after := found[-1] + step * max(1, round(found[-1] / step / FINENESS))) <= most:
        found.append(after)
    return found


def _powers(most: int) -> list[int]:
    return [2**i for i in range(max(most, 1).bit_length())]
