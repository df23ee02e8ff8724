"""SAR-KD from flags: a student learns from a Mixture-of-Experts teacher whose routers learn with it.

    python tools/train_sar_kd.py --teacher_model Qwen/Qwen3-30B-A3B --student_model Qwen/Qwen3-0.6B \\
        --dataset_name HuggingFaceFW/fineweb --dataset_config sample-10BT --output_dir runs/sar --max_steps 1000 \\
        --learning_rate 5e-5 --router_learning_rate 1e-5 --warmup_steps 50 --use_scheduler --eval_tokens 100000
    python tools/train_sar_kd.py --teacher_model teacher --student_model student --dataset_name text.jsonl \\
        --output_dir runs/local --num_epochs 3 --routing top_m --initial_top_k 2 --final_top_k 4 --model_dtype float32

The flags are those of single-file SAR-KD scripts; what they start is an ordinary run in --output_dir, made from
--output_dir/recipe.json: tokenize, train, export. The student ends in --output_dir/export, and the routers beside it,
in router_update/. The same command again resumes, and so do the megakd commands that are printed. One
process, one device; for more, engine.* in a copy of the recipe. What has no flag: section.key=value, like
log.wandb=disabled.

The loss a token is  (1 - alpha) CE + alpha T^2 KL(teacher || student)  with alpha = alpha_kd / (alpha_kd + alpha_ce).
So the whole loss is divided by alpha_kd + alpha_ce. The three weights of router terms are divided by it too: what is
minimised is the same. These terms have no unit here: |W - W0|^2 / |W0|^2, 1 - H / log E, and the load balance.
"""

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megakd.cli import run_verb
from megakd.config import DataConfig, ModelConfig, OptimConfig, SarConfig, apply_overrides, flatten, is_live, parse
from megakd.data.documents import source_files
from megakd.errors import UserError
from megakd.files import read_json, remove, resolve, write_json
from megakd.log import say
from megakd.run import Run

RECIPE = "recipe.json"
# of the documents: a small data set must have one to hold out
HOLDOUT_FRACTION = 0.05


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line without the usage, which has 30 flags here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main(argv: list[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    try:
        args = parser.parse_intermixed_args(argv)
        run = open_run(args.output_dir, recipe(args))
        verbs = [[verb, str(run.folder)] for verb in ("tokenize", "train", "export")]
        by_hand = " && ".join(shlex.join(["megakd", *verb]) for verb in verbs)
        print(f"recipe: {run.path(RECIPE)}\nto go on by hand: {by_hand}", flush=True)
        for verb in verbs:
            run_verb(verb)
    except UserError as error:
        sys.stderr.write(f"train_sar_kd: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("train_sar_kd: interrupted\n")
        sys.exit(130)


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("models and data").add_argument
    add("--teacher_model", required=True, help="a folder or hub id")
    add("--student_model", required=True, help="a folder or hub id")
    add("--dataset_name", required=True, help="a hub id, or a file, folder or pattern of parquet, jsonl or txt")
    add("--dataset_config", help="of a hub data set")
    add("--dataset_split", default="train", help="of a hub data set (default: %(default)s)")
    add("--text_field", default="text", help="default: %(default)s")
    add("--train_tokens", type=count, metavar="N", help="of the data (default: what --max_steps takes, else 2e9)")
    add("--eval_tokens", type=count, default=100000, metavar="N", help="held out for evaluate (default: %(default)s)")
    add("--max_length", type=count, default=512, metavar="N", help="tokens of a window (default: %(default)s)")
    add("--output_dir", type=Path, required=True, help="the run's folder")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=count, default=4, metavar="N", help="windows at once (default: %(default)s)")
    add("--gradient_accumulation_steps", type=count, default=1, metavar="N", help="default: %(default)s")
    add("--learning_rate", type=positive, default=OptimConfig().lr, metavar="LR", help="default: %(default)s")
    add("--router_learning_rate", type=weight, metavar="LR", help="0 freezes them (default: a tenth)")
    add("--weight_decay", type=weight, default=OptimConfig().weight_decay, metavar="W", help="default: %(default)s")
    add("--num_epochs", type=positive, metavar="N", help="passes over the data (default: 1)")
    add("--max_steps", type=count, metavar="N", help="optimizer steps, instead of --num_epochs")
    add("--warmup_steps", type=whole, default=0, metavar="N", help="at most half of all (default: %(default)s)")
    add("--use_scheduler", action="store_true", help="cosine down to a tenth of the rate; without it constant")
    add("--model_dtype", choices=("float32", "float16", "bfloat16"), default=ModelConfig().dtype)
    add("--gradient_checkpointing", action="store_true", help="of the student")
    add("--seed", type=whole, default=0, metavar="N", help="default: %(default)s")
    add("--save_steps", type=count, default=500, metavar="N", help="between checkpoints (default: %(default)s)")
    add("--logging_steps", type=count, default=10, metavar="N", help="default: %(default)s")

    add = parser.add_argument_group("distillation").add_argument
    add("--temperature", type=positive, default=2.0, metavar="T", help="default: %(default)s")
    add("--alpha_kd", type=positive, default=0.5, metavar="W", help="share of T^2 KL, see above (default: %(default)s)")
    add("--alpha_ce", type=weight, default=0.5, metavar="W", help="share of CE, see above (default: %(default)s)")
    add("--router_anchor_weight", type=weight, default=SarConfig().anchor, metavar="W", help="default: %(default)s")
    add("--router_entropy_weight", type=weight, default=SarConfig().entropy, metavar="W", help="default: %(default)s")
    add("--load_balance_weight", type=weight, default=SarConfig().balance, metavar="W", help="default: %(default)s")
    rules = "experts a token takes: as the teacher was trained, all, or --initial_top_k to --final_top_k"
    add("--routing", choices=("trained", "all", "top_m"), default=SarConfig().routing, help=rules)
    add("--initial_top_k", type=count, default=SarConfig().initial_top_k, metavar="N", help="default: %(default)s")
    add("--final_top_k", type=count, default=SarConfig().final_top_k, metavar="N", help="default: %(default)s")
    add("--router_patterns", nargs="+", default=[], metavar="REGEX", help="find routers with odd names")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe, for what has no flag")


def _number(kind: Callable[[str], Any], holds: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not holds(value):  # as every comparison with NaN
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return check


def _integer(text: str) -> int:
    """2e9 is how people write token counts."""
    value = float(text)
    if not value.is_integer():
        raise ValueError
    return int(text) if text.strip("+-").isdigit() else int(value)


count = _number(_integer, lambda value: value >= 1, "a whole number from 1 on")
whole = _number(_integer, lambda value: value >= 0, "a whole number from 0 on")
positive = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
weight = _number(float, lambda value: 0 <= value < math.inf, "a number from 0 on")


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe that says what the flags say; UserError where a model is missing, or values do not fit."""
    if args.max_steps and args.num_epochs:
        say("--num_epochs has no effect: --max_steps says when to end")
    if args.max_length > 65535 or args.max_length < 2:
        raise UserError(f"--max_length: must be between 2 and 65535, got {args.max_length}")
    batch_tokens = args.batch_size * args.gradient_accumulation_steps * args.max_length
    tokens = args.train_tokens or (args.max_steps * batch_tokens if args.max_steps else DataConfig().tokens)
    both = args.alpha_kd + args.alpha_ce
    stage: dict[str, Any] = {"name": "sar"}
    stage |= {"steps": args.max_steps} if args.max_steps else {"epochs": args.num_epochs or 1.0}
    # at the student's own rate the teacher collapses to the student (docs/sar-kd.md)
    rate = args.learning_rate / 10 if args.router_learning_rate is None else args.router_learning_rate
    stage["lr_multipliers"] = [{"pattern": "^routers", "lr_multiplier": rate / args.learning_rate}]
    value = {
        "name": args.output_dir.resolve().name,
        "seed": args.seed,
        "model": {
            "teacher": model(args.teacher_model, "--teacher_model"),
            "student": model(args.student_model, "--student_model", found=True),
            "dtype": args.model_dtype,
        },
        "data": {
            "source": data(args.dataset_name),
            "subset": args.dataset_config,
            "split": args.dataset_split,
            "text_field": args.text_field,
            "sequence_length": args.max_length,
            "tokens": tokens,
            "holdout_fraction": HOLDOUT_FRACTION,
            "holdout_tokens": args.eval_tokens,
        },
        "objective": {"kind": "sar", "alpha": args.alpha_kd / both, "temperature": args.temperature},
        "sar": {
            "routing": args.routing,
            "initial_top_k": args.initial_top_k,
            "final_top_k": args.final_top_k,
            "anchor": args.router_anchor_weight / both,
            "entropy": args.router_entropy_weight / both,
            "balance": args.load_balance_weight / both,
            "router_patterns": args.router_patterns,
        },
        "optim": {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "schedule": "cosine" if args.use_scheduler else "constant",
            "warmup_steps": args.warmup_steps,
            "batch_tokens": batch_tokens,
            "micro_batch": args.batch_size,
        },
        "stages": [stage],
        "engine": {"kind": "local", "activation_checkpointing": args.gradient_checkpointing},
        "checkpoint": {"every_steps": args.save_steps},
        "log": {"every_steps": args.logging_steps},
    }
    value = apply_overrides(value, args.overrides)
    config = parse(value, "flags")
    if config.engine.kind != "local" or config.objective.kind != "sar":
        raise UserError(
            "engine.kind and objective.kind: are local and sar here; megakd new makes a run of another kind"
        )
    return value


def model(name: str, flag: str, found: bool = False) -> str:
    """A model as a run names it: a folder by its whole path, else its hub id; found: the folder of a hub id too."""
    try:
        folder = resolve(name, weights=found)
    except UserError as error:
        raise UserError(f"{flag} {error}") from error
    return str(folder.resolve()) if found or Path(name).exists() else name


def data(name: str) -> str:
    """A data set as a run names it: files by their whole path, so that the run may go on from anywhere."""
    return str(Path(name).expanduser().absolute()) if source_files(name) else name


def open_run(folder: Path, value: dict[str, Any]) -> Run:
    """The run of a recipe in `folder`: made, or opened again with what may change; UserError for another run's."""
    file = folder / RECIPE
    if (folder / "config.json").exists():
        if not file.exists():
            raise UserError(f"{folder}: holds a config.json that this tool did not make; name another --output_dir")
        before, now = (dict(flatten(parse(v, str(file)).model_dump(mode="json"))) for v in (read_json(file), value))
        changes = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if any((folder / made).exists() for made in ("data", "checkpoints")):
            for key in changes:
                if not is_live(key):
                    was, asked = (json.dumps(values.get(key)) for values in (before, now))
                    raise UserError(
                        f"{folder}: {key} of the run that is there is {was}, the flags say {asked}; name another "
                        "--output_dir, or give the flags that it was made with"
                    )
            run = Run.open(folder, [f"{key}={json.dumps(now[key])}" for key in changes])
            write_json(file, value)
            return run
        if not changes:
            return Run.open(folder)
        remove(folder / "config.json")  # nothing was made of it yet
    write_json(file, value)
    return Run.create(file, [], folder)


if __name__ == "__main__":
    main()
