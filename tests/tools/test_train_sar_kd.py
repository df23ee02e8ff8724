import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megakd.config import load_recipe
from megakd.data.shards import ShardSet
from megakd.files import read_json
from megakd.models.hub import load_model
from megakd.run import Run
from tests.conftest import ROOT, metrics
from tests.objectives.sar import dense_student
from tests.tools.examples import refused, tool

module = tool("train_sar_kd")
QUIET = ("log.wandb=disabled", "log.tensorboard=false")


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("student")
    dense_student().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def flags(teacher, student, recipe, tmp_path) -> list[str]:
    """A run of 4 steps of 8 windows of 32 tokens."""
    text = recipe.parent / "text.jsonl"
    return shlex.split(
        f"{' '.join(QUIET)} --teacher_model {teacher} --student_model {student} --dataset_name {text} "
        f"--output_dir {tmp_path / 'out'} --max_length 32 --batch_size 4 --gradient_accumulation_steps 2 --max_steps 4 "
        "--learning_rate 1e-2 --router_learning_rate 2e-3 --model_dtype float32 --save_steps 2 --eval_tokens 500 "
        "--logging_steps 1"
    )


def train(argv: list[str], *more: str) -> Run:
    module.main([*argv, *more])
    return Run.open(Path(argv[argv.index("--output_dir") + 1]))


def test_flags_train_export_and_resume(flags, teacher, tmp_path, capsys, monkeypatch):
    run = train(flags)
    printed = capsys.readouterr().out
    assert f"recipe: {run.folder / 'recipe.json'}" in printed
    assert f"megakd tokenize {run.folder} && megakd train {run.folder} && megakd export {run.folder}" in printed
    rows = metrics(run.folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] < rows[0]["loss"]
    assert {row["lr"] for row in rows} == {1e-2}  # constant without --use_scheduler
    assert load_model(run.folder / "export", torch.float32).config.model_type == "llama"
    update, before = (
        load_file(run.folder / "export" / "router_update" / "router_update.safetensors"),
        load_model(teacher, torch.float32),
    )
    for name, tensor in update.items():
        assert (
            0 < (tensor - before.state_dict()[name]).abs().max() <= 4 * 2e-3 * 1.01
        )  # Adam's steps at the routers' rate

    # the same command again, from elsewhere: after the checkpoint of step 2, then with nothing left to do
    (run.folder / "checkpoints" / "sar" / "step-000004").rename(tmp_path / "away")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert metrics(train(flags).folder) == rows
        again = load_file(run.folder / "export" / "router_update" / "router_update.safetensors")
        assert all(torch.equal(again[name], tensor) for name, tensor in update.items())
    resumed = [event["resumed"] for event in run.events("train")]
    assert [place and Path(place).name for place in resumed] == [None, "step-000002", "step-000004"]
    assert len(run.events("new")) == 1 and load_recipe(run.folder / "recipe.json") == run.config


def test_the_recipe_says_what_the_flags_say(flags, student):
    more = (
        "--alpha_kd 3 --alpha_ce 1 --router_anchor_weight 0.4 --router_entropy_weight 0.04 --load_balance_weight 0.08 "
    )
    more += "--routing top_m --initial_top_k 2 --final_top_k 3 --temperature 1.5 --weight_decay 0.2 --warmup_steps 2 "
    more += (
        "--use_scheduler --gradient_checkpointing --seed 7 --train_tokens 2e3 --dataset_config small --dataset_split a "
    )
    more += "--router_patterns gate$ router --text_field body"
    parser = module.Parser()
    module.arguments(parser)
    config = module.parse(module.recipe(parser.parse_intermixed_args([*flags, *shlex.split(more)])), "flags")
    sar, optim, data = config.sar, config.optim, config.data
    assert (config.objective.kind, config.objective.alpha, config.objective.temperature) == ("sar", 0.75, 1.5)
    assert (sar.anchor, sar.entropy, sar.balance) == (0.1, 0.01, 0.02)
    assert (sar.routing, sar.initial_top_k, sar.final_top_k) == ("top_m", 2, 3)
    assert sar.router_patterns == ("gate$", "router")
    assert (optim.lr, optim.weight_decay, optim.warmup_steps, optim.schedule) == (1e-2, 0.2, 2, "cosine")
    assert (optim.batch_tokens, optim.micro_batch, config.windows_per_step) == (256, 4, 8)
    assert (data.subset, data.split, data.text_field, data.tokens) == ("small", "a", "body", 2000)
    assert (data.sequence_length, data.holdout_tokens) == (32, 500)
    (stage,) = config.stages
    assert (stage.steps, stage.epochs) == (4, None) and stage.lr_multipliers[0].pattern == "^routers"
    assert stage.lr_multipliers[0].lr_multiplier == pytest.approx(0.2)
    assert (config.engine.kind, config.engine.activation_checkpointing, config.seed) == ("local", True, 7)
    assert (config.checkpoint.every_steps, config.log.every_steps, config.log.wandb) == (2, 1, "disabled")
    assert (config.model.student, config.model.dtype) == (str(student), "float32")


def test_epochs_are_passes_over_the_data_and_routers_may_be_frozen(flags, tmp_path, teacher):
    """As a script of its own, in bfloat16."""
    place = flags.index("--max_steps")
    argv = [*flags[:place], *flags[place + 2 :], "--num_epochs", "0.5", "--train_tokens", "2000", "--model_dtype"]
    argv += ["bfloat16", "--router_learning_rate", "0", "--gradient_checkpointing", "--routing", "all"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train_sar_kd.py"), *argv], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out"
    samples = len(ShardSet(folder / "data" / "tokens" / "train"))
    assert len(metrics(folder)) == -(-samples // 2 // 8) and read_json(folder / "config.json")["data"]["tokens"] == 2000
    facts = read_json(folder / "export" / "router_update" / "router_update.json")
    assert facts["routing"] == "all" and "initial_top_k" not in facts
    assert [router["change"] for router in facts["routers"].values()] == pytest.approx([0.0, 0.0], abs=2**-8)


def test_live_flags_may_change_and_others_are_refused(flags, capsys):
    run = train(flags)
    train(flags, "--save_steps", "1", "--batch_size", "2", "--gradient_accumulation_steps", "4")
    now = Run.open(run.folder).config
    assert (now.checkpoint.every_steps, now.optim.micro_batch, now.windows_per_step) == (1, 2, 8)
    assert load_recipe(run.folder / "recipe.json") == now
    said = refused(module, capsys, *flags, "--learning_rate", "1e-3")
    assert "optim.lr of the run that is there is 0.01, the flags say 0.001; name another --output_dir" in said
    train(flags, *QUIET, "--save_steps", "1", "--batch_size", "2", "--gradient_accumulation_steps", "4")
    assert load_recipe(run.folder / "recipe.json") == now


def test_mistakes_before_anything_was_made_can_be_mended(flags, capsys):
    place = flags.index("--dataset_name") + 1
    wrong = [*flags[:place], "nowhere.jsonl", *flags[place + 1 :]]
    assert "data.source: no file at nowhere.jsonl" in refused(module, capsys, *wrong)
    assert len(metrics(train(flags, "--max_steps", "1").folder)) == 1


@pytest.mark.parametrize(
    "more, said",
    [
        ("--learning_rate fast", "argument --learning_rate: must be a number above 0, got 'fast'"),
        ("--learning_rate 0", "argument --learning_rate: must be a number above 0"),
        ("--temperature nan", "argument --temperature: must be a number above 0"),
        ("--router_learning_rate -1", "argument --router_learning_rate: must be a number from 0 on"),
        ("--max_steps 1.5", "argument --max_steps: must be a whole number from 1 on"),
        ("--train_tokens inf", "argument --train_tokens: must be a whole number from 1 on"),
        ("--alpha_kd 0", "argument --alpha_kd"),
        ("--routing some", "argument --routing: invalid choice: 'some'"),
        ("--model_dtype int8", "argument --model_dtype: invalid choice"),
        ("--max_length 100000", "--max_length: must be between 2 and 65535"),
        ("--nothing 1", "unrecognized arguments: --nothing"),
        ("--seed", "argument --seed: expected one argument"),
        ("log.wandbs=disabled", "flags: unknown key 'log.wandbs'; did you mean 'wandb'?"),
        ("engine.kind=deepspeed", "engine.kind and objective.kind: are local and sar here"),
        ("--student_model ./nowhere", "--student_model ./nowhere: not a model folder"),
        ("--teacher_model ./nowhere", "--teacher_model ./nowhere: not a model folder"),
    ],
)
def test_bad_flags_are_one_line(flags, more, said, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main([*drop(flags, more.split()[0]), *shlex.split(more)])
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert ended.value.code == 2 and not printed.out
    assert line.startswith("train_sar_kd: ") and said in line
    assert not Path(flags[flags.index("--output_dir") + 1]).exists()


def drop(flags: list[str], flag: str) -> list[str]:
    """The flags without one of them and its value."""
    place = flags.index(flag) if flag in flags and flag.startswith("--") else None
    return flags if place is None else [*flags[:place], *flags[place + 2 :]]


def test_a_missing_flag_is_named(flags, capsys):
    said = refused(module, capsys, *drop(flags, "--student_model"))
    assert "the following arguments are required: --student_model; see --help" in said


def test_a_config_of_another_kind_is_not_taken_for_a_run(flags, teacher, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text((teacher / "config.json").read_text())
    assert "holds a config.json that this tool did not make" in refused(module, capsys, *flags)


def test_both_lengths_are_said_to_be_one(flags, capsys):
    parser = module.Parser()
    module.arguments(parser)
    value = module.recipe(parser.parse_intermixed_args([*flags, "--num_epochs", "2"]))
    assert value["stages"][0]["steps"] == 4 and "epochs" not in value["stages"][0]
    assert "--num_epochs has no effect" in capsys.readouterr().err
    assert json.loads(json.dumps(value)) == value


def test_help_has_examples_and_says_what_alpha_is(capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "alpha = alpha_kd / (alpha_kd + alpha_ce)" in text
    assert "python tools/train_sar_kd.py --teacher_model" in text
