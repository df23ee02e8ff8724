"""The most memory that a rank takes while it reads a model of Qwen3-30B-A3B's layer sizes, on each of two real ranks.

Started as a script this file is one rank: it reads every model in every way, and writes what it took as JSON. The files
are sparse, without a byte on the disk: what is read is zeros.
"""

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.capture.sharded import load_shared
from megakd.config.parsing import parse
from megakd.models.checks import LiveTeacher
from megakd.models.hub import model_of, write_config
from megakd.models.shared_core import PROJECTIONS, Form
from megakd.models.student import student_config
from megakd.models.tiny import tiny_moe_config
from megakd.system.dist import World, close_world, join_world, sum_over_ranks
from megakd.train.build import build_objective
from tests.conftest import SMALL, run_to_end

VOCABULARY, LAYERS = 151_936, 1
FACTS = {"tokenizer": {"vocab_size": VOCABULARY}, "vocab_size": VOCABULARY, "top_k": 8}
FACTS |= {"temperatures": [1.0, 2.0], "tails": True, "draws": 0, "draw_temperature": None}
SIZES = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
WAYS = {
    "student zero3": ("student", {"stage": 3}, 1),
    "student zero3, two ranks share experts": ("student", {"stage": 3}, 2),
    "student zero2, two ranks share experts": ("student", {"stage": 2}, 2),
    "live teacher zero3": ("teacher", {"stage": 2}, 1),
}
CAPTURES = ("zero3", "autoep")  # ways to share the teacher of generate-logits


def teacher_config() -> Any:
    return tiny_moe_config(VOCABULARY, num_hidden_layers=LAYERS, **SIZES)


def configs() -> dict[str, Any]:
    teacher = teacher_config()
    form = dict.fromkeys(PROJECTIONS, Form("wrappers", 64, 64))
    small = tiny_moe_config(VOCABULARY, **SMALL)
    return {"teacher": teacher, "student": student_config(teacher, dict.fromkeys(range(LAYERS), form)), "small": small}


def sparse_checkpoint(folder: Path, config: Any) -> None:
    """A model's folder whose tensors, experts one by one, are holes in a file."""
    header, end = {}, 0
    for name, tensor in model_of(config, "test").state_dict().items():
        experts = range(len(tensor)) if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else None
        parts = {name: tuple(tensor.shape)}
        if experts:
            rows, columns = tensor.shape[1:]
            names = ["gate_proj", "up_proj"] if "gate_up" in name else ["down_proj"]
            shape = (rows // len(names), columns)
            parts = {f"{name.rpartition('.')[0]}.{e}.{part}.weight": shape for e in experts for part in names}
        for part, shape in parts.items():
            size = 2 * torch.Size(shape).numel()
            header[part] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    write_config(folder, config)


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """By way: the bytes that the worse rank took, its share, the bytes of the largest tensor."""
    folder = tmp_path_factory.mktemp("large")
    for name, config in configs().items():
        sparse_checkpoint(folder / name, config)
    run_to_end(2, __file__, folder)
    return json.loads((folder / "taken.json").read_text())


@pytest.mark.ranks
@pytest.mark.parametrize("way", [*WAYS, *(f"capture {kind}" for kind in CAPTURES)])
def test_a_rank_takes_its_share_and_two_tensors(taken, way):
    took, share, largest = taken[way]
    print(f"{way}: took {took / 2**20:.0f} MiB, share {share / 2**20:.0f}, largest tensor {largest / 2**20:.0f}")
    assert 0.98 * share < took <= share + 2 * largest


def rank(folder: Path) -> None:
    torch.set_num_threads(1)
    world, found = join_world(), {}
    ways = {way: partial(in_training, folder, *settings, world) for way, settings in WAYS.items()}
    ways |= {f"capture {kind}": partial(in_capture, folder, kind, world) for kind in CAPTURES}
    for way, load in ways.items():
        mine = take(load)
        ranks = [sum_over_ranks([n * (world.rank == r) for n in mine], world.device) for r in range(world.size)]
        found[way] = max(ranks)
    if world.first:
        (folder / "taken.json").write_text(json.dumps(found))
    close_world()


def take(load: Callable[[], tuple[str, Any]]) -> list[float]:
    """Bytes: what loading took at most, the share of this rank, the largest tensor; load: (name, the loaded model)."""
    gc.collect()  # the one before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    name, model = load()
    took = status("VmHWM") - before
    share = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in model.parameters())
    whole = model_of(configs()[name], "test").parameters()
    return [took, share, 2 * max(p.numel() for p in whole)]


def in_training(folder: Path, name: str, zero: dict[str, int], spread: int, world: World) -> tuple[str, Any]:
    live = name == "teacher"
    kind = {"kind": "online", "attention": 0} if live else {"kind": "cached"}
    engine = {"kind": "deepspeed", "deepspeed": {"zero_optimization": zero}, "expert_parallel": spread}
    engine["teacher_parallel"] = "zero3" if live else "replica"
    config = parse({"engine": engine, "objective": kind, "data": {"packing": "documents"}}, "test")
    teacher = LiveTeacher(folder / "teacher", None) if live else None
    objective: Any = build_objective(config, folder / ("small" if live else name), FACTS, teacher, world)
    return name, objective.held[0] if live else objective.student


def in_capture(folder: Path, kind: Any, world: World) -> tuple[str, Any]:
    return "teacher", load_shared(folder / "teacher", lambda model: model, kind, torch.bfloat16, world).module


def status(field: str) -> int:
    """Bytes of this process: VmRSS, what it holds in memory; VmHWM, the most that it held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    rank(Path(sys.argv[-1]))
