"""Load a model: whole, or in parts, where each parameter begins without memory and takes the rows that a rank keeps.

In parts a rank's memory holds its share of the model and, for a moment, what one of its tensors is made of.
"""

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megakd.errors import foreign
from megakd.models.hub import (
    Checkpoint,
    check_complete,
    check_folder,
    check_readable,
    load_config,
    model_of,
    say_unused,
)
from megakd.models.quantized import is_quantized
from megakd.models.sources import Sources, module_names
from megakd.system.files import read_json

# rows [first, last) of a parameter; None: all
Read = Callable[[slice | None], Tensor]
# (parameter without memory, how to read it) -> the parameter in its place
Place = Callable[[nn.Parameter, Read], nn.Parameter]


class Part(NamedTuple):
    """Hangs on a parameter as `parameter.part`: it is the rows from `first` of the tensor `name` of the whole model."""

    name: str
    first: int


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """A causal LM of any family, compact students included, from a folder of safetensors.

    UserError when transformers cannot load it, or would fill in tensors with random numbers; says which of its tensors
    the model has no place for.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = load_config(folder)
    check_folder(folder, config)
    if is_quantized(read_json(folder / "config.json")) and not hasattr(config, "quantization_config"):
        return _dequantized(folder, dtype)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with foreign(f"{folder}: not a model that transformers can load"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,  # else it would ask at the terminal, and a "y" would run the folder's code
        )
    model, info = loaded
    check_complete(folder, sorted(info["missing_keys"]))  # transformers would go on with random numbers in their place
    say_unused(folder, sorted(info["unexpected_keys"]))
    return model


def _dequantized(folder: Path, dtype: torch.dtype) -> Any:
    """The same of quantised weights, in parts: transformers' own reader refuses blocks that are not full."""
    from transformers import GenerationConfig

    model, sources = hollow_model(folder, dtype)
    fill(model, sources, placed_on(torch.device("cpu")))
    if (folder / "generation_config.json").exists():
        with foreign(f"{folder}: no generation_config.json that transformers can load"):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def hollow_model(folder: Path, dtype: torch.dtype) -> tuple[Any, Sources]:
    """The causal LM of a folder with parameters on the meta device and buffers as they are, and where to read it.

    UserError as `load_model` has it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    check_folder(folder, config)
    check_readable(folder, config, "reading a model in parts")
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


def keep_exact(model: Any, folder: Path) -> None:
    """Make buffers of the parameters that a family itself never trains, as they are stored: routing biases of some.

    An engine that trains in 16 bits rounds every parameter, and a rounded bias sends tokens to other experts.
    """
    # of a model that is not loaded: transformers lets all that it loads train
    fixed = [name for name, each in model_of(model.config, str(folder)).named_parameters() if not each.requires_grad]
    if not fixed:
        return
    checkpoint = Checkpoint(folder)
    stored = {name: file for file, name in module_names(model, checkpoint.files).items()}
    for name in fixed:
        place, _, child = name.rpartition(".")
        module = model.get_submodule(place)
        del module._parameters[child]
        module.register_buffer(child, checkpoint.tensor(stored[name]))


def fill(model: nn.Module, sources: Sources, place: Place, *others: nn.Module) -> None:
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


def placed_in_pieces(partitions: Any, dtype: torch.dtype | None = None) -> Place:
    """This rank's piece under ZeRO-3; partitions: `Partitions` of system/deepspeed_internals.py.

    dtype: of all parameters, which an engine that trains asks for; None: each its own.
    """

    def place(empty: nn.Parameter, read: Read) -> nn.Parameter:
        parameter = like(empty, torch.empty(empty.shape, dtype=dtype or empty.dtype, device=partitions.device))
        partitions.cut(parameter, read)
        return parameter

    return place


def like(empty: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A parameter of this content with all that was said about one without."""
    parameter = nn.Parameter(data, requires_grad=empty.requires_grad)
    vars(parameter).update(vars(empty))
    return parameter


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


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Parameters and buffers that the family keeps in float32, as transformers does when it loads."""
    from transformers.core_model_loading import build_glob_alternation

    if plan := model._get_dtype_plan(dtype):
        pattern = build_glob_alternation(list(plan))[0]
        for name, tensor in model.state_dict(keep_vars=True).items():
            if pattern.search(name):
                tensor.data = tensor.data.float()
