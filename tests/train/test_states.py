"""Model states as predicted, against the tensors that DeepSpeed's engine holds on each of two real ranks.

Started as a script this file is one rank: it trains every layout, and writes the bytes that it holds as JSON.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megakd.config.parsing import parse
from megakd.config.train import LrRule
from megakd.engine.ds_json import deepspeed_config
from megakd.engine.optim import build_optimizer
from megakd.models.shared_core import PROJECTIONS, Form
from megakd.models.student import student_class, student_config
from megakd.models.tiny import tiny_moe_config
from megakd.system.dist import World, close_world, join_world, sum_over_ranks
from megakd.train.states import Kept, Layout, States, model_states, parameters_of
from tests.conftest import SMALL, run_to_end

VOCABULARY, LENGTH, WINDOWS = 97, 16, 4
# embeddings and routers frozen: what is not trained has weights alone
RULES = (LrRule(pattern="embed_tokens|mlp.gate", lr_multiplier=0.0), LrRule(pattern=".*", lr_multiplier=1.0))
# a threshold between the sizes of parameters: some persist, some do not
LAYOUTS = {
    f"zero{zero} ep{spread} {dtype}": (zero, spread, dtype)
    for zero in (2, 3)
    for spread in (1, 2)
    for dtype in ("bfloat16", "float32")
}
THRESHOLD = 2000


def make_student() -> Any:
    """Two layers of rank 6: most numbers are experts'."""
    torch.manual_seed(0)
    layers = {i: dict.fromkeys(PROJECTIONS, Form("wrappers", 6, 6)) for i in range(2)}
    config = student_config(tiny_moe_config(VOCABULARY, **{**SMALL, "num_experts": 8}), layers)
    return student_class("qwen3_moe")(config)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Bytes of weights, gradients, masters, moments on the mean rank, by layout."""
    folder = tmp_path_factory.mktemp("states")
    make_student().save_pretrained(folder / "student")
    run_to_end(2, __file__, folder)
    return json.loads((folder / "held.json").read_text())


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_states_of_a_rank_are_what_deepspeed_holds(held, name):
    zero, spread, dtype = LAYOUTS[name]
    parameters = parameters_of(make_student(), RULES)
    layout = Layout(zero, 2, spread, getattr(torch, dtype).itemsize, THRESHOLD)
    predicted = model_states(parameters, layout)
    for part, expected, found in zip(States._fields, predicted, held[name], strict=True):
        assert found == pytest.approx(expected, rel=0.01), (part, expected, found)


def test_expert_parallelism_and_zero_divide_as_the_formulas_say():
    parameters = [Kept(1000, True), Kept(8000, True, packed=8000), Kept(500, False)]
    assert model_states(parameters, Layout(0, 8)) == (19000, 18000, 36000, 72000)
    assert model_states(parameters, Layout(1, 8)) == (19000, 18000, 36000 / 8, 72000 / 8)
    assert model_states(parameters, Layout(2, 8, 4)) == (7000, 2 * 125 + 2 * 1000, 4500, 9000)
    assert model_states(parameters, Layout(3, 8, 4, persistent=0)) == (2 * 1187.5, 2 * 1125, 4500, 9000)
    assert model_states(parameters, Layout(3, 8, 4, persistent=500)).weights == 2 * 1187.5 + 1000
    frozen = [Kept(8000, False, packed=8000)]
    assert model_states(frozen, Layout(2, 8))[1:] == (0, 0, 0)
    assert model_states(frozen, Layout(2, 8, 8)).moments == 8000


class Language(nn.Module):
    """Cross-entropy alone."""

    def __init__(self, student: Any):
        super().__init__()
        self.student = student

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.student(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())


def rank(folder: Path) -> None:
    """Every layout in turn; the first rank writes the mean over ranks."""
    torch.set_num_threads(1)
    world = join_world()
    found = {name: sum_over_ranks(train(folder, *layout, world), world.device) for name, layout in LAYOUTS.items()}
    if world.first:
        means = {name: [size / world.size for size in sizes] for name, sizes in found.items()}
        (folder / "held.json").write_text(json.dumps(means))
    close_world()


def train(folder: Path, zero: int, spread: int, dtype: str, world: World) -> list[float]:
    """One whole step, then forward and backward of another: all states exist, and gradients were not used yet."""
    import deepspeed

    from megakd.models.expert_parallel import spread_experts
    from megakd.system.deepspeed_internals import join_groups

    objective = Language(AutoModelForCausalLM.from_pretrained(folder / "student", dtype=getattr(torch, dtype)))
    if spread > 1:
        spread_experts(objective.student, spread, join_groups(spread))
    section = {"stage": zero, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": THRESHOLD}
    config = parse(
        {
            "model": {"dtype": dtype},
            "engine": {"deepspeed": {"zero_optimization": section}},
            "optim": {"micro_batch": 2},
        },
        "test",
    )
    optimizer = build_optimizer(objective, RULES, config.optim)
    settings = deepspeed_config(config, world.size, WINDOWS)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
    for last in (False, True):
        engine.backward(engine(tokens))
        if not last:
            engine.step()
    optimizer = engine.optimizer
    weights = [t for p in engine.module.parameters() for t in (p.data, getattr(p, "ds_tensor", p.data))]
    if zero == 3:
        gradients, masters = [optimizer.grad_partitions_flat_buffer], optimizer.fp32_partitioned_groups_flat
    else:
        gradients = [t for group in optimizer.averaged_gradients.values() for t in group or ()]
        masters = optimizer.single_partition_of_fp32_groups
    moments = [state[name] for state in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [float(size_of(tensors)) for tensors in (weights, gradients, masters, moments)]
    engine.destroy()
    return held


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
