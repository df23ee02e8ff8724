"""Records with a label mask: labels that do not count have no targets and cost a bit and their token."""

import random

import numpy as np
import pytest

from megakd.data.codec import MASKED_NAME, NAME, DamagedRecord, Layout, decode, encode
from megakd.data.records import Sample, TeacherTargets
from tests.data import reference_codec as reference
from tests.data.damage import MUTATIONS, sealed
from tests.data.test_codec import Case, assert_like_reference, example, same, targets_of

CASES = [
    Case("topk", 7, 33, starts=(2, 3, 7)),
    Case("topk", 8, 400, top_k=300, pmin=0.0, spread=0.1),
    Case("topk", 300, 5000, top_k=16, temperatures=(2.0, 3.0, 4.0), starts=(150, 300)),
    Case("sampled", 300, 400, temperatures=(1.0, 0.5, 2.0, 4.0), starts=(7, 8, 300)),
    Case("sampled", 9, 5, draws=255, starts=(4,)),
    Case("hybrid", 300, 5000, top_k=12, draws=20, draw_temperature=2.0, starts=(250,)),
    Case("hybrid", 1, 33, top_k=1, draws=3),
]
SHARES = [0.0, 0.3, 0.7, 1.0]  # of the labels that count


def masked(case: Case, share: float) -> tuple[Sample, Layout]:
    """The example of a case where about `share` of the labels count, none across a document's start."""
    sample, layout = example(case)
    mask = np.random.default_rng(case.seed).random(case.positions) < share
    mask[sample.starts[1:] - 1] = False
    return sample._replace(mask=mask), layout._replace(masked=True)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.profile}-T{case.positions}-V{case.vocabulary}")
def test_round_trip(case, share):
    sample, layout = masked(case, share)
    data = encode(sample, layout)
    found = decode("key", data, layout)
    assert sample.mask is not None and found.mask is not None
    assert found.mask.dtype == bool and np.array_equal(found.mask, sample.mask)
    assert reference.mask(data) == sample.mask.tolist()
    assert_like_reference(found, data, layout)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.profile}-T{case.positions}-V{case.vocabulary}")
def test_what_counts_reads_as_without_a_mask(case):
    """Head, tails and draws of the labels that count are those of the unmasked record; the others have none."""
    sample, layout = masked(case, 0.5)
    whole = decode(
        "key", encode(sample._replace(mask=None), layout._replace(masked=False)), layout._replace(masked=False)
    )
    found = decode("key", encode(sample, layout), layout)
    assert found.mask is not None
    assert np.array_equal(found.tokens, whole.tokens) and np.array_equal(found.starts, whole.starts)
    for name in ("ids", "logprobs", "log_tails", "draw_ids", "draw_shares"):
        left, right = getattr(targets_of(found), name), getattr(targets_of(whole), name)
        assert np.array_equal(left[found.mask], right[found.mask]), name
    nothing = TeacherTargets(*(field[~found.mask] for field in targets_of(found)))
    assert np.isneginf(nothing.logprobs).all() and np.isneginf(nothing.log_tails).all()
    assert not nothing.draw_shares.any() and not nothing.entropy.any() and not nothing.label_nll.any()


def test_all_labels_masked_or_none_round_trip_to_themselves():
    for share in (0.0, 1.0):
        sample, layout = masked(CASES[0], share)
        once = decode("key", encode(sample, layout), layout)
        assert same(decode("key", encode(once, layout), layout), once)


@pytest.mark.parametrize("profile", ["topk", "sampled", "hybrid"])
def test_labels_that_do_not_count_cost_their_token_alone(profile):
    case = Case(profile, 300, 5000, top_k=64, draws=50)
    sizes = [len(encode(*masked(case, share))) for share in (0.7, 1.0, 0.0)]
    assert sizes[0] <= 0.75 * sizes[1]
    assert sizes[2] <= 3 * case.positions + 50


def test_old_readers_refuse_a_masked_record_and_new_ones_read_old_ones():
    assert NAME != MASKED_NAME
    sample, layout = masked(CASES[0], 0.5)
    plain, data = layout._replace(masked=False), encode(sample, layout)
    with pytest.raises(DamagedRecord, match="another profile"):
        decode("key", data, plain)
    old = encode(sample._replace(mask=None), plain)
    assert decode("key", old, plain).mask is None
    with pytest.raises(DamagedRecord, match="another profile"):
        decode("key", old, layout)


@pytest.mark.parametrize("profile", ["topk", "sampled", "hybrid"])
def test_every_flipped_bit_and_every_cut_is_noticed(profile):
    sample, layout = masked(Case(profile, 10, 9, top_k=2, draws=3), 0.5)
    data = encode(sample, layout)
    damaged = [data[:length] for length in range(len(data))] + [data + b"\0", data + data]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for each in damaged:
        with pytest.raises(DamagedRecord):
            decode("key", each, layout)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.profile}-T{case.positions}-V{case.vocabulary}")
def test_damage_under_a_checksum_that_fits_is_refused_or_reads_as_the_reference_reads_it(case):
    sample, layout = masked(case, 0.6)
    data, end = encode(sample, layout), reference.HEADER.size + (case.positions + 7) // 8
    for number in range(300):
        chooser = random.Random(number)
        if number % 2:  # header and mask alone
            changed = chooser.choice(MUTATIONS[:3])(chooser, bytearray(data[:end]))[:end] + data[end:]
        else:
            changed = chooser.choice(MUTATIONS)(chooser, bytearray(data))
        if len(changed) < 8:
            continue
        whole = sealed(changed)
        try:
            found = decode("key", whole, layout)
        except DamagedRecord:
            continue
        assert_like_reference(found, whole, layout)
