import shutil
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megakd.data.batches import Reader, collate, prefetch, to_device, valid_tokens
from megakd.data.packing import pack
from megakd.data.records import IGNORED, Sample, TeacherTargets
from megakd.data.shards import DamagedSample, ShardSet


def sample(tokens: list[int], starts: list[int], targets: TeacherTargets | None = None) -> Sample:
    return Sample("0", np.array(tokens, np.int32), np.array(starts, np.int32), targets)


def random_samples(seed: int, sequence_length: int) -> list[Sample]:
    """Windows as packing makes them, among them starts at the last token and a short last window."""
    chooser = np.random.default_rng(seed)
    documents = [chooser.integers(1, 400, chooser.integers(1, 2 * sequence_length)).tolist() for _ in range(7)]
    return [Sample(str(i), w.tokens, w.starts) for i, w in enumerate(pack(enumerate(documents), sequence_length))]


def reference_row(sample: Sample, sequence_length: int) -> tuple[list[int], list[int], list[int]]:
    """tokens, labels and positions of a sample, one document after the other."""
    tokens, labels, positions = [], [], []
    bounds = [*sample.starts.tolist(), len(sample.tokens)]
    for start, end in pairwise(bounds):
        document = sample.tokens[start:end].tolist()
        tokens += document
        labels += [*document[1:], IGNORED]
        positions += range(len(document))
    length = len(tokens) - 1  # the last token is only a label
    padding = sequence_length - length
    return (
        tokens[:length] + [0] * padding,
        labels[:length] + [IGNORED] * padding,
        positions[:length] + list(range(padding)),
    )


def targets_of(length: int, entries: int = 3, temperatures: int = 2, draws: int = 4, seed: int = 0) -> TeacherTargets:
    chooser = np.random.default_rng(seed)

    def floats(*shape: int) -> np.ndarray:
        return chooser.random((length, *shape), np.float32) + 0.1

    def ids(count: int) -> np.ndarray:
        return chooser.integers(1, 400, (length, count)).astype(np.int32)

    return TeacherTargets(
        ids(entries), -floats(entries), -floats(temperatures), ids(draws), floats(draws), floats(), floats()
    )


def test_an_example():
    batch = collate([sample([5, 6, 7, 8, 9, 3], [0, 2, 5]), sample([1, 2], [0])], 5)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, IGNORED, 8, 9, IGNORED], [2, IGNORED, IGNORED, IGNORED, IGNORED]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert batch.targets is None
    assert {t.dtype for t in batch[:3]} == {torch.int64}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sequence_length", [2, 5, 16])
def test_collate_matches_reference(seed, sequence_length):
    samples = random_samples(seed, sequence_length)
    batch = collate(samples, sequence_length)
    for row, one in enumerate(samples):
        tokens, labels, positions = reference_row(one, sequence_length)
        assert (batch.tokens[row].tolist(), batch.labels[row].tolist(), batch.position_ids[row].tolist()) == (
            tokens,
            labels,
            positions,
        )
    assert (
        (batch.labels != IGNORED).sum() == valid_tokens(samples) == sum(len(s.tokens) - len(s.starts) for s in samples)
    )


def test_samples_pad_to_more_positions_than_they_have():
    samples = random_samples(0, 5)
    batch = collate(samples, 9, whole=True)
    assert batch.tokens.shape == (len(samples), 9)
    assert (batch.labels[:, 5:] == IGNORED).all() and (batch.labels != IGNORED).sum() == valid_tokens(samples)
    assert (batch.position_ids[:-1, 5:] == torch.arange(4)).all()


def test_a_batch_is_as_wide_as_its_longest_sample():
    """A multiple of 8 for the sake of matrix products, but never more than a sequence may have."""
    short, long = sample(list(range(1, 4)), [0]), sample(list(range(1, 22)), [0])
    assert [collate([short, short], limit).tokens.shape for limit in (2, 5, 8, 40)] == [(2, 2), (2, 5), (2, 8), (2, 8)]
    assert [collate([short, long], limit).tokens.shape[1] for limit in (20, 22, 24, 40)] == [20, 22, 24, 24]


@pytest.mark.parametrize("entries, draws", [(3, 4), (3, 0), (0, 4)])
def test_targets_are_padded_and_keep_their_place(entries, draws):
    targets = [targets_of(5, entries, draws=draws, seed=1), targets_of(1, entries, draws=draws, seed=2)]
    batch = collate([sample([1, 2, 3, 4, 5, 6], [0], targets[0]), sample([1, 2], [0], targets[1])], 5)
    assert batch.targets is not None
    for name, field, *per_sample in zip(TeacherTargets._fields, batch.targets, *targets, strict=True):
        assert field.shape == (2, 5, *per_sample[0].shape[1:])
        assert np.array_equal(field[0].numpy(), per_sample[0]) and np.array_equal(field[1, :1].numpy(), per_sample[1])
        assert (field[1, 1:] == 0).all()
        assert field.dtype == (torch.int32 if name in ("ids", "draw_ids") else torch.float32)


def test_to_device_keeps_everything():
    batch = collate([sample([1, 2, 3], [0, 1], targets_of(2))], 3)
    moved = to_device(batch, torch.device("cpu"))
    assert all(
        torch.equal(a, b) for a, b in zip([*batch[:3], *batch.targets], [*moved[:3], *moved.targets], strict=True)
    )
    assert to_device(collate([sample([1, 2], [0])], 3), torch.device("cpu")).targets is None


@torch.no_grad()
def test_packed_windows_give_the_logits_of_each_document_alone(teacher):
    """position_ids that restart and no mask are block-diagonal attention: no document sees another, nor the padding."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    samples = random_samples(3, 24)
    assert max(len(s.starts) for s in samples) > 2 and len(samples[-1].tokens) < 25
    batch = collate(samples, 24)
    packed = model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
    for row, one in enumerate(samples):
        for start, end in pairwise([*one.starts.tolist(), len(one.tokens)]):
            end = min(end, len(one.tokens) - 1)
            if start < end:
                alone = model(batch.tokens[row : row + 1, start:end], use_cache=False).logits[0]
                assert torch.allclose(packed[row, start:end], alone, atol=1e-4), (row, start, end)
    one_document = model(batch.tokens, position_ids=torch.arange(24).expand(len(samples), -1), use_cache=False).logits
    assert not torch.allclose(packed, one_document, atol=1e-2)  # so the above could have failed


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_prefetch_yields_the_same_items(depth):
    items = [None, 0, "x", *range(20)]
    assert list(prefetch(iter(items), depth)) == items
    assert list(prefetch([], depth)) == []


def test_prefetch_works_ahead_but_not_further_than_its_depth():
    made: list[int] = []
    reached = threading.Event()

    def source() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            if i == 3:
                reached.set()
            yield i

    items = prefetch(source(), depth=3)
    assert next(items) == 0
    assert reached.wait(10)  # 1, 2 and 3 are made though nobody has asked for them
    assert len(made) <= 5  # one taken, three waiting, one in hand
    items.close()


def test_prefetch_passes_on_the_error_after_the_items_before_it():
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise RuntimeError("broken source")

    items = prefetch(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(RuntimeError, match="broken source"):
        next(items)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("taken", [1, 4])
def test_prefetch_ends_its_thread_when_the_reader_leaves(depth, taken):
    threads: list[threading.Thread] = []

    def endless() -> Iterator[int]:
        threads.append(threading.current_thread())
        i = 0
        while True:
            yield i
            i += 1

    items = prefetch(endless(), depth)
    assert [next(items) for _ in range(taken)] == list(range(taken))
    items.close()
    assert threads[0] is not threading.current_thread()
    threads[0].join(timeout=20)
    assert not threads[0].is_alive()


def test_prefetch_works_on_the_gpu_of_its_caller(monkeypatch):
    """CUDA gives every new thread the first GPU: there ranks > 0 gathered their teacher's weights."""
    taken: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: taken.append((threading.current_thread().name, gpu)))
    assert list(prefetch([1, 2])) == [1, 2]
    assert taken == [("prefetch", 3)]


class Slow:
    """A data set whose samples take the longer the earlier they are; remembers which threads read it."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.reading = self.most = 0
        self.lock = threading.Lock()

    def __getitem__(self, index: int) -> Sample:
        with self.lock:
            self.threads.add(threading.current_thread().name)
            self.reading += 1
            self.most = max(self.most, self.reading)
        time.sleep(0.002 * (20 - index))
        with self.lock:
            self.reading -= 1
        return sample([index, index], [0])


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_reader_keeps_the_order_asked_for_with_any_number_of_threads(workers):
    slow: Any = Slow()
    reader = Reader(slow, workers)
    asked = [3, 19, 0, 7, 7, 12, 1]
    assert [int(s.tokens[0]) for s in reader.read(asked)] == asked and not list(reader.read([]))
    assert slow.most == workers and {name.split("_")[0] for name in slow.threads} == {"decode"}
    reader.close()
    assert not [t for t in threading.enumerate() if t.name in slow.threads]


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    """The run's training shards, with a flipped byte in samples 1 and 4."""
    folder = Path(shutil.copytree(prepared / "data" / "logits" / "train", tmp_path / "logits" / "train"))
    shards = ShardSet(folder)
    data = bytearray((folder / "shard-00000.tar").read_bytes())
    for index in (1, 4):
        entry = shards.entry(index)
        data[entry.offset + entry.size // 2] ^= 1
    (folder / "shard-00000.tar").write_bytes(data)
    return folder


def test_reader_raises_on_damage_naming_shard_and_sample(damaged):
    shards = ShardSet(damaged)
    reader = Reader(shards, 2)
    assert [s.key for s in reader.read([0, 2, 3])] == [shards.entry(i).key for i in (0, 2, 3)]
    with pytest.raises(DamagedSample, match=rf"shard-00000\.tar: sample {shards.entry(1).key}: checksum"):
        list(reader.read(range(6)))
    assert reader.damaged == {}
    reader.close()


def test_reader_replaces_and_names_damage_when_told_to_skip(damaged, dataset):
    shards = ShardSet(damaged)
    reader = Reader(shards, 3, skip=True)
    found = list(reader.read(range(6)))
    assert [i for i, s in enumerate(found) if s.key == "blank"] == sorted(reader.damaged) == [1, 4]
    for index in (1, 4):
        assert shards.entry(index).key in reader.damaged[index] and "shard-00000.tar" in reader.damaged[index]
    batch, whole = collate(found, 32), collate([dataset[i] for i in range(6)], 32)
    good = [0, 2, 3, 5]
    for mine, theirs in zip([*batch[:3], *batch.targets], [*whole[:3], *whole.targets], strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine[good], theirs[good])
    assert (batch.labels[[1, 4]] == IGNORED).all() and valid_tokens(found) == (batch.labels != IGNORED).sum()
    assert valid_tokens(found) == sum(shards.entry(i).labels for i in good)
    reader.close()


def test_reader_does_not_skip_what_is_not_damage(dataset):
    """A shard that has vanished is no damaged sample: nothing stands in for it."""

    class Broken:
        def __getitem__(self, index: int) -> Sample:
            raise OSError("disk gone")

    broken: Any = Broken()
    reader = Reader(broken, 1, skip=True)
    with pytest.raises(OSError, match="disk gone"):
        list(reader.read([0]))
    reader.close()
