"""Quality against bytes on disk: quantised teachers, the ways to compress, and both together, before and after KD.

    python tools/bench.py size demo --folder sizes engine.kind=local
    python tools/bench.py size recipe.json --targets 0.2 0.35 --methods teacher rank prune --seeds 0 --json rows.json
    python tools/bench.py size demo --list engine.kind=local

A case is a method, a precision and a target: a share of the bytes of the teacher in bf16. The method gets the budget of
expert parameters with which the files, in that precision, are as large as the target or a little smaller. Embeddings,
the head, routers and norms stay in bf16, for no server reads them in fewer bits. Methods:
  teacher   not compressed; its size follows from the precision, so that no target applies
  wrappers  a shared core for each projection and wrappers, with ranks by the planner
  rank      the same with wrappers of one rank, where experts are too large to plan ranks
  basis     bases that experts share
  prune     experts with the least activation are dropped (REAP)
  merge     alike experts become one (HC-SMoE)
Precisions: bf16; int8, int4 and int3, with which every matrix but the embedding is rounded. No file format that servers
read has int3; its bytes are those of codes without gaps and a scale of 16 bits for 128, 64 or 32 numbers.

Compressed students are measured as they are, rounded. Then each is trained over the same tokens, and its forward passes
round (`stages[].quantize`): what is measured is what would be served. FOLDER/data tokenizes and captures once. A second
command goes on where the first was killed, and does nothing again. --shard I/N takes every N-th case, so that several
processes can work in one folder; a last command without it shows all.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import compare_methods as methods
import torch

from megakd.cli import run_verb
from megakd.errors import UserError
from megakd.finish import lacks
from megakd.models.loading import load_model
from megakd.models.parts import precisions, weight_parts
from megakd.models.rounding import line_axis, stored_bytes
from megakd.names import expand, resolve
from megakd.outputs import check_file
from megakd.report.tables import task_table
from megakd.run import Run
from megakd.system.files import publishing, read_json_lines, write_json
from megakd.system.logging import say
from megakd.system.terminal import accept_any_encoding, one_line_errors
from megakd.system.text import clock, table

MARK = "made by tools/bench.py size"
METHODS = ("teacher", "wrappers", "rank", "basis", "prune", "merge")
MATRICES: tuple[str, ...] = ("core", "factors", "experts", "linear")
PRECISIONS = {"bf16": {}, **{name: dict.fromkeys(MATRICES, name) for name in ("int8", "int4", "int3")}}
TARGETS = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5)


class Case(NamedTuple):
    """budget: share of the expert parameters; None for the teacher."""

    method: str
    precision: str
    budget: float | None

    @property
    def student(self) -> str:
        """The run that compresses; cases of other precisions share it."""
        return self.method if self.budget is None else f"{self.method}-{self.budget:g}"

    @property
    def name(self) -> str:
        return f"{self.student}-{self.precision}"

    @property
    def rounding(self) -> dict[str, str]:
        """The precision of each part that is rounded."""
        stock = self.method in ("teacher", "prune", "merge")
        parts = ("linear", "experts") if stock else ("linear", "core", "factors")
        return dict.fromkeys(parts, self.precision) if self.precision != "bf16" else {}


class Sizes(NamedTuple):
    """Of the teacher: numbers of its experts, and bytes of everything else and of one expert number, by precision."""

    expert_numbers: int
    experts: int
    rest: dict[str, int]
    each: dict[str, float]

    @property
    def whole(self) -> float:
        """Bytes in bf16."""
        return self.bytes(1, "bf16")

    def bytes(self, budget: float, precision: str) -> float:
        return self.rest[precision] + budget * self.expert_numbers * self.each[precision]


class Row(NamedTuple):
    """share: of the bytes of the teacher in bf16. compressed: before training. trained: by seed.

    speed: of prefill and of decode, in those of the teacher; rounded weights are computed with as if they were not.
    """

    case: str
    method: str
    precision: str
    budget: float | None
    megabytes: float
    share: float
    compressed: dict[str, Any]
    trained: list[dict[str, Any]]
    speed: dict[str, float] | None = None


def main(argv: Sequence[str]) -> None:
    accept_any_encoding()
    parser = argparse.ArgumentParser(
        prog="bench.py size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a recipe, or the name of a shipped one")
    add("--folder", type=expand, default=Path("sizes"), metavar="DIR", help="of the runs (default: %(default)s)")
    add("--targets", type=float, nargs="+", default=list(TARGETS), metavar="SHARE", help="default: 0.1 to 0.5")
    add("--budgets", type=float, nargs="+", metavar="SHARE", help="of expert parameters, instead of targets of bytes")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, metavar="P", help="default: all")
    add("--seeds", type=int, default=3, metavar="N", help="of training; 0 trains nothing (default: %(default)s)")
    add("--tasks", metavar="A,B", help="lm-eval tasks, for the teacher and the first seed of each case")
    add("--shard", default="1/1", metavar="I/N", help="take every N-th case, from the I-th on")
    add("--speed", action="store_true", help="measure prefill and decoding of each student against the teacher's")
    add("--json", type=expand, metavar="FILE", help="write the rows there too")
    add("--plot", type=expand, metavar="FILE", help="draw KL against bytes there (PNG)")
    add("--list", action="store_true", help="print the cases and their bytes, and end")
    add("overrides", nargs="*", metavar="section.key=value", help="of the recipe")
    with one_line_errors("bench.size", "interrupted; the same command goes on"):
        measure(parser.parse_intermixed_args(argv))


def measure(args: argparse.Namespace) -> None:
    """Compress, train and measure what is missing, then show all of it."""
    recipe, overrides, config = methods.chosen(args.recipe, args.overrides)
    written, drawn = (file and check_file(file, MARK) for file in (args.json, args.plot))
    teacher = resolve(config.model.teacher, config.model.revision)
    sizes = sizes_of(teacher)
    cases = cases_of(sizes, args.methods, args.precisions, args.targets, args.budgets)
    if args.list:
        shares = [[c.name, f"{sizes.bytes(1 if c.budget is None else c.budget, c.precision) / 1e6:.2f}"] for c in cases]
        print(table(["case", "MB, about"], shares, left=True))
        return
    index, shards = shard_of(args.shard)
    data = methods.with_data(args.folder / "data", recipe, overrides)
    tasks = ["--tasks", args.tasks] if args.tasks else []
    whole = measured(data, "teacher", {}, tasks)
    own = cases[index - 1 :: shards]
    work = [(case, seed) for seed in (None, *range(config.seed, config.seed + args.seeds)) for case in own]
    start = time.perf_counter()
    for number, (case, seed) in enumerate(work, start=1):
        first = tasks if seed == config.seed or (not args.seeds and seed is None) else []
        step(args.folder, data, teacher, case, seed, first)
        left = (time.perf_counter() - start) / number * (len(work) - number)
        say(f"bench size: {number}/{len(work)} {case.name} | ETA {clock(left)}")
    seeds = range(config.seed, config.seed + args.seeds)
    rows = [row_of(args.folder, data, teacher, case, seeds, sizes) for case in own]
    if args.speed:
        rows = with_speeds(rows, teacher, {case.name: student_run(args.folder, data, teacher, case) for case in own})
    print(shown(rows, whole))
    if tasks:
        print("\n" + task_table([{"model": "teacher", **whole}, *map(with_tasks, rows)]))
    if written:
        write_json(written, {"made_by": MARK, "teacher": whole, "rows": [row._asdict() for row in rows]})
    if drawn:
        plot(rows, drawn)


def shard_of(said: str) -> tuple[int, int]:
    index, _, count = said.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {said}: expects I/N, from 1/N to N/N")
    return int(index), int(count)


def sizes_of(teacher: Path) -> Sizes:
    model = load_model(teacher, torch.bfloat16)
    parts, rest, numbers = weight_parts(model, str(teacher)), dict.fromkeys(PRECISIONS, 0), 0
    each = dict.fromkeys(PRECISIONS, 0.0)
    for name, parameter in model.named_parameters():
        part, shape = parts.get(name), tuple(parameter.shape)
        if part == "experts":
            numbers += parameter.numel()
        for precision, profile in PRECISIONS.items():
            known = precisions(profile).get(part or "")
            size = 2 * parameter.numel() if known is None else stored_bytes(shape, known)
            if part == "experts":
                each[precision] += size
            else:
                rest[precision] += size
    experts = next(p.shape[0] for name, p in model.named_parameters() if parts.get(name) == "experts")
    return Sizes(numbers, experts, rest, {name: size / numbers for name, size in each.items()})


def cases_of(
    sizes: Sizes, names: Sequence[str], among: Sequence[str], targets: Sequence[float], budgets: Sequence[float] | None
) -> list[Case]:
    """What can be had: more than nothing of the experts and not all of them; cores take one expert's share alone."""
    cases, missed = [], 0
    for precision in among:
        if "teacher" in names and precision != "bf16":
            cases.append(Case("teacher", precision, None))
        numbers = sizes.expert_numbers * sizes.each[precision]
        wanted = budgets or [(target * sizes.whole - sizes.rest[precision]) / numbers for target in targets]
        for budget in wanted:
            for method in names:
                if method == "teacher":
                    continue
                if method in ("prune", "merge"):
                    found, least = math.floor(budget * sizes.experts + 1e-9) / sizes.experts, 2 / sizes.experts
                else:
                    found, least = (
                        math.floor(budget * 1000 + 1e-9) / 1000,
                        (1.8 if method != "rank" else 1.1) / sizes.experts,
                    )
                if least <= found < 1:
                    cases.append(Case(method, precision, found))
                else:
                    missed += 1
    if missed:
        say(
            f"bench size: {missed} of {missed + len(cases)} cases do not exist: the rest of the model is larger than "
            "the target, or the experts fit whole"
        )
    return list(dict.fromkeys(cases))


def student_run(folder: Path, data: Run, teacher: Path, case: Case) -> Run:
    """The run that has a case's student before training."""
    if case.budget is None:
        return methods.opened(folder / case.student, data.folder, [f"model.student={teacher}"])
    changes = methods.changes(case.method, case.budget, methods.sizes_of(data.config))
    return methods.opened(folder / case.student, data.folder, changes)


def step(folder: Path, data: Run, teacher: Path, case: Case, seed: int | None, tasks: list[str]) -> None:
    """Compress and measure a case (seed None), or train and measure it with a seed; nothing where that is done."""
    run = student_run(folder, data, teacher, case)
    if case.budget is not None and lacks(run, "compress") is not None:
        run_verb(["compress", str(run.folder)])
    if seed is None:
        measured(run, "student-0", case.rounding, tasks)
        return
    sibling = trained_run(run, case, seed)
    if lacks(sibling, "train") is not None:
        run_verb(["train", str(sibling.folder)])
    measured(sibling, "last", case.rounding, tasks)


def trained_run(run: Run, case: Case, seed: int) -> Run:
    stages = [stage.model_dump(mode="json", exclude_defaults=True) for stage in run.config.stages]
    if rounding := case.rounding:
        stages[-1]["quantize"] = rounding
    changes = [f"seed={seed}", f"stages={json.dumps(stages)}"]
    return methods.opened(run.folder / f"{case.precision}-seed-{seed}", run.folder, changes)


def measured(run: Run, model: str, rounding: dict[str, str], tasks: list[str]) -> dict[str, Any]:
    """A model's line of a run, rounded; measured once."""
    found = line_of(run, model, rounding, bool(tasks))
    if found is None:
        # a checkpoint of training that rounds is measured rounded
        said = ["--quantize", ",".join(f"{part}={name}" for part, name in rounding.items())]
        said = said if rounding and model != "last" else []
        run_verb(["evaluate", str(run.folder), "--model", model, *tasks, *said])
        found = line_of(run, model, rounding, bool(tasks))
        assert found is not None, (run.folder, model, rounding)
    return found


def line_of(run: Run, model: str, rounding: dict[str, str], tasks: bool) -> dict[str, Any] | None:
    """The last line of a run about a model as it is rounded; with tasks where they are wanted."""
    lines = read_json_lines(run.path("evals.jsonl"), "model")
    own = [
        line
        for line in lines
        if (line["model"].startswith(model) or (model == "last" and "/" in line["model"]))
        and (line.get("quantized") or {}) == rounding
        and (line.get("tasks") or not tasks)
    ]
    return own[-1] if own else None


def row_of(folder: Path, data: Run, teacher: Path, case: Case, seeds: Sequence[int], sizes: Sizes) -> Row:
    run, keep = student_run(folder, data, teacher, case), ("kl", "perplexity", "top1", "tasks")
    lines = [line_of(run, "student-0", case.rounding, False)]
    lines += [line_of(trained_run(run, case, seed), "last", case.rounding, False) for seed in seeds]
    assert all(line is not None for line in lines), (case, seeds)
    found = [{name: line[name] for name in keep if name in line} for line in lines if line is not None]
    size = bytes_of(run, case)
    share = size / sizes.whole
    return Row(case.name, case.method, case.precision, case.budget, size / 1e6, share, found[0], found[1:])


def bytes_of(run: Run, case: Case) -> int:
    """Of a student's files: rounded parts as codes and scales, everything else in bf16."""
    model = load_model(run.student_folder, torch.bfloat16)
    parts, chosen = weight_parts(model, str(run.student_folder)), precisions(case.rounding)
    return sum(
        stored_bytes(tuple(p.shape), chosen[part], line_axis(part, tuple(p.shape))) if part in chosen else 2 * p.numel()
        for part, p in ((parts.get(name, ""), p) for name, p in model.named_parameters())
    )


def with_speeds(rows: Sequence[Row], teacher: Path, runs: dict[str, Run]) -> list[Row]:
    """Rows with the speeds of their students, one of each form, in turns with the teacher."""
    stock, known = load_model(teacher, torch.float32), {}
    for row in rows:
        folder = runs[row.case].student_folder
        if folder not in known:
            known[folder] = speeds(load_model(folder, torch.float32), stock)
            say(
                f"bench size: {row.case}: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in known[folder].items())
            )
    return [row._replace(speed=known[runs[row.case].student_folder]) for row in rows]


@torch.inference_mode()
def speeds(student: Any, teacher: Any, tokens: int = 256, decoded: int = 16, rounds: int = 5) -> dict[str, float]:
    """Medians of ratios of tokens/s, student to teacher: of a prefill at batch 1, and of decoding behind it."""

    def seconds(model: Any) -> tuple[float, float]:
        ids = torch.arange(tokens)[None] % model.config.vocab_size
        start = time.perf_counter()
        made = model(ids, use_cache=True)
        middle = time.perf_counter()
        for _ in range(decoded):
            made = model(ids[:, :1], use_cache=True, past_key_values=made.past_key_values)
        return middle - start, time.perf_counter() - middle

    for model in (teacher, student):
        seconds(model)
    pairs = [(seconds(teacher), seconds(student)) for _ in range(rounds)]
    return {
        name: statistics.median(theirs[index] / own[index] for theirs, own in pairs)
        for index, name in enumerate(("prefill", "decode"))
    }


def shown(rows: Sequence[Row], whole: dict[str, Any]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: row.share):
        before = [f"{row.compressed['kl']:.4f}", f"{row.compressed['perplexity']:.2f}"]
        after = [
            spread([found[name] for found in row.trained], digits) for name, digits in (("kl", 4), ("perplexity", 2))
        ]
        fast = [f"{row.speed[name]:.2f}" for name in ("prefill", "decode")] if row.speed else ["-", "-"]
        lines.append([row.case, f"{row.megabytes:.2f}", f"{row.share:.1%}", *before, *after, *fast])
    head = ["", "MB", "of the teacher", "KL", "perplexity", "KL trained", "perplexity trained", "prefill", "decode"]
    said = f"the teacher: perplexity {whole['perplexity']:.2f}; trained: mean (lowest … highest) over seeds; "
    said += "prefill and decode: tokens/s, in those of the teacher"
    return f"{table(head, lines)}\n\n{said}"


def with_tasks(row: Row) -> dict[str, Any]:
    """A case's tasks: of its first trained student, or of the compressed one where none was trained."""
    return {"model": row.case, "tasks": (row.trained or [row.compressed])[0].get("tasks", {})}


def spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def plot(rows: Sequence[Row], path: Path) -> None:
    """KL against bytes: a color a method, a mark a precision; before training or after it, whichever is less."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    marks = dict(zip(PRECISIONS, "os^v", strict=True))
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        for precision, mark in marks.items():
            own = sorted((r for r in rows if (r.method, r.precision) == (method, precision)), key=lambda row: row.share)
            if not own:
                continue
            shares = [100 * row.share for row in own]
            axis.plot(
                shares,
                [best_kl(row) for row in own],
                "-",
                marker=mark,
                color=f"C{number}",
                label=f"{method}, {precision}",
            )
    front = pareto([(100 * row.share, best_kl(row)) for row in rows])
    axis.step(
        *zip(*front, strict=True), where="post", color="black", alpha=0.3, linewidth=6, zorder=0, label="least KL"
    )
    axis.set_yscale("log")
    axis.set_xlabel("bytes, % of the teacher in bf16")
    axis.set_ylabel("held-out KL to the teacher, nats")
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)
    with publishing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None, "Title": MARK})
    plt.close(figure)


def best_kl(row: Row) -> float:
    """Before training or after it: training at a rate for compressed students harms one that is nearly its teacher."""
    trained = [statistics.fmean(found["kl"] for found in row.trained)] if row.trained else []
    return min(row.compressed["kl"], *trained) if trained else row.compressed["kl"]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bytes, KL) that no other is below and left of, by bytes."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
