"""Distillation by many components, from a flat JSON file: KL, features, attention, layers, contrast; a learned router.

    python tools/compat/train_student_aware.py
    python tools/compat/train_student_aware.py --config launch/student-aware.json
    python tools/compat/train_student_aware.py --config config.json --datasets text.jsonl --batch-size 2 --epochs 1 \\
        --learning-rate 1e-4 --output_dir runs/components log.wandb=disabled objective.gap=1

The keys are those of single-file scripts for student-aware routing, without --config those of
configs/default_config.json next to this file. The run is an ordinary one in checkpoint_dir (or --output_dir), made from
recipe.json there: tokenize, train, export, generate-logits of the held-out text, evaluate. The same command again
resumes, and so do the megakd commands that are printed. The student ends in student/ there, a Hugging Face folder. One
process, one device. What has no key: section.key=value, like log.wandb=disabled.

--resume PATH goes on from a checkpoint, CHECKPOINT_DIR/checkpoints/STAGE/step-N or CHECKPOINT_DIR/checkpoint_epoch_K,
with the keys, flags and data sets that its run was started with. Where that run has later checkpoints, which stay,
another --output_dir is needed.

The loss is the weighted sum of the components alone, without cross entropy (objective.alpha=1). Where student and
teacher have different tokenizers spans of text take the place of positions. The layer-wise component compares the
student's lowest layer first, in the end all (objective.progressive_layers).

The teacher is frozen. A learned router reads the student's hidden states (objective.routing=learned): it estimates how
many of the teacher's experts a token takes, from initial_top_k to final_top_k, at most all; which experts count more
(objective.importance=1); and which positions do (objective.gap=1). It learns at router_lr from what is measured, never
from the student's loss; load_balance_weight pulls its weights of experts to equal ones. A teacher without experts wants
objective.routing=trained objective.importance=0.

use_temperature_curriculum anneals the temperature to min_temperature. --phases trains in three stages, a third of
num_epochs each: the KL alone; then features and attention too; then all components. Each of them has its own warmup
and schedule. Of each data set the first dataset_subset_size documents are taken (null: all of one). data.subset and
data.revision are of the first one.
"""

import argparse
import difflib
import json
import textwrap
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import installed  # noqa: F401
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from resume import find_checkpoint, resume_run, run_of
from run_from_flags import (
    DATASET,
    HOLDOUT,
    STUDENT_MODEL,
    TEACHER_MODEL,
    Parser,
    count,
    data_place,
    one_line,
    open_run,
    positive,
    say_unused,
    settled,
    subset_of,
    to_the_end,
    whole,
)

from megakd.config.data import DataConfig
from megakd.config.objective import OnlineConfig
from megakd.config.parsing import parse
from megakd.config.phases import in_phases
from megakd.config.run import RunConfig
from megakd.data.documents import SUFFIXES, find_files, iter_documents
from megakd.errors import UserError
from megakd.models.hub import empty_model
from megakd.models.routers import describe, find_routers
from megakd.names import expand, resolve
from megakd.run import Run
from megakd.system.files import digest, publishing, read_json, write_json
from megakd.system.logging import say
from megakd.system.terminal import accept_any_encoding
from megakd.tracking import check_tracking

HERE, DEFAULT = Path(__file__).parent, Path("configs") / "default_config.json"
FLAGS, SEED = "flags.json", 42  # FLAGS: in the run's folder, what it was started with
COMMENTS = ("_comment", "comment")


class Settings(BaseModel):
    """The keys of the file, each with its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    teacher_model: str = TEACHER_MODEL
    student_model: str = STUDENT_MODEL
    num_experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    batch_size: int = Field(4, ge=1)
    gradient_accumulation_steps: int = Field(8, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    router_lr: float = Field(1e-4, gt=0)
    num_epochs: float = Field(3, gt=0)
    warmup_steps: int = Field(500, ge=0)
    eval_steps: int = Field(500, ge=1)
    save_epochs: int = Field(1, ge=0)
    max_length: int = Field(512, ge=2, le=65535)
    alpha_kd: float = Field(0.7, ge=0)
    alpha_feature: float = Field(0.1, ge=0)
    alpha_attention: float = Field(0.1, ge=0)
    alpha_layerwise: float = Field(0.05, ge=0)
    alpha_contrastive: float = Field(0.05, ge=0)
    temperature: float = Field(4.0, gt=0)
    min_temperature: float = Field(1.0, gt=0)
    use_temperature_curriculum: bool = False
    contrastive_temp: float = Field(0.07, gt=0)
    initial_top_k: int = Field(1, ge=1)
    final_top_k: int = Field(4, ge=1)
    load_balance_weight: float = Field(0.01, ge=0)
    noise_std: float = 0.1
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    use_amp: bool = True
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    loss_chunk_size: int | None = 128
    attention_layers: int | None = 4
    use_gradient_checkpointing: bool = False
    dataset_subset_size: int | None = Field(50000, ge=1)
    num_workers: int = Field(2, ge=0)
    use_dynamic_batching: bool = False
    checkpoint_dir: str = "./checkpoints"
    log_dir: str = "./logs"
    cache_dir: str = "./cache"
    memory_threshold: float = 0.85
    use_wandb: bool = False
    project_name: str = "megakd"
    use_ema: bool = False
    ema_decay: float | None = None
    use_curriculum: bool = False
    label_smoothing: float = 0.0
    kd_top_k: int | None = None
    use_early_stopping: bool = False
    early_stopping_patience: int | None = None
    early_stopping_min_delta: float | None = None
    teacher_max_length: int | None = None
    use_adaptive_loss_balancing: bool = False
    log_component_losses: bool = True
    log_gradient_norms: bool = True


# why keys have no effect, and the value of each that asks for what is done anyway (...: none does)
UNUSED: dict[str, dict[str, Any]] = {
    "the router is fitted to what is measured, which takes no exploration": {"noise_std": 0},
    "logits exist a chunk at a time in any case": {"loss_chunk_size": ...},
    "the attention of every layer of the student is compared": {"attention_layers": ...},
    "windows are packed, and the teacher reads what the student reads": {
        "use_dynamic_batching": False,
        "teacher_max_length": None,
    },
    "the run's folder holds its logs and data": {"log_dir": ..., "cache_dir": ...},
    "what a step holds is planned, see megakd plan": {"memory_threshold": ...},
    "all of it is logged in any case": {"log_component_losses": True, "log_gradient_norms": True},
    "not done": {
        "use_ema": False,
        "ema_decay": None,
        "use_curriculum": False,
        "label_smoothing": 0,
        "kd_top_k": None,
        "use_early_stopping": False,
        "early_stopping_patience": None,
        "early_stopping_min_delta": None,
        "use_adaptive_loss_balancing": False,
    },
}
TEMPERATURE_END = "min_temperature"  # has no effect without a curriculum


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    with one_line("train_student_aware"):
        args = build_parser().read(argv, greedy="datasets")
        checkpoint = find_checkpoint(args.resume) if args.resume else None
        if checkpoint:
            recall(args, run_of(checkpoint))
        settings = read_settings(args)
        folder = args.output_dir or expand(settings.checkpoint_dir)
        names, seed = args.datasets or [DATASET], SEED if args.seed is None else args.seed
        value = recipe(settings, folder, names[0], seed, args.phases)
        value = settled(value, args.overrides, "online", str(args.config))
        config = parse(value, str(args.config))
        names = [config.data.source, *map(data_place, names[1:])]
        home = Path(Run.open(run_of(checkpoint)).config.data.source).parent if checkpoint else folder
        file = documents_file(home, names, config.data, settings.dataset_subset_size)
        if file:
            value["data"] |= {"source": str(file), "subset": None, "split": "train", "text_field": "text"}
            value["data"].pop("revision", None)
        warn(settings, config)
        say_of_first(names, args.overrides)
        run = resume_run(checkpoint, folder, value) if checkpoint else open_run(folder, value)
        flags = {"datasets": names, "seed": seed, "phases": args.phases, "overrides": args.overrides}
        write_json(folder / FLAGS, {"keys": settings.model_dump(exclude_unset=True), **flags})
        if file and not file.exists():
            check_tracking(config.log)  # else found after minutes of reading
            take_documents(names, config.data, settings.dataset_subset_size, file)
        to_the_end(run, evaluate=not args.skip_eval)


def build_parser() -> Parser:
    parser = Parser(__doc__, epilog=explained())
    add = parser.add_argument
    add("--config", type=expand, metavar="FILE", help=f"JSON with the keys below (default: {DEFAULT})")
    add("--batch-size", type=count, metavar="N", help="instead of batch_size")
    add("--epochs", type=positive, metavar="N", help="instead of num_epochs")
    add("--learning-rate", type=positive, metavar="LR", help="instead of learning_rate")
    sources = f"hub ids, or files, folders or patterns of parquet, jsonl or txt (default: {DATASET})"
    add("--datasets", nargs="+", metavar="NAME", help=sources)
    add("--use-wandb", action="store_true", default=None, help="instead of use_wandb")
    add("--project-name", metavar="NAME", help="instead of project_name")
    add("--resume", metavar="PATH", help="the checkpoint to go on from (default: the newest of the run)")
    add("--phases", action="store_true", help="components come one after the other, in three stages")
    add("--skip-eval", action="store_true", help="end with the export")
    add("--seed", type=whole, metavar="N", help=f"default: {SEED}")
    add("--output_dir", type=expand, metavar="DIR", help="the run's folder, instead of checkpoint_dir")
    add("overrides", nargs="*", metavar="section.key=value", help="of the recipe, for what has no key")
    return parser


def explained() -> str:
    """The keys with their defaults, and which have no effect, for --help."""

    def lines(text: str, indent: str) -> str:
        return textwrap.fill(text, 118, initial_indent="  ", subsequent_indent=indent, break_on_hyphens=False)

    keys = ", ".join(f"{name} {json.dumps(value)}" for name, value in Settings().model_dump().items())
    unused = [lines(f"{why}: {', '.join(names)}", "      ") for why, names in UNUSED.items()]
    return "\n".join([
        "keys and their defaults (those that begin with comment or _comment are notes):",
        lines(keys, "  "),
        "\nkeys without effect; what asks for something else is named in a line:",
        *unused,
        lines("facts of the teacher, which its config.json says: num_experts, top_k", "      "),
        lines(f"only with use_temperature_curriculum: {TEMPERATURE_END}", "      "),
    ])  # fmt: skip


def recall(args: argparse.Namespace, folder: Path) -> None:
    """Complete a command line by what the run in `folder` was started with; nothing where it names a --config."""
    if args.config is not None or not (folder / FLAGS).exists():
        return
    args.config = folder / FLAGS
    known = read_json(args.config)
    args.output_dir = args.output_dir or folder
    args.datasets = args.datasets or known["datasets"]
    args.seed = known["seed"] if args.seed is None else args.seed
    args.phases = args.phases or known["phases"]
    args.overrides = [*known["overrides"], *args.overrides]


def read_settings(args: argparse.Namespace) -> Settings:
    """The file's keys, with those that flags replace; the first thing wrong is a UserError."""
    args.config = args.config or DEFAULT
    if not args.config.exists() and (HERE / args.config).exists():
        args.config = HERE / args.config
    raw = read_json(args.config)
    if not isinstance(raw, dict):
        raise UserError(f"{args.config}: a JSON object of keys and values, not {type(raw).__name__}")
    raw = raw["keys"] if args.config.name == FLAGS else raw
    flags = {
        "batch_size": args.batch_size,
        "num_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "use_wandb": args.use_wandb,
        "project_name": args.project_name,
    }
    given = {name: value for name, value in raw.items() if not name.startswith(COMMENTS)}
    given |= {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.5)
            right = f"did you mean {close[0]!r}?" if close else "--help lists the known ones"
            raise UserError(f"{args.config}: unknown key {name!r}; {right}") from None
        message = first["msg"][:1].lower() + first["msg"][1:]
        got = json.dumps(first["input"], default=str)[:80]
        raise UserError(f"{args.config}: {name}: {message}, got {got}") from None


def recipe(settings: Settings, folder: Path, dataset: str, seed: int, phases: bool = False) -> dict[str, Any]:
    """The recipe that says what the keys say."""
    objective, stage = objective_of(settings), {"name": "online", "epochs": settings.num_epochs}
    return {
        "name": folder.resolve().name,
        "seed": seed,
        "model": {
            "teacher": settings.teacher_model,
            "student": settings.student_model,
            "dtype": settings.amp_dtype if settings.use_amp else "float32",
        },
        "data": {
            "source": dataset,
            "subset": subset_of(dataset),
            "sequence_length": settings.max_length,
            **HOLDOUT,
        },
        "stream": {"workers": max(settings.num_workers, 1)},
        "objective": objective,
        "optim": {
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "schedule": settings.scheduler_type,
            "warmup_steps": settings.warmup_steps,
            "clip_norm": settings.max_grad_norm,
            "batch_tokens": settings.batch_size * settings.gradient_accumulation_steps * settings.max_length,
            "micro_batch": settings.batch_size,
        },
        "stages": in_phases(stage, objective) if phases else [stage],
        "engine": {"kind": "local", "activation_checkpointing": settings.use_gradient_checkpointing},
        "checkpoint": {"every_steps": settings.eval_steps, "every_epochs": settings.save_epochs},
        "log": {"wandb": "online" if settings.use_wandb else "disabled", "wandb_project": settings.project_name},
    }


def objective_of(settings: Settings) -> dict[str, Any]:
    """The section `objective`; what a weight of 0 switches off is not in it."""
    found: dict[str, Any] = {
        "kind": "online",
        "alpha": 1.0,
        "temperature": settings.temperature,
        "kl": settings.alpha_kd,
        "feature": settings.alpha_feature,
        "attention": settings.alpha_attention,
        "layers": settings.alpha_layerwise,
        "progressive_layers": settings.alpha_layerwise > 0,
        "contrastive": settings.alpha_contrastive,
        "contrastive_temperature": settings.contrastive_temp,
        "gap": float(settings.alpha_kd > 0),
        "importance": 1.0,
        "routing": "learned",
        "initial_top_k": settings.initial_top_k,
        "final_top_k": settings.final_top_k,
        "router_lr": settings.router_lr,
        "router_balance": settings.load_balance_weight,
    }
    if settings.use_temperature_curriculum:
        found["temperature"] = [settings.temperature, settings.min_temperature]
    return found


def warn(settings: Settings, config: RunConfig) -> None:
    """What is otherwise than keys and flags may lead to expect, a line each."""
    anyway = {name: value for names in UNUSED.values() for name, value in names.items()}
    if not settings.use_temperature_curriculum:
        anyway[TEMPERATURE_END] = ...
    given = settings.model_fields_set
    say_unused([name for name, value in anyway.items() if name in given and getattr(settings, name) != value])
    objective = config.objective
    if isinstance(objective, OnlineConfig) and objective.routing != "trained":
        teacher = resolve(config.model.teacher, config.model.revision, weights=False)
        routers = find_routers(empty_model(teacher), config.model.teacher, objective.patterns)
        facts = {"num_experts": {router.experts for router in routers}, "top_k": {router.active for router in routers}}
        if any(name in given and {getattr(settings, name)} != facts[name] for name in facts):
            say(f"num_experts and top_k are the teacher's to say: {describe(routers)}")
        fewest = min(facts["num_experts"])
        asked = {"initial_top_k": objective.initial_top_k, "final_top_k": objective.final_top_k}
        more = [f"{name}={number}" for name, number in asked.items() if number > fewest]
        if more and objective.routing != "all":
            say(f"{' and '.join(more)}: a token takes at most the teacher's {fewest} experts")


def say_of_first(names: Sequence[str], overrides: Sequence[str]) -> None:
    """One line about settings that count for the first of several data sets alone."""
    given = [item for item in overrides if item.startswith(("data.revision=", "data.subset="))]
    if given and len(names) > 1:
        say(f"{' '.join(given)}: for {names[0]} alone, the first of --datasets")


def documents_file(folder: Path, names: Sequence[str], data: DataConfig, limit: int | None) -> Path | None:
    """Where the first `limit` documents of each data set are kept; None where all of one are read in their place."""
    if limit is None:
        if len(names) > 1:
            raise UserError(
                f"--datasets: {len(names)} of them need dataset_subset_size, how many documents to take of each; "
                "or give one folder or pattern of files"
            )
        return None
    facts = [*names, data.subset, data.split, data.text_field, limit, *filter(None, [data.revision])]
    return folder.absolute() / f"documents-{digest(facts)}.jsonl"


def take_documents(names: Sequence[str], data: DataConfig, limit: int | None, file: Path) -> None:
    """Write the first `limit` documents of each data set."""
    with publishing(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for name in names:
            subset = data.subset if name == names[0] else subset_of(name)
            if (found := find_files(name)).passed:
                say(f"{name}: {found.counts(SUFFIXES)}{found.passed_over()}")
            revision = data.revision if name == names[0] else None
            texts = iter_documents(name, subset, data.split, data.text_field, data.streaming, revision=revision)
            number = 0
            for number, text in enumerate(islice(texts, limit), 1):  # noqa: B007 (how many there were)
                lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            say(f"{name}: {'the first' if number == limit else 'all'} {number} documents → {file.name}")


if __name__ == "__main__":
    main()
