"""Routers that learned next to a student, as files: written, read again, checked against a teacher.

router_update.safetensors, router_update.pt   the routers alone, by their tensors' names in the teacher's modules
router_update.json                            which teacher, how it was routed, the step, how far each router went
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakd.errors import UserError
from megakd.models.hub import Checkpoint, empty_model
from megakd.models.routers import find_routers
from megakd.models.sources import module_names
from megakd.system.files import read_json, write_json

UPDATE, FACTS = "router_update", "router_update.json"


class TeacherRouters:
    """The routers of a teacher's folder, and what its files call their tensors.

    found: the routers, without weights. stored: {name in the modules: name in the files} of all that trains in them.
    patterns: objective.router_patterns.
    """

    def __init__(self, folder: Path, patterns: Sequence[str] = ()):
        model = empty_model(folder)
        self.checkpoint = Checkpoint(folder)
        self.found = find_routers(model, str(folder), patterns)
        files = {module: file for file, module in module_names(model, self.checkpoint.files).items()}
        # parameters: a buffer like the correction bias of DeepSeek-V3 does not learn
        names = [f"{router.name}.{name}" for router in self.found for name, _ in router.module.named_parameters()]
        if missing := [name for name in names if name not in files]:
            raise UserError(f"{folder}: no tensor of its files is {missing[0]}")
        self.stored = {name: files[name] for name in names}

    def tensor(self, name: str) -> Tensor:
        """A tensor of a router as the files have it, by its name in the modules."""
        return self.checkpoint.tensor(self.stored[name])

    def check(self, tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
        """The tensors by their names in the modules; UserError, naming `place`, where they are not these routers'."""
        module_names = {file: name for name, file in self.stored.items()}
        found = {}
        for name, tensor in tensors.items():
            known = module_names.get(name, name)
            if known not in self.stored:
                raise UserError(
                    f"{place}: {name} is no tensor of a router of {self.checkpoint.folder}; those are "
                    f"{', '.join(list(self.stored)[:2])}{', …' if len(self.stored) > 2 else ''}"
                )
            expected = self.checkpoint.shape(self.stored[known])
            if tuple(tensor.shape) != expected:
                where = self.checkpoint.place(self.stored[known])
                raise UserError(f"{place}: {name} has shape {tuple(tensor.shape)}, {where} has {expected}")
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise UserError(f"{place}: {name} holds NaN, infinite numbers or integers; no router has such weights")
            found[known] = tensor
        return found


def write_update(folder: Path, tensors: Mapping[str, Tensor], teacher: TeacherRouters, facts: dict[str, Any]) -> None:
    """Write the three files into a folder of their own; tensors: of all routers, maybe of more.

    facts: what the JSON begins with.
    """
    if missing := [name for name in teacher.stored if name not in tensors]:
        raise UserError(f"{teacher.checkpoint.folder}: {missing[0]} was not trained; this is another teacher than then")
    learned = teacher.check({name: tensors[name].contiguous() for name in teacher.stored}, "the trained routers")
    folder.mkdir(exist_ok=True)
    file = folder / f"{UPDATE}.safetensors"
    save_file(learned, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes for the owner alone
    torch.save(learned, folder / f"{UPDATE}.pt")
    routers = {
        router.name: {"experts": router.experts, "top_k": router.active, **moved(_of(router.name, learned), teacher)}
        for router in teacher.found
    }
    write_json(folder / FACTS, {**facts, "routers": routers})


def moved(tensors: Mapping[str, Tensor], teacher: TeacherRouters) -> dict[str, float]:
    """change = |W - W0| / |W0| and cosine of W and the teacher's W0, over all tensors of a router as one vector."""
    now, before = (
        torch.cat([tensor.double().flatten() for tensor in each])
        for each in (tensors.values(), map(teacher.tensor, tensors))
    )
    change = (now - before).norm() / before.norm()
    return {"change": change.item(), "cosine": torch.cosine_similarity(now, before, 0).clamp(-1, 1).item()}


def read_update(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a router update, .safetensors or .pt; UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no router update here; megakd export writes {UPDATE}.safetensors and {UPDATE}.pt")
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{path}: a router update ends in .safetensors or .pt")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]} of tensors ({reason})") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path}: holds no plain dictionary of tensors, as a router update does")
    if not found:
        raise UserError(f"{path}: holds no tensor")
    return found


def read_facts(path: Path) -> dict[str, Any] | None:
    """What the JSON next to an update says of it; None where there is none."""
    file = path.with_name(FACTS)
    if not file.exists():
        return None
    facts = read_json(file)
    teacher = facts.get("teacher") if isinstance(facts, dict) else None
    if not isinstance(teacher, dict) or not {"id", "revision", "weights"} <= teacher.keys():
        raise UserError(f"{file}: does not name its teacher by id, revision and weights")
    return facts


def _of(router: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{router}.")}
