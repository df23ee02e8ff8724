"""What every form of a projection would cost and miss, without fitting all of its experts.

In the frame of the fit every projection is E matrices W_e [F, D] (down is transposed). An error here is
sum_e ||W_e - fit_e||^2 / sum_e ||W_e||^2, the lost share of the energy.
"""

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from megakd.compress.als import fit_wrappers
from megakd.compress.forms import GROUPS, MOST, Candidate, Sizes, candidate, candidates
from megakd.compress.groups import find_groups, sketch
from megakd.compress.metric import Metric, Statistics, make_metric, times, times_transposed, whiten
from megakd.compress.threads import Threads, threads_over
from megakd.models.shared_core import SHAPES, Form, free_and_core_rank

# where fits are tried: of the parameters, and of the ranks on the core
ADDITIVE_SHARES, WRAPPER_POINTS = (0.3, 0.7), ((0.12, 1 / 2), (0.45, 1 / 3), (0.45, 2 / 3))
MANY = 64  # experts, from which on a core that is fitted gains at most 2 % over the mean for additive
FITTED_EXPERTS = 8  # the fits behind a prediction see this many
FULL_SWEEPS, FEW_SWEEPS = 20, 3  # of fits that see all experts, and of others; three leave 1 to 4 % of the error
SMALL = 2**24  # numbers of a projection, beyond which even fits of all experts are broken off early
TOLERANCE = 1e-4  # of these fits


def measure(
    weights: Tensor,
    projection: str,
    active: int,
    *,
    shapes: Sequence[str] = SHAPES,
    sample: int = 16,
    groups: int = GROUPS,
    forms: Sequence[Form] | None = None,
    statistics: Statistics | None = None,
    damping: float = 0.1,
    exempt: tuple[int, ...] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> list[Candidate]:
    """What every form of one projection costs and is predicted to miss.

    weights: [E, d_out, d_in] of any floating type. statistics: what calibration measured; the energy is then that of
    sqrt(p_e) M_e W_e N (metric.py), to which experts in `exempt` add nothing.
    basis: exact, the eigenvalues of sum_e W_e^T W_e behind the k-th, with the groups of the fit. additive: singular
    values of W_e - mean behind the r-th for a sample of experts, times what a few fits gain over the mean as core.
    wrappers: a rank of the one on the core is worth so many ranks of the free one; how many, a few fits say. These fits
    see 8 experts and 4, and a core shared by fewer fits better: the relative error, the root of what is lost, is
    continued linearly in 1/E.
    forms: instead of all candidates. progress: called with the share of the work that is done.
    """
    frame = weights.mT if projection == "down" else weights
    experts, f, d = frame.shape
    sizes = Sizes(experts, active, d, f)
    if forms is None:
        forms = candidates(projection, sizes, shapes, groups)
    wanted = {form.shape for form in forms}
    points = _fit_points(f, d, experts, wanted)
    work = 1.0 + len(points)
    left, curve = None, np.zeros(0)
    with threads_over(frame) as threads:
        if statistics is not None:
            metric = make_metric(statistics, projection, damping, exempt, frame, threads)
            frame, left = _measured(frame, metric, threads)
        core, norms = _core_and_norms(frame, left, threads)
        energy = float(norms.sum())
        if energy == 0:  # a projection of zeros loses nothing
            return [candidate(form, projection, sizes, 0.0) for form in forms]
        counts = {form.groups for form in forms if form.shape == "basis"}
        bases = {count: lost / energy for count, lost in basis_curves(frame, counts, threads).items()}
        if wanted & {"additive", "wrappers"}:
            curve = _additive_curve(frame, left, core, norms, spread(experts, sample))
    progress(1 / work)
    wrappers = _WrapperErrors(curve)
    for number, (free, inner) in enumerate(points):
        wrappers.learn(free, inner, predicted_fit(frame, norms, free, inner, left))
        progress((2 + number) / work)

    def error(form: Form) -> float:
        free, inner = free_and_core_rank(form, projection)
        return float(bases[form.groups][inner]) if form.shape == "basis" else wrappers.error(free, inner)

    return [candidate(form, projection, sizes, error(form)) for form in forms]


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` numbers, evenly spaced, the first one among them."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def basis_curves(frame: Tensor, counts: Collection[int], threads: Threads) -> dict[int, np.ndarray]:
    """What is lost of the energy of [E, F, D] with a basis of 0 … D in each of so many groups, [D + 1] by their count.

    The eigenvalues of sum W_e^T W_e behind the k-th, over the groups that a fit would take. Experts that are together
    whatever the count are multiplied together, so that each is multiplied once.
    """
    if not counts:
        return {}
    experts, _, columns = frame.shape
    dtype = torch.promote_types(frame.dtype, torch.float32)
    known = sketch(frame, torch.ones(experts), threads)
    group = torch.stack([find_groups(known, count) for count in counts], 1)
    grams = [torch.zeros(count, columns, columns, dtype=dtype, device=frame.device) for count in counts]
    for together in torch.unique(group, dim=0):
        gram = _gram(frame, (group == together).all(1).tolist(), threads)
        for place, own in enumerate(together.tolist()):
            grams[place][own] += gram
    lost = {}
    for count, of_groups in zip(counts, grams, strict=True):
        lost[count] = sum((_tails(torch.linalg.eigvalsh(gram)) for gram in of_groups), np.zeros(columns + 1))
    return lost


def _gram(frame: Tensor, members: Sequence[bool], threads: Threads) -> Tensor:
    """sum W_e^T W_e over the members, at least one, [D, D]."""
    columns = frame.shape[2]
    dtype = torch.promote_types(frame.dtype, torch.float32)

    def work(chunks: list[slice]) -> Tensor | None:
        total = None
        for chunk in chunks:
            for e in range(chunk.start, chunk.stop):
                if members[e]:
                    if total is None:
                        total = torch.zeros(columns, columns, dtype=dtype, device=frame.device)
                    exact = frame[e].to(dtype)
                    total.addmm_(exact.mT, exact)
        return total

    first, *others = (part for part in threads.map(work) if part is not None)
    for other in others:
        first += other
    return first


def predicted_fit(frame: Tensor, norms: Tensor, free: int, inner: int, left: Tensor | None = None) -> float:
    """What wrappers of all experts M_e W_e [E, F, D] would lose, from fits of a few; norms: squared; left: M_e^T."""

    def lost(chosen: list[int], sweeps: int, among: slice = slice(None)) -> float:
        """What the fit of the chosen loses of some of them."""
        matrices = frame[chosen].to(torch.promote_types(frame.dtype, torch.float32))
        own = None if left is None else left[chosen]
        even = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64, device=frame.device)
        with threads_over(matrices) as threads:
            metric = Metric(even, own, None)
            fit, *_ = fit_wrappers(matrices, metric, free, inner, threads, sweeps=sweeps, tolerance=TOLERANCE)
        shared = times(own, fit.core)
        rest = matrices - shared - fit.u @ (fit.s.mT @ fit.core) - fit.q @ fit.v.mT
        missed = rest[among].square().sum(dtype=torch.float64)
        return float(missed / norms[chosen][among].sum().clamp(min=1e-300))

    experts = len(frame)
    if experts <= FITTED_EXPERTS:
        return lost(list(range(experts)), FULL_SWEEPS if frame.numel() <= SMALL else FEW_SWEEPS)
    chosen = spread(experts, FITTED_EXPERTS)
    # the same four experts, their core shared by eight and by four
    many = math.sqrt(lost(chosen, FEW_SWEEPS, slice(0, None, 2)))
    few = math.sqrt(lost(chosen[::2], FEW_SWEEPS))
    return min(1.0, (many + (many - few) * (1 - len(chosen) / experts)) ** 2)


class _WrapperErrors:
    """Lost energy for any two ranks, from that of free wrappers alone around the mean and some fits.

    curve: [F + 1], lost with free rank r and the mean as core. A fit of (r, 0) gives the logarithm of its ratio to the
    curve, linear in r between fits; one of (r, c) the rank r + worth * c at which free wrappers alone lose as much, and
    the worth of a core rank is a plane over (r + c) / F and c / (r + c).
    """

    def __init__(self, curve: np.ndarray):
        self.curve = curve
        self.ratios = [(0.0, 0.0)]
        self.worths: list[tuple[int, int, float]] = []

    def learn(self, free: int, core: int, lost: float) -> None:
        if core == 0:
            ratio = math.log(max(lost, 1e-30) / self.curve[free]) if self.curve[free] > 0 else 0.0
            self.ratios.append((free, min(ratio, 0.0)))
        else:
            ranks = range(len(self.curve))
            equal = float(np.interp(-lost, [-self.additive(rank) for rank in ranks], ranks))
            self.worths.append((free, core, (equal - free) / core))

    def error(self, free: int, core: int) -> float:
        return self.additive(free + self._worth(free, core) * core if core else free)

    def additive(self, rank: float) -> float:
        rank = min(max(rank, 0.0), len(self.curve) - 1)
        at, logs = zip(*self.ratios, strict=True)
        ratio = float(np.interp(rank, at, logs))
        if rank > at[-1] and len(at) > 1:  # on with the last slope
            ratio += (rank - at[-1]) * (logs[-1] - logs[-2]) / (at[-1] - at[-2])
        return float(np.interp(rank, np.arange(len(self.curve)), self.curve)) * math.exp(ratio)

    def _worth(self, free: int, core: int) -> float:
        def place(free: int, core: int) -> list[float]:
            return [1.0, (free + core) / (len(self.curve) - 1), core / (free + core)]

        known = np.array([place(*pair) for *pair, _ in self.worths])
        plane = np.linalg.lstsq(known, np.array([worth for *_, worth in self.worths]))[0]
        return float(np.clip(plane @ place(free, core), 0.0, 1.2))


def _fit_points(f: int, d: int, experts: int, wanted: set[str]) -> list[tuple[int, int]]:
    """(free rank, core rank) of the fits, free wrappers alone first: the others are compared with them."""
    short = min(f, d)
    room = (MOST - 1 / experts) * f * d  # numbers per expert may have besides the core
    points = []
    if wanted & {"additive", "wrappers"} and experts < MANY:
        points += [(share * room / (f + d), 0.0) for share in ADDITIVE_SHARES]
    if "wrappers" in wanted:
        for share, split in WRAPPER_POINTS:
            per_rank = (1 - split) * (f + d) + split * 2 * f  # a free rank stores F + D numbers, one on the core 2F
            total = min(share * room / per_rank, short)
            points.append(((1 - split) * total, split * total))
    rounded = [(min(round(free), short), round(core)) for free, core in points]
    return list(dict.fromkeys(pair for pair in rounded if pair[0] > 0))


def reach(weights: Tensor, projection: str, statistics: Statistics, exempt: tuple[int, ...] = ()) -> float:
    """The energy that a projection [E, d_out, d_in] has in the block's output, to first order; for down all of it.

    sum_e share_e E ||D_e h||^2 for down, sum_e share_e sum_j rows_ej E (w_ej x)^2 for gate and up: in one unit, so that
    errors of projections compare. What a form loses of the one, times this over that of down, it loses of the output.
    """
    total = 0.0
    for expert, share in enumerate(statistics.share.tolist()):
        if expert not in exempt:
            w = weights[expert].to(torch.float32)
            h = statistics.covariance[expert] if projection == "down" else statistics.covariance
            of_rows = ((w @ h.to(w)) * w).sum(1).double()
            if projection != "down" and statistics.rows is not None:
                of_rows = of_rows * statistics.rows[expert].to(of_rows)
            total += share * float(of_rows.sum())
    return total


def _measured(frame: Tensor, metric: Metric, threads: Threads) -> tuple[Tensor, Tensor]:
    """sqrt(E p_e) M_e W_e N, [E, F, D], and sqrt(E p_e) M_e^T, [E, F, F] or, diagonal, [E, F, 1]."""
    scale = (metric.importance * len(frame)).sqrt()[:, None, None]
    white = whiten(frame, metric, threads)
    # in place where whitening made a copy: the experts of a layer are gigabytes
    white = white.mul_(scale.to(white)) if white is not frame else white * scale.to(white)
    left = torch.ones_like(white[:, :, :1]) if metric.left is None else metric.left
    return white, left * scale.to(white)


def _core_and_norms(frame: Tensor, left: Tensor | None, threads: Threads) -> tuple[Tensor, Tensor]:
    """(the core that alone fits best, [F, D]: the mean of W_e where M = I; ||M_e W_e||^2, [E] in float64)."""
    dtype = torch.promote_types(frame.dtype, torch.float32)

    def work(chunks: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
        target, norms = torch.zeros(frame.shape[1:], dtype=dtype, device=frame.device), []
        gram = torch.zeros(frame.shape[1], frame.shape[1], dtype=dtype, device=frame.device)
        for chunk in chunks:
            exact = frame[chunk].to(dtype)
            own = None if left is None else left[chunk]
            target += times_transposed(own, exact).sum(0)
            if own is not None and own.shape[2] > 1:
                gram += (own @ own.mT).sum(0)
            elif own is not None:
                gram += own[:, :, 0].square().sum(0).diag()
            norms.append(exact.square().sum((1, 2)).double())
        return gram, target, torch.cat(norms)

    grams, targets, norms = zip(*threads.map(work), strict=True)
    target = torch.stack(targets).sum(0)
    if left is None:
        return target / len(frame), torch.cat(norms).cpu()
    # normal equations sum_e M_e^T M_e C = sum_e M_e^T W_e, with a hair of the identity as in als.py
    gram = torch.stack(grams).sum(0).double()
    gram.diagonal().add_(1e-10 * gram.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.solve(gram, target.double()).to(target), torch.cat(norms).cpu()


def _additive_curve(frame: Tensor, left: Tensor | None, core: Tensor, norms: Tensor, chosen: list[int]) -> np.ndarray:
    """Lost share of the chosen experts' energy with that core for all and a free rank of 0 … F."""
    lost = np.zeros(min(frame.shape[1:]) + 1)
    for e in chosen:
        residual = frame[e].to(core) - times(None if left is None else left[e], core)
        # squares of singular values by the smaller of the two Gram matrices
        residual = residual if residual.shape[0] <= residual.shape[1] else residual.mT
        lost += _tails(torch.linalg.eigvalsh(residual @ residual.mT))
    return lost / max(float(norms[chosen].sum()), 1e-300)


def _tails(eigenvalues: Tensor) -> np.ndarray:
    """Sums of all but the largest 0 … n of ascending eigenvalues, [n + 1]."""
    exact = eigenvalues.double().clamp(min=0).cpu().numpy()
    return np.concatenate([[0.0], np.cumsum(exact)])[::-1]
