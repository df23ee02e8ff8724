import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megakd.config.parsing import load_recipe, parse
from megakd.engine.ds_json import OWNED, deepspeed_config
from megakd.errors import UserError
from megakd.names import shipped

SHIPPED = sorted(path.stem for path in shipped("ds_configs", "").glob("*.json"))
DECIDED = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "scheduler": {"type": "WarmupLR"},
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "fp16": {"enabled": True},
    "expert_parallel": {"enabled": True, "autoep_size": 2},
}


def config(deepspeed: dict[str, Any] | None, **optim: Any) -> Any:
    return parse({"engine": {"kind": "deepspeed", "config": "my.json", "deepspeed": deepspeed}, "optim": optim}, "test")


def test_every_owned_key_has_an_example():
    assert DECIDED.keys() == OWNED.keys()


@pytest.mark.parametrize("key", DECIDED)
def test_what_the_run_decides_is_refused_naming_both_places(key):
    with pytest.raises(UserError) as error:
        deepspeed_config(config({key: DECIDED[key]}), 1, 8)
    message = str(error.value)
    assert "my.json" in message and repr(key) in message
    sections = parse({}, "test").model_dump()
    fields = [word for word in OWNED[key].split() if word != "and"]
    for field in fields:
        assert field in message
        node = sections
        for part in field.split("."):  # what the message sends the reader to exists
            node = node[part]


@pytest.mark.parametrize("key", DECIDED)
def test_auto_is_what_the_run_decides(key):
    plain = deepspeed_config(config({}), 1, 8)
    assert deepspeed_config(config({key: "auto"}), 1, 8) == plain
    assert "auto" not in json.dumps(plain)


@pytest.mark.parametrize(
    "ranks, windows, micro, expected", [(1, 8, 1, 8), (1, 8, 8, 1), (2, 24, 3, 4), (4, 512, 2, 64)]
)
def test_accumulation_makes_the_batch(ranks, windows, micro, expected):
    made = deepspeed_config(config({}, micro_batch=micro), ranks, windows)
    assert made["train_micro_batch_size_per_gpu"] == micro
    assert made["gradient_accumulation_steps"] == expected
    assert made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * ranks == windows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_precision_is_the_models(dtype):
    made = deepspeed_config(parse({"model": {"dtype": dtype}, "engine": {"deepspeed": {}}}, "test"), 1, 8)
    assert made["bf16"] == {"enabled": dtype == "bfloat16"}
    assert made["fp16"] == {"enabled": dtype == "float16"}


def test_clipping_is_the_runs():
    assert deepspeed_config(config({}, clip_norm=0.25), 1, 8)["gradient_clipping"] == 0.25


@pytest.mark.parametrize("deepspeed", [None, {}])
def test_without_a_file_nothing_is_partitioned(deepspeed):
    assert deepspeed_config(config(deepspeed), 1, 8)["zero_optimization"]["stage"] == 0


def test_all_else_is_the_users():
    mine = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5},
        "steps_per_print": 3,
        "wall_clock_breakdown": True,
    }
    before = copy.deepcopy(mine)
    run = config(mine)
    made = deepspeed_config(run, 1, 8)
    assert {key: made[key] for key in mine} == before
    assert mine == before and run.engine.deepspeed == before  # nothing was taken out of the frozen config


def test_a_file_may_leave_the_stage_out():
    made = deepspeed_config(config({"zero_optimization": {"reduce_bucket_size": 5}}), 1, 8)
    assert made["zero_optimization"] == {"stage": 0, "reduce_bucket_size": 5}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_merge(name, tmp_path: Path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"engine": {"kind": "deepspeed", "config": name}, "optim": {"micro_batch": 2}}))
    run = load_recipe(recipe)
    file = json.loads(shipped("ds_configs", f"{name}.json").read_text())
    assert run.engine.deepspeed == file
    made = deepspeed_config(run, 2, 16)
    assert made["gradient_accumulation_steps"] == 4
    assert file.keys().isdisjoint(OWNED) and file.items() <= made.items()
    assert json.loads(json.dumps(made)) == made


def test_a_file_for_each_common_stage_is_shipped():
    stages = {
        json.loads(shipped("ds_configs", f"{name}.json").read_text())["zero_optimization"]["stage"] for name in SHIPPED
    }
    assert {0, 2, 3} <= stages
