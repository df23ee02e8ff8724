"""Write tiny checkpoints as quantised ones, by the slow obvious formulas; and what each weight then stands for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakd.identity import WEIGHTS
from megakd.system.files import read_json, write_json

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


class Scheme(NamedTuple):
    """config: quantization_config. encode: weight [R, C] → tensors by ending, and what they stand for, in float64."""

    config: dict[str, Any]
    encode: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def blocks(scale_rc: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """The scale of every entry, [R, C]."""
    rows, columns = (torch.arange(size) // width for size, width in zip(shape, block, strict=True))
    return scale_rc.double()[rows[:, None], columns]


def largest(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest |entry| of each block."""
    rows, columns = weight.shape
    return torch.stack(
        [
            torch.stack([weight[i : i + block[0], j : j + block[1]].abs().max() for j in range(0, columns, block[1])])
            for i in range(0, rows, block[0])
        ]
    )


def packed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [R, C] in int32 words along rows, the first in the lowest bits."""
    per = 32 // bits
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per), dtype=torch.int64)
    for j in range(codes.shape[1]):
        words[:, j // per] |= codes[:, j].long() << (bits * (j % per))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def fp8(block: tuple[int, int] = (128, 128), **settings: Any) -> Scheme:
    """DeepSeek's: blocks with one float32 scale each."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = largest(weight.float(), block) / 448
        whole = blocks(scale, tuple(weight.shape), block)
        codes = (weight.double() / whole).float().to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, codes.double() * whole

    return Scheme({"quant_method": "fp8", "weight_block_size": list(block), **settings}, encode)


def compressed(form: str, **weights: Any) -> Scheme:
    """compressed-tensors' of one group: float-quantized, int-quantized, pack-quantized, mxfp4-pack-quantized, …"""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **weights}
    bits, scale_dtype = weights["num_bits"], weights.pop("scale", torch.bfloat16)

    def block_of(weight: Tensor) -> tuple[int, int]:
        rows, columns = weight.shape
        size = weights.get("group_size")
        return {"tensor": (rows, columns), "channel": (1, columns), "block": weights.get("block_structure")}.get(
            weights["strategy"], (1, size)
        )

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        shape, block = tuple(weight.shape), block_of(weight)
        weight, peak = weight.float(), largest(weight.float(), block)
        if form.endswith("fp4-pack-quantized"):
            return encode_fp4(weight, peak, block)
        if weights["type"] == "float":
            scale = (peak / 448).to(scale_dtype)
            whole = blocks(scale, shape, block)
            codes = (weight.double() / whole).float().to(torch.float8_e4m3fn)
            return {"weight": codes, "weight_scale": scale}, codes.double() * whole
        top = 2 ** (bits - 1)
        scale, zero = (peak / (top - 1)).to(scale_dtype), torch.zeros_like(peak).to(torch.int8)
        if not weights["symmetric"]:
            zero = ((torch.arange(zero.numel()).view(zero.shape) % 5) - 2).to(torch.int8)
        whole, zeros = blocks(scale, shape, block), blocks(zero, shape, block)
        codes = (weight.double() / whole + zeros).round().clamp(-top, top - 1).long()  # no -0.0
        found = {"weight_scale": scale}
        if form == "pack-quantized":
            found |= {"weight_packed": packed(codes + top, bits), "weight_shape": torch.tensor(shape)}
            if not weights["symmetric"]:
                found["weight_zero_point"] = packed(zero.long().T + top, bits).T.contiguous()
        else:
            found["weight"] = codes.to(torch.int8)
            if not weights["symmetric"]:
                found["weight_zero_point"] = zero
        return found, (codes - zeros.long()) * whole

    def encode_fp4(weight: Tensor, peak: Tensor, block: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        found: dict[str, Tensor] = {}
        if form.startswith("mxfp4"):
            exponent = torch.floor(torch.log2(peak)).clamp(min=-120) - 2
            found["weight_scale"] = (exponent + 127).to(torch.uint8)
            scale = 2.0 ** exponent.double()
        else:
            overall = (448 * 6 / weight.abs().max()).float()
            found["weight_scale"] = (peak / 6 * overall).to(torch.float8_e4m3fn)
            found["weight_global_scale"] = overall[None]
            scale = (found["weight_scale"].float() / overall).double()
        whole = blocks(scale, tuple(weight.shape), block)
        table = torch.tensor(E2M1, dtype=torch.float64)
        codes = ((weight.double() / whole)[..., None] - table).abs().argmin(-1)
        found["weight_packed"] = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
        return found, table[codes] * whole

    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return Scheme(
        {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
        encode,
    )


SCHEMES = {
    "fp8": fp8(),
    "fp8, edges": fp8((16, 24)),
    "fp8, rows": fp8((1, 64)),
    "FP8 tensor": compressed("float-quantized", type="float", strategy="tensor", scale=torch.float32),
    "FP8 channel": compressed("float-quantized", type="float"),
    "FP8 block": compressed("float-quantized", type="float", strategy="block", block_structure=[24, 16]),
    "INT8 tensor": compressed("int-quantized", strategy="tensor"),
    "INT8 channel": compressed("int-quantized", scale=torch.float32),
    "INT8 asymmetric": compressed("int-quantized", symmetric=False),
    "INT8 float16": compressed("naive-quantized", scale=torch.float16),
    "INT8 packed": compressed("pack-quantized", strategy="group", group_size=8),
    "INT4 group": compressed("pack-quantized", num_bits=4, strategy="group", group_size=8),
    "INT4 group asymmetric": compressed("pack-quantized", num_bits=4, strategy="group", group_size=8, symmetric=False),
    "INT4 channel": compressed("pack-quantized", num_bits=4, scale=torch.float32),
    "INT4 channel asymmetric": compressed("pack-quantized", num_bits=4, symmetric=False),
    "MXFP4": compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=8),
    "NVFP4": compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=8),
}


def quantize(folder: Path, out: Path, twin: Path, scheme: Scheme, skip: tuple[str, ...] = ("lm_head",)) -> None:
    """The model of `folder` with quantised matrices in `out`, and with what those stand for, in bfloat16, in `twin`.

    skip: names, or parts of them, that stay as they are: as a list in config.json exempts them.
    """
    codes, plain = {}, {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if tensor.ndim != 2 or "embed" in name or any(part in name for part in skip):
            codes[name] = plain[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        parts, exact = scheme.encode(tensor)
        codes |= {f"{name.removesuffix('weight')}{ending}": part for ending, part in parts.items()}
        rounded = exact.float()  # in the type of 16 bits that scales have
        plain[name] = (
            rounded.half() if parts.get("weight_scale", rounded).dtype == torch.float16 else rounded.bfloat16()
        )
    for place, tensors in ((out, codes), (twin, plain)):
        place.mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, place / WEIGHTS, metadata={"format": "pt"})
        for side in folder.glob("*.json"):
            (place / side.name).write_bytes(side.read_bytes())
        config = {**read_json(folder / "config.json"), "dtype": "bfloat16"}
        write_json(place / "config.json", config | ({"quantization_config": scheme.config} if place == out else {}))
