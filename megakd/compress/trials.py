"""What wrappers of any two ranks would lose of a projection's energy, from fits of some ranks and some experts.

And what mixtures of bases would, of which all experts are fitted.

Matrices are M_e W_e, [E, F, D], in the frame of the fit; free wrappers alone are the shape `additive`. Predictions
start from the exact curve of free wrappers around the best core alone. Trial fits say what a fitted core gains over
that, and how many free ranks one rank on the core is worth; both are smooth over the ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megakd.compress.als import fit_wrappers
from megakd.compress.forms import MOST
from megakd.compress.metric import Metric, times
from megakd.compress.mixture import fit_mixture
from megakd.compress.threads import threads_over

# where fits are tried: shares of the numbers; for wrappers, also of the largest core rank that is considered there
ADDITIVE = (0.06, 0.15, 0.35, 0.7)
WRAPPERS = ((0.08, 0.35), (0.08, 1.0), (0.3, 0.35), (0.3, 1.0), (0.75, 0.35), (0.75, 1.0))
# the same where experts are sampled; those in the middle are compared with fits to the end
FEW_ADDITIVE, FEW_WRAPPERS = (0.15, 0.35, 0.7), ((0.08, 0.35), (0.08, 1.0), (0.3, 0.7), (0.75, 0.35), (0.75, 1.0))
CHECKED, CHECKS = (0.15, 0.35, 0.6), 2  # shares of the numbers at which the best forms are fitted, how often
MIXTURES, FEW_MIXTURES = (0.12, 0.25, 0.4, 0.65), (0.2, 0.5)  # shares of the numbers at which mixtures are fitted
FEW_MIXED, MIXED_TOLERANCE = 6, 1e-4  # sweeps where experts are many; relative gain, as in a fit
ALL = 2**22  # numbers of a projection up to which all of its experts are fitted to the end
SAMPLED = 3 * 2**22  # numbers of the experts that are fitted beyond that
FEWEST = 6  # of them
FULL_SWEEPS, FEW_SWEEPS = 20, 4  # of fits to the end, and of others
TOLERANCE = 1e-3  # of trial fits: what is left to gain is half a percent of the error


class WrapperErrors:
    """Lost energy for any two ranks, from that of free wrappers alone around the best core, and some fits.

    curve: [F + 1], lost with free rank r and that core. A fit of (r, 0) gives the logarithm of its ratio to the curve,
    linear in r between fits. One of (r, c) gives the rank r + worth * c at which free wrappers alone lose as much. The
    worth of a core rank at other ranks is interpolated over sqrt((r + c) / F) and c / (r + c): a plane and multiples of
    the distances to the fits.
    """

    def __init__(self, curve: np.ndarray):
        self.curve = curve
        self.known: dict[tuple[int, int], float] = {}
        self._ratios = [(0, 0.0)]

    def learn(self, free: int, core: int, lost: float) -> None:
        """A fit with this free and core rank loses so much."""
        self.known[free, core] = lost
        if core == 0:
            ratio = math.log(max(lost, 1e-30) / self.curve[free]) if self.curve[free] > 0 else 0.0
            self._ratios = sorted([*self._ratios, (free, min(ratio, 0.0))])
        fits = {pair: lost for pair, lost in self.known.items() if pair[1] > 0}
        if not fits:
            return
        ranks = np.linspace(0, len(self.curve) - 1, 8 * len(self.curve))
        alone = [-self.additive(rank) for rank in ranks]
        equal = [float(np.interp(-lost, alone, ranks)) for lost in fits.values()]
        worths = np.array([(rank - free) / core for rank, (free, core) in zip(equal, fits, strict=True)])
        self._at, self._mean = np.array([self._place(*pair) for pair in fits]), worths.mean()
        plane = np.column_stack([np.ones(len(fits)), self._at])
        distances = np.linalg.norm(self._at[:, None] - self._at, axis=2)
        equations = np.block([[distances, plane], [plane.T, np.zeros((3, 3))]])
        self._parts = np.linalg.lstsq(equations, np.concatenate([worths - self._mean, np.zeros(3)]))[0]

    def error(self, free: int, core: int) -> float:
        if core == 0:
            return self.additive(free)
        here = self._place(free, core)
        near = np.concatenate([np.linalg.norm(self._at - here, axis=1), [1.0], here])
        worth = float(np.clip(self._mean + near @ self._parts, 0.0, 1.2))
        return self.additive(free + worth * core)

    def additive(self, rank: float) -> float:
        rank = min(max(rank, 0.0), len(self.curve) - 1)
        at, logs = zip(*self._ratios, strict=True)
        ratio = float(np.interp(rank, at, logs))
        if rank > at[-1] and len(at) > 1:  # on with the last slope
            ratio += (rank - at[-1]) * (logs[-1] - logs[-2]) / (at[-1] - at[-2])
        return float(np.interp(rank, np.arange(len(self.curve)), self.curve)) * math.exp(min(ratio, 0.0))

    def _place(self, free: int, core: int) -> np.ndarray:
        return np.array([math.sqrt((free + core) / (len(self.curve) - 1)), core / (free + core)])


class MixtureErrors:
    """Lost energy of mixtures of so many bases, for any size k, from that of a basis in as many groups and some fits.

    curve: [D + 1], lost with bases of k and the groups of the fit. A fit gives the logarithm of its ratio to the curve,
    0 at k = 0, linear in k between fits and constant beyond them.
    """

    def __init__(self, curve: np.ndarray):
        self.curve = curve
        self.ratios = {0: 0.0}

    def learn(self, size: int, lost: float) -> None:
        if self.curve[size] > 0:
            self.ratios[size] = min(math.log(max(lost, 1e-30) / self.curve[size]), 0.0)

    def error(self, size: int) -> float:
        sizes = sorted(self.ratios)
        return float(self.curve[size]) * math.exp(np.interp(size, sizes, [self.ratios[at] for at in sizes]))


def learn_mixtures(
    frame: Tensor,
    curves: Mapping[int, np.ndarray],
    shares: Mapping[tuple[int, int], float],
    energy: float,
    progress: Callable[[float], None],
) -> dict[int, MixtureErrors]:
    """Fit mixtures at some shares of the numbers, by their number of bases.

    frame: M_e W_e, [E, F, D], of that energy. curves: of bases in groups, by count. shares: of the candidates (count,
    k), what they store. progress: called with the share that is done. Projections beyond ALL are fitted at two shares
    with few sweeps, which flatters no mixture.
    """
    whole = frame.numel() <= ALL
    even = torch.full((len(frame),), 1.0, dtype=torch.float64, device=frame.device)
    found = {}
    with threads_over(frame) as threads:
        counts = sorted({count for count, _ in shares})
        for number, count in enumerate(counts):
            found[count] = MixtureErrors(curves[count])
            own = {size: stored for (number, size), stored in shares.items() if number == count}
            at = {min(own, key=lambda size: abs(own[size] - share)) for share in (MIXTURES if whole else FEW_MIXTURES)}
            for size in sorted(at):
                sweeps = FULL_SWEEPS if whole else FEW_MIXED
                exact = frame.to(torch.promote_types(frame.dtype, torch.float32))
                metric = Metric(even, None, None)
                *_, lost = fit_mixture(exact, metric, size, count, threads, sweeps=sweeps, tolerance=MIXED_TOLERANCE)
                found[count].learn(size, lost / energy)
            progress((1 + number) / len(counts))
    return found


class Trials:
    """Fits of some ranks.

    Small projections are fitted whole. Of others a sample is, with few sweeps. What more sweeps gain, and what is lost
    when all experts share the core (the relative error goes linearly with 1/E), is measured in the middle of the points
    with and of those without core ranks, and taken to be the same elsewhere.
    """

    def __init__(self, frame: Tensor, norms: Tensor, left: Tensor | None):
        """frame: M_e W_e, [E, F, D]; norms: squared, [E]; left: M_e^T."""
        self.frame, self.norms, self.left = frame, norms, left
        self.whole = frame.numel() <= ALL
        count = len(frame) if self.whole else max(FEWEST, SAMPLED // frame[0].numel())
        self.chosen = sample(norms, count)
        self.factors: dict[bool, float] = {}

    def compare(self, points: Sequence[tuple[int, int]]) -> None:
        """Measure how fits of the sample differ from those of all, in the middle of the points."""
        for on_core in (False, True):
            alike = [point for point in points if (point[1] > 0) == on_core]
            if alike and not self.whole:
                self.factors[on_core] = self._factor(*alike[len(alike) // 2])

    def lost(self, free: int, core: int) -> float:
        """The share of the energy that a fit of all experts would lose."""
        lost = self._lost(self.chosen, free, core, FULL_SWEEPS if self.whole else FEW_SWEEPS)
        return min(1.0, float(lost.sum() / self.norms[self.chosen].sum()) * self.factors.get(core > 0, 1.0))

    def _factor(self, free: int, core: int) -> float:
        """What a fit to the end of all experts loses, as a multiple of one of few with few sweeps."""
        few = self._lost(self.chosen, free, core, FEW_SWEEPS)
        many = self._lost(self.chosen, free, core, FULL_SWEEPS)
        half = self._lost(self.chosen[::2], free, core, FULL_SWEEPS)
        # the same experts, their core shared by all that were chosen and by half of these
        shared, alone = float(many[::2].sum()) ** 0.5, float(half.sum()) ** 0.5
        share = 1 - len(self.chosen) / len(self.frame)
        more = 1 + share * max(0.0, 1 - alone / shared) if shared > 0 else 1.0
        return more**2 * float(many.sum() / few.sum().clamp(min=1e-300))

    def _lost(self, chosen: list[int], free: int, core: int, sweeps: int) -> Tensor:
        """||M_e (W_e - fit_e)||^2 of the chosen experts after a fit of them, [len(chosen)]."""
        matrices = self.frame[chosen].to(torch.promote_types(self.frame.dtype, torch.float32))
        own = None if self.left is None else self.left[chosen]
        even = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64, device=matrices.device)
        with threads_over(matrices) as threads:
            metric = Metric(even, own, None)
            fit, *_ = fit_wrappers(matrices, metric, free, core, threads, sweeps=sweeps, tolerance=TOLERANCE)
            lost = []
            for place, matrix in enumerate(matrices):  # one by one: together they may be gigabytes
                shared = times(None if own is None else own[place], fit.core)
                rest = matrix - shared - fit.u[place] @ (fit.s[place].mT @ fit.core) - fit.q[place] @ fit.v[place].mT
                lost.append(rest.square().sum(dtype=torch.float64).cpu())
        return torch.stack(lost)


def sample(norms: Tensor, wanted: int) -> list[int]:
    """`wanted` experts of all norms, evenly spaced in their order; those of norm 0 are not among them."""
    order = norms.argsort(descending=True, stable=True)[: int((norms > 0).sum())].tolist()
    wanted = min(wanted, len(order))
    return [order[(2 * i + 1) * len(order) // (2 * wanted)] for i in range(wanted)]


def learn(
    errors: WrapperErrors,
    trials: Trials,
    shares: Mapping[tuple[int, int], float],
    progress: Callable[[float], None],
) -> None:
    """Fit what predictions need; where fits are cheap, also what they say is best, twice.

    shares: the candidates' (free rank, core rank), and what they store of the experts' numbers. The best of many
    predictions is likely to be one that flatters: it is where two smooth parts of the error meet.
    """
    experts, f, d = trials.frame.shape
    on_core = {core > 0 for _, core in shares}
    points = fit_points(f, d, experts, True in on_core, trials.whole) if shares else []
    checks = [(share, kind) for share in CHECKED for kind in sorted(on_core)] * CHECKS if trials.whole else []
    trials.compare(points)
    for number, point in enumerate(points):
        errors.learn(*point, trials.lost(*point))
        progress((1 + number) / (len(points) + len(checks)))
    for number, (share, kind) in enumerate(checks):
        fitting = [pair for pair, stored in shares.items() if stored <= share and (pair[1] > 0) == kind]
        best = min(fitting, key=lambda pair: errors.error(*pair), default=None)
        if best is not None and best not in errors.known:
            errors.learn(*best, trials.lost(*best))
        progress((1 + len(points) + number) / (len(points) + len(checks)))
    if not points:
        progress(1.0)


def fit_points(f: int, d: int, experts: int, on_core: bool, whole: bool = True) -> list[tuple[int, int]]:
    """(free rank, core rank) of the fits, free wrappers alone first: the others are compared with them.

    A free rank stores F + D numbers for each expert, one on the core 2F. Core ranks go as far as in forms.py. whole:
    all experts are fitted; otherwise fits are dear, and fewer.
    """
    short = min(f, d)
    room = (MOST - 1 / experts) * f * d  # numbers per expert may have besides the core
    points = [(share * room / (f + d), 0.0) for share in (ADDITIVE if whole else FEW_ADDITIVE)]
    if on_core:
        for share, part in WRAPPERS if whole else FEW_WRAPPERS:
            total = share * room
            core = part * min(f / 3, short / 2, total / ((f + d) / 2 + 2 * f))
            points.append((min((total - core * 2 * f) / (f + d), short - core), core))
    rounded = [(max(1, min(round(free), short)), max(1, round(core)) if core else 0) for free, core in points]
    return list(dict.fromkeys(rounded))
