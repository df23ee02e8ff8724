"""Export a student's weights in few bits: each part of it at a precision of its own.

A compact student's codes have names of their own, which student.py reads (models/codes.py). They are those of the
weights in the model's dtype, which training that rounds and evaluations have too.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megakd.config.precisions import Quantize
from megakd.errors import UserError
from megakd.models.codes import stored
from megakd.models.hub import Checkpoint, cast, exact_names, is_student
from megakd.models.parts import precisions, precisions_for, weight_parts
from megakd.models.rounding import Precision, line_axis, quantize
from megakd.system.text import short

Tensors = Iterable[tuple[str, Tensor]]


def requested(said: Quantize, there: Collection[str], place: str) -> dict[str, str]:
    """{part: precision} of a model with the parts `there`; UserError for what cannot be stored."""
    found = precisions_for(said, there, place)
    if part := next((part for part, name in found.items() if name == "int3"), None):
        raise UserError(f"{place}: --quantize {part}=int3: no server reads a format of 3 bits; give int4")
    return found


class Quantizer:
    """Quantises a model's tensors on their way to files, and counts what it did.

    said: precisions of --quantize. model: on the meta device, of the architecture that is written.
    checkpoint: what is read. dtype: of what stays as it is.
    """

    def __init__(self, said: Quantize, model: Any, checkpoint: Checkpoint, dtype: torch.dtype):
        self.place, self.dtype = str(checkpoint.folder), dtype
        if checkpoint.quantized:
            raise UserError(f"{self.place}: is quantised already; give --quantize a checkpoint of float weights")
        if not is_student(model.config):
            raise UserError(
                f"{self.place}: --quantize stores compact students alone, and this would be a stock model "
                f"({model.config.model_type}); export it without --quantize"
            )
        self.parts, self.exact = weight_parts(model, self.place), exact_names(model)
        self.said = requested(said, set(self.parts.values()), self.place)
        self.precisions = precisions(self.said)
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.half_bytes = 0  # of the whole model in 16 bits

    def mark(self, config: Any) -> None:
        """Say in the config of what is written how it is stored."""
        config.shared_core = config.with_precision(self.said)

    def tensors(self, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Of a student with shared cores: codes and scales by names that no model has."""
        for name, tensor in tensors:
            part = self.parts.get(name, "")
            if part not in self.precisions:
                yield name, self._kept(name, tensor)
                continue
            precision = self.precisions[part]
            axis = line_axis(part, tuple(tensor.shape))
            self._check(name, tensor.shape[axis], precision)
            weight = cast(name, tensor, self.dtype, self.exact)
            made = stored(name, *quantize(weight, precision, axis), precision, axis)
            self._count(part, tensor, made.values())
            yield from made.items()

    def summary(self) -> str:
        """How many tensors of each part were quantised, what stayed, and bytes."""
        found = [f"{part} {self.counts[part]} {name}" for part, name in self.said.items()]
        kind = str(self.dtype).removeprefix("torch.")
        written = sum(self.bytes.values())
        return (
            f"tensors in few bits: {', '.join(found)}; {self.counts['']} of {short(self.bytes[''])}B stay {kind}; "
            f"{short(written)}B in all, {written / self.half_bytes:.1%} of the model in 16 bits"
        )

    def _check(self, name: str, length: int, precision: Precision) -> None:
        if precision.bits < 8 and length * precision.bits % 32:
            raise UserError(
                f"{self.place}: {name} has lines of {length} numbers, of which {precision.bits} bits do not fill words "
                f"of 32; give its part ({self.parts[name]}) 8 bits, or leave it out of --quantize"
            )

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        made = cast(name, tensor, self.dtype, self.exact)
        self._count("", tensor, [made])
        return made

    def _count(self, part: str, tensor: Tensor, made: Iterable[Tensor]) -> None:
        self.counts[part] += 1
        self.bytes[part] += sum(each.nbytes for each in made)
        self.half_bytes += tensor.numel() * 2
