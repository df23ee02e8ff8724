"""A model read in parts: its parameters begin without memory, and each is filled with the rows that a rank keeps.

A rank's memory holds its share of the model and, for a moment, what one of its tensors is made of. What the files name
otherwise than the model, or store expert by expert, is renamed and stacked by transformers' own conversions.
"""

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megakd.errors import UserError, foreign
from megakd.identity import StoredTensor, stored_tensors
from megakd.models.hub import check_complete, check_folder, check_unquantized, load_config, say_unused

# rows [first, last) of a parameter; None: all
Read = Callable[[slice | None], Tensor]
# (parameter without memory, how to read it) -> the parameter in its place
Place = Callable[[nn.Parameter, Read], nn.Parameter]

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
}


class Part(NamedTuple):
    """Hangs on a parameter as `parameter.part`: it is the rows from `first` of the tensor `name` of the whole model."""

    name: str
    first: int


def hollow_model(folder: Path, dtype: torch.dtype) -> tuple[Any, "Sources"]:
    """The causal LM of a folder with parameters on the meta device and buffers as they are, and where to read it.

    UserError as `load_model` has it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    check_folder(folder, config)
    check_unquantized(folder, config, "reading a model in parts")
    with foreign(f"{folder}: not a model that transformers can load"), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    _widen(model, dtype)
    model.name_or_path = str(folder)
    sources = Sources(folder, model)
    for name, buffer in model.state_dict().items():
        if buffer.device.type != "meta":
            buffer.copy_(sources.read(name))
    return model, sources


def fill(model: nn.Module, sources: "Sources", place: Place, *others: nn.Module) -> None:
    """Put `place(parameter, read)` where the model has a parameter on the meta device; tied ones stay one.

    The model's experts may have been replaced by those of this rank; parameters say what they are part of (`Part`), or
    how they are packed (models/expert_parallel.py). others: modules outside that hold some of the same parameters.
    """
    made: dict[int, nn.Parameter] = {}
    for name, empty in model.named_parameters():
        if empty.device.type == "meta":
            made[id(empty)] = place(empty, _reader(name, empty, sources))
            _return_freed_memory()
    for owner in (model, *others):
        for module in owner.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in made:
                    module._parameters[name] = made[id(parameter)]


def _return_freed_memory() -> None:
    """To the system: glibc keeps pieces of less than 32 MiB, so that a rank would hold nearly twice its share."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def placed_on(device: torch.device) -> Place:
    """The whole parameter, on a device."""

    def place(empty: nn.Parameter, read: Read) -> nn.Parameter:
        return like(empty, read(None).to(device))

    return place


def placed_in_pieces(partitions: Any) -> Place:
    """This rank's piece under ZeRO-3; partitions: `Partitions` of system/deepspeed_internals.py."""

    def place(empty: nn.Parameter, read: Read) -> nn.Parameter:
        parameter = like(empty, torch.empty(empty.shape, dtype=empty.dtype, device=partitions.device))
        partitions.cut(parameter, read)
        return parameter

    return place


def like(empty: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A parameter of this content with all that was said about one without."""
    parameter = nn.Parameter(data, requires_grad=empty.requires_grad)
    vars(parameter).update(vars(empty))
    return parameter


class Sources:
    """Where each tensor of a causal LM comes from: the files of a folder, by the model's names.

    model: the whole one, on the meta device. UserError when tensors are missing or of another shape; says which ones
    the model has no place for.
    """

    def __init__(self, folder: Path, model: Any):
        self.folder, self.model = folder, model
        self.stored = stored_tensors(folder)
        self.expected = model.state_dict()
        self.made_by: dict[str, _Recipe] = {}
        unused = []
        for recipe in self._recipes(unused):
            for name, shape in recipe.shapes(self.stored).items():
                if name not in self.expected:
                    unused += recipe.names
                elif shape != tuple(self.expected[name].shape):
                    raise UserError(
                        f"{recipe.place(self.stored, folder)} gives {name} of shape {shape}, config.json says "
                        f"{tuple(self.expected[name].shape)}"
                    )
                else:
                    self.made_by[name] = recipe
        tied = model.all_tied_weights_keys
        missing = [name for name in self.expected if name not in self.made_by and tied.get(name) not in self.made_by]
        check_complete(folder, _wanted(missing, model._keys_to_ignore_on_load_missing))
        say_unused(folder, _wanted(unused, model._keys_to_ignore_on_load_unexpected))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of the model in the model's type, or some of its rows: no others are read where that can be."""
        recipe = self.made_by.get(name) or self.made_by[self.model.all_tied_weights_keys[name]]
        return recipe.make(name, rows, partial(self._stored, dtype=self.expected[name].dtype), self.model)

    def _stored(self, name: str, rows: slice | None, dtype: torch.dtype) -> Tensor:
        return _read(self.folder, name, self.stored[name], rows).to(dtype)

    def _recipes(self, unused: list[str]) -> Iterator["_Recipe"]:
        """How transformers makes tensors of the model from what is stored, each from as few as it can."""
        with foreign(
            f"{self.folder}: this transformers reads checkpoints in another way; install transformers==5.22.0"
        ):
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                dot_natural_key,
                rename_source_key,
            )
        model, rules = self.model, get_model_conversion_mapping(self.model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, expected = model.base_model_prefix, self.expected
        found: dict[str, _Recipe] = {}
        for name in sorted(self.stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = name, None
            if target not in expected:
                unused.append(name)
            elif pattern is None:
                found[target] = _Recipe(target, {"": [name]}, None, model)
            else:
                recipe = found.setdefault(target, _Recipe(target, {}, by_pattern[pattern], model))
                recipe.sources.setdefault(pattern, []).append(name)
        yield from found.values()


class _Recipe(NamedTuple):
    """What makes one tensor of the model, or several: stored tensors by pattern of a converter; None: one, as it is."""

    target: str
    sources: dict[str, list[str]]
    converter: Any
    model: Any

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def place(self, stored: Mapping[str, StoredTensor], folder: Path) -> str:
        first = self.names[0]
        return f"{folder / stored[first].file}: {first}"

    def shapes(self, stored: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
        """The shapes of what it makes, by name."""
        if self.converter is None:
            return {self.target: stored[self.names[0]].shape}
        made = self._convert(self.sources, lambda name: torch.empty(stored[name].shape, device="meta"))
        return {name: tuple(tensor.shape) for name, tensor in made.items()}

    def make(self, name: str, rows: slice | None, stored: Callable[[str, slice | None], Tensor], model: Any) -> Tensor:
        if self.converter is None:
            return stored(self.names[0], rows)
        if rows is not None and self._one_row_each():
            some = {pattern: names[rows] for pattern, names in self.sources.items()}
            return self._convert(some, lambda each: stored(each, None))[name]
        made = self._convert(self.sources, lambda each: stored(each, None))[name]
        return made if rows is None else made[rows].clone()

    def _one_row_each(self) -> bool:
        """Whether each stored tensor gives one row of what is made: stacked experts, nothing across them."""
        first = self.converter.operations[0]
        if type(first).__name__ != "MergeModulelist" or first.dim != 0:
            return False
        one = {pattern: names[:1] for pattern, names in self.sources.items()}
        made = self._convert(one, lambda _: torch.empty(2, 3, device="meta"))
        return all(len(tensor) == 1 for tensor in made.values())

    def _convert(self, sources: Mapping[str, list[str]], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(self.converter)
        for pattern, names in sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, partial(read, name))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _reader(name: str, parameter: nn.Parameter, sources: Sources) -> Read:
    """How to read rows of a parameter: of a tensor of its name, of a part of one, or packed from several."""
    packed: Any = getattr(parameter, "packed", None)
    part: Any = getattr(parameter, "part", None)
    if packed is None and part is None:
        return partial(sources.read, name)
    first = packed.first if packed else part.first

    def read(rows: slice | None) -> Tensor:
        start, stop, _ = (rows or slice(None)).indices(len(parameter))
        rows = slice(first + start, first + stop)
        if packed is None:
            return sources.read(part.name, rows)
        factors = [sources.read(factor, rows).flatten(1) for factor in packed.names(name)]
        return torch.cat(factors, dim=1)[..., None]

    return read


def _read(folder: Path, name: str, tensor: StoredTensor, rows: slice | None) -> Tensor:
    """A stored tensor, or rows of it, without mapping its file into memory."""
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


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Parameters and buffers that the family keeps in float32, as transformers does when it loads."""
    from transformers.core_model_loading import build_glob_alternation

    if plan := model._get_dtype_plan(dtype):
        pattern = build_glob_alternation(list(plan))[0]
        for name, tensor in model.state_dict(keep_vars=True).items():
            if pattern.search(name):
                tensor.data = tensor.data.float()


def _wanted(names: list[str], ignored: Any) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in ignored or ())]
