"""Experts distributed over two real ranks: the same losses, states and weights as on one rank that keeps them all.

Started as a script this file is one rank: it runs every layout in turn, and writes what it saw as JSON.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megakd.config.parsing import parse
from megakd.config.train import LrRule
from megakd.engine.ds_json import deepspeed_config
from megakd.engine.optim import build_optimizer
from megakd.models.hub import WEIGHTS, load_config, write_config, write_weights
from megakd.models.shared_core import Form
from megakd.models.student import student_class, student_config
from megakd.models.tiny import tiny_moe_config
from megakd.system.dist import World, barrier, close_world, join_world
from tests.conftest import SMALL, run_to_end
from tests.models.test_expert_parallel import on_two_ranks

STEPS, HALF = 8, 4
SHORT = 3  # steps before what one job tries
VOCABULARY, LENGTH, WINDOWS = 97, 16, 4
RATE = 3e-3  # at 1e-2 one layout differs from step 13 on, by 6e-4: a tie of the router fell to another expert
# one layer of unequal ranks with an expert kept dense; one with a grouped basis, a mixture, and no free factors in up
FORMS = {
    0: {"gate": Form("wrappers", 4, 3), "up": Form("wrappers", 3, 4), "down": Form("wrappers", 4, 2)},
    1: {"gate": Form("basis", 0, 6, 2), "up": Form("wrappers", 0, 4), "down": Form("mixture", 5, 0, 2)},
}
# experts and the rest share a multiplier: they are one group of the optimizer, or two where experts are spread
RULES = ({"pattern": "embed", "lr_multiplier": 0.1},)
FROZEN = ({"pattern": "wrapper", "lr_multiplier": 0.0},)
EXPERTS_ALONE = (
    {"pattern": "wrapper|shared_core|dense_experts", "lr_multiplier": 1.0},
    {"pattern": ".*", "lr_multiplier": 0.0},
)


# the stage after the experts alone
EVERYTHING = ({"pattern": "embed_tokens|lm_head", "lr_multiplier": 0.1}, {"pattern": "norm", "lr_multiplier": 0.5})


class Report(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]


class Language(nn.Module):
    """Cross-entropy and the family's auxiliary loss, summed over the tokens of a batch."""

    def __init__(self, student: Any):
        super().__init__()
        self.student = student

    def forward(self, tokens: Tensor) -> Report:
        out = self.student(tokens, use_cache=False, output_router_logits=True)
        ce = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        return Report(
            ce, {"ce": ce.detach(), "aux": out.aux_loss.detach(), "routers": torch.tensor(len(out.router_logits))}
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spread")


@pytest.fixture(scope="module")
def jobs(folder: Path) -> Callable[..., dict[str, Any]]:
    """jobs("name", zero, spread, ops…): a job over one random student."""
    torch.manual_seed(0)
    config = student_config(tiny_moe_config(VOCABULARY, **SMALL), FORMS, {0: (3,)})
    student = student_class("qwen3_moe")(config)
    for parameter in student.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    student.save_pretrained(folder / "student")

    def make(name: str, zero: int, spread: int, *do: list[Any], rules: Any = RULES, dtype: str = "float32") -> Any:
        placed = [[verb, *(str(folder / w) if isinstance(w, str) else w for w in words)] for verb, *words in do]
        layout = {"name": name, "zero": zero, "spread": spread, "dtype": dtype}
        return {**layout, "student": str(folder / "student"), "rules": rules, "do": placed}

    return make


def launch(ranks: int, plan: Path, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The jobs on real ranks; what they saw, by name."""
    plan.write_text(json.dumps(jobs))
    run_to_end(ranks, __file__, plan)
    return json.loads(plan.with_suffix(".out").read_text())


FIRST, SECOND = ["train", 0, HALF], ["train", HALF, STEPS]


@pytest.fixture(scope="module")
def seen(folder: Path, jobs: Any) -> dict[str, Any]:
    """Every layout on two ranks, then what one rank makes of it."""

    def whole(name: str, zero: int, spread: int) -> Any:
        return jobs(
            name, zero, spread, FIRST, ["save", name], ["adam", f"{name}.adam"], SECOND, ["weights", f"{name}.w"]
        )

    def resumed(source: str, zero: int, spread: int, to: str) -> Any:
        name = f"{source} as {to}"
        return jobs(name, zero, spread, ["load", source], ["adam", f"{name}.adam"], SECOND)

    def border(name: str, zero: int, spread: int, dtype: str = "float32") -> Any:
        cross = ["adam", f"{name}.before"], ["border", f"{name}.w"], ["adam", f"{name}.after"]
        refused = ["adam", f"{name}.kept"], ["reject", 7], ["adam", f"{name}.still"], ["train", 7, 9]
        return jobs(
            name,
            zero,
            spread,
            short,
            *cross,
            ["train", SHORT, 6],
            ["measure", 6],
            *refused,
            rules=EXPERTS_ALONE,
            dtype=dtype,
        )

    def back(name: str, zero: int, spread: int, dtype: str) -> Any:
        saved = short, ["save", name], ["adam", f"{name}.saved"], ["train", SHORT, 5]
        again = ["load", name], ["adam", f"{name}.again"], ["train", SHORT, 5]
        return jobs(name, zero, spread, *saved, *again, dtype=dtype)

    short = ["train", 0, SHORT]
    two = [
        *(whole(f"zero{z} spread{s}", z, s) for z, s in ((2, 1), (2, 2), (3, 1), (3, 2))),
        # each expert on both ranks, in groups of one: what four ranks with expert_parallel=2 do to an expert
        *(jobs(f"zero{z} copies", z, 1, FIRST, SECOND, ["weights", f"zero{z} copies.w"]) for z in (2, 3)),
        *(jobs(f"bfloat16 spread{s}", 3, s, short, dtype="bfloat16") for s in (1, 2)),
        jobs("zero0 spread2", 0, 2, FIRST, ["save", "zero0 spread2"], SECOND, ["weights", "zero0 spread2.w"]),
        jobs("zero0 spread2 as saved", 0, 2, ["load", "zero0 spread2"], SECOND),
        *(resumed(f"zero{z} spread2", z, 2, "saved") for z in (2, 3)),
        *(resumed(f"zero{z} spread1", z, 2, "spread2") for z in (2, 3)),
        jobs("frozen spread1", 3, 1, short, ["save", "frozen"], ["train", SHORT, 6], rules=FROZEN),
        jobs("frozen spread2", 3, 2, short, ["weights", "frozen.w"], ["train", SHORT, 6], rules=FROZEN),
        jobs("frozen as spread2", 3, 2, ["load", "frozen"], ["train", SHORT, 6], rules=FROZEN),
        jobs("alone spread2", 3, 2, short, rules=EXPERTS_ALONE),
        *(border(f"border zero{z} spread{s}", z, s) for z, s in ((0, 1), (2, 1), (2, 2), (3, 1), (3, 2))),
        border("border bfloat16 zero0", 0, 1, dtype="bfloat16"),
        border("border bfloat16 zero3", 3, 2, dtype="bfloat16"),
        *(back(name, zero, spread, name.split()[1]) for name, zero, spread in BACK),
    ]
    found = launch(2, folder / "two.json", two)
    one = [
        jobs("one rank", 0, 1, ["train", 0, STEPS], ["weights", "one.w"]),
        *(resumed(f"zero{z} spread2", z, 1, "one rank") for z in (2, 3)),
        jobs("alone", 0, 1, short, rules=EXPERTS_ALONE),
        border("border", 0, 1),
    ]
    return {**found, **launch(1, folder / "one.json", one)}


def losses(seen: dict[str, Any], name: str) -> list[float]:
    return [step[0] for step in seen[name]["steps"]]


LAYOUTS = ["zero0 spread2", *(f"zero{z} {how}" for z in (2, 3) for how in ("spread1", "spread2", "copies"))]


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_losses_of_one_rank(seen, name):
    assert losses(seen, name) == pytest.approx(losses(seen, "one rank"), abs=1e-5)
    assert losses(seen, name)[-1] < 0.92 * losses(seen, name)[0]


@pytest.mark.ranks
def test_the_norm_that_clips_is_of_all_experts(seen):
    norms = {name: [step[1] for step in seen[name]["steps"]] for name in LAYOUTS}
    assert min(norms["zero3 spread1"]) > 0.5, "nothing was clipped"
    for name in LAYOUTS:
        assert norms[name] == pytest.approx(norms["zero3 spread1"], rel=1e-4), name


@pytest.mark.ranks
def test_routers_still_give_logits_and_auxiliary_loss(seen):
    for name in ("one rank", *LAYOUTS):
        routers, auxiliary = zip(*(step[2:] for step in seen[name]["steps"]), strict=True)
        assert set(routers) == {2.0}  # a layer's each
        assert auxiliary == pytest.approx([step[3] for step in seen["one rank"]["steps"]], rel=1e-4)


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_the_same_folder_under_every_layout(seen, folder, name):
    found, one = (load_file(folder / f"{of}.w" / WEIGHTS) for of in (name, "one"))
    names = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict().keys()
    assert (
        {name.removeprefix("student.") for name in found}
        == names - {"lm_head.weight"}
        == {name.removeprefix("student.") for name in one}
    )
    for key, tensor in found.items():
        assert tensor.dtype == one[key].dtype
        torch.testing.assert_close(tensor, one[key], atol=2e-4, rtol=0)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["zero0 spread2", "zero2 spread2", "zero3 spread2"])
def test_resume_on_the_same_ranks_is_bit_equal(seen, name):
    assert seen[f"{name} as saved"]["steps"] == seen[name]["steps"][HALF:]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "source, to",
    [(f"zero{z} {source}", to) for z in (2, 3) for source, to in (("spread2", "one rank"), ("spread1", "spread2"))],
)
def test_another_layout_goes_on_with_the_same_weights_and_moments(seen, folder, source, to):
    name = f"{source} as {to}"
    assert losses(seen, name) == pytest.approx(losses(seen, source)[HALF:], abs=1e-5)
    mine, theirs = (torch.load(folder / f"{of}.adam", weights_only=True) for of in (name, source))
    assert mine.keys() == theirs.keys() and mine["steps"] == theirs["steps"] == [HALF]
    for key in mine.keys() - {"steps"}:
        assert torch.equal(mine[key].view_as(theirs[key]), theirs[key]), key
        assert theirs[key].any(), key
    assert not (folder / source / "universal").exists()


@pytest.mark.ranks
def test_spread_experts_are_frozen_by_a_rate_of_zero(seen, folder):
    assert losses(seen, "frozen spread2") == pytest.approx(losses(seen, "frozen spread1"), abs=1e-5)
    assert losses(seen, "frozen as spread2") == pytest.approx(losses(seen, "frozen spread1")[SHORT:], abs=1e-5)
    before = load_file(folder / "student" / WEIGHTS)
    after = load_file(folder / "frozen.w" / WEIGHTS)
    wrappers = [name for name in before if "wrapper" in name]
    assert len(wrappers) == 17 and all(torch.equal(before[n], after[f"student.{n}"]) for n in wrappers)


@pytest.mark.ranks
def test_experts_alone_train(seen):
    assert losses(seen, "alone spread2") == pytest.approx(losses(seen, "alone"), abs=1e-5)


BACK = [(f"back float32 zero{z} spread{s}", z, s) for z, s in ((0, 1), (2, 1), (2, 2), (3, 1), (3, 2))]
BACK += [(f"back bfloat16 zero{z} spread{s}", z, s) for z, s in ((0, 1), (3, 2))]


@pytest.mark.ranks
@pytest.mark.parametrize("name", [name for name, _, _ in BACK])
def test_a_rollback_takes_the_same_engine_back(seen, folder, name):
    """What was saved is loaded into the engine that went on: masters, moments and the steps after it, bit by bit."""
    saved, again = (torch.load(folder / f"{name}.{at}", weights_only=True) for at in ("saved", "again"))
    assert saved.pop("steps") == again.pop("steps") and saved.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in saved.items())
    steps = seen[name]["steps"]
    assert steps[SHORT:5] == steps[5:7] and losses(seen, name)[4] < losses(seen, name)[0]


BORDERS = ["border", *(f"border zero{z} spread{s}" for z, s in ((0, 1), (2, 1), (2, 2), (3, 1), (3, 2)))]


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*BORDERS, "border bfloat16 zero0", "border bfloat16 zero3"])
def test_moments_cross_a_stage_border(seen, folder, name):
    """Bit by bit for what goes on training, nothing for what begins to; the rest of the curve is that of one rank."""
    before, after = (torch.load(folder / f"{name}.{at}", weights_only=True) for at in ("before", "after"))
    assert before.pop("steps") == [SHORT + (name == "border bfloat16 zero0")] and after.pop("steps")[0] == 0.0
    fresh = after.keys() - before.keys()
    assert before.keys() < after.keys() and any("lm_head" in key or "embed" in key for key in fresh)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert not any(after[key].any() for key in fresh if not key.endswith("/fp32"))
    assert all(tensor.any() for tensor in before.values())
    close = {"rel": 0.03} if "bfloat16" in name else {"abs": 1e-5}
    assert losses(seen, name) == pytest.approx(losses(seen, "border"), **close)
    frozen, weights = load_file(folder / "student" / WEIGHTS), load_file(folder / f"{name}.w" / WEIGHTS)
    kept = [key for key in frozen if not re.search(EXPERTS_ALONE[0]["pattern"], key)]
    assert kept and all(torch.equal(weights[key], frozen[key].to(weights[key].dtype)) for key in kept)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*BORDERS, "border bfloat16 zero0", "border bfloat16 zero3"])
def test_a_refused_update_changes_nothing_under_any_layout(seen, folder, name):
    """Not even the count of updates; and the steps after it are those of one rank, as the border's test compares."""
    assert seen[name]["left_out"] == "rejected" and len(losses(seen, name)) == SHORT + 3 + 2
    kept, still = (torch.load(folder / f"{name}.{at}", weights_only=True) for at in ("kept", "still"))
    assert kept.pop("steps") == still.pop("steps") and kept.keys() == still.keys()
    assert all(torch.equal(still[key], tensor) for key, tensor in kept.items())


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*BORDERS[1:], "border bfloat16 zero3"])
def test_norms_of_groups_are_those_of_one_rank(seen, name):
    found, expected = seen[name]["norms"], seen["border"]["norms"]
    assert found.keys() == expected.keys() and {key.split("/")[0] for key in found} == {"grad_norm", "update_norm"}
    assert len(expected) == 6 and all(value > 0 for value in expected.values())
    assert found == pytest.approx(expected, rel=0.1 if "bfloat16" in name else 1e-3)


@pytest.mark.ranks
def test_bfloat16_trains_close_to_experts_that_are_not_spread(seen):
    assert losses(seen, "bfloat16 spread2") == pytest.approx(losses(seen, "bfloat16 spread1"), rel=0.01)
    assert losses(seen, "bfloat16 spread2") == pytest.approx(losses(seen, "one rank")[:SHORT], rel=0.03)


def begin(job: dict[str, Any], folder: str, rules: Any, world: World, updates: dict[str, int] | None = None) -> Any:
    """The engine of a job over the student of a folder."""
    from megakd.engine.deepspeed import DeepSpeedEngine
    from megakd.models.expert_parallel import spread_experts
    from megakd.system.deepspeed_internals import join_groups

    student = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job["dtype"]))
    objective = Language(student)
    if job["spread"] > 1 or "copies" in job["name"]:
        spread_experts(student, job["spread"], join_groups(job["spread"]))
    if list(rules) == list(EXPERTS_ALONE):
        student.enable_input_require_grads()
    config = parse(
        {
            "model": {"dtype": job["dtype"]},
            "engine": {"deepspeed": {"zero_optimization": {"stage": job["zero"], "reduce_bucket_size": 10000}}},
            "optim": {"lr": RATE, "clip_norm": 0.5, "micro_batch": 1},
        },
        "test",
    )
    # as the loop does it: the experts are spread before rules are matched
    optimizer = build_optimizer(objective, tuple(LrRule(**rule) for rule in rules), config.optim, updates)
    settings = deepspeed_config(config, world.size, WINDOWS)
    engine = DeepSpeedEngine(objective, optimizer, settings, world, job["spread"])
    return engine


def rank(plan: Path) -> None:
    """Every job of a plan: layout and operations; what it saw is written as plan.out by the first rank.

    Two ranks first compare every shape of the layer with the one that keeps all experts.
    """
    torch.set_num_threads(1)
    world = join_world()
    seen: dict[str, Any] = {}
    if world.size == 2:
        on_two_ranks(world.rank)
    for job in json.loads(plan.read_text()):
        engine = begin(job, job["student"], job["rules"], world)
        mine = seen[job["name"]] = {}
        for verb, *words in job["do"]:
            if verb == "train":
                mine.setdefault("steps", []).extend(train(engine, step, world) for step in range(*words))
            elif verb == "measure":
                mine["norms"] = dict(step_on(engine, words[0], world, norms=True).norms)
            elif verb == "reject":
                report = step_on(engine, words[0], world, accept=lambda sums: sums["total"] < 0)
                mine["left_out"] = report.left_out
            elif verb == "save":
                engine.save(Path(words[0]))
            elif verb == "load":
                engine.load(Path(words[0]))
            elif verb == "weights":
                write_weights(Path(words[0]), engine.weights()) if world.first else list(engine.weights())
            elif verb == "border":
                carried = engine.export_state()
                weights = ((name.removeprefix("student."), tensor) for name, tensor in engine.weights())
                if world.first:
                    write_weights(Path(words[0]), weights)
                    write_config(Path(words[0]), load_config(Path(job["student"])))
                else:
                    list(weights)
                barrier()
                engine.close()
                engine = begin(job, words[0], EVERYTHING, world, carried.updates)
                engine.import_state(carried)
            elif verb == "adam":
                found = dict(adam(engine, world))
                if world.first:
                    torch.save(found, words[0])
        engine.close()
    if world.first:
        plan.with_suffix(".out").write_text(json.dumps(seen))
    close_world()


def step_on(engine: Any, step: int, world: World, **wishes: Any) -> Any:
    """A step on this rank's share of the windows."""
    generator = torch.Generator().manual_seed(step)
    windows = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=generator).cumsum(1) % 11
    return engine.step(windows.chunk(world.size)[world.rank].split(1), WINDOWS * (LENGTH - 1), 1.0, **wishes)


def train(engine: Any, step: int, world: World) -> list[float]:
    """One step: loss a token, gradient norm; router outputs and auxiliary loss."""
    report = step_on(engine, step, world)
    loss = report.sums["total"] / (WINDOWS * (LENGTH - 1))
    return [loss, report.grad_norm, report.sums["routers"] / WINDOWS, report.sums["aux"]]


def adam(engine: Any, world: World) -> Iterator[tuple[str, Any]]:
    """(canonical name/what, whole tensor) of the fp32 weights and Adam's moments, and its counts of steps."""
    from megakd.engine import carry_over as border

    border.link_moments(engine.engine)
    masters, states = border._masters(engine.engine), engine.engine.basic_optimizer.state
    steps = {float(states[master]["step"]) for master in masters.values()}
    for name, parameter in engine.engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        for what in ("fp32", "exp_avg", "exp_avg_sq"):
            full = border._whole(parameter, masters[parameter], what, states[masters[parameter]])
            if hasattr(parameter, "packed"):
                for part, tensor in parameter.packed.whole(
                    name, full.view(getattr(parameter, "ds_shape", parameter.shape))
                ):
                    yield f"{part}/{what}", tensor.clone()
            elif world.first:
                yield f"{name}/{what}", full.clone()
    yield "steps", sorted(steps)


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
