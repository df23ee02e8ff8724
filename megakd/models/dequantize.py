"""Codes and scales of a quantised weight → the weight: (code - zero point) x scale, piece by piece.

The product is taken in float32 and rounded once, to bfloat16; to float16 where the scales are stored so. transformers
and compressed-tensors give the same bits in those types. Of a compact student it stays in float32, until a model of
another type takes it.
E matrices of R rows and C columns; one scale for each block of some rows and columns.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megakd.identity import StoredTensor
from megakd.models.codes import unpack
from megakd.models.stored import DTYPES, read_stored

PIECE = 1 << 22  # numbers that are dequantised at a time: some 50 MB of temporary tensors
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # e2m1; with the sign bit, the negative ones


class Quantized(NamedTuple):
    """How one weight is stored.

    codes, scales, zeros, overall: names of its tensors: zeros holds zero points, overall one number that divides all
    scales. kind: what a code is: a number of its own type, an integer of `bits` packed into int32, half a byte of e2m1.
    matrix: (R, C) of the codes, unpacked. block: rows and columns that share a scale.
    shape: of the weight, [R, C] or [E, R, C]; [E, C, R] where the model has it transposed. dtype: its type.
    unread: names of tensors that say nothing more.
    """

    codes: str
    scales: str
    zeros: str | None
    overall: str | None
    kind: Literal["number", "packed", "fp4"]
    bits: int
    matrix: tuple[int, int]
    block: tuple[int, int]
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False
    unread: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [*(name for name in (self.codes, self.scales, self.zeros, self.overall) if name), *self.unread]


def read_weight(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    weight: Quantized,
    rows: slice | None = None,
    inner: slice | None = None,
) -> Tensor:
    """A weight, or rows of its first dimension; inner: of the second one, for a stack of matrices.

    Besides the result and one matrix' scales, no more than PIECE numbers are in memory.
    """
    (height, width), stacked = weight.matrix, len(weight.shape) == 3
    matrices = range(weight.shape[0])[rows or slice(None)] if stacked else range(1)
    assert stacked or inner is None, (weight, inner)
    assert not weight.transposed or (stacked and inner is None), (weight, inner)
    first, last, _ = ((inner if stacked else rows) or slice(None)).indices(height)
    dtype = DTYPES[weight.dtype]
    size = (width, last - first) if weight.transposed else (last - first, width)
    out = torch.empty(len(matrices), *size, dtype=dtype)
    columns_C = torch.arange(width) // weight.block[1]
    codes = _as_rows(stored[weight.codes], prod(weight.shape) // width)
    step = max(PIECE // max(width, 1), 1)
    for slot, index in enumerate(matrices):
        scales, zeros = _grids(folder, stored, weight, index)
        into = out[slot].mT if weight.transposed else out[slot]
        for start in range(first, last, step):
            stop = min(start + step, last)
            piece = slice(index * height + start, index * height + stop)
            values = _decode(weight, read_stored(folder, weight.codes, codes, piece))[:, :width]
            blocks = torch.arange(start, stop) // weight.block[0]
            if zeros is not None:
                values -= zeros[blocks][:, columns_C]
            into[start - first : stop - first] = values * scales[blocks][:, columns_C]
    return out if stacked else out[0]


def _grids(
    folder: Path, stored: Mapping[str, StoredTensor], weight: Quantized, index: int
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of one matrix, [r, c] float32, one a block."""

    def grid(name: str) -> Tensor:
        tensor = stored[name]
        if len(tensor.shape) == 3 and prod(tensor.shape) > 1:
            return read_stored(folder, name, tensor, slice(index, index + 1))[0]
        whole = read_stored(folder, name, tensor)
        return whole.view(len(whole) if whole.ndim else 1, -1)

    scales = _number(grid(weight.scales))
    if weight.overall:
        scales = scales / _number(read_stored(folder, weight.overall, stored[weight.overall])).flatten()
    if weight.zeros is None:
        return scales, None
    zeros = grid(weight.zeros)
    if weight.kind == "packed":  # along rows, in contrast to codes
        return scales, unpack(zeros.T.contiguous(), weight.bits).T[: weight.matrix[0]].float()
    return scales, zeros.float()


def _as_rows(codes: StoredTensor, rows: int) -> StoredTensor:
    """The same bytes as [E R, bytes or words of a row]."""
    return codes._replace(shape=(rows, prod(codes.shape) // max(rows, 1)))


def _number(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of two, 2^(byte - 127)."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def _decode(weight: Quantized, codes: Tensor) -> Tensor:
    """The numbers that codes stand for, float32."""
    if weight.kind == "packed":
        return unpack(codes, weight.bits).float()
    if weight.kind == "fp4":
        halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        return torch.cat([FP4, -FP4])[halves.int()]
    return codes.float()
