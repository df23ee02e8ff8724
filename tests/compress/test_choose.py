"""Which experts are kept, which are merged, and what merged ones are."""

import numpy as np
import pytest
import torch

from megakd.compress.choose import Plan, best_experts, cluster, clusters, distances_of, merged, put_in_order
from megakd.compress.fewer import fewer_experts_error

F, D = 6, 5
NONE = torch.empty(0, dtype=torch.int64)


def test_the_best_are_kept_in_their_order_and_of_equals_the_first():
    plan = best_experts(torch.tensor([0.5, 0.1, 0.5, 0.9, 0.5]), 3)
    assert plan.leading.tolist() == [0, 2, 3] and plan.alone
    assert plan.members.tolist() == [0, -1, 1, 2, -1]
    everything = torch.randn(5, 3, dtype=torch.bfloat16)
    assert torch.equal(merged(everything, plan), everything[[0, 2, 3]])


def reference_clusters(distances: np.ndarray, count: int) -> list[set[int]]:
    """Join the two clusters with the least mean distance of their members, until so many are left."""
    found = [{i} for i in range(len(distances))]
    while len(found) > count:
        pairs = [(i, j) for i in range(len(found)) for j in range(i)]
        mean = [np.mean([distances[a, b] for a in found[i] for b in found[j]]) for i, j in pairs]
        i, j = pairs[int(np.argmin(mean))]
        found = [s for k, s in enumerate(found) if k not in (i, j)] + [found[i] | found[j]]
    return found


@pytest.mark.parametrize("count", [1, 4, 9, 12])
def test_clusters_are_those_of_average_linkage(count):
    points = np.random.default_rng(0).normal(size=(12, 3))
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    labels = cluster(distances, count)
    assert sorted(set(labels)) == list(range(count))
    found = [{i for i in range(12) if labels[i] == c} for c in range(count)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, reference_clusters(distances, count)))
    assert [min(each) for each in found] == sorted(min(each) for each in found)


def test_equal_experts_still_give_the_number_of_clusters_asked_for():
    assert cluster(np.zeros((5, 5)), 3).max() == 2


def test_distances_are_those_of_the_answers():
    answers = torch.randn(4, 7, 3, dtype=torch.float64)
    likeness = torch.einsum("ind,jnd->ij", answers, answers) / 7
    expected = (answers[:, None] - answers).square().sum(-1).mean(-1).sqrt()
    assert torch.allclose(distances_of(likeness), expected, atol=1e-7)


def test_a_cluster_lies_within_a_group_and_weights_are_shares_of_tokens():
    likeness = torch.eye(8) + 0.99 * (1 - torch.eye(8)).roll(1, 0)
    plan = clusters(likeness, torch.tensor([1, 3, 0, 0, 2, 2, 5, 0]), 4, groups=2)
    assert set(plan.members[:4].tolist()) == {0, 1} and set(plan.members[4:].tolist()) == {2, 3}
    for member in range(4):
        assert plan.weights[plan.members == member].sum() == pytest.approx(1)


def test_permuted_copies_become_the_leading_one():
    """Merged in one order they are the same function; each in its own they are not."""
    gate, up, down = torch.randn(F, D), torch.randn(F, D), torch.randn(D, F)
    orders = [torch.arange(F), torch.randperm(F, generator=torch.Generator().manual_seed(1))]
    stacks = [torch.stack([each[o] for o in orders]) for each in (gate, up)]
    stacks.append(torch.stack([down[:, o] for o in orders]))
    plan = Plan(torch.tensor([0, 0]), torch.tensor([0.75, 0.25]), torch.tensor([0]), NONE)
    ordered = put_in_order(plan, stacks[0], stacks[1], stacks[2])
    for whole, expected, axis in zip(stacks, (gate, up, down), (0, 0, 1), strict=True):
        assert torch.allclose(merged(whole, ordered, axis)[0], expected, atol=1e-6)
        assert not torch.allclose(merged(whole, plan, axis)[0], expected, atol=1e-2)


def test_errors_without_tokens_are_those_of_a_brute_force():
    weights = torch.randn(6, F, D, dtype=torch.float64) * torch.arange(1, 7)[:, None, None]
    weights[4] = weights[1] + 0.01
    flat = weights.flatten(1)
    norms, energy = flat.norm(dim=1), flat.square().sum()
    cosines = flat @ flat.T / norms[:, None] / norms
    kept = norms.argsort(descending=True)[:4]
    expected = ((energy - flat[kept].square().sum()) / energy).sqrt()
    assert fewer_experts_error("prune", norms, cosines, 4) == pytest.approx(float(expected))
    replaced = flat.clone()
    for mine in reference_clusters((flat[:, None] - flat).norm(dim=2).numpy(), 4):
        replaced[list(mine)] = flat[list(mine)].mean(0)
    expected = ((flat - replaced).square().sum() / energy).sqrt()
    assert fewer_experts_error("merge", norms, cosines, 4) == pytest.approx(float(expected))
    assert fewer_experts_error("merge", norms, cosines, 6) == pytest.approx(0, abs=1e-7)


def test_merged_matrices_are_means_by_weight_in_the_type_stored():
    weights = torch.tensor([0.2, 0.8, 1.0])
    plan = Plan(torch.tensor([0, 0, 1]), weights, torch.tensor([1, 2]), NONE)
    matrices = torch.randn(3, F, D, dtype=torch.float64).to(torch.bfloat16)
    found = merged(matrices, plan, 0)
    expected = (0.2 * matrices[0].double() + 0.8 * matrices[1].double()).to(torch.bfloat16)
    assert found.dtype == torch.bfloat16 and torch.allclose(found[0].double(), expected.double(), atol=1e-2)
    assert torch.equal(found[1], matrices[2])
