"""Where each tensor of a model comes from: the files of a folder, by the model's own names, whole or in rows.

What the files name otherwise than the model, or store expert by expert, is renamed and stacked by transformers' own
conversions.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.errors import UserError, foreign
from megakd.identity import StoredTensor
from megakd.models.hub import Checkpoint, check_complete, say_unused
from megakd.models.spec import MoESpec

FLOATING = ("F64", "F32", "F16", "BF16")


class Sources:
    """Where each tensor of a causal LM comes from: the files of a folder, by the model's names.

    model: the whole one, on the meta device. UserError when tensors are missing or of another shape; says which ones
    the model has no place for.
    """

    def __init__(self, folder: Path, model: Any):
        self.folder, self.model = folder, model
        self.checkpoint = Checkpoint(folder)
        self.stored = self.checkpoint.stored
        self.expected = model.state_dict()
        self.made_by: dict[str, _Recipe] = {}
        unused = []
        for recipe in self._recipes(unused):
            self._check_stacks(recipe)
            for name, shape in recipe.shapes(self.stored).items():
                if name not in self.expected:
                    unused += recipe.names
                elif shape != tuple(self.expected[name].shape):
                    what = f"has shape {shape}" if recipe.converter is None else f"makes {name} of shape {shape}"
                    expected = tuple(self.expected[name].shape)
                    raise UserError(f"{recipe.place(self.stored, folder)} {what}, config.json says {expected}")
                else:
                    if self.expected[name].is_floating_point():
                        self._check_types(recipe)
                    self.made_by[name] = recipe
        tied = model.all_tied_weights_keys
        missing = [name for name in self.expected if name not in self.made_by and tied.get(name) not in self.made_by]
        check_complete(folder, _wanted(missing, model._keys_to_ignore_on_load_missing))
        say_unused(folder, unused)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of the model in the model's type, or some of its rows: no others are read where that can be."""
        return self.recipe(name).make(name, rows, partial(self._stored, dtype=self.expected[name].dtype))

    def place(self, name: str) -> str:
        """FILE: TENSOR of what a tensor of the model is made of first, for messages."""
        return self.recipe(name).place(self.stored, self.folder)

    def recipe(self, name: str) -> "_Recipe":
        return self.made_by.get(name) or self.made_by[self.model.all_tied_weights_keys[name]]

    def raw(self, name: str) -> Tensor:
        """A tensor of the model in the type stored."""
        return self.recipe(name).make(name, None, self.checkpoint.rows)

    def experts(self, spec: MoESpec, layer: int, projection: str) -> Tensor:
        """All experts' matrices of one projection, [E, d_out, d_in], in the type stored, whatever the layout.

        UserError, naming file and tensor, when one is not of a floating type that can be computed with, or holds NaN or
        infinite numbers.
        """
        rows = spec.expert_hidden
        half = {"gate": slice(0, rows), "up": slice(rows, 2 * rows), "down": slice(None)}[projection]
        name = spec.fused(layer)["down_proj" if projection == "down" else "gate_up_proj"]
        recipe = self.made_by[name]
        if recipe.converter is None:
            found = self.checkpoint.tensor(recipe.names[0], half)
            self.checkpoint.check(recipe.names[0], found)
            return found
        if stacks := recipe.stacks():
            names = stacks[projection == "up"]
            found = None
            for expert, stored in enumerate(names):
                matrix = self.checkpoint.tensor(stored)
                self.checkpoint.check(stored, matrix)
                if found is None:
                    found = matrix.new_empty(len(names), *matrix.shape)
                found[expert] = matrix
            assert found is not None, (layer, projection)
            return found
        for stored in recipe.names:
            self.checkpoint.check(stored, self.checkpoint.tensor(stored))
        return self.raw(name)[:, half]

    def _check_stacks(self, recipe: "_Recipe") -> None:
        """UserError, naming file and tensor, where experts' stored matrices are not as many and as large as stated."""
        stacks = recipe.stacks() if recipe.converter else None
        if not stacks or recipe.target not in self.expected:
            return
        if self.expected[recipe.target].ndim != 3:  # biases that are stacked: their shapes are compared as a whole
            return
        count, rows, columns = self.expected[recipe.target].shape
        expected = (rows // len(stacks), columns)
        for names in stacks:
            by_expert = {_expert(name): name for name in names}
            for expert in range(count):
                if expert not in by_expert:
                    pattern = next(iter(by_expert.values()), recipe.target)
                    name = re.sub(r"\.\d+(?=\.[^.]*\.[^.]*$|\.[^.]*$)", f".{expert}", pattern)
                    raise UserError(f"{self.folder}: no tensor {name} in it")
            for expert, name in by_expert.items():
                place, shape = f"{self.folder / self.stored[name].file}: {name}", self.stored[name].shape
                if expert >= count:
                    raise UserError(f"{place}: config.json says {count} experts, numbered from 0")
                if shape != expected:
                    raise UserError(f"{place} has shape {shape}, config.json says {expected}")

    def _check_types(self, recipe: "_Recipe") -> None:
        """UserError, naming file and tensor, where weights are stored as codes whose scales are not known."""
        for name in recipe.names:
            if (kind := self.stored[name].dtype) not in FLOATING:
                raise UserError(
                    f"{self.folder / self.stored[name].file}: {name} is stored as {kind}, and no scales for it are "
                    "known; convert the checkpoint to bfloat16 first"
                )

    def _stored(self, name: str, rows: slice | None, dtype: torch.dtype) -> Tensor:
        return self.checkpoint.rows(name, rows).to(dtype)

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


def module_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """{name in the files: name in the modules}; experts that the modules fuse keep the names of the files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    tensors, prefix = model.state_dict(), model.base_model_prefix
    return {name: rename_source_key(name, renamings, [], prefix, tensors)[0] for name in names}


def as_stored(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by the names, and in the pieces, in which hubs store them; what belongs together, at once."""
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, dict(tensors))
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names of a model's tensors, those of a layer together."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(".".join(name.split(".")[:3]), []).append(name)
    return list(parts.values())


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

    def make(self, name: str, rows: slice | None, stored: Callable[[str, slice | None], Tensor]) -> Tensor:
        """The tensor `name` that it makes, or rows of it; stored: reads rows of a stored tensor."""
        if self.converter is None:
            return stored(self.names[0], rows)
        if rows is not None and self._one_row_each():
            some = {pattern: names[rows] for pattern, names in self.sources.items()}
            return self._convert(some, lambda each: stored(each, None))[name]
        made = self._convert(self.sources, lambda each: stored(each, None))[name]
        return made if rows is None else made[rows].clone()

    def stacks(self) -> list[list[str]] | None:
        """The stored matrices, one an expert, of each part that is stacked and put above the next; None otherwise."""
        kinds = [(type(each).__name__, each.dim) for each in self.converter.operations if hasattr(each, "dim")]
        expected = [("MergeModulelist", 0), ("Concatenate", 1)][: len(self.converter.source_patterns)]
        if kinds != expected or len(kinds) < len(self.converter.operations):
            return None
        return [self.sources.get(pattern, []) for pattern in self.converter.source_patterns]

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


def _expert(name: str) -> int:
    """The last number in a tensor's name."""
    return int([part for part in name.split(".") if part.isdigit()][-1])


def _wanted(names: list[str], ignored: Any) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in ignored or ())]
