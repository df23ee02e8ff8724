"""Read one tensor of a folder, or some of its rows, without mapping its file into memory."""

from pathlib import Path

import torch
from torch import Tensor

from megakd.errors import UserError
from megakd.identity import StoredTensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def read_stored(folder: Path, name: str, tensor: StoredTensor, rows: slice | None = None) -> Tensor:
    """A tensor in the type stored; rows: of its first dimension, the others are not read."""
    if tensor.dtype not in DTYPES:
        raise UserError(
            f"{folder / tensor.file}: {name} is stored as {tensor.dtype}, which cannot be read in parts; save the "
            "model in bfloat16"
        )
    shape, start = list(tensor.shape), tensor.start
    if rows is not None and shape:
        first, last, _ = rows.indices(shape[0])
        start += first * ((tensor.stop - tensor.start) // max(shape[0], 1))
        shape[0] = max(last - first, 0)
    found = torch.empty(shape, dtype=DTYPES[tensor.dtype])
    if found.numel():
        bytes_left = found.flatten().view(torch.uint8).numpy().data
        with (folder / tensor.file).open("rb", buffering=0) as file:
            file.seek(start)
            while bytes_left:
                count = file.readinto(bytes_left)
                if not count:
                    raise UserError(f"{folder / tensor.file}: ends within {name}")
                bytes_left = bytes_left[count:]
    return found
