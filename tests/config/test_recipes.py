"""Every recipe and every DeepSpeed file that ships loads, merges and trains."""

import json
from pathlib import Path

import pytest

from megakd.config.checks import check
from megakd.config.parsing import load_recipe
from megakd.engine.ds_json import deepspeed_config
from tests.conftest import ROOT, forked_ranks, in_process, metrics

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.json"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("ds_config", DS_CONFIGS, ids=lambda p: p.stem)
def test_recipe_loads_with_every_deepspeed_file(recipe: Path, ds_config: Path):
    config = load_recipe(recipe, ["engine.kind=deepspeed", f"engine.config={ds_config.stem}"])
    windows = config.optim.batch_tokens // config.data.sequence_length
    assert windows * config.data.sequence_length == config.optim.batch_tokens
    merged = deepspeed_config(config, config.engine.ranks, windows)
    own = json.loads(ds_config.read_text())
    assert own["zero_optimization"].items() <= merged["zero_optimization"].items()
    steps = merged["gradient_accumulation_steps"] * merged["train_micro_batch_size_per_gpu"] * config.engine.ranks
    assert steps == windows
    json.dumps(merged)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_written_config_is_the_same_run(recipe: Path, tmp_path: Path):
    in_process("new", tmp_path / "run", "--from", recipe)
    assert load_recipe(tmp_path / "run" / "config.json") == load_recipe(recipe)
    recipe_name = json.loads((tmp_path / "run" / "config.json").read_text())["name"]
    assert recipe_name == recipe.stem


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_rules_of_recipes_match_real_parameters(recipe: Path):
    """On a student with the recipe's tying: Qwen3-30B-A3B has an untied head, the demo's teacher a tied one.

    A student that is given is a Llama, and rules may name what the objective trains besides it.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import megakd.models.student as student
    from megakd.engine.optim import assign_rules
    from megakd.models.shared_core import PROJECTIONS, Form
    from megakd.models.tiny import tiny_moe_config
    from megakd.objectives.build import build

    config = load_recipe(recipe)
    check(config, recipe.name)
    shape = tiny_moe_config(500, tie_word_embeddings=recipe.stem == "demo")
    layers = {i: {p: Form("wrappers", 4, 4) for p in PROJECTIONS} for i in range(shape.num_hidden_layers)}
    given = LlamaConfig(vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            given if config.model.student else student.student_config(shape, layers)
        )
        teacher = AutoModelForCausalLM.from_config(shape)
    for stage in config.stages:
        trained = model
        if config.objective.kind != "cached":
            trained = build(config.at(stage), model, teacher, {"tokenizer": {"vocab_size": 500}})
        assert {a.rule for a in assign_rules(trained, stage.lr_multipliers)} >= set(range(len(stage.lr_multipliers)))


# zero2 and zero3 are held against the local engine on two ranks by tests/engine/test_equivalence.py
OTHERS = [path for path in DS_CONFIGS if path.stem not in ("zero2", "zero3")]


@pytest.mark.ranks
@pytest.mark.parametrize("ds_config", OTHERS, ids=lambda p: p.stem)
def test_every_other_deepspeed_file_trains_on_two_ranks(ds_config: Path, sibling):
    run = sibling("engine.kind=deepspeed", f"engine.config={ds_config.stem}", "engine.ranks=2", "stages.1.tokens=512")
    forked_ranks(2, "train", run.folder)
    rows = metrics(run.folder)
    assert len(rows) == 5 and rows[-1]["kl_t1"] < rows[0]["kl_t1"]
