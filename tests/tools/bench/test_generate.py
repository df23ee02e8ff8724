"""The benchmark of generation times models that say the same; its figures come from running it whole."""

import torch

from tests.tools.examples import tool

bench = tool("bench.generate")
SMALL = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 5, "num_experts_per_tok": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def test_every_path_generates_the_same_tokens():
    """By the student's own rule, which takes the gathered path for one token and the loop for a long prompt."""
    student, _ = bench.models(3, SMALL)
    student = student.double()
    given = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    prompt = torch.arange(1, 21)[None]  # 40 routed rows
    told = [
        bench.by_path(student, path).generate(prompt, attention_mask=torch.ones_like(prompt), **given).tolist()
        for path in bench.PATHS
    ]
    assert told[0] == told[1] == told[2] and len(set(told[0][0])) > 20
    assert bench.difference(student) <= 1e-12


def test_rows(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", {"small": (3, SMALL)})
    rows = bench.bench_generate(quick=True)
    assert {row.case for row in rows} == {"small, float32", "small, bfloat16"}
    metrics = {row.metric: row.value for row in rows if row.case == "small, float32"}
    assert metrics["max_diff_to_loop"] <= 1e-6 and all(value > 0 for value in list(metrics.values())[1:])
