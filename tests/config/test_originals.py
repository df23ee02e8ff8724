"""Configurations of the systems that MegaKD unites become ours: each block of their documents, and each key of them."""

import json
from pathlib import Path

import pytest

from megakd.config.checks import check
from megakd.config.original_keys import FLAT, TABLE, Move, Skip, is_old
from megakd.config.parsing import load_recipe
from megakd.config.run import RunConfig, flatten
from megakd.errors import UserError
from megakd.run import Run
from tests.conftest import for_each

DISTILLATION = """
teacher:
  model_path: null  # the main file's model.name
  use_cached_logits: true
  cache_dir: "${output.temp_dir}/teacher_logits"
  top_k: 64
  batch_size: 4
loss:
  alpha: 0.6
  temperature: 2.0
training:
  num_train_epochs: 3
  learning_rate: 5e-5
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 8
parameter_lr_multipliers:
  - pattern: ".*shared_core.*"
    lr_multiplier: 1.0
  - pattern: ".*embed_tokens.*"
    lr_multiplier: 0.1
"""
STAGES = """
- stage_name: "stage1_experts_only"
  num_epochs: 2
  parameter_lr_multipliers:
    - pattern: ".*shared_core.*"
      lr_multiplier: 1.0
    - pattern: ".*experts.*"
      lr_multiplier: 1.0
    - pattern: ".*"
      lr_multiplier: 0.0
- stage_name: "stage2_full_model"
  num_epochs: 1
  parameter_lr_multipliers:
    - pattern: ".*"
      lr_multiplier: 1.0
"""


def load(folder: Path, text: str, *overrides: str, name: str = "old.yaml") -> RunConfig:
    path = folder / name
    path.write_text(text)
    config = load_recipe(path, overrides)
    check(config, str(path))
    return config


def changed(config: RunConfig) -> dict[str, object]:
    """What differs from the defaults, by dotted key."""
    default = dict(flatten(RunConfig().model_dump(mode="json")))
    now = dict(flatten(config.model_dump(mode="json")))
    return {k: v for k, v in now.items() if v != default.get(k) and not k.startswith(("engine.", "stages"))}


def test_the_default_file_of_distillation(tmp_path, capsys):
    config = load(tmp_path, DISTILLATION)
    assert changed(config) == {
        "logits.batch_size": 4,
        "objective.alpha": 0.6,
        "optim.micro_batch": 2,
        "optim.batch_tokens": 2 * 8 * 2048,
    }
    (stage,) = config.stages
    assert (stage.epochs, [rule.lr_multiplier for rule in stage.lr_multipliers]) == (3, [1.0, 0.1])
    said = capsys.readouterr().err
    for line in (
        "loss.alpha  →  objective.alpha = 0.6",
        "training.learning_rate  →  optim.lr = 5e-05",
        "× engine.ranks × data.sequence_length = 2 × 8 × 1 × 2048  →  optim.batch_tokens = 32768",
        "teacher.cache_dir  –  skipped: teacher logits are in RUN/data/logits",
    ):
        assert " ".join(line.split()) in " ".join(said.split()), said


# blocks of the documents, in their words, and what they become
BLOCKS = {
    "training:\n  warmup_steps: 100\n  gradient_accumulation_steps: 32\n  per_device_train_batch_size: 1": {
        "optim.batch_tokens": 32 * 2048
    },
    "training:\n  bf16: true\n  fp16: false": {},
    "training:\n  bf16: false\n  fp16: true": {"model.dtype": "float16"},
    "training:\n  bf16: false": {"model.dtype": "float32"},
    "teacher:\n  top_k: 32": {"logits.top_k": 32},
    "distillation:\n  dataset:\n    name: some/set\n    config: part-1\n    streaming: no\n    max_samples: 100": {
        "data.source": "some/set",
        "data.subset": "part-1",
        "data.streaming": False,
        "data.tokens": 100 * 2048,
    },
    "dataset:\n  max_samples: null": {},
    "loss:\n  temperature: 3.0": {"objective.temperature": 3.0},
    "loss:\n  temperature: 6.0": {"objective.temperature": 6.0, "logits.temperatures": [1.0, 6.0]},
    "model:\n  name: org/teacher": {"model.teacher": "org/teacher"},
    "compression:\n  rank: 32": {"compress.rank": 32},
    "compression:\n  num_steps: 500\n  lr: 1e-3": {
        "compress.steps": 500,
        "compress.lr": 1e-3,
        "compress.solver": "adam",
    },
    "evaluation:\n  tasks: [piqa, hellaswag]": {"eval.tasks": ["piqa", "hellaswag"]},
    "training:\n  gradient_checkpointing: true\n  dataloader_num_workers: 4": {"stream.workers": 4},
    "training:\n  report_to: [wandb]": {"log.wandb": "online", "log.tensorboard": False},
    "training:\n  lr_scheduler_type: linear\n  adam_beta2: 0.98\n  max_steps: 50": {
        "optim.schedule": "linear",
        "optim.betas": [0.9, 0.98],
    },
}


@for_each("text, expected", BLOCKS.items())
def test_each_block_of_the_documents(text: str, expected: dict[str, object], tmp_path: Path):
    config = load(tmp_path, text)
    found = changed(config)
    found.pop("optim.micro_batch", None)
    assert found == expected, text


def test_a_live_teacher_gives_the_same_loss(tmp_path):
    objective = load(tmp_path, "teacher: {use_cached_logits: false}\nloss: {temperature: 3}").objective
    assert (objective.kind, objective.kl, objective.feature, objective.layers) == ("online", 1.0, 0.0, 0.0)


def test_stages_of_the_documents(tmp_path, capsys):
    text = "training: {num_train_epochs: 3}\nstages:" + STAGES.replace("\n", "\n  ")
    first, second = load(tmp_path, text).stages
    assert (first.name, first.epochs, second.name, second.epochs) == ("stage1_experts_only", 2, "stage2_full_model", 1)
    assert [rule.pattern for rule in first.lr_multipliers] == [".*shared_core.*", ".*experts.*", ".*"]
    assert "training.num_train_epochs  –  skipped: every stage has lengths of its own" in capsys.readouterr().err
    mixed = "stages: [{stage_name: stage one, learning_rate: 1e-4, loss: {alpha: 0.9}}, {name: two, steps: 5}]"
    one, two = load(tmp_path, mixed + "\ntraining: {num_train_epochs: 2}\nparameter_lr_multipliers: "
                    '[{pattern: ".*norm.*", lr_multiplier: 0}]').stages  # fmt: skip
    assert (one.name, one.lr, one.epochs, one.objective) == ("stage-one", 1e-4, 2, {"alpha": 0.9})
    assert (two.steps, two.epochs, two.lr_multipliers[0].pattern) == (5, None, ".*norm.*")


def test_every_key_is_answered_and_gives_a_field_that_exists(tmp_path):
    fields = dict(flatten(RunConfig().model_dump(mode="json"))) | {"model.student": None}
    for key, rule in TABLE.items():
        assert is_old(key) and is_old(f"distillation.{key}")
        if isinstance(rule, Move):
            assert rule.keys in fields, key
        elif isinstance(rule, Skip):
            assert rule.why and not rule.why.endswith("."), key
        elif not rule.keys.startswith("stages"):
            assert rule.keys in fields, key


WRONG = {
    "training: {learning_rat: 1}": "training.learning_rat: no known key of training; did you mean 'learning_rate'?",
    "training: {fsdp: full_shard}": "training.fsdp=full_shard has no counterpart: ZeRO takes the place of FSDP",
    "training: {lr_scheduler_type: polynomial}": "optim.schedule is one of cosine, linear, constant",
    "training: {bf16: true, fp16: true}": "training.bf16 and training.fp16 are both true",
    "loss: {alpha: 0.5}\nobjective: {alpha: 0.9}": "loss.alpha gives objective.alpha=0.5, and objective.alpha=0.9",
    "loss: {alpha: 0.5}\ndistillation: {loss: {alpha: 0.6}}": "are one key; leave one out",
    "training: {gradient_accumulation_steps: 8 - 32}": "steps: one number is expected, got 8 - 32",
    "loss: {alpha: 0.5 - 0.7}": 'objective.alpha: input should be a valid number, got "0.5 - 0.7"',
    "training: {learning_rate: '${base}'}": "optim.lr=${base}: there is no base",
    "dataset: {name: '???'}": "data.source=???: it has to be given",
    "distillation: {loss: {alpha: 0.5}, bf16: true}": "distillation.bf16: belongs to training: write "
    "distillation.training.bf16",
    "loss: {alpha: 0.5}\nmax_steps: 3": "max_steps: belongs to training: write training.max_steps",
    "distillation: {top_k: 3}": "distillation.top_k: belongs to teacher: write distillation.teacher.top_k",
    "distillation: {objective: {alpha: 1}}": "distillation.objective.alpha: no known key; the sections of distillation",
    "alpha_kd: 0.7\nbatch_size: 4": "alpha_kd, batch_size: keys of a flat file or of flags; use: python tools/compat",
    "student_lr: 1e-4": "use: python tools/compat/train_sar_kd.py",
}


@for_each("text, message", WRONG.items())
def test_what_cannot_be_taken_over_is_refused_by_its_name(text: str, message: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value), caught.value


def test_all_faults_are_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, "training: {foo: 1, fsdp: full_shard, warmup_ratio: 0.1}\nloss: {gamma: 2}")
    assert str(caught.value).count("\n") == 3


def test_overrides_take_old_keys_and_win(tmp_path):
    config = load(tmp_path, DISTILLATION, "training.learning_rate=1e-4", "loss.alpha=0.9", "data.sequence_length=512")
    assert (config.optim.lr, config.objective.alpha, config.optim.batch_tokens) == (1e-4, 0.9, 2 * 8 * 512)
    assert load(tmp_path, DISTILLATION, "objective.alpha=0.2", "stages.0.epochs=1").stages[0].epochs == 1
    ours = json.dumps({"objective": {"alpha": 0.5}, "stages": [{"name": "a", "steps": 3}]})
    config = load(tmp_path, ours, "distillation.dataset.name=org/set", "distillation.dataset.streaming=true",
                  "loss.alpha=0.7", "+training.per_device_train_batch_size=4", name="r.json")  # fmt: skip
    assert (config.data.source, config.objective.alpha, config.optim.micro_batch) == ("org/set", 0.7, 4)
    nested = json.dumps({"distillation": {"loss": {"alpha": 0.5}, "teacher": {"top_k": None}}})
    config = load(
        tmp_path, nested, "loss.alpha=0.7", "distillation.teacher.top_k=9", "teacher.batch_size=3", name="r.json"
    )
    assert (config.objective.alpha, config.logits.top_k, config.logits.batch_size) == (0.7, 9, 3)
    with pytest.raises(UserError, match=r"training\.num_train_epochs: every stage has lengths"):
        load(tmp_path, ours, "training.num_train_epochs=1", name="r.json")


def test_a_run_takes_old_names_of_mutable_settings(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"engine": {"kind": "local"}}))
    Run.create(file, [], tmp_path / "run")
    run = Run.open(tmp_path / "run", ["training.dataloader_num_workers=3"])
    assert run.config.stream.workers == 3
    with pytest.raises(UserError, match=r"optim\.lr is frozen; .* training\.learning_rate=1e-4$"):
        Run.open(tmp_path / "run", ["training.learning_rate=1e-4"])


@pytest.mark.parametrize(
    "key, hint",
    [
        ("optim.learning_rate", "did you mean 'optim.lr'?"),
        ("learning_rate", "did you mean 'optim.lr'?"),
        ("optim.top_k", "did you mean 'logits.top_k'?"),
        ("objective.gradient_checkpointing", "did you mean 'engine.activation_checkpointing'?"),
        ("compress.rnak", "did you mean 'rank'?"),
    ],
)
def test_an_unknown_key_is_looked_for_in_other_sections(tmp_path, key, hint):
    with pytest.raises(UserError) as caught:
        load(tmp_path, "{}", f"{key}=1", name="r.json")
    assert hint in str(caught.value)


def test_flat_keys_are_no_sections_of_ours():
    words = {word for text in FLAT.values() for word in text.split()}
    assert not words & RunConfig.model_fields.keys()
