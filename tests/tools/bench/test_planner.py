"""The proxies are what they are said to be, and rows compare predictions with fits."""

import pytest
import torch

from tests.tools.examples import tool

bench = tool("bench.planner")


def test_proxies_are_as_described():
    found = bench.proxies(16, 24, 64)
    assert {weights.shape for weights in found.values()} == {(16, 24, 64)}
    norms = found["heavy"].flatten(1).norm(dim=1)
    assert norms.max() > 4 * norms.min()
    flat = torch.nn.functional.normalize(found["copies 4"].flatten(1))
    assert len(torch.unique(flat @ flat.T > 0.5, dim=0)) == 4
    for name in ("spaces 4", "unequal"):
        squares = torch.linalg.svdvals(found[name].flatten(0, 1)).square()
        assert squares[: 4 * 8].sum() > 0.85 * squares.sum(), name
    assert torch.equal(found["subsets"], bench.proxies(16, 24, 64)["subsets"])


@pytest.mark.parametrize("projection", ["up", "down"])
def test_rows_compare_predictions_with_fits(projection):
    weights = bench.proxies(8, 16, 48)["spaces 4"]
    weights = weights.mT.contiguous() if projection == "down" else weights
    rows = bench.compare("spaces 4", weights, projection, bench.inputs(8, 16, 48, projection), (0.5,))
    values = {row.metric: row.value for row in rows}
    assert len({row.case for row in rows}) == 1 and 0 < values["fitted"] < 1 and 0 <= values["above_best"] < 0.1
    assert abs(values["basis_off"]) < 1e-3 and abs(values["wrappers_off"]) < 0.1
