"""Predictions of compress.budget against fits: by how much they are off, and what the choice loses.

Proxies are E experts of F x D (of D x F for down) without and with measured inputs. For each share of the experts'
numbers, the form with the best prediction is fitted: of additive, of wrappers, and of bases in 1, 2, 4 and 8 groups.
"""

import torch
from torch import Tensor

from bench.rows import Row
from megakd.compress.fit import Settings, fit_projection
from megakd.compress.forms import Candidate
from megakd.compress.metric import Statistics, make_metric, whiten
from megakd.compress.predict import measure
from megakd.compress.threads import threads_over
from megakd.models.shared_core import dense_weight

ACTIVE, DAMPING = 8, 0.1
SHARES = (0.2, 0.344, 0.5)


def proxies(experts: int = 32, rows: int = 96, columns: int = 256, seed: int = 0) -> dict[str, Tensor]:
    """Stand-ins for real experts, [E, rows, columns], in any order.

    native: independent, singular values fall as i^-0.5. heavy: as i^-1, and norms of experts differ by a factor of 10.
    copies N: N matrices, and for each expert noise of 0.4. spaces N: N input spaces, and noise of 0.5. unequal: 4
    spaces, half of the experts in one. permuted: 8 matrices, each expert's rows in an order of its own. subsets: each
    expert reads its own quarter of common directions. directions: each weighs the same common directions in its own
    way. upcycled: one matrix, and for each expert a difference of low rank. planted: wrappers themselves, and noise.
    """
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    def unit(matrices: Tensor) -> Tensor:
        return matrices / matrices.flatten(1).norm(dim=1)[:, None, None]

    def decaying(count: int, power: float = 0.5) -> Tensor:
        rank = min(rows, columns)
        left = torch.linalg.qr(randn(count, rows, rank))[0]
        right = torch.linalg.qr(randn(count, columns, rank))[0]
        return unit(left * torch.arange(1, rank + 1.0) ** -power @ right.mT)

    def noise(size: float) -> Tensor:
        return size * unit(randn(experts, rows, columns))

    def spaces(of_expert: Tensor) -> Tensor:
        bases = randn(int(of_expert.max()) + 1, columns // 8, columns)
        return unit(randn(experts, rows, columns // 8) @ bases[of_expert]) + 0.5 * decaying(experts, 0.3)

    def shuffled(of_expert: Tensor) -> Tensor:
        return of_expert[torch.randperm(experts, generator=draw)]

    found = {"native": decaying(experts), "heavy": decaying(experts, 1.0) * torch.exp(0.7 * randn(experts, 1, 1))}
    for count in (2, 4, 8, 16):
        of_expert = torch.arange(experts) % count
        found[f"copies {count}"] = decaying(count)[shuffled(of_expert)] + noise(0.4)
        found[f"spaces {count}"] = spaces(shuffled(of_expert))
    sizes = torch.tensor(
        [experts // 2, experts // 4, experts // 8, experts - experts // 2 - experts // 4 - experts // 8]
    )
    found["unequal"] = spaces(shuffled(torch.repeat_interleave(torch.arange(4), sizes)))
    eight = decaying(8)[torch.arange(experts) % 8]
    found["permuted"] = torch.stack([one[torch.randperm(rows, generator=draw)] for one in eight]) + noise(0.4)
    pool = torch.linalg.qr(randn(columns, columns // 2))[0].T
    own = [pool[torch.randperm(columns // 2, generator=draw)[: columns // 8]] for _ in range(experts)]
    found["subsets"] = unit(randn(experts, rows, columns // 8) @ torch.stack(own)) + noise(0.25)
    scales = torch.exp(randn(experts, 1, columns // 2))
    found["directions"] = unit(randn(experts, rows, columns // 2) * scales @ pool) + noise(0.2)
    core, rank = decaying(1), rows // 8
    found["upcycled"] = core + 0.4 * unit(randn(experts, rows, rank) @ randn(experts, rank, columns)) + noise(0.1)
    turned = core + 0.09 * randn(experts, rows, rank) @ (randn(experts, rank, rows) @ core) / rank
    added = 0.7 * unit(randn(experts, rows, rank) @ randn(experts, rank, columns))
    found["planted"] = unit(unit(turned) + added) + noise(0.2)
    return found


def inputs(experts: int, rows: int, columns: int, projection: str) -> Statistics:
    """Made-up measurements: spectra over two decades, unequal shares of tokens and costs of units."""
    draw = torch.Generator().manual_seed(1)

    def moments(*size: int) -> Tensor:
        axes = torch.linalg.qr(torch.randn(*size, size[-1], generator=draw).double())[0]
        return axes * torch.logspace(0, -2, size[-1]).double() @ axes.mT

    share = torch.rand(experts, generator=draw).double() ** 2 + 0.05
    share, counts = share / share.sum(), torch.full((experts,), 4096)
    if projection == "down":
        second = moments(experts, rows)
        return Statistics(share, second, second, counts)
    costs = torch.exp(torch.randn(experts, rows, generator=draw)).double()
    return Statistics(share, moments(columns), moments(columns), counts, costs)


def bench_planner(quick: bool) -> list[Row]:
    """All proxies, without measured inputs; some with them, some of other sizes, and down."""
    rows = []
    plain = proxies(*((8, 24, 64) if quick else ()))
    cases: list[tuple[str, Tensor, str, Statistics | None]] = [(name, w, "gate", None) for name, w in plain.items()]
    if not quick:
        some = ("native", "spaces 8")
        for sizes in ((16, 192, 128), (64, 64, 192), (128, 32, 96)):
            others = proxies(*sizes, seed=1)
            cases += [(f"{name}, {' x '.join(map(str, sizes))}", others[name], "up", None) for name in some]
        for projection in ("up", "down"):
            measured = inputs(32, 96, 256, projection)
            for name in some:
                weights = proxies(seed=2)[name]
                weights = weights.mT.contiguous() if projection == "down" else weights
                cases.append((f"{name}, {projection} with measured inputs", weights, projection, measured))
    for name, weights, projection, statistics in cases:
        rows += compare(name, weights, projection, statistics, SHARES[1:2] if quick else SHARES)
    return rows


def compare(
    name: str, weights: Tensor, projection: str, statistics: Statistics | None, shares: tuple[float, ...]
) -> list[Row]:
    """How far predictions are off the relative error of fits, and what the chosen form loses against the best."""
    table = measure(weights, projection, ACTIVE, statistics=statistics, damping=DAMPING)
    rows = []
    for share in shares:
        best: dict[tuple[str, int], Candidate] = {}
        for found in table:
            kind = found.form.shape, found.form.groups
            if found.parameters <= share * weights.numel() and (kind not in best or found.error < best[kind].error):
                best[kind] = found
        fits = {kind: fitted(weights, projection, found, statistics) for kind, found in best.items()}
        off = {kind: best[kind].error ** 0.5 / error - 1 for kind, error in fits.items()}
        chosen = min(best, key=lambda kind: best[kind].error)
        case = f"{name}, {share:g}: {chosen[0]}" + (f" in {chosen[1]} groups" if chosen[1] > 1 else "")
        rows.append(Row("planner", case, "fitted", fits[chosen], ""))
        rows.append(Row("planner", case, "above_best", fits[chosen] / min(fits.values()) - 1, ""))
        for shape in ("additive", "wrappers", "basis"):
            worst = max((value for kind, value in off.items() if kind[0] == shape), key=abs, default=0.0)
            rows.append(Row("planner", case, f"{shape}_off", worst, ""))
    return rows


def fitted(weights: Tensor, projection: str, found: Candidate, statistics: Statistics | None) -> float:
    """The relative error of a fit in the damped metric, the one that is predicted."""
    tensors, _ = fit_projection(weights, projection, found.form, Settings(damping=(DAMPING,)), statistics)
    frame = weights.mT if projection == "down" else weights
    expanded = torch.stack([dense_weight(tensors, projection, e) for e in range(len(weights))])
    with threads_over(frame) as threads:
        metric = make_metric(statistics, projection, DAMPING, (), frame, threads)
        rest = whiten(frame - (expanded.mT if projection == "down" else expanded), metric, threads)
        lost, all_of_it = (
            (metric.importance * x.square().sum((1, 2))).sum() for x in (rest, whiten(frame, metric, threads))
        )
    return float(lost / all_of_it) ** 0.5
