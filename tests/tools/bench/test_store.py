"""The benchmark's own parts on a small vocabulary; its figures come from running it whole."""

import json

import numpy as np
import pytest

from megakd.config.data import LogitsConfig
from tests.conftest import ROOT, run_to_end
from tests.tools.examples import tool

bench, show = tool("bench.store"), tool("bench.rows").show
VOCABULARY = 600
SETTINGS = {
    "pmin 3e-4": LogitsConfig(top_k=16, temperatures=(1.0,)),
    "all 64": LogitsConfig(top_k=16, pmin=0.0, temperatures=(1.0,)),
    "sampled 50": LogitsConfig(profile="sampled", draws=20, temperatures=(1.0,)),
}


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(bench, "LENGTH", 64)
    monkeypatch.setattr(bench, "IN_A_ROW", 2)
    return bench.capture(lambda n: bench.synthetic_logits(n, 0, VOCABULARY), SETTINGS, 2, 128, VOCABULARY)


def test_every_store_gives_back_what_it_got(captured, tmp_path):
    sample = captured["all 64"].samples[1]
    for store in (bench.Hdf5(), bench.TarNpy(), bench.Parquet()):
        folder = tmp_path / type(store).__name__
        folder.mkdir()
        store.write(captured["all 64"].samples, folder)
        for found in (store.decode(store.encode(sample)), store.open(folder)(1)):
            assert np.array_equal(found[0], sample.tokens)
            assert np.array_equal(found[1], sample.targets.ids)
            assert np.allclose(found[2], sample.targets.logprobs, rtol=1e-3)
    store = bench.Mkd(captured["all 64"].layout)
    store.write(captured["all 64"].samples, tmp_path)
    assert np.array_equal(store.open(tmp_path)(1).tokens, sample.tokens)


def test_measured_rows_are_whole(captured):
    rows = bench.measure("synthetic", captured, 2)
    values = {(row.case, row.metric): row.value for row in rows}
    for case in ("hdf5_gzip", "tar_npz", "parquet_zstd", *(f"megakd, {name}" for name in SETTINGS)):
        for metric in ("bytes_per_token", "encode_ratio", "decode_ratio", "sequential_ratio", "shuffled_ratio"):
            assert values[case, metric] > 0
    assert values["hdf5_gzip", "decode_ratio"] == 1.0
    assert 0 <= values["hdf5_gzip", "kl_mean"] < 1e-5 < values["megakd, pmin 3e-4", "kl_mean"] < 1e-3
    assert ("megakd, sampled 50", "kl_mean") not in values
    assert "megakd, pmin 3e-4" in show(rows)
    json.dumps([row._asdict() for row in rows])


def test_fidelity_is_that_of_a_loop(captured):
    material = captured["pmin 3e-4"]
    store = bench.Mkd(material.layout)
    sample = material.samples[0]
    found = store.decode(store.encode(sample)).targets
    expected = []
    for t in range(64):
        p, q = (
            {int(i): np.exp(x) for i, x in zip(each.ids[t], each.logprobs[t], strict=True) if x > -np.inf}
            | {-1: np.exp(each.log_tails[t, 0])}
            for each in (sample.targets, found)
        )
        assert p.keys() == q.keys()
        expected.append(sum(p[k] * np.log(p[k] / q[k]) for k in p if p[k] > 0))
    assert bench.fidelity([sample], [found])["kl_mean"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_help_and_a_missing_model():
    script = ROOT / "tools" / "bench.py"
    assert "examples:" in run_to_end(1, script, "--help")
    assert "/nowhere" in run_to_end(1, script, "store", "--quick", "--real", "/nowhere", code=2).splitlines()[-1]
