"""Which weights of a checkpoint are quantised, and how: from config.json and from the names and shapes in its files.

Known are FP8 with blocks (`weight_scale_inv`), MXFP4 of gpt_oss (`_blocks`, `_scales`), compressed-tensors with FP8,
INT8, INT4, MXFP4 and NVFP4, and the codes of compact students (`_codes`, `_scale`; codes.py). Modules that a list in
config.json exempts have no scales in the files, and are read as they are.
"""

import re
from collections.abc import Iterator, Mapping
from math import ceil, prod
from pathlib import Path
from typing import Any, NoReturn

from megakd.errors import UserError
from megakd.identity import StoredTensor
from megakd.models.codes import CODES, SCALE, SWAPPED
from megakd.models.dequantize import Quantized
from megakd.models.stored import read_stored

Stored = Mapping[str, StoredTensor]
FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16")
EXPONENTS = ("U8", "F8_E8M0")
# compressed-tensors: format → (how codes are called, types of codes, types of scales)
FORMATS = {
    "float-quantized": ("weight", FLOAT8, SCALES),
    "int-quantized": ("weight", ("I8",), SCALES),
    "naive-quantized": ("weight", (*FLOAT8, "I8"), SCALES),
    "pack-quantized": ("weight_packed", ("I32",), SCALES),
    "mxfp4-pack-quantized": ("weight_packed", ("U8",), EXPONENTS),
    "nvfp4-pack-quantized": ("weight_packed", ("U8",), ("F8_E4M3",)),
}
PACKED_BITS = (2, 4, 8)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a config.json says about quantised weights, in it or in the part for text; None where it says nothing."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that weights are stored as codes."""
    return bool(settings_of(config) or (config.get("shared_core") or {}).get("precision"))


def unknown(settings: Mapping[str, Any], model_type: str) -> str | None:
    """Why weights quantised so cannot be read, in a few words; None where they can."""
    method = _method(settings)
    if method == "fp8":
        return None
    if method == "mxfp4":
        return None if model_type == "gpt_oss" else f"mxfp4 of {model_type}"
    if method != "compressed-tensors":
        return method
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "compressed-tensors with sparse weights"
    if (settings.get("transform_config") or {}).get("config_groups"):
        return "compressed-tensors with transforms"
    for group in _groups(settings):
        scheme, form = group.get("weights"), group.get("format") or settings.get("format")
        if scheme and form not in FORMATS:
            return f"compressed-tensors, format {form}"
        if scheme and form == "pack-quantized" and scheme.get("num_bits") not in PACKED_BITS:
            return f"compressed-tensors, {scheme.get('num_bits')} bits packed"
    return None


def quantized_weights(folder: Path, config: Mapping[str, Any], stored: Stored) -> dict[str, Quantized]:
    """The quantised weights of a folder by the names that they have where nothing is quantised.

    Empty where config.json says of none. UserError, naming tensor and scheme, where one is stored in another way.
    """
    if (config.get("shared_core") or {}).get("precision"):
        return dict(_student(folder, stored))
    settings, model_type = settings_of(config), str(config.get("model_type"))
    if settings is None or unknown(settings, model_type):
        return {}
    reader = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed}[_method(settings)]
    return dict(reader(folder, settings, stored))


def _student(folder: Path, stored: Stored) -> Iterator[tuple[str, Quantized]]:
    for codes, tensor in stored.items():
        swapped = codes.endswith(SWAPPED)
        name = codes.removesuffix(SWAPPED if swapped else CODES)
        if name == codes:
            continue
        scales, said = f"{name}{SCALE}", "a compact student's codes"
        if scales not in stored:
            _refuse(folder, stored, codes, f"no {scales} next to it ({said})")
        _check(folder, stored, codes, ("I8", "F8_E4M3", "I32"), said)
        _check(folder, stored, scales, ("BF16",), said)
        packed = tensor.dtype == "I32"
        *lead, rows, columns = tensor.shape
        columns *= 8 if packed else 1
        groups = stored[scales].shape[-1]
        if stored[scales].shape[:-1] != tensor.shape[:-1] or columns % groups:
            _refuse(folder, stored, codes, f"shape {tensor.shape} with scales of {stored[scales].shape} ({said})")
        shape = (*lead, columns, rows) if swapped else (*lead, rows, columns)
        kind, bits = ("packed", 4) if packed else ("number", 8)
        block = (1, columns // groups)
        yield name, Quantized(codes, scales, None, None, kind, bits, (rows, columns), block, shape, "F32", swapped)


def _fp8(folder: Path, settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Quantized]]:
    for scales in stored:
        name = scales.removesuffix("_scale_inv")
        if name == scales or name not in stored:
            continue
        _check(folder, stored, name, FLOAT8, "fp8")
        _check(folder, stored, scales, (*SCALES, *EXPONENTS), "fp8")
        *_, rows, columns = stored[name].shape
        block = tuple(settings.get("weight_block_size") or (rows, columns))
        grid = _grid(stored[scales])
        if grid != _blocks((rows, columns), block) and not rows % grid[0] and not columns % grid[1]:
            block = (
                rows // grid[0],
                columns // grid[1],
            )  # one scale for each row, for example, whatever config.json says
        yield name, _weight(folder, stored, name, scales, (rows, columns), block, "fp8")


def _mxfp4(folder: Path, settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Quantized]]:
    for codes in stored:
        name = codes.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name == codes or scales not in stored:
            continue
        _check(folder, stored, codes, ("U8",), "mxfp4")
        _check(folder, stored, scales, EXPONENTS, "mxfp4")
        shape = stored[codes].shape
        if len(shape) != 4 or stored[scales].shape != shape[:3]:
            _refuse(folder, stored, codes, f"shape {shape} with scales of {stored[scales].shape} (mxfp4)")
        experts, rows, blocks, half = shape
        columns = blocks * half * 2
        # transformers' module has [E, in, out]
        made = (experts, columns, rows)
        yield name, Quantized(codes, scales, None, None, "fp4", 4, (rows, columns), (1, half * 2), made, "BF16", True)


def _compressed(folder: Path, settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Quantized]]:
    for scales in stored:
        module = scales.removesuffix(".weight_scale")
        if module == scales or (f"{module}.weight" not in stored and f"{module}.weight_packed" not in stored):
            continue
        group = _group_of(module, settings)
        if group is None:
            _refuse(folder, stored, scales, "a module that no group of config.json names (compressed-tensors)")
        form, scheme = group.get("format") or settings["format"], group["weights"]
        said = f"compressed-tensors, {form}"
        kind, codes_in, scales_in = FORMATS[form]
        codes, zeros, overall = (f"{module}.{part}" for part in (kind, "weight_zero_point", "weight_global_scale"))
        if codes not in stored:
            _refuse(folder, stored, scales, f"no {codes} next to it ({said})")
        _check(folder, stored, codes, codes_in, said)
        _check(folder, stored, scales, scales_in, said)
        if f"{module}.weight_g_idx" in stored:
            _refuse(folder, stored, f"{module}.weight_g_idx", f"columns in another order ({said})")
        if (zeros in stored) != (not scheme.get("symmetric", True)):
            _refuse(folder, stored, codes, f"zero points and symmetric={scheme.get('symmetric', True)} ({said})")
        if (overall in stored) != form.startswith("nvfp4"):
            _refuse(folder, stored, codes, f"no weight_global_scale, or one too many ({said})")
        matrix = _matrix(folder, stored, module, codes, scheme, form)
        block = _block(scheme, matrix)
        if block is None:
            _refuse(folder, stored, codes, f"strategy {scheme.get('strategy')} ({said})")
        weight = _weight(folder, stored, codes, scales, matrix, block, said)
        if zeros in stored:
            rows, columns = _blocks(matrix, block)
            packed = ceil(rows * scheme["num_bits"] / 32) if form == "pack-quantized" else rows
            if prod(stored[zeros].shape) != packed * columns:
                _refuse(folder, stored, zeros, f"shape {stored[zeros].shape} for {rows} x {columns} scales ({said})")
        yield (
            f"{module}.weight",
            weight._replace(
                zeros=zeros if zeros in stored else None,
                overall=overall if overall in stored else None,
                kind={"I32": "packed", "U8": "fp4"}.get(stored[codes].dtype, "number"),
                bits=scheme["num_bits"],
                unread=tuple(name for name in (f"{module}.weight_shape",) if name in stored),
            ),
        )


def _weight(
    folder: Path,
    stored: Stored,
    codes: str,
    scales: str,
    matrix: tuple[int, int],
    block: tuple[int, ...],
    said: str,
) -> Quantized:
    """A weight whose numbers have a type of their own; UserError where there are not as many scales as blocks."""
    rows, columns = block
    grid, lead = _grid(stored[scales]), stored[codes].shape[:-2]
    whole = prod(stored[scales].shape) == 1 and _blocks(matrix, (rows, columns)) == (1, 1)
    if not whole and (grid != _blocks(matrix, (rows, columns)) or stored[scales].shape[:-2] != lead):
        shapes = f"shape {(*lead, *matrix)} with scales of {stored[scales].shape}"
        _refuse(folder, stored, codes, f"{shapes}, in blocks of {rows} x {columns} ({said})")
    dtype = "F16" if stored[scales].dtype == "F16" else "BF16"
    return Quantized(codes, scales, None, None, "number", 8, matrix, (rows, columns), (*lead, *matrix), dtype)


def _matrix(
    folder: Path, stored: Stored, module: str, codes: str, scheme: Mapping[str, Any], form: str
) -> tuple[int, int]:
    """(R, C) of a weight whose codes may be packed along rows."""
    shape, bits = stored[codes].shape, scheme["num_bits"]
    if len(shape) != 2:
        _refuse(folder, stored, codes, f"shape {shape} ({form})")
    rows, columns = shape
    if form.endswith("fp4-pack-quantized"):
        return rows, columns * 2
    if form != "pack-quantized":
        return rows, columns
    name = f"{module}.weight_shape"
    if scheme.get("strategy") == "group":  # no reading of thousands of small tensors where scales say it
        original = (rows, _grid(stored[f"{module}.weight_scale"])[1] * (scheme.get("group_size") or 0))
    elif name in stored:
        original = tuple(read_stored(folder, name, stored[name]).tolist())
    else:
        _refuse(folder, stored, codes, f"no {name} next to it ({form})")
    if len(original) != 2 or shape != (original[0], ceil(original[1] * bits / 32)):
        _refuse(folder, stored, codes, f"shape {shape} for a weight of {original} ({form})")
    return original[0], original[1]


def _block(scheme: Mapping[str, Any], matrix: tuple[int, int]) -> tuple[int, int] | None:
    """The rows and columns that share a scale, by the strategy; None for one that is not known."""
    rows, columns = matrix
    block = scheme.get("block_structure") or (0, 0)
    sizes = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, scheme.get("group_size") or 0),
        "tensor_group": (1, scheme.get("group_size") or 0),
        "block": (int(block[0]), int(block[1])),
    }
    found = sizes.get(str(scheme.get("strategy")))
    return found if found and min(found) > 0 else None


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    return str(getattr(method, "value", method))


def _groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list((settings.get("config_groups") or {}).values())


def _group_of(module: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The group of config.json that names a module, else the first that names classes, such as Linear."""
    groups = [group for group in _groups(settings) if group.get("weights")]
    for group in groups:
        for target in group.get("targets", []):
            if target == module or (target.startswith("re:") and re.match(target.removeprefix("re:"), module)):
                return group
    of_classes = (g for g in groups if any(re.fullmatch(r"[A-Z]\w*", target) for target in g.get("targets", [])))
    return next(of_classes, None)


def _grid(scales: StoredTensor) -> tuple[int, int]:
    """How many blocks a matrix has, by the shape of its scales."""
    if prod(scales.shape) == 1:
        return 1, 1
    rows, columns = scales.shape[-2:] if len(scales.shape) > 1 else (*scales.shape, 1)
    return rows, columns


def _blocks(matrix: tuple[int, int], block: tuple[int, ...]) -> tuple[int, int]:
    return ceil(matrix[0] / block[0]), ceil(matrix[1] / block[1])


def _check(folder: Path, stored: Stored, name: str, types: tuple[str, ...], said: str) -> None:
    if stored[name].dtype not in types:
        _refuse(folder, stored, name, f"type {stored[name].dtype} where {' or '.join(types)} is known ({said})")


def _refuse(folder: Path, stored: Stored, name: str, what: str) -> NoReturn:
    raise UserError(
        f"{folder / stored[name].file}: {name} is quantised in a way that cannot be read: {what}; save the model in "
        "bfloat16"
    )
