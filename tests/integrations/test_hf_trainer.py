"""Trainer over MegaKD's shards takes LocalEngine's steps, on one process and on two; its folders are the student's."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments

from megakd import api
from megakd.config.train import LrRule, OptimConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch
from megakd.engine.local import LocalEngine
from megakd.engine.optim import build_optimizer
from megakd.errors import UserError
from megakd.integrations.hf_data import Share
from megakd.integrations.hf_trainer import (
    DistillationDataset,
    DistillationTrainer,
    DistillationTrainingArguments,
)
from megakd.models.loading import load_model
from megakd.models.tiny import train_tokenizer
from megakd.objectives.cached import CachedDistillation
from tests.conftest import ROOT

STEPS = 4
RULES = [
    {"pattern": "embed_tokens|layers.0.self_attn", "lr_multiplier": 0.0},
    {"pattern": "wrapper", "lr_multiplier": 0.5},
]
SETTINGS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 1e-3,
    "lr_scheduler_type": "constant", "max_grad_norm": 0.5, "weight_decay": 0.1, "adam_beta2": 0.95, "logging_steps": 1,
    "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "optim": "adamw_torch",
    "distillation_alpha": 0.7, "lr_multipliers": RULES,
}  # fmt: skip


class Recorded(DistillationTrainer):
    """Keeps the batches that it was given."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append(Batch(*inputs.values()))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.fixture
def make(prepared, tmp_path):
    """make(SETTING=…): a trainer over the run's student and data."""

    def trainer(kind: type = Recorded, **changes: object) -> DistillationTrainer:
        args = DistillationTrainingArguments(**{"output_dir": str(tmp_path / "out"), **SETTINGS, **changes})
        data = prepared / "data" / "logits"
        student = load_model(prepared / "student-0", torch.float32)
        return kind(student, args, data / "train", data / "holdout")

    return trainer


def curve(trainer: DistillationTrainer, *names: str) -> torch.Tensor:
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return torch.tensor([[row[name] for name in names or ("loss", "grad_norm", "ce", "kl", "kl_t1")] for row in rows])


def weights(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in student.named_parameters()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[name], expected[name], atol=tolerance, rtol=0) for name in found)


def test_steps_are_those_of_the_local_engine(make, prepared):
    """Losses, terms, norms and weights, with frozen parameters and accumulation over batches of unequal labels."""
    trainer = make()
    begin = weights(trainer.student)
    trainer.train()
    student = load_model(prepared / "student-0", torch.float32)
    objective = CachedDistillation(student, trainer.args.objective_config(), trainer.train_dataset.facts)
    optim = OptimConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = build_optimizer(objective, tuple(LrRule(**rule) for rule in RULES), optim)
    engine = LocalEngine(objective, optimizer, 0.5, "float32", torch.device("cpu"))
    expected, counts = [], set()
    for step in range(STEPS):
        batches = trainer.seen[2 * step : 2 * step + 2]
        labels = [int((batch.labels != IGNORED).sum()) for batch in batches]
        counts |= set(labels)
        report = engine.step(batches, sum(labels), 1.0)
        means = {name: value / sum(labels) for name, value in report.sums.items()}
        expected.append([means["total"], report.grad_norm, means["ce"], means["kl"], means["kl_t1"]])
    assert len(counts) > 1
    assert torch.allclose(curve(trainer), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    found = weights(trainer.student)
    assert same(found, weights(student))
    frozen = [name for name in begin if "embed_tokens" in name or "layers.0.self_attn" in name]
    assert frozen and all(torch.equal(found[name], begin[name]) for name in frozen)
    assert not any(torch.equal(found[name], begin[name]) for name in begin if "wrapper" in name)


def test_the_names_that_users_of_trainer_write(prepared, tmp_path, capfd):
    """model=, lr_multipliers= of the trainer, and the loss under the names of Hugging Face's examples."""
    changes = {"output_dir": str(tmp_path), "max_steps": 1, "lr_multipliers": None}
    args = DistillationTrainingArguments(**{**SETTINGS, **changes})
    student, data = load_model(prepared / "student-0", torch.float32), prepared / "data" / "logits" / "train"
    trainer = DistillationTrainer(model=student, args=args, train_dataset=data, lr_multipliers=RULES)
    assert args.lr_multipliers is None and trainer.args.lr_multipliers == RULES
    trainer.train()
    row = trainer.state.log_history[0]
    assert [row[name] for name in ("total_loss", "ce_loss", "kl_loss")] == [row[name] for name in ("loss", "ce", "kl")]
    printed = capfd.readouterr().err
    lines = [line.split() for line in printed[printed.index("parameter groups") :].splitlines()]
    counts = [
        int(words[-2].replace(",", ""))
        for words in lines
        if words and words[0] in ("embed_tokens|layers.0.self_attn", "wrapper", "(no")
    ]
    assert sum(counts) == sum(p.numel() for p in student.parameters())
    assert ["wrapper", "0.5", "0.0005"] in [words[:3] for words in lines] and "frozen" in printed
    args.lr_multipliers = RULES[:1]
    with pytest.raises(UserError, match="the trainer's and those of args differ"):
        DistillationTrainer(model=student, args=args, train_dataset=data, lr_multipliers=RULES)
    with pytest.raises(UserError, match="give the student once, as model"):
        DistillationTrainer(student, args, data, student=student)


def test_accumulation_makes_no_difference(make):
    one, two = (make(per_device_train_batch_size=8 // n, gradient_accumulation_steps=n) for n in (1, 2))
    for trainer in (one, two):
        trainer.train()
    assert torch.allclose(curve(one), curve(two), atol=1e-5, rtol=1e-5)
    assert same(weights(one.student), weights(two.student))


def test_evaluation_is_a_mean_over_labels(make, prepared):
    """The last batch is smaller than the others, and the one that Trainer's mean would count as much."""
    trainer = make(per_device_eval_batch_size=7)
    found = trainer.evaluate()
    dataset = trainer.eval_dataset
    assert len(dataset) % 7
    with torch.no_grad():
        batch = collate([dataset[i] for i in range(len(dataset))], 32)
        report = trainer.model.objective(batch)
    tokens = int((batch.labels != IGNORED).sum())
    assert found["eval_loss"] == pytest.approx(float(report.total) / tokens, rel=1e-5)
    assert found["eval_kl"] == pytest.approx(float(report.terms["kl"]) / tokens, rel=1e-5)


def test_checkpoints_are_the_students_and_training_resumes(make, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    whole = make(**settings, load_best_model_at_end=True)
    whole.train()
    folder = tmp_path / "out" / f"checkpoint-{STEPS}"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(whole.student)
    assert same(weights(loaded), weights(whole.student), 0)  # the last is the best
    assert not any("objective" in name for name in loaded.state_dict())
    assert (folder / "student.py").exists()  # for those who have no MegaKD
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert torch.allclose(curve(resumed)[2:], curve(whole)[2:], atol=1e-6)
    assert same(weights(resumed.student), weights(whole.student), 1e-6)
    # a kill while the last checkpoint was written: Trainer alone would resume from its pieces
    (folder / "trainer_state.json").unlink()
    (folder / "config.json").write_text("{")
    (tmp_path / "out" / "checkpoint-old").mkdir()
    again = make(**settings)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.student), weights(whole.student), 1e-6)
    with pytest.raises(UserError, match="no checkpoint here to resume from"):
        make(output_dir=str(tmp_path / "empty")).train(resume_from_checkpoint=True)


def test_a_stock_model_is_loaded_under_its_own_names(make, prepared, teacher, tmp_path):
    """Its folders name every expert, its parameters are stacks of them: Trainer's own loading leaves those out."""
    args = DistillationTrainingArguments(
        **{
            **SETTINGS,
            "output_dir": str(tmp_path / "stock"),
            "lr_multipliers": None,
            "max_steps": 1,
            "learning_rate": 0.01,
        }
    )
    data = prepared / "data" / "logits" / "train"
    trainer = DistillationTrainer(load_model(teacher, torch.float32), args, data)
    trainer.train()
    trainer.save_model()
    again = DistillationTrainer(load_model(teacher, torch.float32), args, data)
    assert not same(weights(again.student), weights(trainer.student))
    again._load_from_checkpoint(str(tmp_path / "stock"))
    assert same(weights(again.student), weights(trainer.student), 0)


SCRIPT = """
import json, sys
from transformers import AutoModelForCausalLM
import megakd
from megakd.integrations.hf_trainer import DistillationTrainer, DistillationTrainingArguments

run, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
args = DistillationTrainingArguments(output_dir=out, **settings)
student = AutoModelForCausalLM.from_pretrained(f"{run}/student-0")
trainer = DistillationTrainer(student, args, f"{run}/data/logits/train", f"{run}/data/logits/holdout")
trainer.train()
found = trainer.evaluate()
trainer.save_model()
if trainer.is_world_process_zero():
    with open(f"{out}/found.json", "w") as file:
        json.dump([trainer.state.log_history, found, trainer.args.world_size], file)
trainer.accelerator.end_training()
"""


@pytest.mark.ranks
def test_two_processes_follow_the_curve_of_one(make, prepared, tmp_path):
    one = make()
    one.train()
    evaluated = one.evaluate()
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = {**SETTINGS, "gradient_accumulation_steps": 1}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += [str(tmp_path / "script.py"), str(prepared), str(tmp_path / "two"), json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    history, found, world = json.loads((tmp_path / "two" / "found.json").read_text())
    assert world == 2
    names = ("loss", "grad_norm", "ce", "kl", "kl_t1")
    two = torch.tensor([[row[name] for name in names] for row in history if "loss" in row])
    assert torch.allclose(two, curve(one), atol=1e-5, rtol=1e-5)
    for name in ("eval_loss", "eval_ce", "eval_kl"):
        assert found[name] == pytest.approx(evaluated[name], abs=1e-5)
    assert same(weights(load_model(tmp_path / "two", torch.float32)), weights(one.student))


def test_arguments_come_from_a_command_line_too():
    parser = HfArgumentParser(DistillationTrainingArguments)
    words = [
        "--output_dir",
        "x",
        "--use_cpu",
        "--distillation_tail",
        "truncated",
        "--lr_multipliers",
        json.dumps(RULES),
    ]
    (args,) = parser.parse_args_into_dataclasses(words)
    assert args.lr_rules() == tuple(LrRule(**rule) for rule in RULES)
    assert args.objective_config().tail == "truncated"
    assert json.loads(args.to_json_string())["lr_multipliers"] == RULES


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distillation_alpha": 2.0}, "distillation_alpha: Input should be less than or equal to 1, got 2.0"),
        (
            {"distillation_tail": "all"},
            "distillation_tail: Input should be 'ghost', 'truncated', 'sampled' or 'hybrid'",
        ),
        ({"distillation_divergence": "jsd", "distillation_mix": 1.0}, "jsd mixes teacher and student"),
        ({"lr_multipliers": "{"}, "lr_multipliers: '{' is not JSON"),
        ({"lr_multipliers": [{"pattern": "x", "lr": 1.0}]}, "lr_multipliers.0.lr_multiplier: Field required"),
        ({"lr_multipliers": [{"pattern": "nowhere", "lr_multiplier": 1.0}]}, "'nowhere' has no effect"),
        ({"distillation_temperature": 3.0}, "the logits carry tails for T = 1, 2, not 3"),
        ({"distillation_tail": "hybrid"}, "hybrid needs draws"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_bad_settings_are_refused_in_a_line(make, changes, message):
    with pytest.raises(UserError) as error:
        make(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_data_that_does_not_fit_is_refused(make, prepared, documents, tmp_path):
    args = DistillationTrainingArguments(**{**SETTINGS, "output_dir": str(tmp_path)})
    student, data = load_model(prepared / "student-0", torch.float32), prepared / "data"
    with pytest.raises(UserError, match="run: megakd generate-logits"):
        DistillationTrainer(student, args, data / "tokens" / "train")
    with pytest.raises(UserError, match="made with a tokenizer of 400 entries"):
        other = train_tokenizer(documents, 300)
        DistillationTrainer(student, args, data / "logits" / "train", processing_class=other)
    with pytest.raises(UserError, match="the embedding has 300 rows"):
        student.resize_token_embeddings(300)
        DistillationTrainer(student, args, data / "logits" / "train")
    with pytest.raises(UserError, match="optimizers: an optimizer that was given skips lr_multipliers"):
        ready = torch.optim.SGD(student.parameters())
        DistillationTrainer(student, args, data / "logits" / "train", optimizers=(ready, None))
    with pytest.raises(UserError, match="args: DistillationTrainingArguments, not TrainingArguments"):
        DistillationTrainer(student, TrainingArguments("x", use_cpu=True), data / "logits" / "train")
    with pytest.raises(UserError, match=r"learning_rate, weight_decay: lr: Input should be greater than 0, got 0\.0"):
        make(learning_rate=0.0).train()
    with pytest.raises(UserError, match="every parameter is frozen"):
        make(lr_multipliers=[{"pattern": "", "lr_multiplier": 0.0}]).train()


def test_a_dataset_goes_to_worker_processes(prepared):
    dataset = DistillationDataset(prepared / "data" / "logits" / "train")
    again = pickle.loads(pickle.dumps(dataset))
    assert len(again) == len(dataset) and again[3].key == dataset[3].key


def test_a_pipeline_in_two_calls(recipe, tmp_path):
    value = json.loads(recipe.read_text())
    run = api.setup_distillation_pipeline(
        value["model"]["teacher"], 3, value["data"]["source"], tmp_path / "run", "stages.0.steps=1",
        "stages.0.tokens=null", "stages.1.steps=1", "stages.1.tokens=null", recipe=recipe,
    )  # fmt: skip
    assert run.config.compress.rank == 3
    folder = api.run_distillation_training(run)
    assert folder == run.path("checkpoints", "all", "step-000002", "weights")
    other = api.setup_distillation_pipeline("teacher", folder, "text.jsonl", tmp_path / "other")
    assert other.config.model.student == str(folder) and other.config.stages[0].epochs == 1


def test_training_that_fails_is_said(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "run_verb", lambda words: None)
    for call in (api.setup_distillation_pipeline, api.run_distillation_training):
        with pytest.raises(UserError, match=f"{call.__name__}: .* With config= call megakd.integrations.pipeline"):
            call(config={}, student_model_path="b")
    monkeypatch.setattr(api.subprocess, "call", lambda words: 2)
    run = api.setup_distillation_pipeline("teacher", 3, "text.jsonl", tmp_path / "run", recipe=recipe)
    with pytest.raises(UserError, match="training ended with exit code 2"):
        api.run_distillation_training(run)


def test_no_file_of_megakd_imports_the_leaves():
    for path in sorted(Path(ROOT, "megakd").rglob("*.py")):
        leaf = path.name == "hf_trainer.py" or path.parent.name == "integrations"
        assert leaf or "hf_trainer" not in path.read_text(), path


@pytest.mark.parametrize("world", [1, 3, 5])
def test_ranks_share_the_evaluation_without_counting_twice(prepared, world):
    dataset = DistillationDataset(prepared / "data" / "logits" / "holdout")
    shares = [Share(dataset, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    samples = [sample for share in shares for sample in share]
    keys = [sample.key for sample in samples if sample.key != "blank"]
    assert len(samples) % world == 0 and sorted(keys) == sorted(dataset[i].key for i in range(len(dataset)))


def test_examples_of_the_document_run(prepared, recipe, tmp_path, monkeypatch):
    """The trainer's over data made here; the pipeline's up to the run, for its teacher is a download."""
    text = (ROOT / "docs" / "hugging-face.md").read_text()
    trainer, _, pipeline, _ = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/qwen3").symlink_to(prepared)
    done: dict = {}
    exec(trainer.replace("max_steps=20", "max_steps=10, use_cpu=True"), done)
    rows = done["trainer"].state.log_history
    assert {"loss", "ce", "kl", "kl_t1"} <= rows[0].keys() and "eval_loss" in rows[-2]
    loaded = AutoModelForCausalLM.from_pretrained("runs/trainer/final")
    assert same(weights(loaded), weights(done["student"]), 0)
    monkeypatch.setattr(api, "run_distillation_training", lambda run: run.folder)
    exec(pipeline.replace("runs/qwen3", "runs/other"), done)
    assert done["run"].config.compress.rank == 64 and done["run"].config.data.tokens == 2_000_000_000


def test_a_generation_config_that_cannot_be_saved_is_refused_before_training(make, prepared, tmp_path):
    """Many hub models have one; transformers refuses it at the first save, after hours."""
    student = load_model(prepared / "student-0", torch.float32)
    student.generation_config.temperature = 0.6
    args = DistillationTrainingArguments(**{**SETTINGS, "output_dir": str(tmp_path)})
    with pytest.raises(UserError, match=r"cannot be saved.*do_sample = True"):
        DistillationTrainer(student, args, prepared / "data" / "logits" / "train")
    student.generation_config.do_sample = True
    DistillationTrainer(student, args, prepared / "data" / "logits" / "train")
