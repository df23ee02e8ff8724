import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megakd.config.objective import SarConfig
from megakd.config.parsing import apply_overrides, load_recipe, parse
from megakd.config.run import RunConfig, flatten, is_mutable
from megakd.errors import UserError
from megakd.names import shipped

LIVE = {
    "data.workers",
    "data.on_bad_line",
    "logits.parallel",
    "logits.batch_size",
    "stream.follow",
    "stream.workers",
    "stream.on_damage",
    "stream.scratch",
    "optim.micro_batch",
    "objective.drift_steps",
    "eval.every_steps",
    "checkpoint.every_epochs",
    "engine.ranks",
    "engine.expert_parallel",
    "engine.activation_checkpointing",
    "engine.offload_teacher",
    "engine.teacher_parallel",
    "guard.nonfinite",
    "guard.spike",
    "guard.window",
    "guard.rollback",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "eval.attention",
    "eval.batch_size",
    "eval.tasks",
    "eval.task_folder",
    "eval.limit",
    "eval.few_shot",
    "eval.task_batch_size",
    "eval.best",
    "eval.poll_seconds",
    "log.every_steps",
    "log.tensorboard",
    "log.wandb",
    "log.wandb_project",
}


@pytest.mark.parametrize(
    "override, words",
    [
        ("stages[0].tokens=9", "write stages.0.tokens=9"),
        ("stages.all.tokens=9", "write stages.0.tokens=9"),
        ("stages.7.tokens=9", "'7' is no index into a list of 1; stages are counted from 0: stages.0"),
    ],
)
def test_a_stage_that_is_named_otherwise_is_named_rightly(override, words):
    with pytest.raises(UserError, match=f"{re.escape(override)}': {re.escape(words)}$"):
        apply_overrides({"stages": [{"name": "all"}]}, [override])


def write(folder: Path, value: Any, name: str = "recipe.json") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def error_of(folder: Path, value: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(write(folder, value), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def leaves(config: RunConfig) -> dict[str, Any]:
    return dict(flatten(config.model_dump(mode="json")))


def test_empty_recipe_is_the_documented_defaults(tmp_path):
    config = load_recipe(write(tmp_path, {}))
    assert config.model_copy(update={"engine": RunConfig().engine}) == RunConfig()
    assert (config.compress.rank, config.data.sequence_length, config.data.tokens) == (64, 2048, 2_000_000_000)
    assert (config.objective.alpha, config.objective.temperature, config.logits.temperatures) == (
        0.5,
        2.0,
        (1.0, 1.33, 2.0, 4.0),
    )
    assert (config.logits.profile, config.logits.top_k, config.logits.pmin) == ("topk", 64, 3e-4)
    assert (config.stream.lanes, config.stream.on_damage, config.objective.tail) == (0, "raise", "ghost")
    assert [stage.name for stage in config.stages] == ["all"]


@pytest.mark.parametrize("path", sorted(shipped("launch/recipes", "").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_read_back_what_they_dump(tmp_path, path):
    config = load_recipe(path)
    assert load_recipe(write(tmp_path, config.model_dump(mode="json"))) == config


def test_overrides(tmp_path):
    recipe = {"stages": [{"name": "a", "tokens": 3}, {"name": "b", "tokens": 4}], "optim": {"lr": 0.1}}
    config = load_recipe(
        write(tmp_path, recipe),
        [
            "stages.0.tokens=5",
            'stages.1.lr_multipliers=[{"pattern": "x=y", "lr_multiplier": 0}]',
            "optim.lr=1e-4",
            "optim.betas=[0.8, 0.9]",
            "model.student=null",
            "model.teacher=Qwen/Qwen3-30B-A3B",
            'data.subset="10"',
            "data.split=train[:1%]=",
            "data.tokens=2e9",
            "log.tensorboard=false",
            "seed=1",
            "seed=2",
            "name=",
        ],
    )
    assert [(s.name, s.tokens) for s in config.stages] == [("a", 5), ("b", 4)]
    rule = config.stages[1].lr_multipliers[0]
    assert (rule.pattern, rule.lr_multiplier) == ("x=y", 0)
    assert (config.optim.lr, config.optim.betas) == (1e-4, (0.8, 0.9))
    assert (config.model.student, config.model.teacher) == (None, "Qwen/Qwen3-30B-A3B")
    assert (config.data.subset, config.data.split, config.data.tokens) == ("10", "train[:1%]=", 2_000_000_000)
    assert config.log.tensorboard is False and config.seed == 2 and config.name == ""


def test_overrides_leave_their_input_alone():
    raw = {"stages": [{"name": "a", "tokens": 3}]}
    assert apply_overrides(raw, ["stages.0.tokens=5", "optim.lr=1"])["stages"][0]["tokens"] == 5
    assert raw == {"stages": [{"name": "a", "tokens": 3}]}


@pytest.mark.parametrize(
    "override", ["optim.lr", "=3", "stages.7.tokens=5", "stages.x=5", "name.x=1", "stages.0.name.x=1"]
)
def test_bad_override_is_quoted(tmp_path, override):
    assert repr(override) in error_of(tmp_path, {"name": "n", "stages": [{"name": "a", "tokens": 3}]}, override)


@pytest.mark.parametrize(
    "value, key, nearest",
    [
        ({"optm": {}}, "optm", "optim"),
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate", "optim.lr"),
        ({"optim": {"zzz": 1}}, "optim.zzz", None),
        ({"optim": {"weight_decy": 1}}, "optim.weight_decy", "weight_decay"),
        ({"stages": [{"name": "a", "tokens": 1}, {"name": "b", "token": 1, "tokens": 1}]}, "stages.1.token", "tokens"),
        (
            {
                "stages": [
                    {"name": "a", "tokens": 1, "lr_multipliers": [{"patern": "x", "pattern": "x", "lr_multiplier": 1}]}
                ]
            },
            "stages.0.lr_multipliers.0.patern",
            "pattern",
        ),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, value, key, nearest):
    message = error_of(tmp_path, value)
    assert "recipe.json" in message and f"unknown key '{key}'" in message
    assert f"did you mean '{nearest}'?" in message if nearest else "known keys are lr, betas, eps" in message


def test_unknown_key_in_an_override_names_the_nearest(tmp_path):
    assert "'objective.alhpa'" in error_of(tmp_path, {}, "objective.alhpa=1")
    assert "did you mean 'alpha'?" in error_of(tmp_path, {}, "objective.alhpa=1")


@pytest.mark.parametrize(
    "override",
    [
        "compress.rank=many",
        "compress.rank=-4",
        "compress.rank=0",
        "compress.rank=2.5",
        "objective.alpha=2",
        "objective.alpha=-0.1",
        "objective.temperature=0",
        "objective.alpha=[0.5]",
        "objective.alpha=[0.5, 2]",
        "objective.temperature=[2, 0]",
        'objective.temperature=[2, "1"]',
        "objective.divergence=hellinger",
        "objective.kind=magic",
        "data.sequence_length=70000",
        "data.holdout_fraction=0",
        "data.tokens=1.5",
        "data.tokens=Infinity",
        "data.source=7",
        "optim.lr=NaN",
        "optim.betas=[0.9]",
        "logits.temperatures=[1, 0]",
        "logits.temperatures=1",
        "logits.profile=dense",
        "logits.top_k=0",
        "logits.top_k=70000",
        "logits.pmin=1",
        "logits.pmin=-0.1",
        "logits.draws=0",
        "logits.draws=256",
        "logits.draw_temperature=0",
        "logits.levels=256",
        "logits.parallel=tensor",
        "stream.lanes=-1",
        "stream.workers=0",
        "stream.on_damage=ignore",
        "objective.tail=dense",
        "model.dtype=int8",
        "stages=[]",
        "stages=x",
        "log.wandb=maybe",
        "optim=3",
        "engine.deepspeed=[]",
    ],
)
def test_wrong_value_names_file_and_key_and_value(tmp_path, override):
    key, _, value = override.partition("=")
    message = error_of(tmp_path, {}, override)
    assert message.startswith(f"{tmp_path / 'recipe.json'}: {key}")
    assert "required" in message or value.strip("[]").split(", ")[-1] in message


def test_too_many_temperatures(tmp_path):
    assert "logits.temperatures" in error_of(tmp_path, {"logits": {"temperatures": list(range(1, 18))}})


def test_hybrid_draws_need_a_tail_at_their_temperature(tmp_path):
    """What the draws are shares of; a sampled capture has no tails and needs none."""
    drawn = {"profile": "hybrid", "draw_temperature": 3.0}
    message = error_of(tmp_path, {"logits": drawn})
    assert message.startswith(f"{tmp_path / 'recipe.json'}: logits") and "add it to temperatures" in message
    assert load_recipe(write(tmp_path, {"logits": {**drawn, "temperatures": [3.0]}})).logits.draw_temperature == 3
    assert load_recipe(write(tmp_path, {"logits": {**drawn, "profile": "sampled"}})).logits.draws == 50
    assert load_recipe(write(tmp_path, {"logits": {"profile": "hybrid", "temperatures": []}})).logits.draws == 50


@pytest.mark.parametrize(
    "temperatures, declared",
    [([], (1.0,)), ([1.0, 2.0], (1.0, 2.0)), ([4.0, 2, 1], (1.0, 4.0, 2.0)), ([3], (1.0, 3.0))],
)
def test_temperature_one_is_always_declared_and_first(tmp_path, temperatures, declared):
    config = load_recipe(write(tmp_path, {"logits": {"temperatures": temperatures}}))
    assert config.logits.declared_temperatures == declared


def test_missing_key_and_the_number_of_other_faults(tmp_path):
    assert "stages.0: value error, give one of tokens, steps and epochs, not none of them" in error_of(
        tmp_path, {"stages": [{"name": "a"}]}
    )
    assert "(and 2 more)" in error_of(tmp_path, {"seed": -1, "compress": {"rank": 0}, "optim": {"lr": 0}})


def test_stages_need_distinct_names_that_can_be_folders(tmp_path):
    stage = {"name": "same", "tokens": 1}
    assert "recipe.json: stages" in error_of(tmp_path, {"stages": [stage, {"name": "other", "tokens": 1}, stage]})
    assert "'same'" in error_of(tmp_path, {"stages": [stage, stage]})
    assert "stages.0.name" in error_of(tmp_path, {"stages": [{"name": "a/b", "tokens": 1}]})


def test_broken_json_names_line_and_column(tmp_path):
    assert "recipe.json:2:14: not valid JSON" in error_of(tmp_path, '{"seed": 1,\n "name": "x" "y"}')
    assert "recipe.json:1:1: not valid JSON" in error_of(tmp_path, "")
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        load_recipe(tmp_path / "none.json")


@pytest.mark.parametrize("value", ["[]", "3", "null", '"text"'])
def test_a_recipe_is_an_object(tmp_path, value):
    assert "recipe.json: a recipe is a JSON object" in error_of(tmp_path, value)


def test_a_section_that_is_none_is_an_error_whatever_overrides_it(tmp_path):
    assert "engine" in error_of(tmp_path, {"engine": "zero3"})
    assert "engine" in error_of(tmp_path, {"engine": "zero3"}, "engine.config=zero2")


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_deepspeed_file_is_copied_in_by_name(tmp_path, name):
    config = load_recipe(write(tmp_path, {}), [f"engine.config={name}"])
    assert config.engine.deepspeed == json.loads(shipped("ds_configs", f"{name}.json").read_text())
    assert parse(config.model_dump(mode="json"), "again") == config


def test_deepspeed_file_is_copied_in_by_path(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", {"zero_optimization": {"stage": 1}}, "mine.json")
    recipe = {"engine": {"config": "deep/mine.json"}}  # relative to the recipe
    assert load_recipe(write(tmp_path, recipe)).engine.deepspeed == {"zero_optimization": {"stage": 1}}
    monkeypatch.chdir(tmp_path / "deep")  # or to where we are
    assert load_recipe(write(tmp_path, {}), ["engine.config=mine.json"]).engine.deepspeed == {
        "zero_optimization": {"stage": 1}
    }
    absolute = f"engine.config={tmp_path / 'deep' / 'mine.json'}"
    assert load_recipe(write(tmp_path, {}), [absolute]).engine.deepspeed == {"zero_optimization": {"stage": 1}}


def test_deepspeed_copy_is_kept_until_another_file_is_named(tmp_path):
    frozen = load_recipe(write(tmp_path, {"engine": {"config": "zero2"}})).model_dump(mode="json")
    frozen["engine"]["deepspeed"]["mine"] = 1
    assert load_recipe(write(tmp_path, frozen)).engine.deepspeed["mine"] == 1
    assert "mine" not in load_recipe(write(tmp_path, frozen), ["engine.config=zero2"]).engine.deepspeed
    assert load_recipe(write(tmp_path, {"engine": {"kind": "local"}})).engine.deepspeed is None


def test_unknown_deepspeed_file_lists_the_known_ones(tmp_path):
    message = error_of(tmp_path, {}, "engine.config=zero9")
    assert "engine.config: 'zero9'" in message and "zero0, zero2, zero3, zero3_offload" in message


@pytest.mark.parametrize("content", ["[1, 2]", "{"])
def test_deepspeed_file_that_is_no_object_is_named(tmp_path, content):
    write(tmp_path, content, "mine.json")
    assert "mine.json" in error_of(tmp_path, {}, "engine.config=mine.json")


def test_mutable_fields_are_these():
    assert {path for path in leaves(RunConfig(objective=SarConfig())) if is_mutable(path)} == LIVE
    assert not is_mutable("stages") and not is_mutable("engine.deepspeed.zero_optimization.stage")


def test_fingerprint_changes_with_every_frozen_field_and_with_no_live_one():
    tries = [True, False, 3, 7, 0.25, "truncated", "linear", "local", "online", "float32", [0.5, 0.75], ["basis"]]
    tries += [16, "sar", "all", "sampled", "zero3", "skip", "free", "adam", "off", "auto", "tvd", "documents", "always"]
    tries += ["nll", "messages", "prune", "frequency", "vllm", [{"source": "a.jsonl"}]]
    tries += [[{"name": "b", "tokens": 3}], {"a": {"b": 1}}]
    others = [
        {"compress": {"budget": 0.3}},
        {"objective": {"kind": "sar"}},
        {"objective": {"kind": "online"}},
    ]  # which some fields need
    configs = [RunConfig(), *(parse(other, "") for other in others)]
    for path in leaves(configs[0]):
        for config, value in itertools.product(configs, tries):
            try:
                changed = parse(apply_overrides(config.model_dump(mode="json"), [f"{path}={json.dumps(value)}"]), "")
            except UserError:
                continue
            if leaves(changed) != leaves(config):
                break
        else:
            raise AssertionError(path)
            continue
        section, *_ = path.split(".")
        moved = {name for name in RunConfig.model_fields if changed.fingerprint(name) != config.fingerprint(name)}
        assert moved == (set() if path in LIVE else {section}), path
        assert (changed.fingerprint() == config.fingerprint()) == (path in LIVE), path


def test_fingerprint_is_a_function_of_the_values(tmp_path):
    left = load_recipe(write(tmp_path, {"seed": 1, "optim": {"lr": 0.5, "eps": 1e-8}}))
    right = load_recipe(write(tmp_path, {"optim": {"eps": 1e-8, "lr": 5e-1}, "seed": 1.0}))
    assert left.fingerprint() == right.fingerprint()
    assert left.fingerprint("model", "data") == right.fingerprint("data", "model") != left.fingerprint("model")


def test_models_refuse_assignment():
    config = RunConfig()
    for section, name in ((config, "seed"), (config.optim, "lr"), (config.stages[0], "tokens"), (config.log, "wandb")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)
    assert config == RunConfig()


STAGES = [
    {"name": "a", "tokens": 1000},
    {"name": "b", "steps": 7, "lr": 0.25, "objective": {"alpha": [0.9, 0.5]}},
    {"name": "c", "epochs": 1.5, "optim": {"batch_tokens": 64, "schedule": "linear"}, "config": "zero2"},
]
SMALL_DATA = {"sequence_length": 16, "tokens": 1600}


def test_a_stage_lays_its_own_settings_over_the_runs(tmp_path):
    config = load_recipe(write(tmp_path, {"stages": STAGES, "data": SMALL_DATA, "optim": {"batch_tokens": 32}}))
    a, b, c = (config.at(stage) for stage in config.stages)
    assert a.optim == config.optim and a.objective == config.objective and a.engine == config.engine
    assert b.optim == config.optim.model_copy(update={"lr": 0.25}) and b.objective.alpha == (0.9, 0.5)
    assert b.objective.temperature == config.objective.temperature
    assert (c.optim.batch_tokens, c.optim.schedule, c.optim.lr) == (64, "linear", config.optim.lr)
    assert c.engine.deepspeed == json.loads(shipped("ds_configs", "zero2.json").read_text()) != a.engine.deepspeed
    assert (a.windows_per_step, c.windows_per_step) == (2, 4)
    # 1000 tokens of 32; 7; one and a half times 100 windows, or 57, of 4 each
    assert [config.steps_of(stage) for stage in config.stages] == [32, 7, 38]
    assert [config.steps_of(stage, 57) for stage in config.stages] == [32, 7, 22]
    again = load_recipe(write(tmp_path, config.model_dump(mode="json")))
    assert again == config and again.fingerprint() == config.fingerprint()


@pytest.mark.parametrize(
    "stage, words",
    [
        ({"steps": 3, "tokens": 5}, "give one of tokens, steps and epochs, not tokens and steps"),
        (
            {"steps": 3, "objective": {"alhpa": 0.5}},
            "stages.0.objective.alhpa: extra inputs are not permitted; did you mean 'alpha'",
        ),
        ({"steps": 3, "objective": {"alpha": 3}}, "stages.0.objective.alpha"),
        ({"steps": 3, "optim": {"micro_batch": 2}}, "stages.0.optim.micro_batch is one for all stages"),
        ({"steps": 3, "lr": 1e-3, "optim": {"lr": 1e-3}}, "lr is there twice"),
        ({"steps": 3, "config": "zero9"}, "stages.0.config: 'zero9' is neither a file nor one of"),
        ({"epochs": 0}, "stages.0.epochs"),
    ],
)
def test_wrong_stages_are_named(tmp_path, stage, words):
    message = error_of(tmp_path, {"stages": [{"name": "a", **stage}]})
    assert words.lower() in message.lower(), message


@pytest.mark.parametrize(
    "name", [".", "..", ".hidden", "best.json", "a.tmp-0123456789ab", "x" * 201, "é" * 101, "a/b", ""]
)
def test_a_stage_is_never_a_folder_where_nobody_looks(tmp_path, name):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"stages": [{"name": name, "steps": 1}], "engine": {"kind": "local"}}))
    with pytest.raises(UserError, match=r"recipe\.json: stages\.0\.name: "):
        load_recipe(path)


@pytest.mark.parametrize("names", [("all", "All"), ("caf\u00e9", "cafe\u0301"), ("STRASSE", "straße"), ("a", "a")])
def test_stages_do_not_share_a_folder_on_any_file_system(tmp_path, names):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"stages": [{"name": n, "steps": 1} for n in names], "engine": {"kind": "local"}}))
    with pytest.raises(UserError, match="checkpoints need distinct names"):
        load_recipe(path)
