"""Checkpoints on disk: resolve a name to a folder, read tensor by tensor, write sharded safetensors."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakd.errors import UserError, foreign
from megakd.identity import INDEX, WEIGHTS, StoredTensor, stored_tensors, tensor_hash
from megakd.models.dequantize import Quantized, read_weight
from megakd.models.quantized import quantized_weights, unknown
from megakd.models.stored import read_stored
from megakd.outputs import MARKER
from megakd.system.dist import read_world
from megakd.system.files import read_json, write_json
from megakd.system.logging import say

SHARD_BYTES = 2 * 2**30
CODE = (
    "codes.py",
    "rounding.py",
    "shared_core.py",
    "student.py",
)  # what a student's folder needs to be loaded without MegaKD


def check_complete(folder: Path, missing: list[str]) -> None:
    """UserError when a model's folder lacks tensors of it."""
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors of the model are missing, the first is {missing[0]}")


def load_config(folder: Path) -> Any:
    """The Hugging Face config of a folder's causal LM: of the text part where transformers would load that alone.

    Without quantization_config, or the precision of a student's parts, where weights are dequantised on read.
    """
    from transformers import AutoConfig

    import megakd.models.student  # noqa: F401  (makes students known to transformers)

    with foreign(f"{folder}: no config.json that transformers can load"):
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    whole, config = config, _of_text(config)
    settings = getattr(whole, "quantization_config", None) or getattr(config, "quantization_config", None)
    if config is not whole:
        config.name_or_path = whole.name_or_path
    vars(config).pop("quantization_config", None)
    if settings is not None and unknown(settings, whole.model_type):
        config.quantization_config = settings
    if is_student(config):
        config.shared_core = config.with_precision({})
    return config


def _of_text(config: Any) -> Any:
    """The config that AutoModelForCausalLM would take: of the text part of a model for images, or the same."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = getattr(config, "sub_configs", {}).get("text_config")
    if text is None or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return config.get_text_config() if getattr(model, "config_class", None) == text else config


def empty_model(folder: Path) -> Any:
    """The model of a folder without its weights (on the meta device): names and shapes of parameters, no memory."""
    return model_of(load_config(folder), str(folder))


def model_of(config: Any, place: str) -> Any:
    """A model without weights, on the meta device, of a config; UserError naming `place` when there is none."""
    from transformers import AutoModelForCausalLM

    with foreign(f"{place}: config.json describes no model that transformers can make"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_folder(folder: Path, config: Any) -> None:
    """UserError where two readers of a model folder would see two models (see `stored_tensors` too)."""
    tensors = stored_tensors(folder)
    if other := getattr(config, "transformers_weights", None):
        raise UserError(
            f"{folder}: config.json names {other} as transformers_weights, which other programs do not read; rename "
            f"it to {WEIGHTS} and delete that entry"
        )
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if getattr(config, "tie_word_embeddings", False) and head in tensors and embedding in tensors:
        one, two = (tensor_hash(folder, tensors[name]) for name in (head, embedding))
        if one != two:
            raise UserError(
                f"{folder}: config.json says tie_word_embeddings, but {head} and {embedding} differ; set "
                f"tie_word_embeddings to false, or delete {head}: some programs would tie them, others not"
            )


def check_readable(folder: Path, config: Any, purpose: str) -> None:
    """UserError when weights are quantised in a way that only transformers reads, if any; config: of `load_config`."""
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        why = unknown(settings if isinstance(settings, dict) else settings.to_dict(), config.model_type)
        raise UserError(
            f"{folder}: config.json has a quantization_config ({why}) that MegaKD cannot dequantise; {purpose} needs "
            "float weights: save the model in bfloat16, or delete that entry if the weights are not quantized"
        )


def say_unused(folder: Path, names: list[str]) -> None:
    """Say how many tensors of a folder the model has no place for, and of which parts."""
    if names and read_world().first:
        parts = Counter(re.findall(r"^(model\.layers\.\d+|model\.\w+|\w+)", name)[0] for name in names)
        said = ", ".join(f"{count} of {part}" for part, count in parts.most_common(4))
        say(
            f"{folder}: {len(names)} tensors of its files are skipped, for the model of config.json has none of those "
            f"names: {said}{', …' if len(parts) > 4 else ''}; the first is {names[0]}"
        )


class Checkpoint:
    """The tensors of a folder of safetensors by name, one file or many, read when asked for.

    Quantised weights have the names, shapes and types that they have once dequantised (`models/quantized.py`).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.raw = stored_tensors(folder)
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        self.quantized = quantized_weights(folder, config, self.raw)
        self.stored = _as_if_dequantized(self.raw, self.quantized)
        self.files = {name: tensor.file for name, tensor in self.stored.items()}

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor; rows: of the second dimension, the others are not read."""
        if name in self.quantized:
            return read_weight(self.folder, self.raw, self.quantized[name], inner=rows)
        return self._read(name, lambda file: file.get_tensor(name) if rows is None else file.get_slice(name)[:, rows])

    def rows(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or rows of its first dimension, without mapping its file into memory."""
        if name in self.quantized:
            return read_weight(self.folder, self.raw, self.quantized[name], rows)
        return read_stored(self.folder, name, self.stored[name], rows)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.stored:
            raise UserError(f"{self.folder}: no tensor {name} in it")
        return self.stored[name].shape

    def _read(self, name: str, read: Callable[[Any], Any]) -> Any:
        if name not in self.files:
            raise UserError(f"{self.folder}: no tensor {name} in it")
        with self._open(self.files[name]) as file:
            try:
                return read(file)
            except SafetensorError as error:
                raise UserError(f"{self.folder / self.files[name]}: cannot give {name} ({error})") from error

    def place(self, name: str) -> str:
        """FILE: TENSOR, for messages."""
        return f"{self.folder / self.files.get(name, '?')}: {name}"

    def check(self, name: str, tensor: Tensor) -> None:
        """UserError when what was read is no floating type that can be computed with, or holds NaN or infinity."""
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{self.place(name)} is stored as {kind}; convert the checkpoint to bfloat16 first")
        # both are NaN if an entry is; a whole sum takes 40 times as long, isfinite 55 times
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise UserError(f"{self.place(name)} holds NaN or infinite weights")

    def _open(self, file: str) -> Any:
        try:
            return safe_open(str(self.folder / file), framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / file}: cannot be read as safetensors ({error})") from error


def _as_if_dequantized(raw: Mapping[str, StoredTensor], quantized: Mapping[str, Quantized]) -> dict[str, StoredTensor]:
    """Tensors by name, each quantised weight in place of its codes; as many bytes as its tensors together."""
    used = {part for weight in quantized.values() for part in weight.names}
    stored = {name: tensor for name, tensor in raw.items() if name not in used}
    for name, weight in quantized.items():
        codes = raw[weight.codes]
        size = sum(raw[part].stop - raw[part].start for part in weight.names)
        stored[name] = StoredTensor(codes.file, weight.dtype, weight.shape, codes.start, codes.start + size)
    return stored


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write (name, tensor) pairs as `model.safetensors`, or as numbered files with an index when they exceed one.

    Tensors are taken one at a time and must not change afterwards; no more than one file's worth is held. `folder`
    should be a temporary one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names: list[list[str]] = []
    total = 0
    for part in _parts(tensors, shard_bytes):  # no enumerate: it holds a part until the next one is whole
        path = folder / f"part-{len(names):05d}"
        save_file(part, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes for the owner alone; clusters share folders
        names.append(list(part))
        total += sum(t.numel() * t.element_size() for t in part.values())
        del part
    if len(names) == 1:
        (folder / "part-00000").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for number, part in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"part-{number:05d}").rename(folder / file)
        weight_map.update(dict.fromkeys(part, file))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _parts(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if part and size + count > limit:
            yield part
            part, size = {}, 0
        tensor = tensor.detach().cpu().contiguous()
        alone = tensor.untyped_storage().nbytes() == count
        if not alone or any(tensor.data_ptr() == other.data_ptr() for other in part.values()):
            tensor = tensor.clone()  # safetensors refuses tensors that share memory
        part[name] = tensor
        size += count
    yield part


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer and generation files (everything small but config and weights) into a model folder."""
    skipped = ("config.json", INDEX, "training.json", "compress.json", MARKER)
    for path in sorted(source.iterdir()):
        if path.name in skipped or path.name.endswith("processor_config.json"):  # the latter: of images
            continue
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(path, target / path.name)


def write_config(folder: Path, config: Any) -> None:
    """Write a Hugging Face config as config.json; a student's with the code that reads it (`copy_code`).

    Without the folder that it was read from: that is a path of this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_student(config):
        copy_code(folder, config)
    value = json.loads(config.to_json_string(use_diff=False))
    value.pop("_name_or_path", None)
    write_json(folder / "config.json", value)


def is_student(config: Any) -> bool:
    """Whether a config is that of a compressed student, in contrast to a stock model's."""
    return hasattr(config, "shared_core")


def copy_code(folder: Path, config: Any) -> None:
    """Copy the student's code into its folder and name it in the config, for `trust_remote_code=True`."""
    for name in CODE:
        shutil.copyfile(Path(__file__).parent / name, folder / name)
    model = config.architectures[0]
    config.auto_map = {
        "AutoConfig": f"student.{type(config).__name__}",
        "AutoModelForCausalLM": f"student.{model}",
    }


def exact_names(model: Any) -> frozenset[str]:
    """Tensors of a model that stay in the type stored: its buffers, and what its family keeps in float32.

    Routing biases are among them, for a rounded one sends tokens to other experts.
    """
    kept = [re.escape(part) for part in model._get_dtype_plan(torch.bfloat16)]
    pattern = re.compile("|".join([*kept, r"(expert_bias|correction_bias|balancing_biases)$"]))
    buffers = {name for name, _ in model.named_buffers()}
    return frozenset(name for name in model.state_dict() if name in buffers or pattern.search(name))


def cast(name: str, tensor: Tensor, dtype: torch.dtype, exact: frozenset[str]) -> Tensor:
    """A tensor as a folder of `dtype` stores it; exact: `exact_names`."""
    return tensor if name in exact or not tensor.is_floating_point() else tensor.to(dtype)
