"""A family that keeps its routers in float32 trains in bfloat16 under every ZeRO stage, and alike.

Started as a script this file is one rank: it trains a student under each stage, and writes the losses as JSON.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from megakd.config.parsing import parse
from megakd.models.hub import Checkpoint
from megakd.models.loading import load_model
from megakd.models.shared_core import PROJECTIONS, make_form
from megakd.system.dist import close_world, join_world
from megakd.train.build import build_engine, build_objective
from megakd.train.memory import full_batch, full_targets
from tests.conftest import run_to_end
from tests.models.families import small_model
from tests.models.students import make_student

LENGTH, STAGES = 12, (2, 3)
FACTS = {"tokenizer": {"vocab_size": 128}, "vocab_size": 128, "top_k": 8, "temperatures": [1.0, 2.0]}
FACTS |= {"tails": True, "draws": 0, "draw_temperature": None}


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore")
def test_routers_in_float32_train_under_every_stage(tmp_path):
    """ZeRO-3 ended with an AssertionError of DeepSpeed, which joins pieces of one type alone."""
    small_model("ernie4_5_moe").save_pretrained(tmp_path / "stock")
    make_student(tmp_path / "stock", tmp_path / "student", {p: make_form("wrappers", p, 8, 3) for p in PROJECTIONS})
    types = {p.dtype for p in load_model(tmp_path / "student", torch.bfloat16).parameters()}
    assert types == {torch.bfloat16, torch.float32}
    run_to_end(1, __file__, tmp_path)
    two, three, *exact = json.loads((tmp_path / "losses.json").read_text())
    assert exact == [True, True], "a routing bias that is a parameter was rounded to bfloat16"
    assert two[0] == three[0] and two[-1] < two[0]
    assert two == pytest.approx(three, rel=5e-3)  # bfloat16: sums in another order; in float32 they agree within 1e-5


def train(folder: Path, zero: int) -> tuple[list[float], bool]:
    """The losses of three steps; whether the routing biases are still those of the files."""
    world = join_world()
    config = parse(
        {
            "engine": {"kind": "deepspeed", "deepspeed": {"zero_optimization": {"stage": zero}}},
            "objective": {"kind": "cached", "alpha": 0.0},
            "data": {"packing": "documents", "sequence_length": LENGTH},
            "optim": {"batch_tokens": 2 * LENGTH, "micro_batch": 2, "lr": 1e-4},
            "stages": [{"name": "all", "steps": 3}],
        },
        "test",
    )
    stage = config.stages[0]
    objective = build_objective(config.at(stage), folder / "student", FACTS, None, world)
    engine = build_engine(config.at(stage), objective, stage, world, announce=False)
    batch = full_batch(2, LENGTH)._replace(targets=full_targets(FACTS, 2, LENGTH))
    losses = [engine.step([batch], 2 * LENGTH, 1.0).sums["ce"] for _ in range(3)]
    checkpoint = Checkpoint(folder / "student")
    biases = {name.removeprefix("student."): t for name, t in engine.weights() if name.endswith("correction_bias")}
    assert len(biases) == 3, biases
    return losses, all(torch.equal(tensor, checkpoint.tensor(name)) for name, tensor in biases.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    losses, exact = zip(*(train(Path(sys.argv[-1]), zero) for zero in STAGES), strict=True)
    (Path(sys.argv[-1]) / "losses.json").write_text(json.dumps([*losses, *exact]))
    close_world()
