"""On which numbers of ranks a run can train, and go on after another number; needs no torch.

As a program it answers the launch files: `python -m megakd.train.elastic RUN LEAST MOST [section.key=value ...]`
prints the numbers from LEAST to MOST that `fitting` finds.
"""

import sys

from megakd.config.run import RunConfig
from megakd.errors import UserError
from megakd.run import Run
from megakd.system.signals import USER_ERROR


def misfit(config: RunConfig, ranks: int) -> str | None:
    """Why a run cannot train on so many ranks, in one line; None where it can.

    The batch of a step stays the same: fewer ranks accumulate more micro-batches.
    """
    spread = config.engine.expert_parallel
    if config.engine.kind == "local" and ranks > 1:
        return f"engine.kind: local is one process, this is a world of {ranks}; set engine.kind=deepspeed in a new run"
    if config.engine.kind == "local" and spread > 1:
        return (
            f"engine.expert_parallel: {spread}, but engine.kind local is one process; set engine.kind=deepspeed in a "
            "new run, or engine.expert_parallel=1"
        )
    if ranks % spread:
        return f"engine.expert_parallel: {spread} does not divide the {ranks} ranks; change engine.ranks or it"
    for stage in config.stages:
        windows = config.at(stage).windows_per_step
        if windows % (ranks * config.optim.micro_batch):
            return (
                f"optim.batch_tokens: {windows} windows per step do not divide among {ranks} ranks x "
                f"optim.micro_batch {config.optim.micro_batch}; change optim.micro_batch, engine.ranks or the batch"
            )
    return None


def fitting(config: RunConfig, least: int, most: int) -> list[int]:
    """The numbers of ranks from `least` to `most` between which a run can change while it trains, ascending.

    UserError where there is none, and where a checkpoint stays with the ranks that saved it.
    """
    for stage in config.stages:
        own = config.at(stage).engine
        zero = (own.deepspeed or {}).get("zero_optimization", {})
        if own.kind == "deepspeed" and zero.get("stage", 0) == 0:
            raise UserError(
                f"engine.config: {own.config} has ZeRO stage 0, whose checkpoints load on the ranks that saved them "
                "alone; take zero2 or zero3 in a new run, or the same ranks each time"
            )
    found = [ranks for ranks in range(least, most + 1) if misfit(config, ranks) is None]
    if not found:
        raise UserError(str(misfit(config, most)))
    return found


def main(folder: str, least: str, most: str, *overrides: str) -> None:
    """Print the numbers, or, with exit code 2, why there are none."""
    try:
        found = fitting(Run.open(folder, overrides).config, int(least), int(most))
    except UserError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(USER_ERROR)
    sys.stdout.write(" ".join(map(str, found)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
