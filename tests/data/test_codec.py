import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
import torch

from megakd.capture.targets import targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.data.codebook import build_book
from megakd.data.codec import DamagedRecord, Layout, decode, encode
from megakd.data.records import IGNORED, Sample, TeacherTargets
from tests.data import reference_codec as reference

NATS, NATS_BOUND, MOST_NATS = ("label_nll", "entropy"), 0.016, math.expm1(254.5 / 32)  # bound on 1 + x
ANGLE_STEP = math.pi / 2 / 255  # of asin(sqrt(tail share))


class Case(NamedTuple):
    """T positions of a vocabulary of V, K kept; starts: of documents beyond the first one, at 0."""

    profile: str
    positions: int
    vocabulary: int
    top_k: int = 8
    draws: int = 50
    temperatures: tuple[float, ...] = (1.0, 2.0)
    draw_temperature: float = 1.0
    pmin: float = 3e-4
    levels: int = 236
    starts: tuple[int, ...] = ()
    spread: float = 3.0
    seed: int = 0


CASES = [
    Case("topk", 1, 5, top_k=1, temperatures=(1.0,)),
    Case("topk", 2, 5, top_k=5, pmin=0.0, starts=(1,)),
    Case("topk", 7, 33, starts=(2, 3, 7)),
    Case("topk", 7, 400, top_k=300, pmin=0.0, spread=0.1),
    Case("topk", 2, 400, top_k=400, pmin=0.0, temperatures=(1.0, 4.0)),
    Case("topk", 300, 400, top_k=64, temperatures=(1.0, 0.5, 2.0, 3.0), starts=(100, 101, 299), levels=255),
    Case("topk", 300, 5000, top_k=16, temperatures=(2.0, 3.0, 4.0), starts=(150, 300), levels=60),
    Case("topk", 7, 5000, top_k=256, pmin=0.0, temperatures=(1.0, 3.0)),
    Case("sampled", 1, 5, temperatures=(1.0,)),
    Case("sampled", 2, 33, draws=1),
    Case("sampled", 7, 5, draws=255, starts=(4,)),
    Case("sampled", 300, 400, temperatures=(1.0, 0.5, 2.0, 4.0), starts=(7, 8, 300)),
    Case("sampled", 7, 5000, draws=255, draw_temperature=2.0, spread=0.1),
    Case("hybrid", 1, 33, top_k=1, draws=3),
    Case("hybrid", 2, 5, top_k=4, draws=255, temperatures=(1.0, 2.0, 3.0, 4.0), pmin=0.0, levels=2),
    Case("hybrid", 7, 400, top_k=300, draws=20, pmin=0.0, spread=0.1, starts=(1, 2)),
    Case("hybrid", 300, 5000, top_k=12, draws=20, draw_temperature=2.0, starts=(250,)),
    Case("hybrid", 7, 33, draws=20, temperatures=(0.5, 3.0), draw_temperature=0.5),
]


def example(case: Case, logits: torch.Tensor | None = None) -> tuple[Sample, Layout]:
    """A sample with targets of a teacher of random logits, rows between near uniform and near certain."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = case.positions, case.vocabulary
    if logits is None:
        scale = case.spread * torch.rand(case.positions, 1, generator=generator)
        logits = scale * torch.randn(shape, generator=generator) - torch.arange(case.vocabulary).add(3).log()
    tokens = torch.randint(case.vocabulary, (case.positions + 1,), generator=generator)
    labels = tokens[1:].clone()
    labels[[start - 1 for start in case.starts]] = IGNORED
    config = LogitsConfig(**{k: v for k, v in case._asdict().items() if k in LogitsConfig.model_fields})
    offsets = torch.rand(case.positions, generator=generator, dtype=torch.float64)
    targets = TeacherTargets(*(field.numpy() for field in targets_from_logits(logits, labels, config, offsets)))
    named = [targets.ids[targets.logprobs > -np.inf], targets.draw_ids[targets.draw_shares > 0]]
    head, draws = case.profile != "sampled", case.profile != "topk"
    layout = Layout(
        top_k=case.top_k * head,
        draws=case.draws * draws,
        levels=case.levels,
        temperatures=config.declared_temperatures,
        sequence_length=300,
        book=build_book(np.concatenate(named), case.vocabulary),
    )
    starts = np.array([0, *case.starts], np.int32)
    return Sample("key", tokens.numpy().astype(np.int32), starts, targets), layout


def targets_of(sample: Sample) -> TeacherTargets:
    assert sample.targets is not None
    return sample.targets


def same(left: Sample, right: Sample) -> bool:
    fields = ((each.tokens, each.starts, *targets_of(each)) for each in (left, right))
    pairs = zip(*fields, strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def tail_angles(targets: TeacherTargets, temperatures: tuple[float, ...]) -> np.ndarray:
    """asin(sqrt(share of the tail in the sum of all p^(1/T))), [T, M], in float64."""
    logprobs, log_tails = targets.logprobs.astype(np.float64), targets.log_tails.astype(np.float64)
    heads = np.stack([np.exp(logprobs / t).sum(1) for t in temperatures], 1)
    return np.arcsin(np.sqrt(np.exp(log_tails) / (heads + np.exp(log_tails))))


def assert_within_bounds(found: Sample, sample: Sample, record: reference.Record, layout: Layout) -> None:
    """The bounds that the codec states for what it stores of a number."""
    expected, targets, step = targets_of(sample), targets_of(found), 1 / layout.levels
    assert np.array_equal(found.tokens, sample.tokens) and np.array_equal(found.starts, sample.starts)
    for row in range(len(targets.ids)):
        kept = expected.logprobs[row] > -np.inf
        roots = dict(zip(expected.ids[row][kept].tolist(), np.exp(expected.logprobs[row][kept] / 2), strict=True))
        if layout.top_k:
            assert {token for token, _ in record.head[row]} == set(roots) and len(record.head[row]) == len(roots)
            for token, value in record.head[row]:
                assert abs(value * step - roots[token]) <= 0.5 * step + 1e-6 or (value == 1 and roots[token] < step)
        drawn, shares = expected.draw_shares[row] > 0, targets.draw_shares[row] > 0
        assert dict(zip(targets.draw_ids[row][shares], targets.draw_shares[row][shares], strict=True)) == dict(
            zip(expected.draw_ids[row][drawn], expected.draw_shares[row][drawn], strict=True)
        )
    if layout.top_k:
        mass = np.exp(np.c_[targets.logprobs, targets.log_tails[:, :1]].astype(np.float64)).sum(1)
        assert np.abs(mass - 1).max() < 1e-5
        found_angles, angles = (tail_angles(t, layout.temperatures) for t in (targets, expected))
        # neither head nor tail may vanish, however small it is: half a step, but a whole one at both ends
        inner = (angles > ANGLE_STEP) & (angles < 254 * ANGLE_STEP)
        assert (np.abs(found_angles - angles) <= np.where(inner, 0.5, 1) * ANGLE_STEP + 1e-5).all()
        assert (np.isneginf(targets.log_tails) == (np.exp(expected.log_tails) == 0)).all()
    for name in NATS:
        numbers, true = getattr(targets, name), getattr(expected, name)
        there = (targets.ids == found.tokens[1:, None]) & (targets.logprobs > -np.inf)
        there[:, 255:] = False  # 255 says that the label is not there
        if name == "label_nll" and there.any():  # of a label in the head it is what the head says
            known = there.any(1) & (true > 0)
            assert np.array_equal(numbers[known], -np.where(there, targets.logprobs, 0).sum(1)[known])
            numbers, true = numbers[~known], true[~known]
        assert (np.abs(numbers - true.clip(max=MOST_NATS)) <= NATS_BOUND * (1 + true)).all()
    assert (targets.label_nll[found.starts[1:] - 1] == 0).all()


def assert_like_reference(found: Sample, data: bytes, layout: Layout) -> None:
    """Equal in what is whole numbers, to float32 rounding in what is not."""
    tokens, starts, expected = reference.decode(data, layout)
    targets = targets_of(found)
    assert found.tokens.dtype == np.int32 and np.array_equal(found.tokens, tokens)
    assert found.starts.dtype == np.int32 and np.array_equal(found.starts, starts)
    for name in TeacherTargets._fields:
        left, right = getattr(targets, name), getattr(expected, name)
        assert left.dtype == right.dtype and left.shape == right.shape, name
        if name in ("ids", "draw_ids", "draw_shares"):
            assert np.array_equal(left, right), name
        else:
            assert np.allclose(left, right, rtol=4e-7, atol=2e-6), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.profile}-T{case.positions}-V{case.vocabulary}")
def test_round_trip(case):
    sample, layout = example(case)
    data = encode(sample, layout)
    found = decode(sample.key, data, layout)
    assert found.key == sample.key
    assert_like_reference(found, data, layout)
    assert_within_bounds(found, sample, reference.parse(data, layout), layout)


def test_cases_are_what_they_are_meant_to_be():
    """Rows of different length, of more than 255 entries, labels in their row and not; else round trips show less."""
    seen = set()
    for case in CASES:
        sample, layout = example(case)
        targets = targets_of(sample)
        for ids, kept in ((targets.ids, targets.logprobs > -np.inf), (targets.draw_ids, targets.draw_shares > 0)):
            counts, label = kept.sum(1), sample.tokens[1:, None]
            seen.add(("lengths differ", case.profile, bool(np.ptp(counts))))
            seen.add(("more than 255", bool((counts > 255).any())))
            seen |= {("label in its row", case.profile, bool(there)) for there in ((ids == label) & kept).any(1)}
        seen |= {("16 draws on an id", bool(large)) for large in (targets.draw_shares * layout.draws > 15.5).ravel()}
        seen.add(("raw bits", len(reference.open_record(encode(sample, layout), layout)[2]) > 0))
    for profile in ("topk", "sampled", "hybrid"):
        assert seen >= {(what, profile, True) for what in ("lengths differ", "label in its row")}
        assert ("label in its row", profile, False) in seen
    assert seen >= {(what, which) for what in ("more than 255", "16 draws on an id", "raw bits") for which in (0, 1)}


def test_rows_of_every_length_below_and_above_255():
    """The number of entries takes two bytes; rows of 1, 255, 256, 257 and 300 entries side by side."""
    lengths = [1, 255, 256, 257, 300, 2, 299]
    logits = torch.full((len(lengths), 400), -30.0)
    for row, length in enumerate(lengths):
        logits[row, row : row + length] = torch.linspace(0, -2, length)
    sample, layout = example(Case("topk", len(lengths), 400, top_k=300, temperatures=(1.0, 0.5)), logits)
    assert (targets_of(sample).logprobs > -np.inf).sum(1).tolist() == lengths
    data = encode(sample, layout)
    found = decode("key", data, layout)
    assert (targets_of(found).logprobs > -np.inf).sum(1).tolist() == lengths
    assert_like_reference(found, data, layout)
    assert_within_bounds(found, sample, reference.parse(data, layout), layout)


@pytest.mark.parametrize("profile", ["topk", "sampled", "hybrid"])
@pytest.mark.parametrize("pmin", [0.0, 3e-4])
def test_certain_and_uniform_teachers(profile, pmin):
    """All the mass in one token, half in each of two, and the same everywhere: tails of nothing and of nearly all."""
    logits = torch.zeros(4, 400)
    logits[0, 7] = 9e4
    logits[1, [3, 9]] = 200.0
    logits[3, 11] = 2.0
    case = Case(profile, 4, 400, top_k=4, draws=10, pmin=pmin, temperatures=(1.0, 0.5, 2.0, 4.0), starts=(2,))
    sample, layout = example(case, logits)
    data = encode(sample, layout)
    found = decode("key", data, layout)
    assert_like_reference(found, data, layout)
    if profile != "sampled":
        kept = {0: {7}, 1: {3, 9}}
        for row, ids in kept.items():
            best = targets_of(found).logprobs[row] > -2
            assert set(targets_of(found).ids[row][best].tolist()) == ids
    if profile == "sampled" or pmin:
        assert_within_bounds(found, sample, reference.parse(data, layout), layout)
    if profile != "sampled" and pmin:
        assert np.isneginf(targets_of(found).log_tails[:2, :2]).all()
        assert targets_of(found).logprobs[0].tolist() == [0.0, *[-np.inf] * 3]
    if profile == "sampled":
        assert targets_of(found).draw_shares[0].tolist() == [1.0, *[0.0] * 9]


def test_whole_vocabulary_stored_keeps_its_tail_of_nothing():
    sample, layout = example(Case("topk", 7, 11, top_k=11, pmin=0.0))
    assert np.isneginf(targets_of(sample).log_tails).all()
    found = targets_of(decode("key", encode(sample, layout), layout))
    assert np.isneginf(found.log_tails).all() and np.isfinite(found.logprobs).all()


@pytest.mark.parametrize("name", NATS)
def test_numbers_in_nats(name):
    """Label NLL and entropy within 1.6 % of 1 + x; what is too large stays within half a step of the last."""
    sample, layout = example(Case("sampled", 300, 33))

    def stored(x: np.ndarray) -> np.ndarray:
        changed = sample._replace(targets=targets_of(sample)._replace(**{name: x.astype(np.float32)}))
        return getattr(targets_of(decode("key", encode(changed, layout), layout)), name)

    for high in (1.0, 52.0, MOST_NATS):
        x = np.linspace(0, high, 300)
        found = stored(x)
        assert (np.abs(found - x) <= NATS_BOUND * (1 + x)).all()
    x = np.full(300, 1e30)
    x[1] = np.inf
    assert np.allclose(stored(x), MOST_NATS, rtol=1 / 31)


@pytest.mark.parametrize("name", NATS)
@pytest.mark.parametrize("x", [0.02, 1.0, 3.3, 11.0])
def test_numbers_in_nats_keep_their_mean_where_they_are_alike(name, x):
    """Plain rounding would be off by up to 1.6 % of 1 + x at every position alike."""
    sample, layout = example(Case("sampled", 300, 33))
    changed = sample._replace(targets=targets_of(sample)._replace(**{name: np.full(300, x, np.float32)}))
    found = getattr(targets_of(decode("key", encode(changed, layout), layout)), name)
    assert abs(found.mean(dtype=np.float64) - x) <= 2e-4 * (1 + x)


def lm_shaped(positions: int, vocabulary: int) -> torch.Tensor:
    """Logits as language models have them: common words are likely everywhere, some rows are all but sure."""
    generator = torch.Generator().manual_seed(5)
    common = -torch.arange(vocabulary).add(3.0).log()
    own = torch.randn(positions, vocabulary, generator=generator)
    sharpness = 1.2 + 1.5 * torch.rand(positions, 1, generator=generator)
    return sharpness * (0.8 * common + 1.4 * own)


@pytest.mark.parametrize("profile", ["topk", "hybrid"])
def test_what_rounding_costs_in_nats(profile):
    """KL(head and tail as they were || as they are decoded): a mean of at most 2.5e-4, never negative."""
    sample, layout = example(Case(profile, 300, 5000, top_k=64), lm_shaped(300, 5000))
    targets = targets_of(sample)
    found = targets_of(decode("key", encode(sample, layout), layout))
    entries = (targets.logprobs > -np.inf).sum(1)
    tails = np.exp(targets.log_tails[:, 0])
    assert entries.min() < 20 and entries.max() == 64 and tails.min() < 0.02 and tails.max() > 0.3  # all kinds of rows
    costs = []
    for row in range(300):
        true, decoded = (
            {int(i): math.exp(x) for i, x in zip(t.ids[row], t.logprobs[row], strict=True) if x > -math.inf}
            | {-1: math.exp(t.log_tails[row, 0])}
            for t in (targets, found)
        )
        assert true.keys() == decoded.keys()
        left, right = sum(true.values()), sum(decoded.values())
        assert abs(left - 1) < 1e-5 and abs(right - 1) < 1e-5
        costs.append(sum(p / left * math.log(p / left / (decoded[i] / right)) for i, p in true.items()))
    print(f"mean {np.mean(costs):.2e}, 99 % {np.quantile(costs, 0.99):.2e}")
    assert min(costs) >= 0 and 1e-5 < np.mean(costs) <= 2.5e-4, (min(costs), np.mean(costs))


@pytest.mark.parametrize("profile", ["topk", "sampled", "hybrid"])
def test_same_sample_same_bytes(profile):
    case = Case(profile, 7, 33, draws=10, starts=(3,))
    sample, layout = example(case)
    data = encode(sample, layout)
    again, its_layout = example(case)
    assert encode(again, its_layout) == data == encode(sample, layout)
    assert encode(example(case._replace(seed=1))[0], layout) != data


@pytest.mark.parametrize("profile", ["topk", "sampled", "hybrid"])
def test_layout_in_memory_is_no_part_of_the_value(profile):
    sample, layout = example(Case(profile, 7, 33, draws=10, starts=(3,)))
    data = encode(sample, layout)

    def strided(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, 2, -1)[..., ::2]

    def backwards(array: np.ndarray) -> np.ndarray:
        return array[..., ::-1].copy()[..., ::-1]

    def read_only(array: np.ndarray) -> np.ndarray:
        return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)

    for form in (np.asfortranarray, strided, backwards, read_only):
        targets = TeacherTargets(*map(form, targets_of(sample)))
        changed = Sample(sample.key, form(sample.tokens), form(sample.starts), targets)
        assert encode(changed, layout) == data, form.__name__


def test_threads_do_not_disturb_each_other():
    """Eight threads encode and decode records of all profiles at once, each as it would alone."""
    examples = [example(case) for case in CASES if case.vocabulary < 5000]
    alone = [encode(sample, layout) for sample, layout in examples]
    decoded = [decode("key", data, layout) for data, (_, layout) in zip(alone, examples, strict=True)]

    def work(number: int) -> bool:
        index = number % len(examples)
        sample, layout = examples[index]
        data = encode(sample, layout)
        return data == alone[index] and same(decode("key", data, layout), decoded[index])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40 * len(examples))))


@pytest.mark.parametrize("profile", ["topk", "sampled", "hybrid"])
def test_every_flipped_bit_is_noticed(profile):
    sample, layout = example(Case(profile, 2, 9, top_k=2, draws=3))
    data = encode(sample, layout)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedRecord):
            decode("key", bytes(damaged), layout)


@pytest.mark.parametrize("profile", ["topk", "sampled", "hybrid"])
def test_every_cut_and_every_addition_is_noticed(profile):
    sample, layout = example(Case(profile, 2, 9, top_k=2, draws=3))
    data = encode(sample, layout)
    for damaged in [*(data[:length] for length in range(len(data))), data + b"\0", data + b"x", data + data]:
        with pytest.raises(DamagedRecord):
            decode("key", damaged, layout)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"book": build_book(np.array([3]), 33)}, "another codebook"),
        ({"draws": 5}, "another profile"),
        ({"top_k": 0, "draws": 5}, "another profile"),
        ({"temperatures": (1.0,)}, "other temperatures"),
        ({"temperatures": (1.0, 2.0, 4.0)}, "other temperatures"),
        ({"sequence_length": 6}, "7 positions"),
        ({"top_k": 1}, "entries"),
    ],
)
def test_a_record_of_other_layout_is_refused(changes, message):
    sample, layout = example(Case("topk", 7, 33))
    data = encode(sample, layout)
    with pytest.raises(DamagedRecord, match=message):
        decode("key", data, layout._replace(**changes))


def test_another_number_of_draws_is_refused():
    sample, layout = example(Case("sampled", 7, 33, draws=10))
    data = encode(sample, layout)
    for draws in (9, 11):
        with pytest.raises(DamagedRecord, match=r"draws|entries"):
            decode("key", data, layout._replace(draws=draws))
