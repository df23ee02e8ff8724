"""What a run will take, from its configuration and the teacher's config.json alone; starts nothing.

With --gpus, what it takes on many GPUs: memory per GPU by part for ZeRO-2, ZeRO-3 and ZeRO-3 with CPU offload at each
size of expert parallelism, the largest micro-batch, which DeepSpeed file to take and why, bytes on disk, time per verb.
Times come from RUN/measured.json, which train and generate-logits write, for the same kind of GPU; else they are
estimates: FLOPs at an assumed utilization. Each row says which.

examples:
  megakd plan runs/a
  megakd plan runs/a --gpus 64 --gpu h100
  megakd plan runs/a --gpus 2 --gpu 24GB --gpus-per-node 2
  megakd plan runs/a --gpus 8 --gpu a100-80 --measured runs/small/measured.json
"""

import argparse

from megakd.config.checks import check_batches
from megakd.errors import UserError
from megakd.models.checks import check_models
from megakd.names import expand
from megakd.report.fleet import fleet_text
from megakd.report.gpus import KNOWN, find_gpu
from megakd.report.layouts import Fleet
from megakd.report.memory import memory
from megakd.report.plan import beginnings, compression, lengths, packing, sizes, tasks
from megakd.report.stored import stored_shards
from megakd.run import Run
from megakd.system.text import table

UTILIZATION = 0.3  # assumed, not measured
SECTIONS = (
    "model",
    "compress",
    "data",
    "logits",
    "objective",
    "optim",
    "stages",
    "engine",
    "eval",
)  # of the configuration


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, metavar="N", help="plan for so many GPUs")
    parser.add_argument("--gpu", metavar="NAME", help=f"which: {', '.join(KNOWN)}, or its memory, like 80GB")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of a host (default: 8)")
    parser.add_argument("--measured", type=expand, metavar="FILE", help="rates (default: RUN/measured.json)")
    parser.add_argument("--utilization", type=float, metavar="SHARE", help="assumed where nothing is measured (0.3)")


def main(run: Run, args: argparse.Namespace) -> None:
    fleet = fleet_of(args)
    check_models(run.config)
    if fleet is None:
        check_batches(run.config)
    rows = [*sizes(run), *compression(run), *beginnings(run), *packing(run), *stored_shards(run), *lengths(run)]
    rows += [*([] if fleet else memory(run)), *tasks(run)]
    print(table(["plan", ""], rows, left=True))
    if fleet:
        print(f"\n{fleet_text(run, fleet, args.measured, args.utilization or UTILIZATION)}")


def fleet_of(args: argparse.Namespace) -> Fleet | None:
    """The GPUs to plan for, None without --gpus; UserError for options that do not fit together."""
    if args.gpus is None:
        for name in ("gpu", "gpus_per_node", "measured", "utilization"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for --gpus N; add it")
        return None
    if args.gpu is None:
        raise UserError(
            f"--gpus {args.gpus}: say which with --gpu, one of {', '.join(KNOWN)}, or its memory, like 80GB"
        )
    per_node = min(args.gpus, 8) if args.gpus_per_node is None else args.gpus_per_node
    if args.gpus < 1 or per_node < 1 or args.gpus % per_node:
        raise UserError(f"--gpus {args.gpus}: expected a multiple of --gpus-per-node {per_node}, both above 0")
    if args.utilization is not None and not 0 < args.utilization <= 1:
        raise UserError(f"--utilization {args.utilization:g}: expected a share above 0 and at most 1, like 0.3")
    return Fleet(find_gpu(args.gpu), args.gpus, per_node)
