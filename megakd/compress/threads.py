"""Map over experts so that results are the same bytes for any number of threads.

The experts are cut into contiguous parts, fixed by their number alone, and each part into chunks, fixed by the shapes.
One single-threaded worker thread computes a part in order, and results are in the order of the parts: a sum over them
has one order. On an accelerator there is one part of large chunks: the same functions run batched.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
MOST = 16  # as many threads at most; each part holds a sum of the size of a core
CPU_CHUNK, DEVICE_CHUNK = 2**18, 2**28  # numbers of a chunk's matrices; below, calls cost more than arithmetic


class Threads(NamedTuple):
    chunks: list[list[slice]]
    pool: ThreadPoolExecutor | None

    def map(self, function: Callable[[list[slice]], Result]) -> list[Result]:
        """function(chunks of a part) of every part, in order."""
        if self.pool is None:
            return [function(part) for part in self.chunks]
        return [future.result() for future in [self.pool.submit(function, part) for part in self.chunks]]


@contextmanager
def threads_over(matrices: Tensor, chunk: int | None = None) -> Iterator[Threads]:
    """Worker threads over the first dimension of `matrices` [E, rows, columns]; torch has one thread inside.

    chunk: matrices worked on at once, instead of the number that fits the device.
    """
    experts, size = len(matrices), max(matrices[0].numel(), 1)
    on_cpu = matrices.device.type == "cpu"
    chunk = chunk or max(1, (CPU_CHUNK if on_cpu else DEVICE_CHUNK) // size)
    # a whole number of chunks per part
    per_part = -(-experts // (MOST if on_cpu else 1))
    per_part = -(-per_part // chunk) * chunk
    chunks = [
        [slice(at, min(at + chunk, experts)) for at in range(start, min(start + per_part, experts), chunk)]
        for start in range(0, experts, per_part)
    ]
    threads = torch.get_num_threads()
    workers = min(threads, len(chunks)) if on_cpu else 1
    # before the pool starts: a new thread inherits the number set last, in its own copy (OpenMP's and MKL's are a
    # thread's own). One thread too for what is done outside of them, its rounding depends on the number as well.
    torch.set_num_threads(1)
    try:
        if workers == 1:
            yield Threads(chunks, None)
        else:
            with ThreadPoolExecutor(workers, "experts", torch.set_num_threads, (1,)) as pool:
                yield Threads(chunks, pool)
    finally:
        torch.set_num_threads(threads)
