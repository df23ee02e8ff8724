"""Run the teacher over the token shards once: RUN/data/logits/{holdout,train}, the same samples with its targets.

Input shard i gives output shard i. Any number of workers (ranks, Slurm tasks, or --part) take shards[worker::workers];
a finished shard is skipped, one that a kill cut short or that is damaged is made again, a rerun at any width goes on.
The validation set always keeps the most probable tokens (logits.profile=topk): it is measured, not trained on.
With a live teacher (objective.kind=sar or online) it is all that is captured, of the teacher as it was before.

With logits.parallel=zero3 or autoep one teacher is sharded over all ranks of a launcher, which then work in step.

examples:
  megakd generate-logits runs/a logits.batch_size=16
  megakd generate-logits runs/a --max-tokens 1e8      the first 100M tokens; without it, later, the rest
  megakd generate-logits runs/a --part 0/4            worker 0 of 4, on any machine that sees the folder
  megakd generate-logits runs/a --reread              finished shards are hashed again, damaged ones redone
  megakd generate-logits runs/a --force               capture everything again; the old logits are set aside
  sbatch --array=0-15 launch/generate_logits.sbatch runs/a
  deepspeed --num_gpus 8 --module megakd generate-logits runs/a logits.parallel=zero3
  megakd generate-logits runs/v --vllm-python ~/vllm-env/bin/python     of a run made with logits.engine=vllm
"""

import argparse
import re
import time
from contextlib import closing
from pathlib import Path

from megakd.capture.checks import check_teacher, check_tokens
from megakd.capture.pipeline import Worker, capture_part, make_codebook, part_of
from megakd.capture.source import Capture
from megakd.capture.vllm_client import vllm_of
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.measured import Stopwatch, record_rate
from megakd.models.flops import forward_flops
from megakd.names import resolve
from megakd.run import Run
from megakd.system.dist import (
    World,
    close_world,
    join_world,
    read_world,
    take_device,
)
from megakd.system.logging import say
from megakd.system.machine import describe_machine
from megakd.system.version import made_with

SECTIONS = ("model", "data", "logits")  # of the configuration


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=float, help="capture only the first shards that hold so many tokens")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="take part I of N of the shards (0/1: all)")
    parser.add_argument("--reread", action="store_true", help="hash finished shards again and redo damaged ones")
    parser.add_argument("--force", action="store_true", help="set existing logits aside and capture them again")
    parser.add_argument("--vllm-python", metavar="PATH", help="logits.engine=vllm: the Python of vLLM's environment")
    parser.add_argument("--vllm-options", metavar="JSON", help="logits.engine=vllm: options of vllm.LLM")


def main(run: Run, args: argparse.Namespace) -> None:
    world = join_world() if run.config.logits.parallel != "replica" else take_device(read_world())
    worker = _worker(args.part, world)
    if args.force and worker.workers > 1:
        raise UserError(
            f"--force: each of {worker.workers} workers would set aside what the others write; rename "
            f"{run.path('data', 'logits')}, and start them without --force"
        )
    if args.max_tokens is not None and not args.max_tokens > 0:
        raise UserError(f"--max-tokens {args.max_tokens:g}: expected a number above 0, like 1e8")
    vllm = vllm_of(run.config.logits.engine, args.vllm_python, args.vllm_options)
    folder = resolve(run.config.model.teacher, run.config.model.revision)
    sets = {part: ShardSet(run.path("data", "tokens", part)) for part in ("holdout", "train")}
    live = run.config.objective.live  # training asks the teacher itself
    tokenizer = check_tokens(run.config, folder, sets.values(), world.first)
    model = check_teacher(run.config, folder, tokenizer, world.size)
    if live:
        unused = "" if args.max_tokens is None else "; --max-tokens has no effect"
        say(f"generate-logits: the validation set alone, for training has a live teacher{unused}")
    if args.force:
        _set_aside(run.path("data", "logits"))
    capture = Capture(run, folder, world, tokenizer.vocab_size, vllm)
    parts = [part_of(run, name, tokens) for name, tokens in sets.items()]
    stopwatch = Stopwatch()
    with closing(capture):
        book = make_codebook(capture, next(part for part in parts if part.name == "train"))
        for part in parts:
            if live and part.name == "train":
                continue
            limit = args.max_tokens if part.name == "train" else None
            made = capture_part(capture, part, worker, book, limit=limit, reread=args.reread, stopwatch=stopwatch)
            share = f"{worker.number}/{worker.workers}"
            run.record("generate-logits", part=part.name, worker=share, shards=made, megakd=made_with())
    if stopwatch.tokens:
        device = describe_machine(world.device)["device"]
        flops = forward_flops(model.config, run.config.data.sequence_length, str(folder))
        tokens, seconds = stopwatch.tokens, stopwatch.seconds
        record_rate(run.folder, "generate-logits", device, tokens, seconds, ranks=1, flops_per_token=flops)
    close_world()


def _set_aside(logits: Path) -> None:
    """Rename existing logits; of linked ones the link alone, so that the run that they are in keeps them."""
    if logits.is_symlink() or logits.exists():
        aside = logits.with_name(f"logits-before-{time.strftime('%Y%m%d-%H%M%S')}")
        logits.rename(aside)
        say(f"{logits}: captured again; the old logits are {aside.name} now, delete it when nothing needs it")


def _worker(part: str, world: World) -> Worker:
    index, _, count = part.partition("/")
    digits = re.fullmatch("[0-9]+/[0-9]+", part)
    if not digits or int(index) >= int(count):
        raise UserError(f"--part {part}: expected I/N with I from 0 to N - 1, like 0/4")
    return Worker(int(index) * world.size + world.rank, int(count) * world.size)
