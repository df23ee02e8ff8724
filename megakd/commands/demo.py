"""The whole path on a small teacher that ships with MegaKD: no network, no GPU, minutes on two cores.

tokenize → compress → generate-logits → train in two stages under DeepSpeed ZeRO-3 on 2 ranks → the same training with
cross entropy alone → evaluate → export → report. Every number of the table it ends with is measured in this run.
Started again on the same folder, it goes on where it stopped, and says so; delete the folder to begin anew. A folder
that holds other things keeps them; kd/ and ce/ in it must be the demo's two runs, or are refused.

examples:
  megakd demo
  megakd demo --folder runs/mine --teacher path/to/a/qwen3-moe
"""

import argparse
import sys
import time
from pathlib import Path

from megakd.cli import run_verb
from megakd.config.parsing import load_recipe
from megakd.config.run import flatten, is_mutable
from megakd.errors import UserError
from megakd.evals.evaluate import evaluate
from megakd.finish import to_the_end
from megakd.names import expand, find_recipe, holds_run, model_folder
from megakd.report.tables import conclusion, quality_table
from megakd.run import Run
from megakd.system.logging import say
from megakd.system.text import clock
from megakd.system.verbs import VerbFailed, to_go_on

RECIPE = "demo"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=expand, default=Path("demo"), help="where runs go (default: demo)")
    parser.add_argument("--teacher", default="demo", help="a Qwen3-MoE folder of your own")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of the recipe")


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    kd, ce = args.folder / "kd", args.folder / "ce"
    own = args.teacher != "demo" and model_folder(args.teacher)
    teacher = str(own.absolute()) if own else args.teacher
    settings = [f"model.teacher={teacher}", *_fewer_ranks(), *args.overrides]
    alone = ["objective.alpha=0", "name=ce-alone"]
    begun = _begun(kd, settings), _begun(ce, [*settings, *alone])
    if any(begun):
        say(f"demo: goes on in {args.folder}, where what is finished stays; to begin anew, delete that folder")
    if not begun[0]:
        _verb("new", str(kd), "--from", RECIPE, *settings)
    _to_the_end(kd, "export")
    if not begun[1]:
        _verb("new", str(ce), "--from", str(kd), *alone)
    _to_the_end(ce, "evaluate")
    rows = evaluate(Run.open(kd)), evaluate(Run.open(ce))
    _verb("export", str(kd), "--dense")
    _verb("report", str(kd), "--baseline", str(ce))
    shown = [rows[0][0], rows[0][1], rows[0][-1], rows[1][-1]]
    print(
        "\n" + quality_table(shown, ["teacher", "student, compressed", "student, after KD", "student, after CE alone"])
    )
    if any(row[name] is None for row in shown for name in ("kl", "nll")):
        raise UserError(f"{kd}: a measure is not finite; see `failed` in evals.jsonl of both runs")
    print(f"\n{conclusion(shown)}\n{clock(time.perf_counter() - start)} in all; look at {kd / 'report.html'}")


def _begun(folder: Path, settings: list[str]) -> bool:
    """Whether `folder` holds the run that the recipe and `settings` make; UserError when it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not holds_run(folder):
        raise UserError(f"{folder}: exists already and is no run of the demo; name another --folder")
    now, asked = (
        dict(flatten(each.model_dump(mode="json")))
        for each in (Run.open(folder).config, load_recipe(find_recipe(RECIPE), settings))
    )
    for key in sorted(now.keys() | asked.keys()):
        if not is_mutable(key) and now.get(key) != asked.get(key):
            raise UserError(
                f"{folder}: {key} of the existing run is {now.get(key)}, asked for is {asked.get(key)}; "
                "name another --folder, or delete this one to begin anew"
            )
    return True


def _fewer_ranks() -> list[str]:
    """The recipe wants 2 ranks; a machine with one GPU has room for one."""
    import torch

    return (
        ["engine.ranks=1", "optim.micro_batch=16"]
        if torch.cuda.is_available() and torch.cuda.device_count() < 2
        else []
    )


def _verb(*argv: str) -> None:
    say(f"\n$ megakd {' '.join(argv)}")
    run_verb(list(argv))


def _to_the_end(run: Path, until: str) -> None:
    """As `megakd run` brings it there; the process ends with the exit code of a verb that fails."""
    say(f"\n$ megakd run {run} --until {until}")
    try:
        to_the_end(Run.open(run), until, here=run_verb)
    except VerbFailed as failed:
        say(f"{run}: {failed}; {to_go_on(failed.code)}")
        sys.exit(failed.code)
