"""Rows that compare mixtures of bases with the other shapes."""

from tests.tools.examples import tool

bench = tool("bench.mixture")


def test_rows_compare_shapes_at_equal_numbers():
    rows = bench.compare("native", bench.proxies(8, 16, 48)["native"], (2,), 5)
    assert {row.metric for row in rows} == {"wrappers", "additive", "basis", "mixture of 2"}
    assert all(0 < row.value < 1 for row in rows)
