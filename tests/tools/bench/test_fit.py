"""The proxies are what they are said to be, and rows carry the promised metrics."""

import torch

from tests.tools.examples import tool

bench = tool("bench.fit")


def test_proxies_are_as_described():
    found = bench.proxies(6)
    assert list(found) == ["flat", "native", "upcycled", "planted", "demo teacher"]
    for name, weights in found.items():
        assert weights.shape == ((8, 192, 192) if name == "demo teacher" else (6, 192, 512))
        flat = weights.flatten(1) / weights.flatten(1).norm(dim=1, keepdim=True)
        cosine = (flat @ flat.T).fill_diagonal_(0).abs().max()
        assert cosine > 0.5 if name in ("upcycled", "planted") else cosine < 0.2, (name, cosine)
    sigma = torch.linalg.svdvals(found["native"])
    assert torch.allclose(sigma / sigma[:, :1], torch.arange(1, 193) ** -0.5, rtol=1e-3)
    again = bench.proxies(6)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_rows_of_solvers_and_forms(monkeypatch):
    monkeypatch.setattr(bench, "RATES", (1e-2,))
    weights = bench.proxies(2)["upcycled"]
    rows = (
        bench.solvers("upcycled", weights, (3,)) + bench.forms("upcycled", weights, bench.RANK) + bench.real_size(3, 1)
    )
    values = {(row.case, row.metric): row.value for row in rows}
    assert all(row.bench == "fit" for row in rows)
    als, adam = values["upcycled, als", "relative_error"], values["upcycled, adam 3", "relative_error"]
    assert values["upcycled, adam 3", "error_of_als"] == als / adam < 1
    assert values["upcycled, adam 3", "cpu_seconds"] > 0
    below = [row for row in rows if row.metric == "below_seed_form"]
    assert len(below) == 1 and 0 < below[0].value < 1 and "0.23 of the numbers" in below[0].case
    assert values["768 x 2048, rank 64, 3 experts", "cpu_seconds"] > 0
