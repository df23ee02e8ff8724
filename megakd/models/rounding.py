"""Weights in few bits: codes and scales, the numbers that they stand for, and rounding that gradients pass.

Numbers of a line of a matrix share a scale, in groups of 128 (64, 32 where that does not divide the line) for 3 and 4
bits, over the whole line else. Integers are symmetric: code x scale, code from -2^(b-1) to 2^(b-1) - 1, as
compressed-tensors has them. A group's scale is that of its largest number; for 3 and 4 bits a smaller one is taken
where that loses less in squares: what it clips costs less than coarser steps do.

This file needs torch alone: it is copied into the folders of quantised students.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

GROUPS = (128, 64, 32)
SHRINKS = (1.0, 0.9, 0.8, 0.7)  # of the scale of the largest number, tried for few bits
SCALE = torch.bfloat16  # type in which scales are stored


class Precision(NamedTuple):
    """How a weight is stored. bits: of a code. floating: codes are float8_e4m3fn, else integers."""

    bits: int
    floating: bool = False

    @property
    def grouped(self) -> bool:
        return self.bits <= 4


PRECISIONS = {
    "int8": Precision(8),
    "fp8": Precision(8, floating=True),
    "int4": Precision(4),
    "int3": Precision(3),  # no file format that servers read has it: to measure, not to export
}


def group_size(length: int, precision: Precision) -> int:
    """How many numbers of a line of this length share a scale."""
    if not precision.grouped:
        return length
    return next((size for size in GROUPS if length % size == 0), length)


def line_axis(part: str, shape: tuple[int, ...]) -> int:
    """The axis along which numbers share scales: the longer one of factors, else that of a matrix' inputs."""
    return -2 if part == "factors" and shape[-2] > shape[-1] else -1


def quantize(weight: Tensor, precision: Precision, axis: int = -1) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a weight whose lines lie along `axis`, -1 or -2.

    codes: int8 or float8, of the weight's shape. scales: bfloat16, the same but for `axis`, which has a scale a group.
    Computed in float32. A group of zeros has the scale 1.
    """
    if axis == -2:
        codes, scales = quantize(weight.mT, precision)
        return codes.mT, scales.mT
    size = group_size(weight.shape[-1], precision)
    groups = weight.float().unflatten(-1, (-1, size))
    largest = groups.abs().amax(-1, keepdim=True)
    if precision.floating:
        scale = _stored(largest / torch.finfo(torch.float8_e4m3fn).max)
        codes = (groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return codes.flatten(-2), scale.squeeze(-1).to(SCALE)
    low, high = -(2 ** (precision.bits - 1)), 2 ** (precision.bits - 1) - 1
    best = least = None
    for shrink in SHRINKS if precision.grouped else SHRINKS[:1]:
        scale = _stored(largest * shrink / (high + 0.5))
        error = (groups - (groups / scale).round_().clamp_(low, high) * scale).square_().sum(-1, keepdim=True)
        if best is None or least is None:
            best, least = scale, error
        else:
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    assert best is not None
    codes = (groups / best).round_().clamp_(low, high).to(torch.int8)
    return codes.flatten(-2), best.squeeze(-1).to(SCALE)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, axis: int = -1) -> Tensor:
    """The weight that codes and scales stand for; the product is taken in float32."""
    if axis == -2:
        return dequantize(codes.mT, scales.mT, dtype).mT
    groups = codes.float().unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.float()[..., None]).flatten(-2).to(dtype)


def rounded(weight: Tensor, precision: Precision, axis: int = -1) -> Tensor:
    """The weight as it is after it was stored with this precision; gradients pass as if nothing were rounded."""
    return _Rounded.apply(weight, precision, axis)  # type: ignore[no-any-return]


def stored_bytes(shape: tuple[int, ...], precision: Precision, axis: int = -1) -> int:
    """Bytes of a weight's codes, packed without gaps, and its scales."""
    *lines, length = shape if axis == -1 else (*shape[:-2], shape[-1], shape[-2])
    count = 1
    for size in lines:
        count *= size
    packed = -(-length * precision.bits // 8)
    return count * (packed + length // group_size(length, precision) * SCALE.itemsize)


def _stored(scale: Tensor) -> Tensor:
    """A scale as it is read back; 1 for a group of zeros."""
    scale = scale.to(SCALE).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


class _Rounded(torch.autograd.Function):
    """Straight-through: the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, precision: Precision, axis: int) -> Tensor:
        return dequantize(*quantize(weight, precision, axis), weight.dtype, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return gradients[0], None, None
