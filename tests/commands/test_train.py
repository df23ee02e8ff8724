"""Training on damaged and remote shards, and on every kind of target; each test a whole small run."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megakd import cli
from megakd.data.batches import collate
from megakd.data.shards import ShardSet
from megakd.data.stream import Stream
from megakd.errors import UserError
from megakd.run import Run
from megakd.train.build import build_objective
from tests.conftest import forked_ranks, metrics

Make = Callable[..., Run]


def megakd(*argv: object) -> None:
    """`megakd ARGV` in this process, which has loaded the libraries."""
    cli.run_verb([str(each) for each in argv])


def own_logits(run: Run) -> Path:
    """Replace the run's link to another run's logits by a copy that a test may damage; the training shards."""
    link = run.path("data", "logits")
    source = link.resolve()
    link.unlink()
    shutil.copytree(source, link)
    return link / "train"


def flip(folder: Path, index: int) -> str:
    """Change a byte in the middle of a sample; its key."""
    shards = ShardSet(folder)
    number = next(n for n in range(len(shards.sizes)) if index < sum(shards.sizes[: n + 1]))
    entry, tar = shards.entry(index), folder / f"{shards.names[number]}.tar"
    data = bytearray(tar.read_bytes())
    data[entry.offset + entry.size // 2] ^= 1
    tar.write_bytes(data)
    return entry.key


def order_of(run: Run, count: int) -> list[int]:
    shards = ShardSet(run.path("data", "logits", "train"), growing=True)
    return Stream(shards.sizes, run.config.seed, run.config.stream.lanes).take(0, count)


def weights(run: Run, step: int = 10) -> dict[str, torch.Tensor]:
    (folder,) = run.path("checkpoints").glob(f"*/step-{step:06d}")
    return load_file(folder / "weights" / "model.safetensors")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    assert before.keys() == after.keys()
    return not all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.create(prepared, [], tmp_path_factory.mktemp("undisturbed") / "run")
    megakd("train", run.folder)
    return run


def test_damaged_samples_are_left_out_counted_and_named(sibling: Make, undisturbed: Run, capsys):
    """Two in the first step, whose loss is that of the other 14 over their tokens, and one in the seventh."""
    run = sibling()
    train, order = own_logits(run), order_of(run, 160)
    bad = [order[3], order[14], order[6 * 16 + 5]]
    keys = [flip(train, index) for index in bad]
    megakd("train", run.folder, "stream.on_damage=skip")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: skipped: ")]
    rows, whole = metrics(run.folder), metrics(undisturbed.folder)
    assert [row.get("damaged_samples") for row in rows] == [2] * 4 + [None] * 2 + [1] * 4  # counted within a stage
    events = [json.loads(line) for line in run.path("history.jsonl").read_text().splitlines()]
    named = [event["sample"] for event in events if event["event"] == "damaged"]
    for found in (said, named):
        assert len(found) == 3
        for key, text in zip(keys, found, strict=True):
            assert f"sample {key}: checksum does not match" in text and "shard-0000" in text
    shards = ShardSet(run.path("data", "logits", "train"))
    lost = [shards.entry(index).labels for index in bad]
    assert min(lost) > 0
    steps = [row["tokens"] - before["tokens"] for before, row in zip([{"tokens": 0}, *rows[:-1]], rows, strict=True)]
    expected = [sum(shards.entry(i).labels for i in order[s : s + 16]) for s in range(0, 160, 16)]
    expected[0] -= lost[0] + lost[1]
    expected[6] -= lost[2]
    assert steps == expected
    objective = build_objective(run.config, run.student_folder, shards.facts)
    with torch.no_grad():
        report = objective(collate([shards[i] for i in order[:16] if i not in bad], 32))
    for name in ("ce", "kl", "kl_t1"):
        assert rows[0][name] == pytest.approx(report.terms[name].item() / steps[0], rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(report.total.item() / steps[0], rel=1e-5)
    assert rows[0]["ce"] != pytest.approx(whole[0]["ce"], rel=1e-5)
    # what the damaged samples would have taught is all that is missing
    assert [row["lr"] for row in rows] == [row["lr"] for row in whole]
    assert rows[-1]["kl_t1"] == pytest.approx(whole[-1]["kl_t1"], rel=0.05)


@pytest.mark.ranks
def test_ranks_leave_out_together_what_one_process_does(sibling: Make):
    """Each rank meets its own damage; the tokens that count are those of all."""
    runs = [
        sibling("stream.on_damage=skip", "optim.micro_batch=2"),
        sibling("stream.on_damage=skip", "engine.kind=deepspeed", "engine.config=zero2", "engine.ranks=2"),
    ]
    for run in runs:
        train, order = own_logits(run), order_of(run, 160)
        for place in (2, 5, 16, *range(80, 96), 120):  # even: the first rank's; the sixth step whole
            flip(train, order[place])
    megakd("train", runs[0].folder)
    forked_ranks(2, "train", runs[1].folder)
    local, ranks = (metrics(run.folder) for run in runs)
    assert [row.get("damaged_samples") for row in local] == [2, 3, 3, 3, None, 16, 16, 17, 17, 17]
    for mine, theirs in zip(ranks, local, strict=True):
        assert (mine.get("damaged_samples"), mine["tokens"]) == (theirs.get("damaged_samples"), theirs["tokens"])
        names = [name for name in ("loss", "ce", "kl", "kl_t1") if name in theirs]
        assert mine.keys() == theirs.keys() and [mine[n] for n in names] == pytest.approx(
            [theirs[n] for n in names], abs=2e-5
        )
    assert runs[1].path("history.jsonl").read_text().count('"event": "damaged"') == 20


def test_a_shard_that_was_cut_short_is_left_out_where_it_is_cut(sibling: Make, capsys):
    run = sibling()
    train, order = own_logits(run), order_of(run, 160)
    shards, tar = ShardSet(train), train / "shard-00002.tar"
    first = sum(shards.sizes[:2])
    tar.write_bytes(tar.read_bytes()[: shards.entry(first + 40).offset])
    with pytest.raises(UserError, match=r"shard-00002\.tar.*cut short"):
        megakd("train", run.folder)
    megakd("train", run.folder, "stream.on_damage=skip")
    cut = {shards.entry(i).key for i in order if first + 40 <= i < first + shards.sizes[2]}
    said = capsys.readouterr().err
    assert len(cut) > 3 and {key for key in cut if f"sample {key}: checksum" in said} == cut
    assert said.count("skipped") == len(cut)


def test_a_step_whose_samples_are_all_damaged_spoils_no_weight(sibling: Make):
    """One shard at a time: the first two of ten steps lie within what was cut off the first shard."""
    run = sibling("stream.lanes=1", "checkpoint.every_steps=1")
    train = own_logits(run)
    tar, lost = train / "shard-00000.tar", ShardSet(train).sizes[0]
    tar.write_bytes(tar.read_bytes()[:600])
    megakd("train", run.folder, "stream.on_damage=skip")
    rows = metrics(run.folder)
    assert rows[0]["damaged_samples"] == 16 and rows[3]["damaged_samples"] == min(64, lost)
    assert all(math.isfinite(row[name]) for row in rows for name in ("tokens", "lr", "grad_norm"))
    learnt = [all(math.isfinite(row.get(name, math.nan)) for name in ("loss", "ce", "kl", "kl_t1")) for row in rows]
    assert learnt == [False] * (lost // 16) + [True] * (10 - lost // 16)
    assert [row["tokens"] for row in rows[:2]] == [0, 0]
    start = load_file(run.student_folder / "model.safetensors")
    for step in (1, 2, 10):
        assert all(tensor.isfinite().all() for tensor in weights(run, step).values())
        assert moved(start, weights(run, step)) == (step == 10)


def test_a_step_without_samples_moves_nothing_by_momentum_or_decay(sibling: Make):
    """The second of the second stage; it counts as done, and those around it learn."""
    run = sibling("checkpoint.every_steps=1")
    train, order = own_logits(run), order_of(run, 160)
    for index in order[5 * 16 : 6 * 16]:
        flip(train, index)
    megakd("train", run.folder, "stream.on_damage=skip")
    assert [moved(weights(run, step), weights(run, step + 1)) for step in (5, 6)] == [False, True]
    saved = [run.path("checkpoints", "all", f"step-{step:06d}", "state", "local.pt") for step in (5, 6)]
    states = [torch.load(path, weights_only=True) for path in saved]
    moments = [[group["exp_avg"] for group in state["optimizer"]["state"].values()] for state in states]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True)) and any(m.any() for m in moments[0])
    rows = metrics(run.folder)
    assert [row["step"] for row in rows] == list(range(1, 11)) and rows[5]["tokens"] == rows[4]["tokens"]
    assert ["loss" in row for row in rows] == [True] * 5 + [False] + [True] * 4
    megakd("report", run.folder)


def test_a_damaged_sample_is_named_once_a_run(sibling: Make, capsys):
    """Not again in each of three epochs, nor after a resume; but it counts each time that it is skipped."""
    run = sibling("stages.1.tokens=20480", "checkpoint.every_steps=20")
    train, order = own_logits(run), order_of(run, 44 * 16)
    key = flip(train, order[100])
    megakd("train", run.folder, "stream.on_damage=skip")
    said = capsys.readouterr().err
    assert said.count("skipped: ") == 1 and f"sample {key}: checksum" in said
    in_stage = order[4 * 16 :].count(order[100])
    assert in_stage > 1 and metrics(run.folder)[-1]["damaged_samples"] == in_stage
    assert len(run.events("damaged")) == 1
    for folder in run.path("checkpoints").glob("all/step-*"):
        shutil.rmtree(folder)
    megakd("train", run.folder, "stream.on_damage=skip")
    assert "skipped" not in capsys.readouterr().err and len(run.events("damaged")) == 1
    assert metrics(run.folder)[-1]["damaged_samples"] == in_stage


def test_damage_stops_a_run_that_was_not_told_to_skip(sibling: Make, monkeypatch, capsys):
    run = sibling()
    key = flip(own_logits(run), order_of(run, 160)[4 * 16 + 2])
    monkeypatch.setattr(sys, "argv", ["megakd", "train", str(run.folder)])
    with pytest.raises(SystemExit) as ended:
        cli.run_command_line()
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert last.startswith("megakd: ") and f".tar: sample {key}: checksum does not match" in last
    assert "generate-logits" in last
    assert len(metrics(run.folder)) == 4  # up to the step before


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_run_over_lanes_resumes_exactly(sibling: Make, lanes, tmp_path):
    """In the second stage, in the middle of shards; also from copies on a local disk."""
    run = sibling(f"stream.lanes={lanes}")
    megakd("train", run.folder)
    expected, trained = metrics(run.folder), weights(run)
    assert len(expected) == 10
    for folder in run.path("checkpoints").glob("*/step-*"):
        if folder.name > "step-000007":
            shutil.rmtree(folder)
    (tmp_path / "scratch").mkdir()
    megakd("train", run.folder, f"stream.scratch={tmp_path / 'scratch'}", "stream.workers=3")
    assert metrics(run.folder) == expected
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(run).items())
    assert list((tmp_path / "scratch").iterdir()) == []


def test_lanes_are_another_order_of_the_same_samples(sibling: Make, undisturbed: Run):
    run = sibling("stream.lanes=2")
    assert sorted(order_of(run, 250)) == sorted(order_of(undisturbed, 250)) == list(range(250))
    megakd("train", run.folder)
    assert metrics(run.folder)[0]["ce"] != metrics(undisturbed.folder)[0]["ce"]
    shards = ShardSet(run.path("data", "logits", "train"))
    objective = build_objective(run.config, run.student_folder, shards.facts)
    with torch.no_grad():
        report = objective(collate([shards[i] for i in order_of(run, 16)], 32))
    tokens = metrics(run.folder)[0]["tokens"]
    assert metrics(run.folder)[0]["ce"] == pytest.approx(report.terms["ce"].item() / tokens, rel=1e-5)


@pytest.mark.parametrize("override", ["stream.follow=true", "stream.scratch=."])
def test_following_and_copying_need_lanes(sibling: Make, override):
    with pytest.raises(UserError, match=r"has no effect: it needs stream\.lanes, like 8"):
        megakd("train", sibling().folder, override)


def test_scratch_must_be_a_folder(sibling: Make, tmp_path):
    with pytest.raises(UserError, match=r"stream\.scratch: .*nowhere is no folder"):
        megakd("train", sibling("stream.lanes=1").folder, f"stream.scratch={tmp_path / 'nowhere'}")


@torch.no_grad()
def mean_kl(run: Run, student: Path, shards: ShardSet) -> float:
    """The run's KL of a student over all that it trains on."""
    objective = build_objective(run.config, student, shards.facts)
    report = objective(collate([shards[i] for i in order_of(run, 160)], 32))
    return report.terms["kl"].item() / sum(shards.entry(i).labels for i in order_of(run, 160))


@pytest.mark.parametrize(
    "profile, temperature, tail",
    [("sampled", 1.0, "sampled"), ("sampled", 2.0, "sampled"), ("hybrid", 2.0, "hybrid"), ("hybrid", 2.0, "ghost")],
)
def test_every_kind_of_target_trains(sibling: Make, profile, temperature, tail, capsys):
    """Loss and held-out KL fall; the validation set keeps the teacher's head whatever trains; all verbs go on."""
    run = sibling(
        f"logits.profile={profile}", f"logits.draw_temperature={temperature}", "logits.draws=12", "logits.top_k=4",
        f"logits.temperatures=[1.0, {temperature}]", f"objective.temperature={temperature}", f"objective.tail={tail}",
        "objective.alpha=1.0",
    )  # fmt: skip
    megakd("generate-logits", run.folder)
    train, holdout = (ShardSet(run.path("data", "logits", part)) for part in ("train", "holdout"))
    assert (train.facts["profile"], train.facts["draws"], train.facts["draw_temperature"]) == (profile, 12, temperature)
    assert (train.facts["top_k"], train.facts["tails"]) == ((0, False) if profile == "sampled" else (4, True))
    assert (holdout.facts["profile"], holdout.facts["top_k"], holdout.facts["draws"]) == ("topk", 4, 0)
    assert train[0].targets.draw_shares.shape[1] == 12 and holdout[0].targets.draw_shares.shape[1] == 0
    megakd("train", run.folder)
    rows, last = metrics(run.folder), run.path("checkpoints", "all", "step-000010")
    assert len(rows) == 10 and all(math.isfinite(row["loss"]) for row in rows)
    assert all(("kl_t1" in row) == ((profile, temperature) != ("sampled", 2.0)) for row in rows)
    before, after = (mean_kl(run, folder, train) for folder in (run.student_folder, last / "weights"))
    assert after < before - 3e-4  # paired: the noise of draws and of stored entropies is in both
    assert rows[0]["loss"] == pytest.approx(temperature**2 * rows[0]["kl"], rel=1e-5)
    capsys.readouterr()
    megakd("evaluate", run.folder)
    found = {row["model"]: row for row in map(json.loads, run.path("evals.jsonl").read_text().splitlines())}
    assert found["all/step-000010"]["kl"] < 0.97 * found["student-0"]["kl"]
    assert found["teacher"]["kl"] < 0.02 * found["student-0"]["kl"]
    megakd("report", run.folder)
    assert "held-out" in run.path("report.html").read_text().lower()


def test_a_stage_trains_with_its_own_loss_batch_and_length(sibling: Make):
    """An epoch is as many windows as the training shards hold; alpha moves from its first to its last step."""
    loss = "stages.1.objective=" + json.dumps({"alpha": [1.0, 0.0], "temperature": 1.0})
    run = sibling("stages.1.tokens=null", "stages.1.epochs=0.5", 'stages.1.optim={"batch_tokens": 256}', loss)
    windows = len(ShardSet(run.path("data", "logits", "train")))
    megakd("train", run.folder)
    rows = metrics(run.folder)
    steps = -(-windows // 2 // 8)
    assert len(rows) == 4 + steps and steps > 5
    labels = [row["tokens"] - before["tokens"] for before, row in pairwise(rows)]
    assert all(label > 400 for label in labels[:3]) and all(label <= 256 for label in labels[3:])
    for number, row in enumerate(rows[4:]):
        alpha = 1 - number / (steps - 1)
        assert row["loss"] == pytest.approx((1 - alpha) * row["ce"] + alpha * row["kl"], rel=1e-5)
    assert rows[3]["loss"] == pytest.approx(0.3 * rows[3]["ce"] + 0.7 * 4 * rows[3]["kl"], rel=1e-5)
