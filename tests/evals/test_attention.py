"""Overlap of attention: against loops over documents in float64, and as a measure of a run."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

import megakd.evals.measure
from megakd.data.records import Sample
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.evals.attention import attention_overlap, row_overlap
from megakd.evals.evaluate import named
from megakd.evals.measure import Meter, numbers
from megakd.losses.hidden import layer_map
from megakd.models.loading import load_model
from megakd.report.tables import quality_table
from tests.conftest import in_process
from tests.models.students import FAMILIES, make_model
from tests.objectives.sar import dense_student

CPU = torch.device("cpu")


def window(tokens: list[int], starts: list[int]) -> Sample:
    return Sample("0", np.array(tokens, np.int32), np.array(starts, np.int32))


class Windows(list[Sample]):
    """Samples in the place of a folder of shards; packed, as where the facts say nothing."""

    facts: dict[str, Any] = {}  # noqa: RUF012 (never changed)


@pytest.fixture(scope="module")
def holdout(prepared):
    shards = ShardSet(prepared / "data" / "tokens" / "holdout")
    yield shards
    shards.close()


def reference_rows(student: Tensor, teacher: Tensor, head: int, query: int) -> float:
    """sum over keys of min(p, q) for one query of one of gcd(H, G) heads, from [H, T, T] and [G, T, T]."""
    heads = math.gcd(len(student), len(teacher))

    def row(side: Tensor) -> list[float]:
        wide = len(side) // heads
        group = [side[i, query].tolist() for i in range(head * wide, (head + 1) * wide)]
        return [sum(column) / wide for column in zip(*group, strict=True)]

    return sum(min(p, q) for p, q in zip(row(student), row(teacher), strict=True))


def reference_overlap(student: Any, teacher: Any, windows: list[Sample]) -> float:
    """Every document alone, as far as it lies in a window; its first token sees itself alone, its last has no label."""
    found = []
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    for sample in windows:
        for start, stop in pairwise([*sample.starts.tolist(), len(sample.tokens)]):
            ids = torch.tensor(sample.tokens[start:stop].tolist())[None, :-1]
            if ids.shape[1] < 2:
                continue
            with torch.no_grad():
                own, theirs = (m.model(ids, use_cache=False, output_attentions=True) for m in (student, teacher))
            own, theirs = ([each[0].double() for each in side.attentions] for side in (own, theirs))
            for layer, other in enumerate(layer_map(len(own), len(theirs))):
                for head in range(math.gcd(len(own[layer]), len(theirs[other]))):
                    for query in range(1, ids.shape[1]):
                        found.append(reference_rows(own[layer], theirs[other], head, query))
    return sum(found) / len(found)


@pytest.mark.parametrize("heads, guides", [(1, 1), (2, 6), (3, 2), (4, 6)])
def test_rows_match_the_reference_and_others_have_no_say(heads, guides):
    """Padding and borders do not count, whatever is in their rows."""
    generator = torch.Generator().manual_seed(0)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    student, teacher = (
        torch.randn(3, count, 5, 5, generator=generator, dtype=torch.float64)
        .mul(2)
        .masked_fill(later, -math.inf)
        .softmax(-1)
        for count in (heads, guides)
    )
    counted = torch.rand(3, 5, generator=generator) < 0.6
    counted[2] = False
    common = math.gcd(heads, guides)
    expected = sum(
        reference_rows(student[b], teacher[b], head, t) / common
        for b, t in counted.nonzero().tolist()
        for head in range(common)
    )
    found = row_overlap(student, teacher, counted)
    assert found.item() == pytest.approx(expected, rel=1e-12) and 0 < found < counted.sum()
    for filler in (0.0, 7.0, math.nan):
        for side in (student, teacher):
            side.transpose(1, 2)[~counted] = filler
        assert torch.equal(row_overlap(student, teacher, counted), found)
    assert row_overlap(student, teacher, torch.zeros_like(counted)) == 0


def test_bounds_are_met_even_by_rows_that_do_not_sum_to_one():
    """As in bfloat16."""
    counted = torch.ones(1, 2, dtype=torch.bool)
    first, other = (torch.eye(2).mul(1.004).bfloat16()[order][None, None] for order in ([0, 1], [1, 0]))
    assert row_overlap(first, first, counted) == 2 and row_overlap(first, other, counted) == 0


@pytest.mark.parametrize("layers, heads", [(1, 2), (3, 6), (2, 4)])
def test_models_match_the_reference(layers, heads, holdout, teacher):
    """The teacher has 2 layers of 4 heads."""
    student = dense_student(num_hidden_layers=layers, num_attention_heads=heads, hidden_size=24).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.mul_(5 if "_proj" in name else 1)  # rows that are not all alike
    guide = load_model(teacher, torch.float32).eval()
    windows: Any = [holdout[0], window(holdout[1].tokens.tolist(), [0, 5, 6, 8, 20]), holdout[len(holdout) - 1]]
    found = attention_overlap(student, guide, Windows(windows), 3, CPU, "student")
    assert found == pytest.approx(reference_overlap(student, guide, windows), rel=1e-5)
    assert 0 < found < 0.95
    one = attention_overlap(student, guide, holdout, 1, CPU, "student")
    assert one == pytest.approx(reference_overlap(student, guide, windows[:1]), rel=1e-5)
    whole = attention_overlap(student, guide, holdout, 10**6, CPU, "student")
    assert 0 < whole < 1 and len({found, one, whole}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_wholly_like_itself(family, dtype):
    windows: Any = [window([5, 6, 7, 8, 9, 3, 2, 5], [0, 2, 5])]
    model, other = make_model(family).to(dtype), make_model(family).to(dtype)
    assert attention_overlap(model, other, Windows(windows), 1, CPU, "itself") == 1
    with torch.no_grad():
        for layer in other.model.layers:
            for parameter in layer.self_attn.parameters():
                parameter.mul_(3)
    assert 0 < attention_overlap(model, other, Windows(windows), 1, CPU, "other") < 1


def test_documents_of_one_labelled_token_do_not_count(teacher):
    """What stands next to a document neither: each one's first position sees itself alone."""
    guide = load_model(teacher, torch.float32).eval()
    student = dense_student().eval()
    alone: Any = [window([5, 6, 7, 8], [0])]
    beside: Any = [window([9, 4, 5, 6, 7, 8, 3, 2], [0, 2, 6]), window([8, 3, 7], [0, 2])]
    expected = attention_overlap(student, guide, Windows(alone), 9, CPU, "student")
    assert attention_overlap(student, guide, Windows(beside), 9, CPU, "student") == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match=r"eval\.attention: .*first 1 windows"):
        attention_overlap(student, guide, Windows(beside[1:]), 9, CPU, "student")


def test_models_keep_their_own_attention(holdout, teacher, prepared):
    guide = load_model(teacher, torch.float32).eval()
    student = load_model(prepared / "student-0", torch.float32).eval()
    assert 0.5 < attention_overlap(student, guide, holdout, 2, CPU, "student") < 1
    assert not any(module._forward_hooks for model in (guide, student) for module in model.modules())
    guide.get_decoder().forward = lambda tokens, **named: BaseModelOutput(torch.zeros(*tokens.shape, 4))
    with pytest.raises(UserError, match=r"the teacher: a \w+ gives no attention probabilities; set eval\.attention=0"):
        attention_overlap(student, guide, holdout, 2, CPU, "student")
    for model in (guide, student):
        assert model.config._attn_implementation == "sdpa"
        assert not any(module._forward_hooks for module in model.modules())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


def header(output: str) -> list[str]:
    return next(line for line in output.splitlines() if line.startswith("held out")).split()


def test_a_run_measures_it_when_asked(sibling, teacher):
    """Lines without it are measured again, but for the teacher's, which has none."""
    run = sibling().folder
    assert "attention" not in header(in_process("evaluate", run))
    plain = lines(run)
    assert [row["model"] for row in plain] == ["teacher", "student-0"]
    assert not any("attention" in row for row in plain)
    said = in_process("evaluate", run, "eval.attention=2")
    assert "attention" in header(said)
    (row,) = lines(run)[2:]
    assert row["model"] == "student-0" and row["kl"] == plain[1]["kl"]
    student = load_model(run / "student-0", torch.float32).eval()
    holdout = ShardSet(run / "data" / "tokens" / "holdout")
    expected = attention_overlap(student, load_model(teacher, torch.float32).eval(), holdout, 2, CPU, "student")
    assert row["attention"] == pytest.approx(expected, rel=1e-6) and 0 < expected < 1
    shown = {line.split()[0]: line.split() for line in reversed(said.splitlines()) if line.strip()}
    column = header(said).index("attention") - 3  # words of "held out" and "KL to teacher" that are no columns
    assert shown["teacher"][column] == "-" and shown["student-0"][column] == f"{expected:.1%}"
    assert quality_table([row]).split("\n")[0].split() == header(said)
    assert numbers(row)["attention"] == row["attention"]
    in_process("evaluate", run)
    assert len(lines(run)) == 3
    in_process("evaluate", run, "--model", teacher)
    assert lines(run)[-1]["attention"] == 1
    in_process("evaluate", run, "eval.attention=0")
    assert len(lines(run)) == 4


def test_a_piece_of_other_windows_is_not_taken(sibling, tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(megakd.evals.measure, "attention_overlap", lambda *args: asked.append(args[3]) or 0.5)
    for count in (1, 1, 2, 1, 0):
        run = sibling(f"eval.attention={count}")
        row = Meter(run).row(named(run, "student-0"), tmp_path)
        assert row.get("attention") == (0.5 if count else None)
    assert asked == [1, 2]
