"""Map over experts so that results are the same bytes for any number of threads.

The experts are cut into lanes, contiguous and fixed by their number alone, and a lane into chunks, fixed by the shapes.
A lane is worked through in order by one single-threaded thread, and what lanes return is in their order: a sum over it
has one order. On an accelerator there is one lane of large chunks: the same functions run batched.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
LANES = 16  # as many threads at most; each lane holds a sum of the size of a core
CPU_CHUNK, DEVICE_CHUNK = 2**18, 2**28  # numbers of a chunk's matrices; below, calls cost more than arithmetic


class Lanes(NamedTuple):
    chunks: list[list[slice]]
    pool: ThreadPoolExecutor | None

    def map(self, function: Callable[[list[slice]], Result]) -> list[Result]:
        """function(chunks of a lane) of every lane, in order."""
        if self.pool is None:
            return [function(lane) for lane in self.chunks]
        return [future.result() for future in [self.pool.submit(function, lane) for lane in self.chunks]]


@contextmanager
def lanes_over(matrices: Tensor, chunk: int | None = None) -> Iterator[Lanes]:
    """Lanes over the first dimension of `matrices` [E, rows, columns]; torch has one thread inside, as before after it.

    chunk: matrices worked on at once, instead of the number that fits the device.
    """
    experts, size = len(matrices), max(matrices[0].numel(), 1)
    on_cpu = matrices.device.type == "cpu"
    chunk = chunk or max(1, (CPU_CHUNK if on_cpu else DEVICE_CHUNK) // size)
    # a whole number of chunks a lane
    per_lane = -(-experts // (LANES if on_cpu else 1))
    per_lane = -(-per_lane // chunk) * chunk
    chunks = [
        [slice(at, min(at + chunk, experts)) for at in range(start, min(start + per_lane, experts), chunk)]
        for start in range(0, experts, per_lane)
    ]
    threads = torch.get_num_threads()
    workers = min(threads, len(chunks)) if on_cpu else 1
    # before the pool starts: a new thread takes over the number set last, in its own copy (OpenMP's and MKL's are a
    # thread's own). One thread too for what is done outside of lanes, its rounding depends on the number as well.
    torch.set_num_threads(1)
    try:
        if workers == 1:
            yield Lanes(chunks, None)
        else:
            with ThreadPoolExecutor(workers, "experts", torch.set_num_threads, (1,)) as pool:
                yield Lanes(chunks, pool)
    finally:
        torch.set_num_threads(threads)
