"""Shared bases: W_e ~ A_e Z_g(e) with Z_g [k, D] of a group of experts, closed form or k-subspaces.

W_e [F, D] are whitened (metric.py), and Z is orthonormal there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megakd.compress.metric import Metric
from megakd.compress.threads import Threads

SKETCH = 64  # random directions of the inputs in which experts are compared before there are groups


class Basis(NamedTuple):
    """z [G, k, D], a [E, F, k], group [E]."""

    z: Tensor
    a: Tensor
    group: Tensor

    def expand(self, chunk: slice) -> Tensor:
        return self.a[chunk] @ self.z[self.group[chunk]]


def fit_basis(
    whitened: Tensor,
    metric: Metric,
    size: int,
    groups: int,
    rounds: int,
    threads: Threads,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor, int]:
    """(orthonormal bases [G, size, D], groups [E], rounds) of a small sum p_e ||W_e - A_e Z_g(e)||^2, W_e whitened.

    One group: the leading eigenvectors of sum p_e W_e^T W_e, the optimum. More: alternately the bases of the groups,
    and each expert to the basis that holds most of it (k-subspaces), at most so many rounds.
    """
    p = metric.importance
    norms = whitened.square().sum((1, 2))
    group = _first_groups(whitened, p, groups, threads)
    z = torch.stack([_leading_rows(whitened, p, group == g, size, threads) for g in range(groups)])
    done = 0
    while groups > 1 and done < rounds:
        done += 1
        held = torch.stack([_held(whitened, z[g], threads) for g in range(groups)], 1)
        after = _without_empty(held.argmax(1), held.amax(1) / norms.clamp(min=torch.finfo(norms.dtype).tiny), p, groups)
        progress()
        changed = [g for g in range(groups) if not torch.equal(after == g, group == g)]
        group = after
        for g in changed:
            z[g] = _leading_rows(whitened, p, group == g, size, threads)
        if not changed:
            break
    return z, group, done


def _first_groups(whitened: Tensor, p: Tensor, groups: int, threads: Threads) -> Tensor:
    """Experts by the one of `groups` they resemble most, [E]: each chosen to resemble those before it least.

    Compared are X_e^T X_e of X_e = W_e Omega, in a few random directions, by their cosines.
    """
    experts, _, columns = whitened.shape
    if groups == 1:
        return torch.zeros(experts, dtype=torch.int64, device=whitened.device)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(columns, min(SKETCH, columns), generator=generator).to(whitened)

    def work(chunks: list[slice]) -> Tensor:
        sketches = [whitened[chunk] @ directions for chunk in chunks]
        return torch.cat([(x.mT @ x).flatten(1) for x in sketches])

    features = torch.cat(threads.map(work))
    # what all experts share (Omega^T Omega is not I) says nothing about groups
    features = features / features.norm(dim=1, keepdim=True).clamp(min=1e-30)
    features = functional.normalize(features - features.mean(0))
    chosen = [int(p.argmax())]
    while len(chosen) < groups:
        closest = (features @ features[chosen].T).amax(1)
        closest[(p == 0) | torch.isin(torch.arange(experts, device=p.device), torch.tensor(chosen).to(p.device))] = 2
        chosen.append(int(closest.argmin()))
    return (features @ features[chosen].T).argmax(1)


def _without_empty(group: Tensor, held: Tensor, p: Tensor, groups: int) -> Tensor:
    """A group without experts gets the one whose basis holds the least of it, among groups of several."""
    group = group.clone()
    for g in range(groups):
        counts = torch.bincount(group[p > 0], minlength=groups)
        if counts[g] == 0 and counts.max() > 1:
            worst = torch.where((p > 0) & (counts[group] > 1), held, 2.0).argmin()
            group[worst] = g
    return group


def _leading_rows(whitened: Tensor, p: Tensor, members: Tensor, size: int, threads: Threads) -> Tensor:
    """The leading eigenvectors of sum p W^T W over `members` [E], [size, D]; zeros beyond D."""
    columns = whitened.shape[2]
    chosen = (members & (p > 0)).tolist()

    def work(chunks: list[slice]) -> Tensor:
        total = whitened.new_zeros(columns, columns)
        for chunk in chunks:
            for e in range(chunk.start, chunk.stop):
                if chosen[e]:
                    total.addmm_(whitened[e].mT, whitened[e] * p[e].to(whitened))
        return total

    first, *others = threads.map(work)
    for other in others:
        first.add_(other)
    leading = torch.linalg.eigh(first)[1].flip(1)[:, :size].T
    return functional.pad(leading, (0, 0, 0, size - len(leading)))


def _held(whitened: Tensor, z: Tensor, threads: Threads) -> Tensor:
    """||W_e Z^T||^2, [E]."""
    return torch.cat(
        threads.map(lambda chunks: torch.cat([(whitened[chunk] @ z.T).square().sum((1, 2)) for chunk in chunks]))
    )


def projected(whitened: Tensor, z: Tensor, group: Tensor, threads: Threads) -> Tensor:
    """W_e Z_g(e)^T, [E, F, k]."""
    found = whitened.new_empty(*whitened.shape[:2], z.shape[1])

    def work(chunks: list[slice]) -> None:
        for chunk in chunks:
            found[chunk] = whitened[chunk] @ z[group[chunk]].mT

    threads.map(work)
    return found


def balance_basis(basis: Basis) -> Basis:
    """The same products with entries of the same mean square in a basis vector and in what multiplies it."""
    z, a, group = basis
    scale = torch.ones(z.shape[:2], dtype=z.dtype, device=z.device)
    for g in range(len(z)):
        of_a = a[group == g].square().mean((0, 1)).sqrt()
        of_z = z[g].square().mean(1).sqrt()
        scale[g] = torch.where((of_a > 0) & (of_z > 0), (of_a / of_z.clamp(min=1e-30)).sqrt(), 1.0)
    return Basis(z * scale[:, :, None], a / scale[group][:, None, :], group)
