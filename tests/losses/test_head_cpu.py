"""Rows one by one on a CPU: chosen there alone, where they fit, with the values of blocks."""

import pytest
import torch

from megakd.data.records import TeacherTargets
from megakd.losses import head as fused
from megakd.losses.divergence import Divergence
from megakd.losses.head_chunk import Chunk, Job
from megakd.losses.head_cpu import Rows
from megakd.losses.signals import Sparse, Stored, Tail
from tests.losses.test_head import TAILS, VOCABULARY, alike, differentiated, fused_run, inputs, stored_targets


def part(rows: int = 1, device: str = "cpu", differentiate: bool = True, **changes) -> Chunk:
    nothing = torch.zeros(2, 0)
    targets = TeacherTargets(nothing.int(), nothing, nothing, nothing.int(), nothing, torch.zeros(2), torch.zeros(2))
    job = Job(
        labels_N=torch.zeros(2, dtype=torch.int64),
        teacher=Sparse(targets, Stored(True, (2.0,), None), "ghost"),
        alpha=0.5,
        temperature=2.0,
        divergence=Divergence(),
        vocab_size=7,
        scale=1.0,
        softcap=None,
        compute=torch.float32,
        differentiate=differentiate,
    )._replace(**changes)
    logits = torch.empty(2, 7, device=device)
    return Chunk(logits, logits if job.in_place else logits.clone(), 1.0, job, differentiate, rows)


def test_rows_are_for_a_cpu_whose_cache_a_row_fills():
    assert Rows.fit(part())
    assert not Rows.fit(part(device="meta"))  # Python's numbers would be waited for at every row of a GPU
    assert not Rows.fit(part(rows=2))
    assert not Rows.fit(part(differentiate=False))
    assert not Rows.fit(part(softcap=30.0)) and not Rows.fit(part(compute=torch.bfloat16))
    assert not Rows.fit(part(divergence=Divergence("jsd")))  # its slopes depend on the student


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("tail", TAILS)
def test_rows_give_the_values_of_blocks(monkeypatch, tail: Tail, temperature, dtype, tolerance):
    if temperature == 0.5 and tail != "truncated":
        return  # no tail is stored for it
    labels, targets, stored = stored_targets(tail, temperature)
    monkeypatch.setitem(fused.BLOCK_BYTES, "cpu", dtype.itemsize * VOCABULARY)
    seen, right = [], Rows.student
    monkeypatch.setattr(Rows, "student", staticmethod(lambda *a: (seen.append(1), right(*a))[1]))
    run, hidden_and_weight = fused_run(labels, Sparse(targets, stored, tail), 0.6, temperature), inputs(dtype)
    found = differentiated(run, *hidden_and_weight)
    assert seen
    monkeypatch.setattr(Rows, "fit", staticmethod(lambda part: False))
    expected = differentiated(run, *hidden_and_weight)
    assert alike(found[0], expected[0], tolerance)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()
