"""What a configuration alone can tell: refused at `new` and by its name, said where something takes a field's place."""

import json
import shutil

import pytest

from megakd.config.checks import check, notices
from megakd.config.effects import idle_fields
from megakd.config.objective import OnlineConfig, SarConfig
from megakd.config.parsing import apply_overrides, load_recipe, parse
from megakd.config.run import RunConfig
from megakd.errors import UserError
from megakd.run import Run
from tests.conftest import ROOT, in_process

SAR, ONLINE = {"kind": "sar"}, {"kind": "online"}


def config_of(**sections: object) -> RunConfig:
    return parse({"engine": {"kind": "local"}, **sections}, "recipe")


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"objective": {"mix": 0.1}}, "objective.mix=0.1 has no effect"),
        ({"objective": {**ONLINE, "final_top_k": 2}}, "objective.final_top_k=2 has no effect: objective.routing=top_m"),
        ({"objective": ONLINE, "logits": {"profile": "sampled"}}, 'logits.profile="sampled" has no effect'),
        ({"logits": {"draws": 5}}, "logits.draws=5 has no effect: logits.profile=topk stores no draws"),
        ({"stream": {"scratch": "/tmp"}}, 'stream.scratch="/tmp" has no effect: it needs stream.lanes'),
        ({"engine": {"kind": "local", "expert_parallel": 2}}, "engine.expert_parallel=2 has no effect"),
        ({"engine": {"kind": "local", "ranks": 2}}, "engine.ranks=2 has no effect: engine.kind=local is one process"),
        ({"compress": {"shapes": ["basis"]}}, "compress.shapes=.* has no effect: compress.budget alone"),
        ({"compress": {"budget": 0.2, "split": "free"}}, 'compress.split="free" has no effect'),
        ({"stages": [{"name": "a", "steps": 1, "config": "zero2"}]}, 'stages.0.config="zero2" has no effect'),
        ({"stages": [{"name": "a", "steps": 1, "objective": {"mix": 0.2}}]}, "stages.0.objective.mix=0.2 has no"),
        ({"stages": [{"name": "a", "steps": 1, "lr_multipliers": [{"pattern": "(", "lr_multiplier": 1}]}]},
         r"stages.0.lr_multipliers: '\(' is not a regular expression"),
    ],
)  # fmt: skip
def test_a_field_without_effect_is_refused_by_name(sections, said):
    with pytest.raises(UserError, match=f"^recipe: {said}"):
        check(config_of(**sections), "recipe")


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"subset": "a"}, 'subset="a" has no effect: data.sources.1.source names files'),
        ({"split": "test"}, 'split="test" has no effect: data.sources.1.source names files'),
        ({"revision": "main"}, 'revision="main" has no effect: data.sources.1.source names files'),
        ({"text_field": "body"}, 'text_field="body" has no effect: data.sources.1.source is plain text'),
        ({"source": "a/b", "format": "messages", "text_field": "body"}, 'text_field="body" has no effect: .*format'),
        ({"messages_field": "chat"}, 'messages_field="chat" has no effect: data.sources.1.format is not messages'),
        ({"completion_field": "a"}, 'completion_field="a" has no effect: .*format is not prompt_completion'),
        ({"tools_field": "a"}, 'tools_field="a" has no effect: data.sources.1.format=text has no tools'),
    ],
)
def test_a_field_without_effect_of_one_source_is_refused_by_name(fields, said):
    other = {"source": "a/b", "subset": "x", "split": "test", "revision": "main", "text_field": "body"}
    fine = config_of(data={"sources": [other, {"source": "python-docs"}]})
    check(fine, "recipe")
    with pytest.raises(UserError, match=f"^recipe: data.sources.1.{said}"):
        check(config_of(data={"sources": [other, {"source": "python-docs", **fields}]}), "recipe")


def test_ranks_of_a_recipe_for_deepspeed_go_with_its_kind(tmp_path, capsys):
    """One rank must not train in silence where two were asked for."""
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"engine": {"kind": "deepspeed", "config": "zero2", "ranks": 2}}))
    check(load_recipe(file, ["engine.kind=local"]), "recipe")
    assert "engine.kind=local: drops engine.ranks=2" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"engine\.ranks=4 has no effect"):
        check(load_recipe(file, ["engine.kind=local", "engine.ranks=4"]), "recipe")


def test_a_field_that_one_stage_uses_has_an_effect():
    stages = [{"name": "a", "steps": 1}, {"name": "b", "steps": 1, "objective": {"divergence": "jsd"}}]
    check(config_of(objective={"mix": 0.1}, stages=stages), "recipe")
    with pytest.raises(UserError, match=r"objective\.mix"):
        check(config_of(objective={"mix": 0.1}, stages=stages[:1]), "recipe")


def test_what_takes_a_fields_place_is_said():
    sections = {"model": {"student": "given"}, "compress": {"rank": 3}, "engine": {"kind": "local", "config": "zero2"}}
    config = config_of(**sections, stages=[{"name": "a", "steps": 10}])
    check(config, "recipe")
    assert [line.split(" ")[0] for line in notices(config)] == ["compress.rank=3", 'engine.config="zero2"', "stage"]
    assert notices(config)[-1].endswith("optim.warmup_steps=100 is more than half of its 10 steps; warmup takes 5")
    assert not any(line.startswith("stage") for line in notices(config, begun=1))  # it was said when the stage began
    alone = config_of(objective={"kind": "sar", "alpha": 0.0}, stages=[{"name": "a", "epochs": 1}])
    (line,) = notices(alone)
    assert "objective.alpha=0: the student learns from cross entropy alone" in line
    assert notices(alone, windows=alone.windows_per_step * 10)[1:] == [
        "stage a: optim.warmup_steps=100 is more than half of its 10 steps; warmup takes 5"
    ]


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"objective": {"temperature": [5, 1]}},
         r"stages.0 \(all\): objective.temperature: .*T = 1, 1.33, 2, 4, not 5 to 1"),
        ({"objective": {"temperature": 0.9}}, "the logits carry tails for T = 1, 1.33, 2, 4, not 0.9"),
        ({"objective": {"temperature": 4.5}}, "the logits carry tails for T = 1, 1.33, 2, 4, not 4.5"),
        ({"objective": {"temperature": 3}, "logits": {"temperatures": [1, 2]}},
         "the logits carry tails for T = 1, 2, not 3"),
        ({"objective": {"temperature": [4, 1], "tail": "hybrid"}, "logits": {"profile": "hybrid"}},
         "objective.temperature: a ramp passes through temperatures that hybrid has no draws for"),
        ({"objective": {"tail": "sampled"}}, "objective.tail: sampled needs draws"),
        ({"objective": {"tail": "truncated", "divergence": "reverse_kl"}}, "reverse_kl is infinite"),
        ({"stages": [{"name": "a", "steps": 1, "objective": {"kind": "sar"}}]},
         "stages.0.objective.kind: sar, but objective.kind is cached; all stages of a run have one kind"),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_train_is_told_before_anything_is_made(sections, said, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"engine": {"kind": "local"}, **sections}))
    with pytest.raises(UserError, match=said):
        Run.create(recipe, [], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"best": "kld"}, "eval.best: 'kld' is not measured; give one of auto, kl, perplexity"),
        (
            {"best": "hellaswag/acc"},
            "eval.best: 'hellaswag/acc' is not measured; .* TASK/METRIC of a task in eval.tasks",
        ),
        ({"tasks": ["mine"], "task_folder": "/no/such/folder"}, "eval.task_folder: /no/such/folder is no folder"),
    ],
)
def test_an_evaluation_that_cannot_be_is_told_before_anything_is_made(fields, said, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"engine": {"kind": "local"}, "eval": fields}))
    with pytest.raises(UserError, match=f"recipe.json: {said}"):
        Run.create(recipe, [], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"objective": {**SAR, "tail": "truncated"}},
         "unknown key 'objective.tail': it is a field of objective.kind=cached, and the kind is sar"),
        ({"objective": {"anchor": 1.0}}, "unknown key 'objective.anchor': it is a field of objective.kind=sar, and"),
        ({"objective": {"routing": "all"}}, "'objective.routing': it is a field of objective.kind=sar and online, and"),
        ({"objective": {**SAR, "ancor": 1}}, "unknown key 'objective.ancor'; did you mean 'anchor'?"),
        ({"objective": {"kind": "dense"}}, "objective.kind: input should be 'cached', 'sar' or 'online', got"),
        ({"sar": {"anchor": 1.0, "entropy": 1.0}}, r"sar.anchor=1.0 has no effect: .*sar \(and 1 more\)$"),
        ({"objective": SAR, "online": {"kl": 1.0}}, "online.kl=1.0 has no effect: objective.kind=online alone"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_of_objective_is_refused_by_name(sections, said):
    with pytest.raises(UserError, match=f"^recipe: .*{said}"):
        config_of(**sections)


def test_sections_of_older_recipes_and_overrides_mean_what_they_did():
    """0.1 had sections sar and online; what is its default under another kind goes without a word."""
    old = {"objective": {"kind": "sar", "alpha": 0.7, "tail": "ghost"}, "sar": {"anchor": 0.7}, "online": {"kl": 0.7}}
    assert config_of(**old).objective == SarConfig(alpha=0.7, anchor=0.7)
    again = config_of(**config_of(**old).model_dump(mode="json"))
    assert again.objective == SarConfig(alpha=0.7, anchor=0.7)
    changed = apply_overrides({"objective": {"tail": "ghost"}}, ["objective.kind=online", "online.gap=1"])
    assert parse(changed, "recipe").objective == OnlineConfig(gap=1)


def frozen_with(run: Run, **sections: dict[str, object]) -> None:
    """The config.json that an older version would have written."""
    path = run.path("config.json")
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **sections}))


def test_an_older_run_whose_stage_has_another_kind_is_refused_in_one_line(sibling):
    """It was a KeyError when its stage began."""
    run = sibling()
    value = json.loads(run.path("config.json").read_text())
    value["stages"][1]["objective"] = {"kind": "sar"}
    run.path("config.json").write_text(json.dumps(value))
    assert "stages.1.objective.kind: sar, but objective.kind is cached" in in_process("train", run.folder, code=2)
    assert Run.open(run.folder).config.stages[1].objective == {"kind": "sar"}  # other verbs read it


def test_an_older_run_opens_with_fields_without_effect_and_goes_on_when_it_has_begun(sibling):
    run = sibling("stages.0.steps=1", "stages.0.tokens=null", "stages.1.steps=1", "stages.1.tokens=null")
    stages = json.loads(run.path("config.json").read_text())["stages"]
    idle = [{**stages[0], "config": "zero2"}, stages[1]]
    frozen_with(run, stages=idle)
    assert 'stages.0.config="zero2" has no effect' in in_process("train", run.folder, code=2)
    frozen_with(run, stages=stages, sar={"anchor": 0.7})
    assert "train: sar.anchor=0.7 has no effect: objective.kind=sar alone" in in_process("train", run.folder)
    shutil.rmtree(run.path("checkpoints", "all"))  # begun, not finished
    frozen_with(run, stages=idle)
    assert 'train: stages.0.config="zero2" has no effect' in in_process("train", run.folder)


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch" / "recipes").glob("*.json")))
def test_shipped_recipes_keep_what_they_say(recipe):
    config = parse(json.loads(recipe.read_text()), recipe.name)
    assert not [str(each) for each in idle_fields(config)]


def test_an_override_of_the_kind_drops_the_other_kinds_fields_and_says_so(tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"engine": {"kind": "local"}, "objective": {**SAR, "anchor": 0.7, "alpha": 0.9}}))
    assert load_recipe(recipe, ["objective.kind=online"]).objective == OnlineConfig(alpha=0.9)
    assert "objective.kind=online: drops anchor, which objective.kind=sar had" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"unknown key 'objective\.anchor': it is a field of objective.kind=sar"):
        load_recipe(recipe, ["objective.kind=online", "objective.anchor=0.2"])
    recipe.write_text(json.dumps({"engine": {"kind": "local"}, "objective": {"tail": "ghost"}}))
    assert load_recipe(recipe, ["objective.kind=sar"]).objective == SarConfig()
    assert not capsys.readouterr().err
