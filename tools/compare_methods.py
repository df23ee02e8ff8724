"""Ways to compress at equal bytes: held-out KL and perplexity right after compression and after equal distillation.

    python tools/compare_methods.py demo --folder methods engine.kind=local
    python tools/compare_methods.py recipe.json --budgets 0.25 0.5 --seeds 3 --json rows.json --plot rows.png
    python tools/compare_methods.py demo --only prune merge --list

RECIPE is a recipe, or the name of a shipped one. Methods:
  rank      a shared core for each projection and wrappers of one rank everywhere, the largest within the budget
  wrappers  the same with ranks by the planner, which takes long where experts are large
  basis     a basis that experts share, in groups
  mixture   bases that all experts share, mixed with coefficients of each
  planner   wrappers or basis, whichever is predicted to lose least, for each layer and projection
  prune     experts with the least activation weighted by the router (REAP) are dropped
  merge     alike experts become one (HC-SMoE)
  prune+core  half of the experts are pruned, then the others share cores within the same budget

Every budget is a share of the teacher's expert parameters. FOLDER/data tokenizes and captures once;
FOLDER/METHOD-BUDGET compresses, and FOLDER/METHOD-BUDGET/seed-N trains that student over the same number of tokens, in
the order of its seed. Compression has no random numbers, so its row has one value; training has a mean over seeds with
the lowest and highest. All are measured on the validation set as `megakd evaluate` does. The same command again goes on
where it was killed; what is finished is not done again.

Stages train alike whatever the student is: give rules that match parameters of all methods, or none.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import installed  # noqa: F401

from megakd.cli import run_verb
from megakd.config.parsing import load_recipe
from megakd.config.run import RunConfig
from megakd.errors import UserError
from megakd.finish import lacks
from megakd.names import expand, find_recipe, resolve
from megakd.outputs import check_file
from megakd.run import Run
from megakd.system.files import publishing, read_json_lines, write_json
from megakd.system.logging import say
from megakd.system.terminal import accept_any_encoding, one_line_errors
from megakd.system.text import clock, table

MARK = "made by tools/compare_methods.py"
QUIET = ("log.wandb=disabled", "log.tensorboard=false", "eval.tasks=[]")
CORES = "compress.method=shared_core"
METHODS: dict[str, tuple[str, ...]] = {
    "rank": (CORES,),
    "wrappers": (CORES, 'compress.shapes=["wrappers","additive"]'),
    "basis": (CORES, 'compress.shapes=["basis"]'),
    "mixture": (CORES, 'compress.shapes=["mixture"]'),
    "planner": (CORES,),
    "prune": ("compress.method=prune",),
    "merge": ("compress.method=merge",),
    "prune+core": (CORES,),
}


class Measured(NamedTuple):
    """What the validation set says of a model."""

    kl: float
    perplexity: float
    parameters: int


class Row(NamedTuple):
    """A method at a budget. megabytes: of its files. share: of the teacher's parameters. trained: by seed."""

    method: str
    budget: float
    megabytes: float
    share: float
    compressed: Measured
    seeds: list[int]
    trained: list[Measured]


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a recipe, or the name of a shipped one")
    add("--folder", type=expand, default=Path("methods"), metavar="DIR", help="of the runs (default: %(default)s)")
    add("--budgets", type=float, nargs="+", default=[0.25, 0.5], metavar="SHARE", help="default: 0.25 0.5")
    add("--seeds", type=int, default=3, metavar="N", help="of training: the recipe's and those after it (default: 3)")
    add("--only", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add("--json", type=expand, metavar="FILE", help="write the rows there too")
    add("--plot", type=expand, metavar="FILE", help="draw KL against bytes there (PNG)")
    add("--list", action="store_true", help="print the runs and what they change, and end")
    add("overrides", nargs="*", metavar="section.key=value", help="of the recipe")
    with one_line_errors("compare_methods", "interrupted; the same command goes on"):
        args = parser.parse_intermixed_args(argv)
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Compress, train and measure what is missing, then show all of it."""
    recipe, overrides, config = chosen(args.recipe, args.overrides)
    written, drawn = (file and check_file(file, MARK) for file in (args.json, args.plot))
    pairs = [(method, budget) for budget in args.budgets for method in args.only]
    if args.list:
        sizes = sizes_of(config)
        print(
            table(
                ["run", "changes"], [[run_name(*pair), "  ".join(changes(*pair, sizes))] for pair in pairs], left=True
            )
        )
        return
    data = with_data(args.folder / "data", recipe, overrides)
    teacher = measured(data, "teacher")
    seeds, start = list(range(config.seed, config.seed + args.seeds)), time.perf_counter()
    rows = []
    for number, (method, budget) in enumerate(pairs, start=1):
        rows.append(row_of(args.folder, data, method, budget, seeds))
        left = (time.perf_counter() - start) / number * (len(pairs) - number)
        say(f"compare_methods: {number}/{len(pairs)} {run_name(method, budget)} | ETA {clock(left)}")
    print(shown(rows, teacher))
    if written:
        write_json(written, {"made_by": MARK, "teacher": teacher._asdict(), "rows": [plain(row) for row in rows]})
    if drawn:
        plot(rows, drawn)


def chosen(name: str, changes: Sequence[str]) -> tuple[Path, list[str], RunConfig]:
    """(recipe, overrides, configuration) to compare with; UserError for one that leaves nothing to compare."""
    recipe, overrides = find_recipe(name), [*QUIET, *changes]
    config = load_recipe(recipe, overrides)
    if config.engine.kind != "local":
        raise UserError(f"engine.kind: {config.engine.kind} starts processes of its own; add engine.kind=local")
    if config.model.student:
        raise UserError(f"model.student: {config.model.student} leaves nothing to compress; leave it out")
    return recipe, overrides, config


def with_data(folder: Path, recipe: Path, overrides: Sequence[str]) -> Run:
    """The run in `folder` with tokens and the teacher's logits, made where they are missing."""
    run = opened(folder, recipe, overrides)
    for verb in ("tokenize", "generate-logits"):
        if lacks(run, verb) is not None:
            run_verb([verb, str(run.folder)])
    return run


def run_name(method: str, budget: float) -> str:
    return f"{method}-{budget:g}"


def changes(method: str, budget: float, sizes: tuple[int, int, int]) -> list[str]:
    """The overrides that make a method at a budget; sizes: those of the teacher's experts."""
    if method == "rank":
        return [*METHODS[method], "compress.budget=null", f"compress.rank={largest_rank(budget, *sizes)}"]
    found = [*METHODS[method], f"compress.budget={budget:g}"]
    return [*found, f"compress.experts={sizes[0] // 2}"] if method == "prune+core" else found


def largest_rank(budget: float, experts: int, hidden: int, expert_hidden: int) -> int:
    """Of wrappers whose numbers are at most this share of the experts'."""
    from megakd.models.shared_core import Form, stored_parameters

    def share(rank: int) -> float:
        stored = stored_parameters(Form("wrappers", rank, rank), "gate", experts, hidden, expert_hidden)
        return stored / (experts * hidden * expert_hidden)

    found = max((rank for rank in range(1, min(hidden, expert_hidden) + 1) if share(rank) <= budget), default=0)
    if not found:
        least = f"a shared core and wrappers of rank 1 take {share(1):.1%} of the experts"
        raise UserError(f"--budgets {budget:g}: {least}; name larger ones, or other methods with --only")
    return found


def sizes_of(config: Any) -> tuple[int, int, int]:
    """(experts a layer, hidden, expert hidden) of the teacher."""
    from megakd.models.hub import load_config
    from megakd.models.spec import spec_for

    folder = resolve(config.model.teacher, config.model.revision, weights=False)
    spec = spec_for(load_config(folder), str(folder))
    return spec.experts, spec.hidden, spec.expert_hidden


def row_of(folder: Path, data: Run, method: str, budget: float, seeds: Sequence[int]) -> Row:
    run = opened(folder / run_name(method, budget), data.folder, changes(method, budget, sizes_of(data.config)))
    if lacks(run, "compress") is not None:
        run_verb(["compress", str(run.folder)])
    compressed, trained = measured(run, "student-0"), []
    for seed in seeds:
        sibling = opened(run.folder / f"seed-{seed}", run.folder, [f"seed={seed}"])
        if lacks(sibling, "train") is not None:
            run_verb(["train", str(sibling.folder)])
        trained.append(measured(sibling, "last"))
    share = compressed.parameters / measured(data, "teacher").parameters
    stored = sum(file.stat().st_size for file in run.student_folder.glob("*.safetensors"))
    return Row(method, budget, stored / 1e6, share, compressed, list(seeds), trained)


def measured(run: Run, model: str) -> Measured:
    """A model of a run on the validation set; measured once."""
    known = read_json_lines(run.path("evals.jsonl"), "model")
    rows = [row for row in known if row["model"] == model or (model == "last" and "/" in row["model"])]
    if not rows:
        run_verb(["evaluate", str(run.folder), "--model", model])
        rows = read_json_lines(run.path("evals.jsonl"), "model")
    return Measured(rows[-1]["kl"], rows[-1]["perplexity"], rows[-1]["parameters"])


def opened(folder: Path, source: Path, overrides: Sequence[str]) -> Run:
    """The run in `folder`, made of `source` where there is none; UserError where it is another."""
    if not (folder / "config.json").exists():
        return Run.create(source, overrides, folder)
    run, file = Run.open(folder), source / "config.json" if source.is_dir() else source
    if run.config.fingerprint() != load_recipe(file, overrides).fingerprint():
        raise UserError(f"{folder}: the run there has another configuration; name another --folder")
    return run


def shown(rows: Sequence[Row], teacher: Measured) -> str:
    lines = []
    for row in rows:
        spread = []
        for values in ([found.kl for found in row.trained], [found.perplexity for found in row.trained]):
            spread.append(f"{statistics.fmean(values):.4f} ({min(values):.4f} … {max(values):.4f})")
        before = [f"{row.compressed.kl:.4f}", f"{row.compressed.perplexity:.2f}"]
        lines.append([run_name(row.method, row.budget), f"{row.megabytes:.2f}", f"{row.share:.1%}", *before, *spread])
    head = ["", "MB", "of the parameters", "KL compressed", "perplexity", "KL trained", "perplexity trained"]
    below = f"the teacher: perplexity {teacher.perplexity:.2f}; trained: mean (lowest … highest) over "
    return f"{table(head, lines)}\n\n{below}{len(rows[0].seeds)} seeds"


def plain(row: Row) -> dict[str, Any]:
    trained = [found._asdict() for found in row.trained]
    return {**row._asdict(), "compressed": row.compressed._asdict(), "trained": trained}


def plot(rows: Sequence[Row], path: Path) -> None:
    """KL against the share of the teacher's parameters, right after compression (dashed) and after training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.share)
        shares, color = [row.share for row in own], f"C{number}"
        kls = [[found.kl for found in row.trained] for row in own]
        means = [statistics.fmean(values) for values in kls]
        reach = [
            [m - min(v) for m, v in zip(means, kls, strict=True)],
            [max(v) - m for m, v in zip(means, kls, strict=True)],
        ]
        axis.plot(shares, [row.compressed.kl for row in own], "--", marker=".", color=color, alpha=0.5)
        axis.errorbar(shares, means, yerr=reach, marker="o", capsize=3, color=color, label=method)
    axis.set_yscale("log")
    axis.set_xlabel("share of the teacher's parameters")
    axis.set_ylabel("held-out KL to the teacher, nats")
    axis.set_title("dashed: compressed; solid: after distillation, with the range over seeds", fontsize=10)
    axis.legend()
    with publishing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None, "Title": MARK})
    plt.close(figure)


if __name__ == "__main__":
    main()
