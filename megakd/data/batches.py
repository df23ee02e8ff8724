"""Samples → Batch: pad, shift once, restart positions at documents."""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Event, Thread
from typing import Any, TypeVar

import numpy as np
import torch

from megakd.data.records import IGNORED, Batch, Sample, TeacherTargets, with_rows
from megakd.data.shards import DamagedSample, ShardSet

Item = TypeVar("Item")
WIDTH = 8  # batches have a multiple of so many positions


def collate(samples: Sequence[Sample], sequence_length: int, whole: bool = False) -> Batch:
    """Pad samples to the longest of them and shift them once; padding is a document without labels.

    A batch has at most `sequence_length` positions, where longer samples are cut; less is a multiple of 8, as matrix
    products want it. whole: it has `sequence_length`.
    """
    if not whole:
        sequence_length = batch_width((len(sample.tokens) - 1 for sample in samples), sequence_length)
    shape = (len(samples), sequence_length)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, sample in enumerate(samples):
        length = min(len(sample.tokens) - 1, sequence_length)
        assert length > 0, (sample.key, len(sample.tokens))
        tokens[row, :length] = sample.tokens[:length]
        labels[row, :length] = sample.tokens[1 : length + 1]
        starts = [s for s in sample.starts if s <= length]
        positions[row] = _positions([*(s for s in starts if s < length), length], sequence_length)
        labels[row, [s - 1 for s in starts if s > 0]] = IGNORED
        if sample.mask is not None:
            labels[row, :length][~sample.mask[:length]] = IGNORED
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        _collate_targets([s.targets for s in samples], sequence_length),
    )


def batch_width(lengths: Iterable[int], sequence_length: int) -> int:
    """How many positions a batch of samples of so many positions has."""
    return min(-(-max(lengths) // WIDTH) * WIDTH, sequence_length)


def _positions(starts: list[int], length: int) -> np.ndarray:
    """0, 1, 2, … restarting at each start; [length]."""
    index = np.arange(length)
    return index - np.maximum.accumulate(np.where(np.isin(index, starts), index, 0))


def _collate_targets(targets: Sequence[TeacherTargets | None], sequence_length: int) -> TeacherTargets | None:
    if targets[0] is None:
        return None

    def padded(arrays: list[np.ndarray]) -> torch.Tensor:
        out = np.zeros((len(arrays), sequence_length, *arrays[0].shape[1:]), arrays[0].dtype)
        for row, array in enumerate(arrays):
            out[row, : len(array)] = array[:sequence_length]
        return torch.from_numpy(out)

    return TeacherTargets(*(padded(list(field)) for field in zip(*targets, strict=True)))  # type: ignore[arg-type]


class Reader:
    """Samples by index, decoded in threads (numba and zstd release the GIL); in the order asked for.

    skip: a damaged sample is replaced by one without labels, and its index noted in `damaged`; else it raises.
    """

    def __init__(self, dataset: ShardSet, workers: int, skip: bool = False):
        self.dataset, self.skip = dataset, skip
        self.damaged: dict[int, str] = {}  # index → what is wrong
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def read(self, indices: Iterable[int]) -> Iterator[Sample]:
        """All indices are decoded from now on, `workers` at once; who iterates waits for the next sample alone."""
        return self.pool.map(self._one, indices)

    def _one(self, index: int) -> Sample:
        try:
            return self.dataset[index]
        except DamagedSample as error:
            if not self.skip:
                raise
            self.damaged[index] = str(error)
            return self.dataset.blank()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def valid_tokens(samples: Iterable[Sample]) -> int:
    """How many positions of the samples carry a label: what losses are divided by."""
    return sum(sample.label_count for sample in samples)


def prefetch(items: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """The same items, made in a background thread up to `depth` ahead; an error in it is raised here.

    Close it (contextlib.closing) where leaving early is possible: a thread that still runs at exit aborts the process.
    The thread has the caller's current GPU; CUDA would give it the first one, whatever the rank.
    """
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    queue: Queue = Queue(depth)
    stop = Event()
    end = object()

    def fill() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            for item in items:
                queue.put((item, None))
                if stop.is_set():
                    return
            queue.put((end, None))
        except BaseException as error:  # passed on, not handled
            queue.put((end, error))

    thread = Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        deadline = time.monotonic() + 10  # it may wait for a rank that is gone
        while thread.is_alive() and time.monotonic() < deadline:
            while not queue.empty():
                queue.get_nowait()
            thread.join(0.01)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`, and with its `Rows`, which are made before it is moved."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        return type(value)(*map(moved, value)) if hasattr(value, "_fields") else value

    return moved(with_rows(batch))
