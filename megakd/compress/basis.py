"""Shared bases: W_e ~ A_e Z_g(e) with Z_g [k, D] of a group of experts, in closed form.

W_e [F, D] are whitened (metric.py), and Z is orthonormal there.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megakd.compress.groups import find_groups, sketch
from megakd.compress.metric import Metric
from megakd.compress.threads import Threads


class Basis(NamedTuple):
    """z [G, k, D], a [E, F, k], group [E]."""

    z: Tensor
    a: Tensor
    group: Tensor

    def expand(self, chunk: slice) -> Tensor:
        return self.a[chunk] @ self.z[self.group[chunk]]


def fit_basis(whitened: Tensor, metric: Metric, size: int, groups: int, threads: Threads) -> tuple[Tensor, Tensor]:
    """(orthonormal bases [G, size, D], groups [E]) of a small sum p_e ||W_e - A_e Z_g(e)||^2, W_e whitened.

    The bases are the leading eigenvectors of sum p_e W_e^T W_e over a group, the optimum for these groups.
    """
    p = metric.importance
    group = torch.zeros(len(whitened), dtype=torch.int64)
    if groups > 1:
        group = find_groups(sketch(whitened, p, threads), groups)
    group = group.to(whitened.device)
    return torch.stack([_leading_rows(whitened, p, group == g, size, threads) for g in range(groups)]), group


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
