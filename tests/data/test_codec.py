import math

import numpy as np
import pytest
import torch

from megakd.data.codec import HEADER, DamagedRecord, decode, encode
from megakd.data.records import IGNORED, TeacherTargets
from megakd.models.teacher import targets_from_logits

# T, K, V, M: T = 1, K = 1 and K = V among them
SHAPES = [(1, 1, 5, 1), (1, 3, 11, 2), (7, 8, 33, 3), (13, 1, 400, 2), (5, 11, 11, 2)]
PAD_BITS = range(8 * 10, 8 * 12)  # two alignment bytes of the header that carry nothing


def example(shape: tuple[int, int, int, int], seed: int = 0) -> TeacherTargets:
    positions, entries, vocabulary, temperatures = shape
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(positions, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    labels[-1] = IGNORED
    targets = targets_from_logits(logits, labels, entries, tuple(1.0 + i for i in range(temperatures)))
    return TeacherTargets(*(field.numpy() for field in targets))


def equal(left: TeacherTargets, right: TeacherTargets) -> bool:
    return all(
        a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(left, right, strict=True)
    )


def reference_row(logprobs: list[float], log_tail: float) -> list[float]:
    """A row rounded to half precision and scaled to mass 1, the tail last, in Python floats."""
    rounded = [float(np.float16(value)) for value in [*logprobs, log_tail]]
    total = math.log(sum(math.exp(value) for value in rounded))
    return [value - total for value in rounded]


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_exact_up_to_half_precision(shape):
    targets = example(shape)
    found = decode(encode(targets))
    assert [f.dtype for f in found] == [np.int32, np.float32, np.float32, np.float32]
    assert np.array_equal(found.ids, targets.ids)
    assert np.array_equal(found.label_nll, targets.label_nll)
    assert np.array_equal(found.log_tails[:, 1:], targets.log_tails[:, 1:].astype(np.float16).astype(np.float32))
    for row in range(shape[0]):
        expected = reference_row(targets.logprobs[row].tolist(), float(targets.log_tails[row, 0]))
        assert np.allclose([*found.logprobs[row], found.log_tails[row, 0]], expected, atol=1e-5)
    # within 2^-11 of its size, and of the mean size for the scaling
    values = np.concatenate([targets.logprobs, targets.log_tails[:, :1]], 1)
    mean_size = -(np.exp(values) * np.where(np.isfinite(values), values, 0)).sum(1, keepdims=True)
    size = np.abs(targets.logprobs) + mean_size
    assert (np.abs(found.logprobs - targets.logprobs) <= 2**-11 * size + 1e-5).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_decoded_mass_sums_to_one(shape):
    found = decode(encode(example(shape)))
    mass = np.exp(found.logprobs.astype(np.float64)).sum(1) + np.exp(found.log_tails[:, 0].astype(np.float64))
    assert np.abs(mass - 1).max() < 1e-5


def test_whole_vocabulary_stored_keeps_its_tail_of_nothing():
    targets = example((5, 11, 11, 2))
    assert np.isneginf(targets.log_tails).all()
    found = decode(encode(targets))
    assert np.isneginf(found.log_tails).all() and np.isfinite(found.logprobs).all()


def test_a_certain_teacher_survives():
    """All the mass in one token, others so improbable that half precision has only -inf for them."""
    logits = torch.tensor([[9e4, 0.0, -9e4, 1.0]])
    targets = TeacherTargets(*(f.numpy() for f in targets_from_logits(logits, torch.tensor([0]), 2, (1.0, 2.0))))
    with np.errstate(over="ignore"):  # the cast of -9e4 to half precision
        found = decode(encode(targets))
    assert found.ids[0].tolist() == [0, 3]
    assert found.logprobs[0, 0] == 0 and np.isneginf(found.log_tails[0, 0]) and not np.isnan(found.logprobs).any()


def test_same_targets_same_bytes():
    first, second = example((7, 8, 33, 3)), example((7, 8, 33, 3))
    assert encode(first) == encode(second) == encode(first)
    assert encode(example((7, 8, 33, 3), seed=1)) != encode(first)
    strided = TeacherTargets(*(np.asfortranarray(f) for f in first))  # layout in memory is no part of the value
    assert encode(strided) == encode(first)


@pytest.mark.parametrize("shape", [(3, 2, 9, 2), (1, 1, 5, 1), (4, 4, 4, 2)])
def test_every_flipped_bit_is_noticed(shape):
    """But those of the header's two alignment bytes, which carry nothing: the value stays the same."""
    data = encode(example(shape))
    value = decode(data)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        if bit in PAD_BITS:
            assert equal(decode(bytes(damaged)), value)
        else:
            with pytest.raises(DamagedRecord):
                decode(bytes(damaged))


def test_every_cut_and_every_addition_is_noticed():
    data = encode(example((3, 2, 9, 2)))
    for length in range(len(data)):
        with pytest.raises(DamagedRecord):
            decode(data[:length])
    for extra in (b"\0", b"x", data):
        with pytest.raises(DamagedRecord):
            decode(data + extra)


def test_two_records_with_their_headers_exchanged_are_noticed():
    left, right = encode(example((3, 2, 9, 2))), encode(example((4, 2, 9, 2)))
    for header, body in ((left, right), (right, left)):
        with pytest.raises(DamagedRecord):
            decode(header[: HEADER.size] + body[HEADER.size :])
