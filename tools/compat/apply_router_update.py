"""A teacher with the routers that learned in a run of SAR-KD: its folder copied, the routers' tensors replaced.

    python tools/compat/apply_router_update.py TEACHER runs/a/export OUT
    python tools/compat/apply_router_update.py Qwen/Qwen3-30B-A3B router_update.pt OUT --revision main

TEACHER: a folder, or a hub id. UPDATE: what `megakd export` writes, .safetensors or .pt, its folder or the export's.
OUT gets the teacher's tensors by their names, in their types, and all files next to them. A router_update.json that
lies next to UPDATE says which teacher it belongs to; another one is refused. Without it names and shapes alone are
checked. Routers learn in float32. Where the teacher's are bfloat16, a part of what they learned is rounded away; the
tool says how much. A token takes as many experts as config.json says, whatever the routers were trained with.
"""

import argparse
import shutil
from pathlib import Path

import installed  # noqa: F401
import torch
from torch import Tensor

from megakd.errors import UserError
from megakd.identity import INDEX, changed_fingerprint
from megakd.models.hub import write_weights
from megakd.models.router_update import FACTS, UPDATE, TeacherRouters, read_facts, read_update
from megakd.names import expand, resolve
from megakd.outputs import check_folder
from megakd.system.files import publishing
from megakd.system.terminal import accept_any_encoding, one_line_errors

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a model folder, or a hub id")
    parser.add_argument("update", type=expand, help="router_update.safetensors, router_update.pt, or their folder")
    parser.add_argument("out", type=expand, help="the folder to make")
    parser.add_argument("--revision", help="of a hub id (default: the one that router_update.json names)")
    args = parser.parse_args(argv)
    with one_line_errors("apply_router_update"):
        args.out = check_folder(args.out)
        update = args.update
        if update.is_dir():
            inside = update / UPDATE if (update / UPDATE).is_dir() else update  # an export's folder, or its own
            update = inside / f"{UPDATE}.safetensors"
        apply(args.teacher, args.revision, update, args.out)


def apply(name: str, revision: str | None, update: Path, out: Path) -> None:
    """Write the teacher with its routers replaced; UserError when the update is not this teacher's."""
    tensors, facts = read_update(update), read_facts(update)
    made_for = facts["teacher"] if facts else None
    folder = resolve(name, revision or (made_for and made_for["revision"]))
    if made_for and (found := changed_fingerprint(made_for["weights"], folder)):
        raise UserError(
            f"{update}: learned in {made_for['id']} (weights {made_for['weights']}), but {name} has weights {found}; "
            f"name that teacher, or take {FACTS} away to check names and shapes alone"
        )
    teacher = TeacherRouters(folder, facts.get("router_patterns", ()) if facts else ())
    learned = teacher.check(tensors, str(update))
    checkpoint = teacher.checkpoint
    by_file = {teacher.stored[module]: tensor for module, tensor in learned.items()}
    with publishing(out) as temporary:
        whole = ((file, checkpoint.tensor(file)) for file in checkpoint.files)
        write_weights(temporary, ((f, by_file[f].to(t.dtype) if f in by_file else t) for f, t in whole))
        copy_others(folder, temporary)
    print(f"{out}: {len(learned)} of {len(teacher.stored)} tensors of {len(teacher.found)} routers replaced")
    print(f"{out}: {lost(learned, teacher):.1%} of what they learned is rounded away in the teacher's types")


def copy_others(source: Path, target: Path) -> None:
    """Copy what lies in a model's folder next to the weights: config.json, tokenizer, card, licence, code."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        index = path.name == INDEX or path.name.endswith(".index.json")
        if path.is_file() and path.suffix not in WEIGHTS and not index and path.name != FACTS:
            shutil.copyfile(path, target / path.name)


def lost(learned: dict[str, Tensor], teacher: TeacherRouters) -> float:
    """|rounded W - W| / |W - W0| over all replaced tensors, W0 the teacher's."""
    rounding = moved = 0.0
    for name, tensor in learned.items():
        before, now = teacher.tensor(name), tensor.double()
        rounding += (now.to(before.dtype).double() - now).square().sum().item()
        moved += (now - before.double()).square().sum().item()
    return (rounding / max(moved, torch.finfo(torch.float64).tiny)) ** 0.5


if __name__ == "__main__":
    main()
