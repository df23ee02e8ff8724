"""SAR-KD from flags: a student learns from a Mixture-of-Experts teacher whose routers learn with it.

    python tools/compat/train_sar_kd.py --teacher_model huihui-ai/Huihui-MoE-1B-A0.6B --student_model Qwen/Qwen3-0.6B \\
        --dataset_name wikitext --dataset_config_name wikitext-103-raw-v1 --block_size 1024 --train_steps 1000 \\
        --per_device_batch_size 1 --grad_accum_steps 8 --student_lr 1e-4 --eval_steps 200 --output_dir outputs/sar_kd
    python tools/compat/train_sar_kd.py --teacher_model teacher --student_model student --dataset_name text.jsonl \\
        --model_dtype float16 --block_size 512 --use_scheduler --routing top_m --initial_top_k 2 --final_top_k 4

The flags are those of single-file SAR-KD scripts, the run is an ordinary one in --output_dir, made from
--output_dir/recipe.json: tokenize, train, export, generate-logits of the held-out text, evaluate. The same command
again resumes, and so do the megakd commands that are printed. It ends with

    OUTPUT_DIR/student/                              the student, a Hugging Face folder
    OUTPUT_DIR/router_update.pt, .safetensors, .json the teacher's routers by name: apply_router_update.py reads them

and the student's perplexity on held-out text: every --eval_steps during training, and before it and at every checkpoint
by evaluate. One process, one device; for
more, engine.* in a copy of the recipe. What has no flag: section.key=value, like log.wandb=disabled.

The loss per token is  (1 - alpha) CE + alpha T^2 KL(teacher || student)  with alpha = alpha_kd / (alpha_kd + alpha_ce).
So the whole loss is divided by alpha_kd + alpha_ce. The three weights of router terms are divided by it too: what is
minimised is the same. The terms are |W - W0|^2 summed over routers, 1 - H / log E, and the load balance. With
--alpha_kd 0 the student learns from CE alone, the routers from their own terms.

One default is not that of the published scripts: --router_lr is a tenth of --student_lr, for at the student's own rate
a teacher was seen to collapse to the student (docs/online-distillation.md). For an anchor whose weight means the same
in every model, |W - W0|^2 / |W0|^2, add objective.anchor_form=relative objective.anchor=0.1. A student with another
tokenizer than the teacher's learns from spans of text instead of the KL.
"""

import argparse
from pathlib import Path
from typing import Any

from run_from_flags import (
    DATASET,
    DATASET_CONFIG,
    HOLDOUT,
    STUDENT_MODEL,
    TEACHER_MODEL,
    Parser,
    count,
    one_line,
    open_run,
    positive,
    say_unused,
    settled,
    subset_of,
    to_the_end,
    weight,
    whole,
)

from megakd.config.objective import SarConfig
from megakd.config.parsing import parse
from megakd.errors import UserError
from megakd.models.hub import empty_model, load_config
from megakd.models.routers import describe, find_routers
from megakd.names import expand, resolve
from megakd.system.logging import say
from megakd.system.terminal import accept_any_encoding

SCHEDULER, WARMUP_STEPS = "cosine", 100


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    with one_line("train_sar_kd"):
        args = build_parser().read(argv, greedy="router_patterns")
        value = recipe(args)
        config = parse(value, "flags")
        teacher = resolve(config.model.teacher, config.model.revision, weights=False)
        routers = find_routers(empty_model(teacher), config.model.teacher, config.objective.patterns)
        warn(args, value)
        say(f"train_sar_kd: learns {describe(routers)}")
        to_the_end(open_run(args.output_dir, value))


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("models and data").add_argument
    add("--teacher_model", default=TEACHER_MODEL, metavar="M", help="a folder or hub id (default: %(default)s)")
    add("--student_model", default=STUDENT_MODEL, metavar="M", help="a folder or hub id (default: %(default)s)")
    source = "a hub id, or a file, folder or pattern of parquet, jsonl or txt (default: %(default)s)"
    add("--dataset_name", default=DATASET, metavar="D", help=source)
    config = f"of a hub data set (default: {DATASET_CONFIG} of {DATASET}); no effect for files"
    add("--dataset_config_name", metavar="C", help=config)
    add("--dataset_split", default="train", metavar="S", help="of a hub data set (default: %(default)s)")
    add("--text_field", default="text", metavar="F", help="default: %(default)s")
    add("--train_tokens", type=count, metavar="N", help="of the data (default: what --train_steps take)")
    held_out = "held out for evaluate (default: %(default)s)"
    add("--eval_tokens", type=count, default=HOLDOUT["holdout_tokens"], metavar="N", help=held_out)
    add("--block_size", type=count, default=1024, metavar="N", help="tokens of a window (default: %(default)s)")
    add("--output_dir", type=expand, default=Path("outputs/sar_kd"), metavar="DIR", help="default: %(default)s")

    add = parser.add_argument_group("optimization").add_argument
    add("--per_device_batch_size", type=count, default=1, metavar="N", help="windows at once (default: %(default)s)")
    add("--grad_accum_steps", type=count, default=8, metavar="N", help="times so many a step (default: %(default)s)")
    add("--train_steps", type=count, default=1000, metavar="N", help="optimizer steps (default: %(default)s)")
    measures = "steps between measurements of the validation perplexity, 0: none (default: %(default)s)"
    add("--eval_steps", type=whole, default=200, metavar="N", help=measures)
    saves = "steps between checkpoints, 0: at the end alone (default: %(default)s)"
    add("--save_steps", type=whole, default=500, metavar="N", help=saves)
    add("--student_lr", type=positive, default=1e-4, metavar="LR", help="default: %(default)s")
    router_lr = "0 freezes them (default: a tenth of --student_lr, at that rate or more a teacher was seen to collapse)"
    add("--router_lr", type=weight, metavar="LR", help=router_lr)
    add("--weight_decay", type=weight, default=0.0, metavar="W", help="default: %(default)s; routers have none")
    add("--max_grad_norm", type=positive, default=1.0, metavar="N", help="default: %(default)s")
    add("--use_scheduler", action="store_true", help="warm up, then down to a tenth of the rate; else it is constant")
    no_effect = "no effect without --use_scheduler"
    add("--warmup_steps", type=whole, metavar="N", help=f"at most half of all (default: {WARMUP_STEPS}); {no_effect}")
    add("--scheduler_type", choices=("linear", "cosine"), help=f"default: {SCHEDULER}; {no_effect}")
    dtypes = "of the forward pass, and of the teacher (default: %(default)s)"
    add("--model_dtype", choices=("float16", "bfloat16", "float32"), default="float32", help=dtypes)
    again = "recompute activations in the backward pass (default: where both models can; docs/online-distillation.md)"
    add("--gradient_checkpointing", action="store_true", default=None, help=again)
    add("--no_gradient_checkpointing", dest="gradient_checkpointing", action="store_false", help="keep activations")
    add("--seed", type=whole, default=42, metavar="N", help="default: %(default)s")
    add("--logging_steps", type=count, default=10, metavar="N", help="default: %(default)s")

    add = parser.add_argument_group("distillation").add_argument
    add("--temperature", type=positive, default=2.0, metavar="T", help="default: %(default)s")
    add("--alpha_kd", type=weight, default=0.9, metavar="W", help="share of T^2 KL, see above (default: %(default)s)")
    add("--alpha_ce", type=weight, default=0.1, metavar="W", help="share of CE, see above (default: %(default)s)")
    anchor = "of |W - W0|^2, summed over routers (default: %(default)s)"
    add("--router_anchor_weight", type=weight, default=1e-4, metavar="W", help=anchor)
    add("--router_load_balance_weight", type=weight, default=1e-3, metavar="W", help="default: %(default)s")
    add("--router_entropy_weight", type=weight, default=1e-4, metavar="W", help="default: %(default)s")
    patterns = "regular expressions, for routers with odd names (default: found by role and shape)"
    add("--router_patterns", nargs="*", default=[], metavar="REGEX", help=patterns)
    rules = "experts a token takes: as the teacher was trained (the default; 2 where that is one of weight x / x, which"
    rules += " teaches a router nothing), all, or --initial_top_k to --final_top_k"
    add("--routing", choices=("trained", "all", "top_m"), help=rules)
    top_m = "default: %s; no effect without --routing top_m"
    add("--initial_top_k", type=count, metavar="N", help=top_m % SarConfig().initial_top_k)
    add("--final_top_k", type=count, metavar="N", help=top_m % SarConfig().final_top_k)

    add = parser.add_argument_group("memory").add_argument
    away = "the teacher's layers lie in CPU memory, and come to the device one at a time"
    add("--offload_teacher_to_cpu", action="store_true", help=away)
    add("--no_offload_teacher", dest="offload_teacher_to_cpu", action="store_false", help="the default")
    planned = "no effect: what a step holds is planned, see megakd plan OUTPUT_DIR"
    for name in ("clear_cache_every_step", "aggressive_gc"):
        add(f"--{name}", action="store_true", default=None, help=planned)
        add(f"--no_{name.removesuffix('_every_step')}", dest=name, action="store_false", default=None, help=planned)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe, for what has no flag")
    return parser


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe that says what the flags say; UserError where a model is missing, or values do not fit."""
    if not 2 <= args.block_size <= 65535:
        raise UserError(f"--block_size: must be between 2 and 65535, got {args.block_size}")
    batch_tokens = args.per_device_batch_size * args.grad_accum_steps * args.block_size
    both = args.alpha_kd + args.alpha_ce
    if not both:
        raise UserError("--alpha_kd 0 and --alpha_ce 0: the student would learn nothing; give one of them a weight")
    warmup = WARMUP_STEPS if args.warmup_steps is None else args.warmup_steps
    engine: dict[str, Any] = {"kind": "local", "activation_checkpointing": bool(args.gradient_checkpointing)}
    if args.offload_teacher_to_cpu:
        engine["offload_teacher"] = True
    value = {
        "name": args.output_dir.resolve().name,
        "seed": args.seed,
        "model": {"teacher": args.teacher_model, "student": args.student_model, "dtype": args.model_dtype},
        "data": {
            "source": args.dataset_name,
            "subset": subset_of(args.dataset_name, args.dataset_config_name),
            "split": args.dataset_split,
            "text_field": args.text_field,
            "sequence_length": args.block_size,
            "tokens": args.train_tokens or args.train_steps * batch_tokens,
            **HOLDOUT,
            "holdout_tokens": args.eval_tokens,
        },
        "objective": {
            "kind": "sar",
            "alpha": args.alpha_kd / both,
            "temperature": args.temperature,
            "routing": args.routing or SarConfig().routing,
            "initial_top_k": args.initial_top_k or SarConfig().initial_top_k,
            "final_top_k": args.final_top_k or SarConfig().final_top_k,
            "router_lr_multiplier": router_rate(args) / args.student_lr,
            "anchor": args.router_anchor_weight / both,
            "anchor_form": "absolute",
            "entropy": args.router_entropy_weight / both,
            "balance": args.router_load_balance_weight / both,
            "router_patterns": args.router_patterns,
        },
        "optim": {
            "lr": args.student_lr,
            "weight_decay": args.weight_decay,
            "schedule": (args.scheduler_type or SCHEDULER) if args.use_scheduler else "constant",
            "warmup_steps": warmup if args.use_scheduler else 0,
            "clip_norm": args.max_grad_norm,
            "batch_tokens": batch_tokens,
            "micro_batch": args.per_device_batch_size,
        },
        "stages": [{"name": "sar", "steps": args.train_steps}],
        "engine": engine,
        "checkpoint": {"every_steps": args.save_steps or args.train_steps},
        "eval": {"every_steps": args.eval_steps},
        "log": {"every_steps": args.logging_steps},
    }
    value = settled(value, args.overrides, "sar", "flags")
    unsaid = not any(item.startswith("engine.activation_checkpointing=") for item in args.overrides)
    if args.gradient_checkpointing is None and unsaid:
        value["engine"]["activation_checkpointing"] = both_recompute(value["model"])
    free = args.routing is None and not any(
        item.startswith(("objective.routing=", "sar.routing=")) for item in args.overrides
    )
    if free and one_of_weight_one(value["model"]["teacher"]):
        say("--routing top_m, 2 experts a token: the one that the teacher takes has weight x / x, no gradient")
        value["objective"] |= {"routing": "top_m", "initial_top_k": 2, "final_top_k": 2}
    return value


def one_of_weight_one(teacher: str) -> bool:
    """Whether a token takes one expert of this teacher with weight x / x = 1, which gives its router no gradient."""
    config = load_config(resolve(teacher, weights=False))
    return getattr(config, "num_experts_per_tok", 0) == 1 and getattr(config, "norm_topk_prob", False)


def both_recompute(models: dict[str, Any]) -> bool:
    """Whether student and teacher can recompute activations in the backward pass."""
    names = models["student"], models["teacher"]
    return all(empty_model(resolve(name, weights=False)).supports_gradient_checkpointing for name in names)


def router_rate(args: argparse.Namespace) -> float:
    return args.student_lr / 10 if args.router_lr is None else args.router_lr


def warn(args: argparse.Namespace, value: dict[str, Any]) -> None:
    """What is done otherwise than the flags may lead to expect, a line each."""
    if router_rate(args) > args.student_lr:
        say(
            f"--router_lr {args.router_lr:g} is above --student_lr {args.student_lr:g}: at such rates a teacher was "
            "seen to collapse to the student; the log's kl_frozen and teacher_ce tell (docs/online-distillation.md)"
        )
    if args.gradient_checkpointing is None:
        on = value["engine"]["activation_checkpointing"]
        state = "on: less memory, more time per step; off:" if on else "off; on, where both models support it:"
        say(f"gradient checkpointing is {state} --{'no_' if on else ''}gradient_checkpointing")
    in_vain = {
        "--dataset_config_name": args.dataset_config_name and value["data"]["subset"] is None,
        "--warmup_steps": args.warmup_steps is not None and not args.use_scheduler,
        "--scheduler_type": args.scheduler_type and not args.use_scheduler,
        "--clear_cache_every_step": args.clear_cache_every_step,
        "--no_clear_cache": args.clear_cache_every_step is False,
        "--aggressive_gc": args.aggressive_gc,
        "--no_aggressive_gc": args.aggressive_gc is False,
    }
    say_unused([name for name, given in in_vain.items() if given])


if __name__ == "__main__":
    main()
