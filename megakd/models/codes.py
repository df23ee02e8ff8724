"""Weights in few bits as a compact student's folder stores them: two tensors for each, its codes and its scales.

    NAME_codes    int8 or float8_e4m3fn [.., R, C]; integers of 4 bits packed into int32 [.., R, C / 8]
    NAME_codes_T  the same of a weight whose lines lie along its last axis but one, these two axes swapped
    NAME_scale    bfloat16 [.., R, groups of a line]

The names are none of the model's, so that nothing takes codes for weights. This file needs torch alone: it is copied
into every student's folder.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .rounding import Precision, dequantize

CODES, SWAPPED, SCALE = "_codes", "_codes_T", "_scale"
WORD = 32  # bits of the integers that codes are packed into


def stored(name: str, codes: Tensor, scales: Tensor, precision: Precision, axis: int = -1) -> dict[str, Tensor]:
    """The two tensors of what `quantize` made of a weight."""
    if axis == -2:
        codes, scales = codes.mT, scales.mT
    if precision.bits < 8:
        codes = pack(codes, precision.bits)
    return {name + (SWAPPED if axis == -2 else CODES): codes, name + SCALE: scales}


def restored(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The same (name, tensor) pairs, with each weight in place of its codes and scales, which come in any order."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        ending = next((ending for ending in (SWAPPED, CODES, SCALE) if name.endswith(ending)), None)
        if ending is None:
            yield name, tensor
            continue
        weight = name.removesuffix(ending)
        parts = halves.setdefault(weight, {})
        parts[ending] = tensor
        if len(parts) == 2:
            del halves[weight]
            scales = parts.pop(SCALE)
            ((ending, codes),) = parts.items()
            codes = unpack(codes, 4) if codes.dtype == torch.int32 else codes
            made = dequantize(codes, scales, dtype)
            yield weight, (made.mT.contiguous() if ending == SWAPPED else made)
    if halves:
        raise ValueError(f"{len(halves)} weights have codes without scales, or the reverse; the first is {min(halves)}")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed integers [.., C] in int32 words [.., C bits / 32], each plus 2^(bits - 1), the first in the lowest bits.

    As compressed-tensors packs them, where words have no bits to spare.
    """
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    parts = (codes.int() + 2 ** (bits - 1)).unflatten(-1, (-1, len(shifts)))
    return (parts << shifts).sum(-1, dtype=torch.int64).to(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`, int8."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    return (((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2) - 2 ** (bits - 1)).to(torch.int8)
