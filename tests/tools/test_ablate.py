"""Variants over seeds: the runs that are made, their numbers by hand, what a kill leaves, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.config.objective import of_kind
from megakd.config.parsing import load_recipe
from megakd.config.run import RunConfig
from megakd.models.loading import load_model
from megakd.run import Run
from tests.conftest import metrics
from tests.objectives.sar import sar_recipe
from tests.tools.examples import refused, tool

module = tool("ablate")
STAGES = 'stages=[{"name": "all", "steps": 2}]'


@pytest.fixture(scope="module")
def sar(tmp_path_factory, recipe, tokenizer) -> Path:
    return sar_recipe(recipe, tmp_path_factory.mktemp("recipe"), tokenizer)


def config_of(recipe: Path, *overrides: str) -> RunConfig:
    return load_recipe(recipe, overrides)


def last_line(run: Path) -> dict[str, Any]:
    """What `evaluate` wrote of the checkpoint at the end."""
    lines = map(json.loads, (run / "evals.jsonl").read_text().splitlines())
    return next(line for line in lines if line["model"] == "all/step-000002")


def made(folder: Path) -> dict[str, Run]:
    """The runs of variants by their place."""
    return {str(path.parent.relative_to(folder)): Run.open(path.parent) for path in folder.glob("*/*/*/config.json")}


@pytest.fixture(scope="module")
def done(sar, tmp_path_factory) -> tuple[Path, list[str], dict[str, Any]]:
    """Both sets with CE alone over three seeds of two steps: the folder, the command, its JSON."""
    folder = tmp_path_factory.mktemp("ablation") / "runs"
    argv = [str(sar), "--folder", str(folder), "--set", "sar", "online", "--only", "routers-frozen", "ce-alone"]
    argv += [STAGES, "--json", str(folder / "rows.json"), "--plot", str(folder / "rows.png")]
    module.main(argv)
    return folder, argv, json.loads((folder / "rows.json").read_text())


def test_variants_of_a_seed_share_data_and_tokens(done):
    folder, _, _ = done
    runs = made(folder)
    names = ["sar/base", "sar/routers-frozen", "sar/ce-alone", "online/base", "online/ce-alone"]
    assert sorted(runs) == sorted(f"{name}/seed-{seed}" for name in names for seed in range(3))
    place = (folder / "seed-0" / "data" / "tokens").resolve()
    assert {run.path("data", "tokens").resolve() for run in runs.values()} == {place}
    for seed in range(3):
        first = {name: metrics(folder / name / f"seed-{seed}")[0] for name in names}
        # nothing was updated yet: the same text through the same weights
        assert len({round(row["ce"], 4) for row in first.values()}) == 1
        assert len({row["tokens"] for row in first.values()}) == 1
    assert len({metrics(folder / "sar/base" / f"seed-{seed}")[0]["ce"] for seed in range(3)}) == 3


def test_rows_say_what_the_runs_say(done):
    folder, _, found = done
    rows = {(row["set"], row["variant"]): row for row in found["rows"]}
    assert next(iter(rows)) == ("sar", "base") and len(rows) == 5
    for (name, variant), row in rows.items():
        lines = [last_line(folder / name / variant / f"seed-{seed}") for seed in row["seeds"]]
        assert row["nlls"] == [line["nll"] for line in lines]
        assert row["nll"] == pytest.approx(sum(row["nlls"]) / 3) and row["perplexity"] == math.exp(row["nll"])
        assert row["tokens"] == pytest.approx(sum(line["tokens"] for line in lines) / 3)
        if variant == "base":
            assert row["difference"] is None and row["verdict"] == ""
        else:
            differences = [a - b for a, b in zip(row["nlls"], rows[name, "base"]["nlls"], strict=True)]
            assert row["difference"] == pytest.approx(sum(differences) / 3)
            assert row["verdict"] == module.verdict(row["low"], row["high"])
    assert rows["sar", "ce-alone"]["nlls"] == pytest.approx(rows["online", "ce-alone"]["nlls"], rel=1e-5)
    assert rows["sar", "routers-frozen"]["teacher_nlls"] == [found["teacher_nll"]] * 3
    assert all(nll != found["teacher_nll"] for nll in rows["sar", "base"]["teacher_nlls"])
    assert rows["online", "base"]["teacher_nll"] is None
    assert (folder / "rows.png").read_bytes()[:4] == b"\x89PNG"


def test_again_nothing_is_trained(done, capsys):
    folder, argv, found = done
    before = {name: run.path("history.jsonl").read_bytes() for name, run in made(folder).items()}
    capsys.readouterr()
    module.main(argv)
    printed = capsys.readouterr()
    assert {name: run.path("history.jsonl").read_bytes() for name, run in made(folder).items()} == before
    assert json.loads((folder / "rows.json").read_text()) == found
    assert "15/15 online/ce-alone seed 2" in printed.err and "| 0 to do" in printed.err
    lines = [line.split() for line in printed.out.splitlines()]
    assert [line[0] for line in lines if line] == [
        *("sar", "--------------", "base", "routers-frozen", "ce-alone"),
        *("online", "--------", "base", "ce-alone", "means"),
    ]
    row = found["rows"][1]
    assert f"{row['difference']:+.4f}  {row['low']:+.4f} … {row['high']:+.4f}" in printed.out
    assert f"{found['teacher_nll']:.4f}" in printed.out


def test_killed_it_goes_on(sar, tmp_path, monkeypatch):
    """Between training and measuring: that run is measured, the one before it is left alone, the rest is done."""
    argv = [str(sar), STAGES, "--folder", str(tmp_path / "runs"), "--only", "no-anchor", "--json", str(tmp_path / "j")]
    measured = []

    def killed(run: Run, only: str) -> Any:
        measured.append(str(run.folder.relative_to(tmp_path / "runs")))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return original(run, only)

    original = module.evaluate
    monkeypatch.setattr(module, "evaluate", killed)
    with pytest.raises(SystemExit) as ended:
        module.main(argv)
    assert ended.value.code == 130
    assert measured == ["sar/base/seed-0", "sar/base/seed-0", "sar/no-anchor/seed-0"]  # the second: the teacher
    del measured[:]
    monkeypatch.setattr(
        module, "evaluate", lambda run, only: (measured.append(run.config.name), original(run, only))[1]
    )
    module.main(argv)
    assert measured == ["sar-no-anchor-0", "sar-base-1", "sar-no-anchor-1", "sar-base-2", "sar-no-anchor-2"]
    rows = json.loads((tmp_path / "j").read_text())["rows"]
    assert [len(row["nlls"]) for row in rows] == [3, 3]
    assert len(metrics(tmp_path / "runs/sar/no-anchor/seed-0")) == 2


@pytest.mark.parametrize(
    "values, base, mean, half",
    [
        ([1.1, 2.2, 3.3], [1.0, 2.0, 3.0], 0.2, 4.302653 * 0.1 / 3**0.5),  # t of 2 degrees of freedom, s = 0.1
        ([1, 2, 3, 4, 5], [0, 0, 0, 0, 0], 3.0, 2.776445 * 1.581139 / 5**0.5),  # 4 degrees, s = sqrt(10 / 4)
        ([7.0, 7.0, 7.0], [7.5, 7.5, 7.5], -0.5, 0.0),
    ],
)
def test_intervals_by_hand(values, base, mean, half):
    assert module.paired(values, base) == pytest.approx((mean, mean - half, mean + half), abs=1e-6)


def test_seeds_that_differ_much_do_not_hide_a_difference():
    """Which is what pairs are for."""
    base = [5.0, 6.0, 7.0]
    results = [module.Result("base", seed, nll, 10) for seed, nll in enumerate(base)]
    better = [module.Result("a", seed, nll - 0.1 - seed / 100, 10) for seed, nll in enumerate(base)]
    mixed = [module.Result("b", seed, nll + (-1) ** seed, 10) for seed, nll in enumerate(base)]
    worse = [module.Result("c", seed, nll + 0.1 + seed / 100, 10) for seed, nll in enumerate(base)]
    changes: dict[str, list[str]] = {"base": [], "a": ["x=1"], "b": [], "c": []}
    rows = module.compared("sar", [*better, *results, *mixed, *worse], changes)
    assert [row.verdict for row in rows] == ["", "helps", "no difference shown", "hurts"]
    assert rows[1].changes == ["x=1"] and rows[1].difference == pytest.approx(-0.11)
    with pytest.raises(AssertionError):  # other tokens are no fair comparison
        module.compared("sar", [*results, *(each._replace(tokens=9) for each in better)], {"base": [], "a": []})


@pytest.mark.parametrize(
    "low, high, said",
    [
        (-0.2, -0.1, "helps"),
        (0.1, 0.2, "hurts"),
        (-0.1, 0.1, "no difference shown"),
        (0.0, 0.1, "no difference shown"),
        (-0.1, 0.0, "no difference shown"),
    ],
)
def test_verdicts(low, high, said):
    assert module.verdict(low, high) == said


def test_variants_change_what_they_say(sar):
    """Around a recipe where everything is on, and around one where all but the KL is off."""
    found = module.variants("sar", config_of(sar))
    assert list(found) == [
        *("base", "routers-frozen", "routers-slow", "routers-fast", "ce-alone", "no-anchor", "no-entropy"),
        *("no-balance", "anchor-x100", "all-experts", "top-2-to-4"),
    ]
    assert config_of(sar, *found["anchor-x100"]).objective.anchor == 10
    for name in ("routers-slow", "routers-fast"):  # skipped where it is what the recipe does
        assert list(module.variants("sar", config_of(sar, *found[name]))) == [each for each in found if each != name]
    frozen = config_of(sar, *found["routers-frozen"])
    rules = [[(rule.pattern, rule.lr_multiplier) for rule in stage.lr_multipliers] for stage in frozen.stages]
    assert rules == [[], [("embed_tokens", 0)]] and frozen.objective.router_lr_multiplier == 0
    staged = ('stages.1.objective={"alpha": 0.9, "temperature": 1.0}', "objective.routing=all", "objective.entropy=0")
    found = module.variants("sar", config_of(sar, *staged))
    assert "entropy" in found and "all-experts" not in found
    alone = config_of(sar, *staged, *found["ce-alone"])
    assert [alone.at(stage).objective.alpha for stage in alone.stages] == [0, 0]
    assert alone.at(alone.stages[1]).objective.temperature == 1.0

    found = module.variants("online", config_of(sar))
    parts = ["kl", "feature", "attention", "layers", "contrastive"]
    assert list(found) == [
        *("base", "ce-alone", "kl-alone", *(f"no-{name}" for name in parts), "gap", "importance"),
        *("capacity", "all-experts", "rules", "learned-router", "progressive-layers", "thirds", "phases"),
    ]
    online = f"objective={of_kind(config_of(sar).objective, 'online').model_dump_json()}"
    only = config_of(sar, online, *found["kl-alone"]).objective
    assert only.kl and not any(getattr(only, name) for name in parts[1:])
    found = module.variants("online", config_of(sar, online, *found["kl-alone"], "objective.gap=2"))
    more = ["capacity", "all-experts", "rules", "learned-router"]
    assert list(found)[3:] == ["no-kl", "no-gap", *parts[1:], "importance", *more]
    learned = config_of(sar, online, *found["learned-router"], "objective.temperature=[4,1]")
    found = module.variants("online", learned)
    assert "rules" in found and "learned-router" not in found
    phased, alike = (config_of(sar, online, *found[name]) for name in ("phases", "thirds"))
    lengths = [(stage.name, stage.steps) for stage in alike.stages]
    assert lengths == [(stage.name, stage.steps) for stage in phased.stages]
    names = [f"{stage}-{phase}" for stage in ("first", "second") for phase in ("basic", "aligned", "all")]
    assert lengths == list(zip(names, (1, 1, 1, 2, 1, 1), strict=True))
    own = [phased.at(stage).objective for stage in phased.stages[:3]]
    assert [[name for name in parts if getattr(each, name)] for each in own] == [parts[:1], parts[:3], parts]
    assert [each.temperature for each in own] == [(4, 3), (3, 2), (2, 1)]
    assert [phased.at(stage).objective.temperature for stage in alike.stages[3:]] == [(4, 3), (3, 2), (2, 1)]
    cached = f"objective={of_kind(config_of(sar).objective, 'cached').model_dump_json()}"
    found = module.variants("cached", config_of(sar, cached, "stream.curriculum=nll"))
    assert list(found) == ["base", "ce-alone", "kl-alone", "truncated", "as-it-comes", "easy-first-entropy"]
    assert config_of(sar, cached, *found["easy-first-entropy"]).stream.curriculum == "entropy"
    for name in ("sar", "online", "cached"):
        kind = {"sar": [], "online": [online], "cached": [cached]}[name]
        base = config_of(sar, *kind)
        for variant, changes in module.variants(name, base).items():
            assert (config_of(sar, *kind, *changes) == base) == (variant == "base"), variant


def test_students_start_alike_for_a_seed(teacher, recipe, tmp_path):
    config = config_of(recipe)
    first, same, other = (
        module.make_student(tmp_path / place, "32x1", config, seed) for place, seed in (("a", 5), ("b", 5), ("a", 6))
    )
    weights = [load_model(folder, torch.float32).state_dict() for folder in (first, same, other)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[0][name], weights[2][name])
    before = first.stat().st_mtime_ns
    assert module.make_student(tmp_path / "a", "32x1", config, 5) == first and first.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "more, said",
    [
        ("--seeds 2", "--seeds: 2 are too few to say how much seeds differ; give 3 or more"),
        ("--set stored", "--set: 'stored' is none of sar, online, cached"),
        ("--only nothing", "--only: 'nothing' is none of base, routers-frozen"),
        ("--student 64x2", "--student: the recipe has model.student="),
        ("--student 33x2 model.student=null", "--student: '33x2' is no HIDDENxLAYERS with a multiple of 32"),
        ("--student big model.student=null", "--student: 'big' is no HIDDENxLAYERS"),
        ("engine.kind=deepspeed", "engine.kind: deepspeed starts processes of its own; add engine.kind=local"),
        ("objective.anker=1", "unknown key 'objective.anker'; did you mean 'anchor'?"),
        ("--set sar objective.anker=1", "unknown key 'objective.anker'"),
        ("--nothing", "unrecognized arguments: --nothing; see --help"),
    ],
)
def test_mistakes_are_one_line(sar, tmp_path, more, said, capsys):
    argv = [str(sar), "--folder", str(tmp_path / "runs"), *more.split()]
    assert said in refused(module, capsys, *argv)
    assert not (tmp_path / "runs").exists()


def test_another_recipe_in_the_same_folder_is_refused(done, capsys):
    _, argv, _ = done
    said = refused(module, capsys, *argv, "optim.lr=0.5")
    assert "optim.lr of the existing run is 0.01, now it is 0.5; name another --folder" in said
    assert "nowhere: no such recipe" in refused(module, capsys, "nowhere")


def test_list_and_help(sar, tmp_path, capsys):
    module.main([str(sar), "--list", "--set", "sar", "--folder", str(tmp_path / "runs")])
    assert "sar/no-anchor       objective.anchor=0\n" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0 and "python tools/ablate.py demo --student 128x4" in capsys.readouterr().out
