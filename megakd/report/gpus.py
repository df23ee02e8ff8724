"""Known GPUs: memory and dense FLOP/s, as their vendor's data sheets state them; none of it is measured here.

| name | source |
|---|---|
| a100-40, a100-80 | NVIDIA A100 Tensor Core GPU data sheet, SXM4 |
| h100 | NVIDIA H100 Tensor Core GPU data sheet, SXM5; half of the FLOP/s that it states with sparsity |
| h200 | NVIDIA H200 Tensor Core GPU data sheet, SXM; half of the FLOP/s that it states with sparsity |
| b200 | NVIDIA DGX B200 data sheet, an eighth of the system; half of the FLOP/s with sparsity |
| l40s | NVIDIA L40S data sheet |
| 4090, 3090 | NVIDIA Ada and Ampere GA102 GPU architecture white papers, FP16 with FP32 accumulation |
| v100 | NVIDIA V100 Tensor Core GPU data sheet, SXM2, 32 GB; FP16, for it has no bfloat16 |
| t4 | NVIDIA T4 data sheet; FP16, for it has no bfloat16 |
| p100 | NVIDIA Tesla P100 data sheet, PCIe, 16 GB; FP16, for it has no bfloat16 |
"""

import re
from typing import NamedTuple

from megakd.errors import UserError

GIB = 2**30


class Gpu(NamedTuple):
    """flops: dense 16-bit FLOP/s, None: unknown. memory in bytes, taken as GiB as drivers report it.

    device: a regular expression of what CUDA calls it. bfloat16: whether its matrix units compute in it.
    """

    name: str
    memory: float
    flops: float | None = None
    device: str = ""
    bfloat16: bool = True


KNOWN = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 40 * GIB, 312e12, r"A100.*40GB"),
        Gpu("a100-80", 80 * GIB, 312e12, r"A100.*80GB"),
        Gpu("h100", 80 * GIB, 989.4e12, r"H100.*80GB"),
        Gpu("h200", 141 * GIB, 989.4e12, r"H200"),
        Gpu("b200", 180 * GIB, 2250e12, r"B200"),
        Gpu("l40s", 48 * GIB, 362.05e12, r"L40S"),
        Gpu("4090", 24 * GIB, 165.2e12, r"RTX 4090"),
        Gpu("3090", 24 * GIB, 71e12, r"RTX 3090"),
        Gpu("v100", 32 * GIB, 125e12, r"V100.*32GB", bfloat16=False),
        Gpu("t4", 16 * GIB, 65e12, r"\bT4\b", bfloat16=False),
        Gpu("p100", 16 * GIB, 18.7e12, r"P100", bfloat16=False),
    )
}


def find_gpu(text: str) -> Gpu:
    """A known GPU by name, or an unknown one by its memory, as in 80GB; UserError lists the known ones."""
    name = text.strip().lower()
    if name in KNOWN:
        return KNOWN[name]
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*gi?b", name)) and float(match[1]) > 0:
        return Gpu(name, float(match[1]) * GIB)
    raise UserError(f"--gpu {text}: expected one of {', '.join(KNOWN)}, or its memory, like 80GB")
