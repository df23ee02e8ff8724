"""The head inside the loss under ZeRO-3 on one and two real ranks: tied or not, frozen or not, as on the local engine.

Started as a script this file is one rank: it runs every case in turn, and writes what it saw as JSON.
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3MoeForCausalLM

from megakd.capture.targets import targets_from_logits
from megakd.config.objective import CachedConfig
from megakd.config.parsing import parse
from megakd.config.train import LrRule
from megakd.data.records import IGNORED, Batch, TeacherTargets
from megakd.engine.ds_json import deepspeed_config
from megakd.engine.local import LocalEngine
from megakd.engine.optim import build_optimizer
from megakd.models.tiny import tiny_moe_config
from megakd.objectives.cached import CachedDistillation
from megakd.system.dist import close_world, join_world
from tests.conftest import SMALL, run_to_end

VOCABULARY, PADDED, WINDOWS, LENGTH, STEPS = 97, 104, 2, 16, 2
FACTS = {"vocab_size": VOCABULARY, "top_k": 8, "draws": 0, "draw_temperature": None, "temperatures": [1.0, 2.0]}
FACTS |= {"tails": True}
HEAD, REST = {"pattern": "lm_head|embed", "lr_multiplier": 0.0}, {"pattern": "", "lr_multiplier": 0.0}
ALPHAS = (0.9, 0.3)
SMALL_BUCKETS = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10000}


def case(name: str, tied: bool = False, rules: tuple[dict[str, Any], ...] = (), dtype: str = "float32") -> Any:
    return {"name": name, "tied": tied, "rules": list(rules), "dtype": dtype}


CASES = [
    case("untied"),
    case("tied", tied=True),
    case("head frozen", rules=(HEAD,)),
    case("tied head frozen", tied=True, rules=(HEAD,)),
    case("head alone", rules=({"pattern": "lm_head", "lr_multiplier": 1.0}, REST)),
    case("bfloat16", dtype="bfloat16"),
]
ONE_RANK = ["untied", "tied", "head frozen", "tied head frozen", "head alone"]
TWO_RANKS = ["untied", "tied", "head frozen", "tied head frozen", "bfloat16"]


def objective_of(case: dict[str, Any]) -> CachedDistillation:
    torch.manual_seed(0)
    student = Qwen3MoeForCausalLM(
        tiny_moe_config(PADDED, **SMALL | {"num_hidden_layers": 1}, tie_word_embeddings=case["tied"])
    )
    for parameter in student.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    config = CachedConfig(alpha=ALPHAS, temperature=2.0)
    return CachedDistillation(student.to(getattr(torch, case["dtype"])), config, FACTS)


def batches(step: int) -> list[Batch]:
    """Windows of one step, one of them without a label."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for window in range(WINDOWS):
        tokens = torch.randint(VOCABULARY, (1, LENGTH + 1), generator=generator).cumsum(1) % VOCABULARY
        labels = tokens[:, 1:].clone()
        labels[:, :3] = IGNORED
        if (step, window) == (1, 1):
            labels[:] = IGNORED
        logits = 2 * torch.randn(LENGTH, VOCABULARY, generator=generator)
        config = parse({"logits": {"top_k": 8}}, "test").logits
        flat = targets_from_logits(logits, labels[0], config, torch.zeros(LENGTH))
        targets = TeacherTargets(*(field[None] for field in flat))
        found.append(Batch(tokens[:, :-1], labels, torch.arange(LENGTH)[None], targets))
    return found


def run(case: dict[str, Any], rank: int, ranks: int, zero: bool, folder: Path) -> list[dict[str, float]]:
    """Losses a step; the first rank writes the weights of the end."""
    objective = objective_of(case)
    rules = tuple(LrRule(**rule) for rule in case["rules"])
    config = parse(
        {
            "model": {"dtype": case["dtype"]},
            "engine": {"deepspeed": {"zero_optimization": {"stage": 3, **SMALL_BUCKETS}}},
            "optim": {"micro_batch": 1, "clip_norm": 1.0, "lr": 3e-3},
        },
        "test",
    )
    optimizer = build_optimizer(objective, rules, config.optim)
    if not objective.student.get_input_embeddings().weight.requires_grad:
        objective.student.enable_input_require_grads()
    engine: Any = LocalEngine(objective, optimizer, 1.0, case["dtype"], torch.device("cpu"))
    if zero:
        from megakd.engine.deepspeed import DeepSpeedEngine

        settings = deepspeed_config(config, ranks, WINDOWS)
        engine = DeepSpeedEngine(objective, optimizer, settings, join_world())
    seen = []
    for step in range(STEPS):
        objective.at(step / (STEPS - 1))
        windows = batches(step)
        tokens = sum(int((batch.labels != IGNORED).sum()) for batch in windows)
        report = engine.step(windows[rank::ranks], tokens, 1.0)
        seen.append({name: value / tokens for name, value in report.sums.items()} | {"norm": report.grad_norm})
    weights = {name: tensor.clone().contiguous() for name, tensor in engine.weights()}
    if rank == 0:
        save_file(weights, folder / f"{case['name']}.safetensors")
    engine.close()
    return seen


def launch(ranks: int, folder: Path) -> dict[str, Any]:
    """Every case on real ranks, started once."""
    folder.mkdir()
    run_to_end(ranks, __file__, folder)
    return json.loads((folder / "seen.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fused")


@pytest.fixture(scope="module")
def on_ranks(folder: Path) -> Callable[[int], tuple[Path, dict[str, Any]]]:
    return cache(lambda ranks: (folder / str(ranks), launch(ranks, folder / str(ranks))))


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, name", [*((1, name) for name in ONE_RANK), *((2, name) for name in TWO_RANKS[:-1])])
def test_zero3_is_the_local_engine(on_ranks, folder, ranks, name):
    """Losses, norms, every weight and its name; a batch without labels among them, and alpha that changes."""
    place, seen = on_ranks(ranks)
    (chosen,) = (case for case in CASES if case["name"] == name)
    expected = run(chosen, 0, 1, False, folder)
    for mine, theirs in zip(seen[name], expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)
    mine, theirs = (load_file(each / f"{name}.safetensors") for each in (place, folder))
    assert mine.keys() == theirs.keys()
    start, frozen = dict(objective_of(chosen).named_parameters()), 0
    for key, tensor in theirs.items():
        assert torch.allclose(mine[key], tensor, atol=1e-4, rtol=0), key
        frozen += torch.equal(mine[key], start[key])
    assert (frozen > 0) == bool(chosen["rules"]) and frozen < len(theirs)
    assert ("student.lm_head.weight" in theirs) != chosen["tied"]


@pytest.mark.ranks
def test_bfloat16_is_near_the_local_engine(on_ranks, folder):
    """Which keeps float32 weights: another rounding."""
    _, seen = on_ranks(2)
    for mine, theirs in zip(seen["bfloat16"], run(case("float32"), 0, 1, False, folder), strict=True):
        assert mine["total"] == pytest.approx(theirs["total"], rel=0.03)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = join_world()
    place = Path(sys.argv[1])
    names = ONE_RANK if world.size == 1 else TWO_RANKS
    seen = {c["name"]: run(c, world.rank, world.size, True, place) for c in CASES if c["name"] in names}
    if world.first:
        (place / "seen.json").write_text(json.dumps(seen))
    close_world()
