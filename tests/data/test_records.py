"""Places of what counts, in the place of boolean masks."""

import pytest
import torch

from megakd.data.batches import to_device
from megakd.data.records import (
    IGNORED,
    Batch,
    Paired,
    Rows,
    Side,
    labelled,
    rows_of,
    scored_spans,
    shared_spans,
)

MASK = torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, False, False]])


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 2, 4)])
def test_rows_pick_what_a_mask_picks_bit_by_bit(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, expected = rows_of(MASK).pick(values), values[MASK]
    assert torch.equal(found, expected)
    slopes = [torch.autograd.grad(each.square().sum(), values, retain_graph=True)[0] for each in (found, expected)]
    assert torch.equal(*slopes)


def test_rows_place_what_they_picked():
    values = torch.arange(12.0).view(3, 4).requires_grad_()
    placed = rows_of(MASK).place(rows_of(MASK).pick(values))
    assert torch.equal(placed, torch.where(MASK, values, 0.0))
    assert torch.equal(torch.autograd.grad(placed.sum(), values)[0], MASK.float())
    assert rows_of(MASK)[1:] == ((3, 0, 1), 4)


def test_to_device_makes_rows_of_labels_and_of_spans():
    labels = torch.where(MASK, 7, IGNORED)
    spans = torch.tensor([[0, 0, 1, -1], [-1, -1, -1, -1], [0, 1, 1, 2]])
    student = Side(labels, labels, labels, spans, torch.where(spans > 0, spans, -1))
    teacher = student._replace(spans=torch.where(spans == 1, -1, spans))
    batch = Batch(*student[:3], paired=Paired(student, teacher, torch.tensor([2, 0, 3])))
    moved = to_device(batch, torch.device("cpu"))
    assert moved.paired is not None and isinstance(moved.counted, Rows)
    assert moved.counted.flat.tolist() == MASK.flatten().nonzero()[:, 0].tolist()
    assert labelled(moved) is moved.counted and labelled(moved.paired.teacher) is moved.paired.teacher.counted
    # of 3 windows and 3 spans: 0 of the first window, 0 and 2 of the third are on both sides
    assert shared_spans(moved.paired).flat.tolist() == [0, 6, 8] and shared_spans(moved.paired).sizes == (1, 0, 2)
    assert scored_spans(moved.paired).flat.tolist() == [1, 7, 8] and scored_spans(moved.paired).length == 3
