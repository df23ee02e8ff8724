"""What dropping or merging experts would lose of their weights, before any token is run.

Of one projection: ||W - W'|| / ||W|| over all E experts. Pruned: the experts of the largest norms stay, and dropped
ones count whole, as if nothing took their place. Merged: clusters of average linkage on the distances of matrices as
they are stored, hidden units not matched; each expert is replaced by the mean of its cluster. `compress` chooses by
tokens instead.
"""

import torch
from torch import Tensor

from megakd.compress.choose import cluster, distances_of

METHODS = ("prune", "merge")


def fewer_experts_error(method: str, norms: Tensor, cosines: Tensor, count: int) -> float:
    """With `count` experts left, from norms [E] and cosines of all pairs as vectors [E, E], float64."""
    gram = cosines * norms[:, None] * norms
    energy = gram.diagonal()
    if method == "prune":
        lost = energy.sum() - energy.sort(descending=True).values[:count].sum()
    else:
        labels = torch.from_numpy(cluster(distances_of(gram).numpy(), count))
        lost = energy.sum()
        for label in range(count):
            mine = (labels == label).nonzero()[:, 0]
            lost = lost - gram[mine][:, mine].sum() / len(mine)
    return float((lost / energy.sum().clamp(min=1e-300)).clamp(min=0).sqrt())
