"""Choose which experts of a layer are kept, or which become one, and how: the plan of a layer with fewer experts.

E experts, N that are left, F expert hidden.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from megakd.compress.permute import match_units

DROPPED = -1


class Plan(NamedTuple):
    """What becomes of each expert of a layer.

    members: [E] int64, the number in the student of what it becomes, DROPPED where it becomes nothing. weights: [E],
    its part in that; those of one member sum to 1. leading: [N] int64, the expert with the most tokens of each member.
    order: [E, F] int64, its hidden units in the order of the leading expert's; empty where all stay in theirs.
    """

    members: Tensor
    weights: Tensor
    leading: Tensor
    order: Tensor

    @property
    def alone(self) -> bool:
        """Whether nothing is merged: the leading experts are kept as they are."""
        return int((self.members != DROPPED).sum()) == len(self.leading)


def best_experts(scores: Tensor, count: int, groups: int = 1) -> Plan:
    """Keep the `count` experts with the largest scores [E], as many in each of the router's groups, in their order."""
    experts, kept = len(scores), []
    for numbers in torch.arange(experts).split(experts // groups):
        # a stable sort: of equal scores the first expert stays
        best = torch.argsort(scores[numbers].double(), descending=True, stable=True)[: count // groups]
        kept += sorted(numbers[best].tolist())
    members = torch.full((experts,), DROPPED)
    members[kept] = torch.arange(len(kept))
    return Plan(members, (members != DROPPED).float(), torch.tensor(kept), torch.empty(0, dtype=torch.int64))


def clusters(likeness: Tensor, counts: Tensor, count: int, groups: int = 1) -> Plan:
    """Put experts with similar answers into `count` clusters, as many in each of the router's groups.

    Hierarchical clustering with average linkage (HC-SMoE: Chen et al. 2024), here of the distances
    (E_x ||y_i(x) - y_j(x)||^2)^1/2, from likeness [E, E] = E_x y_i(x) . y_j(x). An expert's weight in its cluster is
    its share of the cluster's routed tokens, counts [E].
    """
    experts, members = len(likeness), torch.empty(len(likeness), dtype=torch.int64)
    distances = distances_of(likeness)
    each = count // groups
    for group, numbers in enumerate(torch.arange(experts).split(experts // groups)):
        own = distances[numbers][:, numbers].numpy()
        members[numbers] = group * each + torch.from_numpy(cluster(own, each))
    leading, weights = [], torch.empty(experts)
    for member in range(count):
        mine = (members == member).nonzero()[:, 0]
        seen = counts[mine].double()
        leading.append(int(mine[seen.argmax()]))
        weights[mine] = (seen / seen.sum() if seen.sum() > 0 else torch.ones(len(mine)).double() / len(mine)).float()
    return Plan(members, weights, torch.tensor(leading), torch.empty(0, dtype=torch.int64))


def distances_of(likeness: Tensor) -> Tensor:
    """(E ||y_i - y_j||^2)^1/2 in float64, [E, E]."""
    exact = likeness.double().cpu()
    squares = exact.diagonal()
    return (squares[:, None] + squares - 2 * exact).clamp(min=0).sqrt()


def cluster(distances: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` clusters each is in, [n]; clusters are numbered by their first member."""
    if count >= len(distances):
        return np.arange(len(distances))
    symmetric = (distances + distances.T) / 2
    np.fill_diagonal(symmetric, 0)
    tree = linkage(squareform(symmetric, checks=False), "average")
    # cut after n - count joins: a threshold would leave fewer clusters where distances are equal
    labels = np.arange(len(distances))
    for number, (a, b, *_) in enumerate(tree[: len(distances) - count]):
        joined = _leaves(tree, int(a), len(distances)) + _leaves(tree, int(b), len(distances))
        labels[joined] = len(distances) + number
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _leaves(tree: np.ndarray, node: int, count: int) -> list[int]:
    if node < count:
        return [node]
    a, b = tree[node - count, :2].astype(int)
    return _leaves(tree, a, count) + _leaves(tree, b, count)


def put_in_order(plan: Plan, gate: Tensor, up: Tensor, down: Tensor) -> Plan:
    """The plan with the hidden units of every expert in the order of its cluster's leading one.

    gate, up: [E, F, D], down: [E, D, F].
    """
    order = torch.arange(gate.shape[1]).repeat(len(gate), 1)
    for expert, member in enumerate(plan.members.tolist()):
        first = int(plan.leading[member])
        if expert != first:
            pair = [[each[number] for each in (gate, up, down)] for number in (first, expert)]
            order[expert] = match_units(*pair)
    return plan._replace(order=order)


def merged(matrices: Tensor, plan: Plan, axis: int | None = None) -> Tensor:
    """What the experts' tensors [E, ...] become, [N, ...] of the same type.

    axis: of one expert's tensor, the dimension of its hidden units, put in order first; None: it has none. Sums are in
    float32; where nothing is merged the bytes stay.
    """
    if plan.alone:
        return matrices[plan.leading]
    found = torch.empty(len(plan.leading), *matrices.shape[1:], dtype=matrices.dtype)
    for member in range(len(found)):
        mine = (plan.members == member).nonzero()[:, 0].tolist()
        if len(mine) == 1:
            found[member] = matrices[mine[0]]
            continue
        total = torch.zeros(matrices.shape[1:], dtype=torch.promote_types(matrices.dtype, torch.float32))
        for expert in mine:
            own = matrices[expert].to(total)
            if axis is not None and len(plan.order):
                own = own.index_select(axis, plan.order[expert])
            total += plan.weights[expert].to(total) * own
        found[member] = total.to(found.dtype)
    return found
