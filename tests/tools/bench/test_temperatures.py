from tests.tools.examples import tool


def test_interpolated_tails_cost_little_more_than_stored_ones():
    bench = tool("bench.temperatures")
    rows = {(row.case, row.metric): row.value for row in bench.bench_temperatures(True, None)}
    for temperature in bench.GRID:
        case = f"1, 1.33, 2, 4: T = {temperature:g}"
        assert 0 < rows[case, "interpolated_mean"] < rows[case, "stored_mean"] + 8e-6
