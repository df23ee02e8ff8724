"""What every form of a projection would cost and miss, without fitting all of its experts.

In the frame of the fit every projection is E matrices W_e [F, D] (down is transposed). An error here is
sum_e ||W_e - fit_e||^2 / sum_e ||W_e||^2, the lost share of the energy.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from megakd.compress.forms import GROUPS, USUAL, Candidate, Sizes, candidate, candidates
from megakd.compress.groups import find_groups, sketch
from megakd.compress.metric import Metric, Statistics, make_metric, times, times_transposed, whiten
from megakd.compress.threads import Threads, threads_over
from megakd.compress.trials import ALL, Trials, WrapperErrors, learn, learn_mixtures, sample
from megakd.models.shared_core import Form, free_and_core_rank, stored_parameters

CURVES = 16  # experts whose singular values are computed, of a projection that is not fitted whole
FIRST, MIXED = 0.2, 0.4  # of the work: what comes before the fits, fits of mixtures where there are any


def measure(
    weights: Tensor,
    projection: str,
    active: int,
    *,
    shapes: Sequence[str] = USUAL,
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
    values of W_e - core behind the r-th, times what a few fits gain over the best core alone. wrappers: a rank of the
    one on the core is worth so many ranks of the free one; how many, a few fits say. Beyond 4 million numbers, these
    are of a sample of experts (trials.py). mixture: what a basis in as many groups loses, times what a few fits gain.
    forms: instead of all candidates. progress: called with the share of the work that is done.
    """
    frame = weights.mT if projection == "down" else weights
    experts, f, d = frame.shape
    sizes = Sizes(experts, active, d, f)
    if forms is None:
        forms = candidates(projection, sizes, shapes, groups)
    left, curve = None, np.zeros(0)
    with threads_over(frame) as threads:
        if statistics is not None:
            metric = make_metric(statistics, projection, damping, exempt, frame, threads)
            frame, left = _measured(frame, metric, threads)
        core, norms = _core_and_norms(frame, left, threads)
        energy = float(norms.sum())
        if energy == 0:  # a projection of zeros loses nothing
            return [candidate(form, projection, sizes, 0.0) for form in forms]
        counts = {form.groups for form in forms if form.based}
        bases = {count: lost / energy for count, lost in basis_curves(frame, counts, threads).items()}
        ranks = {free_and_core_rank(form, projection): form for form in forms if not form.based}
        if ranks:
            chosen = sample(norms, experts if frame.numel() <= ALL else CURVES)
            curve = _additive_curve(frame, left, core, norms, chosen)
    progress(FIRST)

    def share(form: Form) -> float:
        return stored_parameters(form, projection, experts, d, f) / frame.numel()

    mixtures = {
        (form.groups, free_and_core_rank(form, projection)[1]): share(form) for form in forms if form.shape == "mixture"
    }
    first = FIRST + (MIXED if mixtures else 0)
    mixed = learn_mixtures(frame, bases, mixtures, energy, lambda share: progress(FIRST + (first - FIRST) * share))
    shares = {pair: share(form) for pair, form in ranks.items()}
    wrappers = WrapperErrors(curve)
    learn(wrappers, Trials(frame, norms, left), shares, lambda share: progress(first + (1 - first) * share))

    def error(form: Form) -> float:
        free, inner = free_and_core_rank(form, projection)
        if form.shape == "mixture":
            return mixed[form.groups].error(inner)
        return float(bases[form.groups][inner]) if form.shape == "basis" else wrappers.error(free, inner)

    return [candidate(form, projection, sizes, error(form)) for form in forms]


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
