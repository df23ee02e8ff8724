"""What a run will take, from its configuration and the teacher's config.json alone; starts nothing.

examples:
  megakd plan runs/a
"""

import argparse

from megakd.config.effects import check_batches
from megakd.models.checks import check_models
from megakd.report.memory import memory
from megakd.report.plan import beginnings, compression, lengths, packing, sizes, tasks
from megakd.report.stored import stored_shards
from megakd.run import Run
from megakd.system.text import table

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


def main(run: Run, args: argparse.Namespace) -> None:
    check_models(run.config)
    check_batches(run.config)
    rows = [*sizes(run), *compression(run), *beginnings(run), *packing(run), *stored_shards(run), *lengths(run)]
    rows += [*memory(run), *tasks(run)]
    print(table(["plan", ""], rows, left=True))
