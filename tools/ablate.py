"""What each part of an objective is worth: variants of a run, trained alike over several seeds, compared by seed.

    python tools/ablate.py demo --student 128x4 --set sar engine.kind=local 'stages=[{"name": "all", "steps": 100}]'
    python tools/ablate.py recipe.json --set sar online --seeds 5 --folder ablation --json rows.json --plot rows.png
    python tools/ablate.py recipe.json --set online --list
    python tools/ablate.py recipe.json --set online --only no-kl ce-alone

RECIPE is a recipe, the name of a shipped one or a run's folder; sets of variants change its objective:
  sar     base: section `sar` as it is. Routers frozen, slow, as fast as the student; CE alone; each part off (on where
          it is off); routings.
  online  base: section `online` as it is. CE alone, KL alone, each part off (on where it is off), routings. Experts,
          their weights and positions by rules, or all by the learned router. Layers from the lowest up. Components in
          phases, a third of each stage long, and `thirds`: the same stages, with their schedules, without phases.
  cached  base: the recipe's loss from cached logits, which are captured once. CE alone, KL alone, the teacher cut to
          its stored tokens; easy sequences first, by NLL and by entropy.
Without --set: that of the recipe's objective.kind.

Every variant of every seed is an ordinary run in FOLDER/SET/VARIANT/seed-N over the tokens of FOLDER/seed-N
(cached: and the logits of FOLDER/seed-N-cached). The seed
is that of the order of the data, and of the student's weights where --student makes one: a seed's variants read the
same text in the same order and start alike, so differences are taken by seed. Runs are trained and measured on the
validation set as `megakd train` and `megakd evaluate --model last` do, in this process: engine.kind must be local. The
same command again goes on where it was killed; finished runs are not done again. W&B and TensorBoard are off unless
asked for.

difference: a variant's held-out NLL minus the base's, mean over seeds, with Student's 95 % interval. The change helps
where all of it lies below 0, hurts where all of it lies above; else no difference is shown. Of changes that do nothing
one in twenty helps or hurts all the same.
"""

import argparse
import json
import math
import os
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import installed  # noqa: F401

from megakd.cli import run_verb
from megakd.config.effects import idle_fields
from megakd.config.objective import CachedConfig, OnlineConfig, SarConfig, of_kind
from megakd.config.parsing import load_recipe
from megakd.config.phases import PHASES, in_phases
from megakd.config.run import RunConfig, flatten, is_mutable
from megakd.config.train import LrRule
from megakd.data.tokenizers import load_tokenizer, vocabulary_size
from megakd.errors import UserError
from megakd.evals.evaluate import evaluate
from megakd.finish import lacks
from megakd.names import expand, find_recipe, resolve
from megakd.outputs import check_file
from megakd.run import Run
from megakd.system.files import publishing, read_json_lines, write_json
from megakd.system.logging import say
from megakd.system.terminal import accept_any_encoding, one_line_errors
from megakd.system.text import clock, finite, table

SETS, BASE = ("sar", "online", "cached"), "base"
THIRDS: dict[str, dict[str, Any]] = {"thirds": {name: {} for name in PHASES}, "phases": PHASES}
QUIET = ("log.wandb=disabled", "log.tensorboard=false")
MARK = "made by tools/ablate.py"
EVENT = "ablation"  # in a run's history.jsonl: what was measured of it at its end
MEASURED = ("nll", "tokens", "teacher_nll")  # fields of a Result
WEIGHT = 0.01  # of the terms of `sar` that are off by default, where they are switched on
HEAD_FEATURES = 32  # of a head of attention of a student made here


class Result(NamedTuple):
    """What the validation set says of a finished run. teacher_nll: of the teacher with the routers that it learned."""

    variant: str
    seed: int
    nll: float
    tokens: int
    teacher_nll: float | None = None


class Row(NamedTuple):
    """A variant over its seeds. difference, low, high: to the base, by seed; None for the base itself."""

    set: str
    variant: str
    changes: list[str]
    seeds: list[int]
    nlls: list[float]
    nll: float
    perplexity: float
    teacher_nlls: list[float]
    teacher_nll: float | None
    tokens: float
    difference: float | None
    low: float | None
    high: float | None
    verdict: str


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    with one_line_errors("ablate", "interrupted; the same command goes on"):
        args = parser.parse_intermixed_args(argv)
        # overrides behind --set and --only are none of their names
        for names in (args.set, args.only):
            args.overrides += [word for word in names if "=" in word]
            names[:] = [word for word in names if "=" not in word]
        ablate(args)


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a recipe, the name of a shipped one, or a run's folder")
    add(
        "--folder",
        type=expand,
        default=Path("ablation"),
        metavar="DIR",
        help="where the runs are (default: %(default)s)",
    )
    add("--seeds", type=int, default=3, metavar="N", help="the recipe's seed and those after it (default: %(default)s)")
    add("--set", nargs="+", default=[], metavar="NAME", help=f"of variants: {', '.join(SETS)}")
    add("--only", nargs="+", default=[], metavar="VARIANT", help="of the sets, next to the base")
    add("--list", action="store_true", help="print the variants and what they change, and end")
    size = f"a dense student with random weights and the teacher's tokenizer, HIDDEN a multiple of {HEAD_FEATURES}"
    add("--student", metavar="HIDDENxLAYERS", help=size)
    add("--json", type=expand, metavar="FILE", help="write the rows there too")
    add("--plot", type=expand, metavar="FILE", help="draw the differences there (PNG)")
    add("overrides", nargs="*", metavar="section.key=value", help="of the recipe")


def ablate(args: argparse.Namespace) -> None:
    """Train and measure what is missing, then compare."""
    recipe, overrides = find_recipe(args.recipe), [*QUIET, *args.overrides]
    written, drawn = (file and check_file(file, MARK) for file in (args.json, args.plot))
    config = load_recipe(recipe, overrides)
    plan = planned(args, config)
    if args.list:
        lines = [[f"{name}/{v}", "  ".join(c)] for name, found in plan.items() for v, c in found.items()]
        print(table(["variant", "changes"], lines, left=True))
        return
    jobs = [
        (name, variant, changes, seed)
        for seed in range(config.seed, config.seed + args.seeds)
        for name, found in plan.items()
        for variant, changes in found.items()
    ]
    say(f"ablate: {sum(map(len, plan.values()))} variants x {args.seeds} seeds = {len(jobs)} runs in {args.folder}")
    results: dict[str, list[Result]] = {name: [] for name in plan}
    teacher: float | None = None
    start, made = time.perf_counter(), 0
    for index, (name, variant, changes, seed) in enumerate(jobs):
        source = source_run(args, recipe, config, overrides, name, seed)
        settings = [f"objective={of_kind(config.objective, name).model_dump_json()}"]
        settings += [f"name={name}-{variant}-{seed}", *changes]
        run = opened(args.folder / name / variant / f"seed-{seed}", source.folder, settings)
        found = measured(run.folder)
        if not found:
            run_verb(["train", str(run.folder)])
            row = evaluate(run, "last")[0]
            found, made = {key: row[key] for key in MEASURED if key in row}, made + 1
            run.record(EVENT, **found)
        results[name].append(Result(variant, seed, **found))
        teacher = teacher or teacher_nll(run)
        left = sum(not measured(args.folder / n / v / f"seed-{s}") for n, v, _, s in jobs[index + 1 :])
        eta = f"ETA {clock((time.perf_counter() - start) / made * left)}" if made else f"{left} to do"
        say(f"ablate: {index + 1}/{len(jobs)} {name}/{variant} seed {seed}: NLL {found['nll']:.4f} | {eta}")
    rows = [row for name, found in results.items() for row in compared(name, found, plan[name])]
    print(shown(rows, teacher))
    if written:
        write_json(written, {"made_by": MARK, "teacher_nll": teacher, "rows": [row._asdict() for row in rows]})
    if drawn:
        plot(rows, drawn)


def planned(args: argparse.Namespace, config: RunConfig) -> dict[str, dict[str, list[str]]]:
    """{set: {variant: changes}} of what was asked for; UserError for what cannot be done."""
    if config.engine.kind != "local":
        raise UserError(f"engine.kind: {config.engine.kind} starts processes of its own; add engine.kind=local")
    if args.seeds < 3:
        raise UserError(f"--seeds: {args.seeds} are too few to say how much seeds differ; give 3 or more")
    if args.student and config.model.student:
        raise UserError(f"--student: the recipe has model.student={config.model.student}; give one of both")
    if args.student:
        size_of(args.student)
    names = args.set or [config.objective.kind]
    if wrong := [name for name in names if name not in SETS]:
        raise UserError(f"--set: {wrong[0]!r} is none of {', '.join(SETS)}")
    plan = {name: variants(name, config) for name in dict.fromkeys(names)}
    known = list(dict.fromkeys(variant for found in plan.values() for variant in found))
    if wrong := [name for name in args.only if name not in known]:
        raise UserError(f"--only: {wrong[0]!r} is none of {', '.join(known)}")
    return {
        name: {v: c for v, c in found.items() if not args.only or v in (BASE, *args.only)}
        for name, found in plan.items()
    }


def variants(name: str, config: RunConfig) -> dict[str, list[str]]:
    """{variant: the overrides that make it} of a set around a configuration."""
    return {"sar": sar_variants, "online": online_variants, "cached": cached_variants}[name](config)


def cached_variants(config: RunConfig) -> dict[str, list[str]]:
    objective, now = of_kind(config.objective, "cached"), config.stream.curriculum
    assert isinstance(objective, CachedConfig), objective
    orders = {"as-it-comes": "off", "easy-first-nll": "nll", "easy-first-entropy": "entropy"}
    return {
        BASE: [],
        "ce-alone": ce_alone(config),
        "kl-alone": ["objective.alpha=1"],
        **({} if objective.tail == "truncated" else {"truncated": ["objective.tail=truncated"]}),
        **{name: [f"stream.curriculum={kind}"] for name, kind in orders.items() if kind != now},
    }


def sar_variants(config: RunConfig) -> dict[str, list[str]]:
    on = {"anchor": SarConfig().anchor, "entropy": WEIGHT, "balance": WEIGHT}
    frozen = routers_at(config, 0.0)
    rates = {"routers-slow": 0.1, "routers-fast": 1.0}
    # at the student's rate a weak anchor does not hold routers: the teacher becomes as bad as the student
    # (docs/online-distillation.md)
    sar = sar_of(config)
    strong = {"anchor-x100": [f"objective.anchor={100 * sar.anchor:g}"]} if sar.anchor else {}
    return {
        BASE: [],
        "routers-frozen": frozen,
        **{name: routers_at(config, rate) for name, rate in rates.items() if not in_force(config, rate)},
        "ce-alone": [*frozen, *ce_alone(config)],
        **switched(sar, on),
        **strong,
        **routings(sar, {"all-experts": ("all",), "top-2-to-4": ("top_m", 2, 4)}),
    }


def sar_of(config: RunConfig) -> SarConfig:
    objective = of_kind(config.objective, "sar")
    assert isinstance(objective, SarConfig), objective
    return objective


def online_variants(config: RunConfig) -> dict[str, list[str]]:
    parts = {name: getattr(OnlineConfig(), name) for name in ("kl", "feature", "attention", "layers", "contrastive")}
    inside = [f"objective.{name}=0" for name in parts if name != "kl"]
    plain = ["objective.gap=0", "objective.importance=0", "objective.routing=trained"]
    online = of_kind(config.objective, "online")
    return {
        BASE: [],
        "ce-alone": [*ce_alone(config), "objective.kl=0", *inside, *plain],
        "kl-alone": [*inside, *plain],
        **switched(online, {**parts, "gap": 1.0, "importance": 1.0}),
        **routings(online, {"capacity": ("capacity", 1, 4), "all-experts": ("all",)}),
        **adapted(online),
        **progressive(config, online),
    }


def adapted(settings: Any) -> dict[str, list[str]]:
    """The teacher's experts, their weights and the positions: all by rules, or all by the learned router."""
    full = [f"objective.{key}" for key in ("gap=1", "importance=1", "initial_top_k=1", "final_top_k=4")]
    now = settings.routing, settings.gap, settings.importance
    ways = {"rules": "capacity", "learned-router": "learned"}
    return {name: [f"objective.routing={rule}", *full] for name, rule in ways.items() if now != (rule, 1, 1)}


def progressive(config: RunConfig, settings: Any) -> dict[str, list[str]]:
    """Layers from the lowest up; components in phases, and the same three stages without phases to compare with."""
    found = {}
    if settings.layers:
        found["layers-at-once" if settings.progressive_layers else "progressive-layers"] = [
            f"objective.progressive_layers={json.dumps(not settings.progressive_layers)}"
        ]
    if any(getattr(settings, name) for name in ("feature", "attention", "layers", "contrastive")):
        found |= {name: [f"stages={json.dumps(thirds(config, phases))}"] for name, phases in THIRDS.items()}
    return found


def thirds(config: RunConfig, phases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every stage of a configuration in three; their steps add up to its own (passes: up to two steps more)."""
    stages = []
    for stage in config.stages:
        value = stage.model_dump(mode="json", exclude_defaults=True)
        if stage.tokens:
            value = {**value, "tokens": None, "steps": config.steps_of(stage)}
        stages += in_phases(value, config.at(stage).objective.model_dump(mode="json"), phases)
    return stages


def switched(settings: Any, on: dict[str, float]) -> dict[str, list[str]]:
    """A variant for each weight: 0 where it is on, else what `on` says."""
    return {
        **{f"no-{name}": [f"objective.{name}=0"] for name in on if getattr(settings, name)},
        **{name: [f"objective.{name}={value}"] for name, value in on.items() if not getattr(settings, name)},
    }


def routings(settings: Any, rules: dict[str, tuple[Any, ...]]) -> dict[str, list[str]]:
    """A variant for each (rule, first, last) that is not the one in force."""
    now = settings.routing, settings.initial_top_k, settings.final_top_k
    keys = [f"objective.{key}" for key in ("routing", "initial_top_k", "final_top_k")]
    return {
        name: [f"{key}={value}" for key, value in zip(keys, rule, strict=False)]
        for name, rule in rules.items()
        if now[: len(rule)] != rule
    }


def routers_at(config: RunConfig, multiplier: float) -> list[str]:
    """The routers' rate in every stage, without rules of its own for them."""
    rules = [[r.model_dump() for r in stage.lr_multipliers if not _of_routers(r)] for stage in config.stages]
    changed = [
        f"stages.{i}.lr_multipliers={json.dumps(kept)}"
        for i, (stage, kept) in enumerate(zip(config.stages, rules, strict=True))
        if len(kept) < len(stage.lr_multipliers)
    ]
    return [f"objective.router_lr_multiplier={multiplier}", *changed]


def in_force(config: RunConfig, multiplier: float) -> bool:
    """Whether the routers of every stage have that rate anyway."""
    own = sar_of(config).router_lr_multiplier
    return all(
        multiplier == next((r.lr_multiplier for r in stage.lr_multipliers if _of_routers(r)), own)
        for stage in config.stages
    )


def _of_routers(rule: LrRule) -> bool:
    return rule.pattern.lstrip("^").startswith("routers")


def ce_alone(config: RunConfig) -> list[str]:
    """alpha 0, whatever stages say."""
    own = [(i, stage.objective) for i, stage in enumerate(config.stages) if "alpha" in stage.objective]
    return ["objective.alpha=0", *(f"stages.{i}.objective={json.dumps({**o, 'alpha': 0})}" for i, o in own)]


def source_run(
    args: argparse.Namespace, recipe: Path, config: RunConfig, overrides: list[str], name: str, seed: int
) -> Run:
    """The run of a seed that a set's variants take data and student from; never trained itself.

    One for all live teachers, another with cached logits. From that of the first seed it inherits what would be alike.
    """
    # text for a live teacher is cut by the student's tokenizer, else by the teacher's
    kind, place = ("cached", "seed-{}-cached") if name == "cached" else ("sar", "seed-{}")
    folder, first, student = args.folder / place.format(seed), args.folder / place.format(config.seed), args.student
    overrides = [*overrides, f"objective={of_kind(config.objective, kind).model_dump_json()}"]
    settings = [f"seed={seed}"]
    if student:
        settings.append(f"model.student={make_student(folder.parent, student, load_recipe(recipe, overrides), seed)}")
    run = opened(folder, recipe, [*overrides, *settings]) if folder == first else opened(folder, first, settings)
    if not run.path("data", "tokens", "train", "manifest.json").exists():
        run_verb(["tokenize", str(folder)])
    if not (run.student_folder / "config.json").exists():
        run_verb(["compress", str(folder)])
    if kind == "cached" and lacks(run, "generate-logits") is not None:
        run_verb(["generate-logits", str(folder)])
    return run


def opened(folder: Path, source: Path, overrides: Sequence[str]) -> Run:
    """The run in `folder`, made of `source` where there is none; UserError where it is another.

    A field that a variant leaves without effect goes back to its default: nobody gave it to this run.
    """
    file = source / "config.json" if source.is_dir() else source
    idle = [each for each in idle_fields(load_recipe(file, overrides)) if not each.replaced]
    overrides = [*overrides, *(f"{each.path}={json.dumps(each.default)}" for each in idle)]
    if not (folder / "config.json").exists():
        return Run.create(source, overrides, folder)
    run = Run.open(folder)
    wanted = load_recipe(file, overrides)
    before, now = (dict(flatten(each.model_dump(mode="json"))) for each in (run.config, wanted))
    for key in {**before, **now}:
        if before.get(key) != now.get(key) and not is_mutable(key):
            was, asked = (json.dumps(each.get(key)) for each in (before, now))
            raise UserError(f"{folder}: {key} of the existing run is {was}, now it is {asked}; name another --folder")
    return run


def size_of(student: str) -> tuple[int, int]:
    """(hidden size, layers) of 128x4."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", student)
    hidden, layers = map(int, found.groups()) if found else (0, 0)
    if not hidden or hidden % HEAD_FEATURES:
        raise UserError(f"--student: {student!r} is no HIDDENxLAYERS with a multiple of {HEAD_FEATURES}, like 128x4")
    return hidden, layers


def make_student(folder: Path, size: str, config: RunConfig, seed: int) -> Path:
    """`folder`/student-SIZE-seed-N: a Llama of random weights with the teacher's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder.absolute() / f"student-{size}-seed-{seed}"
    if path.exists():
        return path
    hidden, layers = size_of(size)
    tokenizer: Any = load_tokenizer(resolve(config.model.teacher, config.model.revision, weights=False))
    shape = LlamaConfig(
        vocab_size=vocabulary_size(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_FEATURES, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, max_position_embeddings=config.data.sequence_length,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(shape)
    with publishing(path) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    say(f"ablate: {path.name}: {model.num_parameters():,} parameters")
    return path


def measured(folder: Path) -> dict[str, Any]:
    """What a run's history says was measured at its end; empty before that."""
    rows = [row for row in read_json_lines(folder / "history.jsonl", "event") if row["event"] == EVENT]
    return {key: rows[-1][key] for key in MEASURED if key in rows[-1]} if rows else {}


def teacher_nll(run: Run) -> float:
    """The teacher's own NLL on the run's validation set, as it was; measured once."""
    known = [
        row
        for row in read_json_lines(run.path("evals.jsonl"), "model")
        if row["model"] == "teacher" and finite(row.get("nll"))
    ]
    return (known or evaluate(run, "teacher"))[-1]["nll"]


def compared(name: str, results: Sequence[Result], changes: dict[str, list[str]]) -> list[Row]:
    """A row for each variant of a set, the base first; every variant has the base's seeds."""
    by_variant = {variant: [each for each in results if each.variant == variant] for variant in changes}
    base = by_variant[BASE]
    rows = []
    for variant, found in by_variant.items():
        # equal tokens of equal data: what is compared is the change alone
        assert [(r.seed, r.tokens) for r in found] == [(r.seed, r.tokens) for r in base], (found, base)
        nlls, theirs = [each.nll for each in found], [each.teacher_nll for each in found]
        taught = [nll for nll in theirs if nll is not None]
        nll = statistics.fmean(nlls)
        interval = None if variant == BASE else paired(nlls, [each.nll for each in base])
        rows.append(
            Row(
                name, variant, changes[variant], [each.seed for each in found], nlls, nll, math.exp(nll),
                taught, statistics.fmean(taught) if taught else None, statistics.fmean(each.tokens for each in found),
                *(interval or (None, None, None)), "" if interval is None else verdict(*interval[1:]),
            )
        )  # fmt: skip
    return rows


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of the differences by seed: mean -+ t(0.975, n - 1) s / sqrt(n) (Student 1908)."""
    from scipy.stats import t

    differences = [value - other for value, other in zip(values, base, strict=True)]
    mean = statistics.fmean(differences)
    half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    return "helps" if high < 0 else "hurts" if low > 0 else "no difference shown"


def shown(rows: Sequence[Row], teacher: float | None) -> str:
    """A table a set, a variant a line."""
    headers = ["validation set NLL", "perplexity", "difference", "95 % interval", "teacher's NLL", "tokens", "verdict"]
    parts = []
    for name in dict.fromkeys(row.set for row in rows):
        lines = []
        for row in (row for row in rows if row.set == name):
            interval = ["", ""]
            if row.difference is not None:
                interval = [f"{row.difference:+.4f}", f"{row.low:+.4f} … {row.high:+.4f}"]
            taught = "" if row.teacher_nll is None else f"{row.teacher_nll:.4f}"
            numbers = [f"{row.nll:.4f}", f"{row.perplexity:.2f}", *interval, taught, f"{row.tokens:,.0f}", row.verdict]
            lines.append([row.variant, *numbers])
        parts.append(table([name, *headers], lines))
    seeds = len(rows[0].seeds)
    parts.append(f"means over {seeds} seeds; the teacher as it was: NLL {teacher:.4f}")
    return "\n\n".join(parts)


def plot(rows: Sequence[Row], path: Path) -> None:
    """A PNG of the differences with their intervals, a panel a set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.set for row in rows))
    panels = [[row for row in rows if row.set == name and row.difference is not None][::-1] for name in names]
    height = 1.2 + 0.3 * max(map(len, panels))
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), height), layout="constrained", squeeze=False)
    colors = {"helps": "tab:green", "hurts": "tab:red", "no difference shown": "tab:gray"}
    for axis, name, panel in zip(axes[0], names, panels, strict=True):
        for place, row in enumerate(panel):
            assert row.low is not None and row.high is not None, row
            axis.plot([row.low, row.high], [place, place], color=colors[row.verdict], linewidth=2)
            axis.plot(row.difference, place, "o", color=colors[row.verdict])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(panel)), [row.variant for row in panel])
        axis.set_title(f"{name}: validation set NLL minus the base's, 95 % intervals", fontsize=10)
    with publishing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None, "Title": MARK})
    plt.close(figure)


if __name__ == "__main__":
    main()
