"""Roots, shrinkage, weights of experts; threads."""

import pytest
import torch
from torch import Tensor

from megakd.compress.metric import (
    SHARE_FLOOR,
    Statistics,
    make_metric,
    root,
    shrinkage,
    unwhiten_left,
    unwhiten_right,
    whiten,
)
from megakd.compress.threads import MOST, threads_over


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(*shape: int, tokens: int, seed: int = 0) -> Tensor:
    x = randn(*shape[:-1], tokens, shape[-1], seed=seed)
    return x.mT @ x / tokens


@pytest.mark.parametrize("damping", [0.05, 0.5, 1.0])
def test_root_is_that_of_the_damped_second_moment_of_mean_one(damping):
    h = 7 * moments(3, 6, tokens=40)
    found = root(h, damping)
    mean = h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert torch.allclose(found @ found.mT, (1 - damping) * h / mean + damping * torch.eye(6, dtype=h.dtype))
    assert torch.equal(found, found.tril())


def test_root_of_nothing_is_the_identity_and_of_few_tokens_is_finite():
    assert torch.equal(root(torch.zeros(2, 4, 4), 0.1), torch.eye(4).expand(2, 4, 4))
    assert root(moments(9, tokens=2), 0.0).isfinite().all()


@pytest.mark.parametrize("decades", [0, 1, 2])
def test_shrinkage_is_near_the_best_share_of_the_identity(decades):
    """Gaussian samples: squared errors within 15 % of the unshrunk one of the best share's."""
    size = 20
    spectrum = torch.logspace(0, -decades, size, dtype=torch.float64)
    for tokens in (10, 40, 400):
        found, best, none = 0.0, 0.0, 0.0
        for seed in range(20):
            x = randn(tokens, size, seed=seed) * spectrum.sqrt()
            h = (x.T @ x / tokens)[None]
            identity = h[0].trace() / size * torch.eye(size, dtype=h.dtype)

            def error(share: float, h: Tensor = h, identity: Tensor = identity) -> float:
                return ((1 - share) * h[0] + share * identity - spectrum.diag()).square().sum().item()

            found += error(shrinkage(h, torch.tensor([tokens], dtype=h.dtype)).item())
            none += error(0)
            best += min(error(share / 50) for share in range(51))
        assert found < best + 0.15 * none, (tokens, found, best, none)


def test_fewer_tokens_are_shrunk_more_and_none_entirely():
    h = moments(12, tokens=30).expand(5, -1, -1)
    found = shrinkage(h, torch.tensor([0.0, 3, 30, 300, 3e6], dtype=h.dtype))
    assert found[0] == 1 and (found.diff() <= 0).all() and found[-1] < 1e-3 and (found >= 0).all()
    assert shrinkage(torch.zeros(1, 4, 4), torch.tensor([5.0])) == 1


@pytest.mark.parametrize("projection", ["gate", "down"])
def test_whitening_and_back(projection):
    experts, f, d = 4, 5, 7
    weights = randn(experts, f, d)
    h = moments(experts, f, tokens=900) if projection == "down" else moments(d, tokens=900)
    share = torch.tensor([0.0, 0.2, 0.3, 0.5], dtype=torch.float64)
    statistics = Statistics(share, h, h, torch.full((experts,), 900.0))
    with threads_over(weights) as threads:
        metric = make_metric(statistics, projection, 0.1, (3,), weights, threads)
        whitened = whiten(weights, metric, threads)
        for e in range(experts):
            half = metric.right if metric.left is None else metric.left[e]
            assert half is not None
            damped = half @ half.T
            inner = weights[e].T @ damped @ weights[e] if projection == "down" else weights[e] @ damped @ weights[e].T
            found = whitened[e].T @ whitened[e] if projection == "down" else whitened[e] @ whitened[e].T
            assert torch.allclose(found, inner)
        assert torch.allclose(unwhiten_right(unwhiten_left(whitened, metric, threads), metric), weights)
    # the floor, none for the exempt, a sum of 1; for down times how large hidden states are
    scale = h.diagonal(dim1=1, dim2=2).mean(1) if projection == "down" else torch.ones(experts, dtype=h.dtype)
    expected = (share * scale)[:3]
    expected[0] = SHARE_FLOOR * expected.sum() / 3
    assert metric.importance[3] == 0
    assert torch.allclose(metric.importance[:3], expected / expected.sum())


@pytest.mark.parametrize("experts", [1, 15, 16, 17, 128])
@pytest.mark.parametrize("chunk", [None, 1, 3, 200])
def test_lanes_hold_every_expert_once_in_order(experts, chunk):
    with threads_over(torch.zeros(experts, 2, 2), chunk) as threads:
        flat = [e for chunks in threads.map(list) for part in chunks for e in range(part.start, part.stop)]
        assert flat == list(range(experts)) and len(threads.chunks) <= MOST


def test_lanes_run_in_threads_of_one_thread_each_and_give_the_number_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with threads_over(torch.zeros(32, 2, 2), 1) as threads:
            assert threads.pool is not None
            # also after torch has set up its own threads in them
            inside = threads.map(
                lambda chunks: (torch.randn(300, 300) @ torch.randn(300, 300), torch.get_num_threads())[1]
            )
            assert set(inside) == {1} and torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="chunks"), threads_over(torch.zeros(32, 2, 2), 1) as threads:
            threads.map(_fails)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def _fails(chunks: list[slice]) -> None:
    raise ValueError(f"chunks {chunks}")
