"""Two calls from Python whose results go into Hugging Face's Trainer: the pieces of a training, and the training.

The work is a run's: its folder is made, or gone on with. `megakd.api` has the calls that stay within a run.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megakd.config.checks import notices
from megakd.config.objective import CachedConfig
from megakd.config.parsing import in_our_keys, load_recipe, parse, read_recipe
from megakd.config.run import RunConfig, flatten
from megakd.config.train import StageConfig
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import UserError
from megakd.integrations.hf_trainer import DistillationDataset, DistillationTrainer, DistillationTrainingArguments
from megakd.models.loading import load_model
from megakd.names import as_text, expand
from megakd.run import Run
from megakd.system.files import write_json
from megakd.system.logging import say

Pieces = tuple[Any, DistillationDataset, DistillationDataset | None, Any]

# What a configuration says and Trainer does: of these sections all, and these fields.
SECTIONS = ("name", "seed", "model", "data", "compress", "logits", "objective", "optim", "stages")
FIELDS = ("log.every_steps", "eval.every_steps", "eval.batch_size", "checkpoint.every_steps", "checkpoint.keep")


def setup_distillation_pipeline(
    config: Any,
    teacher_model_path: str | Path | None = None,
    student_model_path: str | Path | None = None,
    force_regenerate_logits: bool = False,
    folder: str | Path | None = None,
) -> Pieces:
    """(student, training set, validation set, tokenizer), made in a run's folder; called again it goes on there.

    config: a dict, an OmegaConf object, a recipe's path (JSON, YAML) or a RunConfig; in the keys of MegaKD or of the
    systems it unites. folder: of the run; default: training.output_dir or output.dir of the config. The
    validation set is None where the capture draws tokens, for it has no draws.
    """
    tree = _tree(config)
    folder = expand(folder or _output_dir(tree))
    raw = _ours(tree)
    model = {"teacher": teacher_model_path, "student": student_model_path}
    raw["model"] = {**raw.get("model", {}), **{name: as_text(path) for name, path in model.items() if path is not None}}
    run = _run(raw, folder)
    if run.config.objective.live:
        raise UserError("config: objective.kind has a live teacher, which Trainer has not; use: megakd run RUN")
    logits = run.path("data", "logits")
    capture = ["generate-logits", *(["--force"] if force_regenerate_logits else [])]
    for verb in [["tokenize"], *([] if run.config.model.student else [["compress"]]), capture]:
        if code := subprocess.call([sys.executable, "-m", "megakd", *verb, str(run.folder)]):
            raise UserError(f"{run.folder}: {verb[0]} ended with exit code {code}; call this again to go on")
    student = load_model(run.student_folder, torch.float32)
    holdout = DistillationDataset(logits / "holdout") if run.config.logits.profile == "topk" else None
    return student, DistillationDataset(logits / "train"), holdout, load_tokenizer(run.student_folder)


def run_distillation_training(
    config: Any,
    student_model: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    tokenizer: Any = None,
    output_dir: str | Path | None = None,
) -> DistillationTrainer:
    """The student trained by Trainer through all stages of the config; the trainer of the last one.

    output_dir: of Trainer's checkpoints; default: `trainer` in the config's output_dir. AdamW begins anew in a stage.
    """
    tree = _tree(config)
    folder = expand(output_dir) if output_dir else expand(_output_dir(tree)) / "trainer"
    settings = parse(_ours(tree), "config")
    for line in (*notices(settings, len(train_dataset)), *_ignored(settings)):
        say(line)
    measured, trainer = settings.eval.every_steps if eval_dataset is not None else 0, None
    for stage in settings.stages:
        args = _arguments(settings.at(stage), stage, folder / stage.name, len(train_dataset), measured)
        trainer = DistillationTrainer(student_model, args, train_dataset, eval_dataset, tokenizer)
        trainer.train()
    assert trainer is not None
    return trainer


def _tree(config: Any) -> dict[str, Any]:
    """A configuration as a dict of our keys or of older ones."""
    if isinstance(config, RunConfig):
        return config.model_dump(mode="json")
    if isinstance(config, str | Path):
        return read_recipe(expand(config), [])[0]
    if type(config).__module__.partition(".")[0] == "omegaconf" and "omegaconf" in sys.modules:
        config = importlib.import_module("omegaconf").OmegaConf.to_container(config, resolve=True)
    if not isinstance(config, dict):
        raise UserError(f"config: a dict, an OmegaConf object, a path or a RunConfig, not {type(config).__name__}")
    if "defaults" in config:
        raise UserError("config: OmegaConf.load does not follow its defaults; give the path: config='conf/config.yaml'")
    return json.loads(json.dumps(config, default=str))


def _ours(tree: dict[str, Any]) -> dict[str, Any]:
    return in_our_keys(tree, [], "config", True)[0]


def _output_dir(tree: dict[str, Any]) -> str:
    values, names = dict(flatten(tree)), ("training.output_dir", "distillation.training.output_dir", "output.dir")
    found = next((values[name] for name in (*names, "output_dir") if values.get(name)), None)
    if not found:
        raise UserError(
            "config: names no training.output_dir or output.dir; give folder= (run_distillation_training: output_dir=)"
        )
    return str(found)


def _run(raw: dict[str, Any], folder: Path) -> Run:
    """The run of a configuration in a folder: a new one, or the existing one of the same configuration."""
    with TemporaryDirectory() as place:
        recipe = Path(place, "config-from-python.json")
        write_json(recipe, raw)
        if not (folder / "config.json").exists():
            return Run.create(recipe, [], folder)
        run, wanted = Run.open(folder), load_recipe(recipe)
    if run.config.fingerprint() != wanted.fingerprint():
        raise UserError(f"{folder}: a run of another configuration; give another folder=")
    return run


def _ignored(config: RunConfig) -> list[str]:
    """One line with the fields that were set and have no effect in Trainer, or none."""
    changed = dict(flatten(config.model_dump(mode="json", exclude_defaults=True)))
    if config.engine.kind == "local":
        changed.pop("engine.kind", None)
    ignored = [key for key in changed if key not in FIELDS and key.partition(".")[0] not in SECTIONS]
    line = f"config: no effect in Trainer, which has settings of its own: {', '.join(ignored)}; megakd train obeys them"
    return [line] if ignored else []


def _arguments(
    config: RunConfig, stage: StageConfig, folder: Path, samples: int, eval_steps: int
) -> DistillationTrainingArguments:
    """A stage as Trainer's arguments; UserError for a loss that they cannot say. eval_steps: 0 measures nothing."""
    optim, objective = config.optim, config.objective
    if not isinstance(objective, CachedConfig):
        raise UserError("config: Trainer's loss reads cached logits: set objective.kind=cached")
    ends = optim.final_lr_ratio if optim.schedule == "cosine" else {"linear": 0.0, "constant": 1.0}[optim.schedule]
    if optim.schedule == "linear" and optim.final_lr_ratio:
        say("optim.final_lr_ratio: Trainer's linear schedule ends at 0")
    kind = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}[optim.schedule]
    steps = config.steps_of(stage, samples)
    names = ("alpha", "temperature", "tail", "divergence", "mix")
    args = DistillationTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        max_grad_norm=optim.clip_norm,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs={"min_lr_rate": ends} if optim.schedule == "cosine" else {},
        warmup_steps=min(optim.warmup_steps, steps // 2),
        per_device_train_batch_size=optim.micro_batch,
        bf16=config.model.dtype == "bfloat16" and torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=config.log.every_steps,
        save_steps=config.checkpoint.every_steps,
        save_total_limit=config.checkpoint.keep or None,
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps or None,
        per_device_eval_batch_size=config.eval.batch_size,
        seed=config.seed,
        report_to="none",
        lr_multipliers=[rule.model_dump() for rule in stage.lr_multipliers],
        **{f"distillation_{name}": getattr(objective, name) for name in names},
    )
    if config.stream.curriculum != "off":
        raise UserError("config: stream.curriculum: Trainer shuffles by a sampler of its own; use: megakd train RUN")
    at_once = optim.micro_batch * args.world_size
    if config.windows_per_step % at_once or optim.batch_tokens % config.data.sequence_length:
        raise UserError(
            f"config: optim.batch_tokens={optim.batch_tokens} is no whole number of micro-batches of "
            f"{optim.micro_batch} sequences of {config.data.sequence_length} tokens on {args.world_size} ranks"
        )
    args.gradient_accumulation_steps = config.windows_per_step // at_once
    if config.model.dtype != "float32" and not args.bf16:
        say(f"model.dtype={config.model.dtype}: Trainer computes in float32 here")
    if args.objective_config() != objective:
        raise UserError("config: objective has fields that Trainer's arguments do not; use: megakd train RUN")
    return args
