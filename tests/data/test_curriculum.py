"""Easy sequences first: how hard each is, which may be drawn when, and one order for any ranks, resumed or not."""

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megakd.config.data import StreamConfig
from megakd.config.parsing import load_recipe
from megakd.data import curriculum as module
from megakd.data.curriculum import MEASURES, Curriculum, difficulties, open_curriculum
from megakd.data.shards import ShardSet
from megakd.data.stream import Stream, shards_digest
from megakd.engine.checkpoint import Progress, published
from megakd.errors import UserError
from megakd.run import Run
from megakd.system.dist import World
from megakd.train.data import stage_data
from tests.conftest import for_each, in_process, metrics
from tests.data.test_stream import documented

EASIEST = [3, 0, 4, 1, 2]


def allowed(place: int, epoch: int, size: int, start: float, epochs: float) -> int:
    """How many of the easiest may be drawn, by Platanios et al. (2019), eq. 8, and at least one that is left."""
    t, T = epoch * size + place, epochs * size
    return max(math.ceil(min(1.0, math.sqrt(t * (1 - start**2) / T + start**2)) * size), place + 1)


def reference_odds(easiest: list[int], epoch: int, start: float, epochs: float) -> dict[tuple[int, ...], float]:
    """The probability of every order: at each place one of the allowed that are left, all alike."""
    odds: dict[tuple[int, ...], float] = {(): 1.0}
    for place in range(len(easiest)):
        pool, longer = easiest[: allowed(place, epoch, len(easiest), start, epochs)], {}
        for drawn, odd in odds.items():
            left = [sample for sample in pool if sample not in drawn]
            longer |= {(*drawn, sample): odd / len(left) for sample in left}
        odds = longer
    return odds


@for_each("start, epochs, epoch", [(0.3, 1.0, 0), (0.05, 3.0, 0), (0.05, 3.0, 2), (0.5, 0.5, 0)])
def test_orders_are_as_likely_as_drawing_from_the_easiest_that_are_left(start, epochs, epoch):
    odds = reference_odds(EASIEST, epoch, start, epochs)
    curriculum, count = Curriculum(np.array(EASIEST), start, epochs), 4000
    found = Counter(tuple(curriculum.order(epoch, np.random.default_rng([seed, 9])).tolist()) for seed in range(count))
    assert set(found) <= set(odds)
    for order, odd in odds.items():
        assert abs(found[order] / count - odd) < 5 * math.sqrt(odd * (1 - odd) / count) + 1e-9, order


@for_each("size, start, epochs", [(1, 0.1, 1.0), (37, 0.01, 1.0), (200, 0.2, 2.5), (50, 0.4, 0.3)])
def test_each_epoch_has_every_sample_once_and_no_harder_one_than_competence_allows(size, start, epochs):
    easiest = np.random.default_rng(0).permutation(size)
    rank = np.argsort(easiest)
    stream = Stream([size], 3, 0, Curriculum(easiest, start, epochs))
    plain = Stream([size], 3)
    for epoch in range(5):
        order = stream.take(epoch * size, size)
        assert sorted(order) == list(range(size))
        if epoch >= epochs:  # all may be drawn
            assert order == plain.take(epoch * size, size)
        else:
            assert all(rank[s] < allowed(place, epoch, size, start, epochs) for place, s in enumerate(order))
    for position in (0, size // 2, size + 1):  # a new process knows the position alone
        again = Stream([size], 3, 0, Curriculum(easiest, start, epochs))
        assert again.take(position, 2 * size) == stream.take(position, 2 * size)


def test_easy_ones_come_first_and_other_seeds_draw_otherwise():
    curriculum = Curriculum(np.arange(1000), 0.05, 1.0)
    means = [np.mean(Stream([1000], 0, 0, curriculum).take(place, 200)) for place in range(0, 1000, 200)]
    assert means == sorted(means) and means[0] < 250 and means[-1] > 600
    assert Stream([1000], 1, 0, curriculum).take(0, 50) != Stream([1000], 0, 0, curriculum).take(0, 50)


def test_the_documented_rule_gives_the_order():
    made = documented("curriculum_order")
    curriculum = Curriculum(np.array(EASIEST * 8).argsort(kind="stable"), 0.1, 1.5)
    for seed, epoch in ((0, 0), (3, 0), (3, 1)):
        expected = made(curriculum.easiest.tolist(), seed, epoch, 0.1, 1.5)
        assert Stream([40], seed, 0, curriculum).take(epoch * 40, 40) == expected


# ---- how hard sequences are


@pytest.fixture(scope="module")
def own(prepared, tmp_path_factory) -> Path:
    """A copy of the training logits: what is measured is written next to them."""
    return Path(shutil.copytree(prepared / "data" / "logits" / "train", tmp_path_factory.mktemp("own") / "train"))


def test_difficulty_is_measured_once_and_again_where_its_file_is_damaged(own, monkeypatch):
    shards = ShardSet(own)
    for measure in MEASURES:
        values = difficulties(shards, measure, 2)
        for index in (0, 7, len(shards) - 1):
            sample = shards[index]
            assert sample.targets is not None
            targets, labelled = sample.targets, set(range(len(sample.tokens) - 1)) - {s - 1 for s in sample.starts}
            if measure == "nll":
                expected = sum(float(targets.label_nll[t]) for t in labelled) / len(labelled)
            else:
                logs = np.concatenate([targets.logprobs, targets.log_tails[:, :1]], 1).astype(float).tolist()
                sums = [-sum(math.exp(x) * x for x in row if x > -math.inf) for row in logs]
                expected = sum(sums) / len(sums)
            assert values[index] == pytest.approx(expected, rel=1e-6)
        [file] = own.glob(f"difficulty-{measure}-*.npz")
        file.write_bytes(file.read_bytes()[:-30])
        assert np.array_equal(difficulties(shards, measure, 1), values)  # no number of threads counts
        monkeypatch.setattr(module, "_measured", None)
        assert np.array_equal(difficulties(shards, measure, 2), values)
        monkeypatch.undo()
    order = open_curriculum(StreamConfig(curriculum="nll"), shards)
    assert order is not None and (np.diff(difficulties(shards, "nll", 2)[order.easiest]) >= 0).all()
    assert open_curriculum(StreamConfig(), shards) is None
    others = [order._replace(start=0.2), order._replace(easiest=order.easiest[::-1]), None]
    assert len({shards_digest(shards.names, shards.sizes, each) for each in [order, *others]}) == 4
    shards.close()


def test_damaged_samples_are_the_hardest_and_measured_again(own, tmp_path, capsys):
    folder = Path(shutil.copytree(own, tmp_path / "train", ignore=shutil.ignore_patterns("difficulty*")))
    entry = ShardSet(folder).entry(3)
    tar = folder / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    data[entry.offset + 600] ^= 1
    tar.write_bytes(data)
    shards = ShardSet(folder)
    with pytest.raises(UserError, match="shard-00000"):
        difficulties(shards, "nll", 1)
    assert np.flatnonzero(np.isinf(difficulties(shards, "nll", 1, skip=True))).tolist() == [3]
    assert "1 damaged samples count as the hardest" in capsys.readouterr().err and not list(folder.glob("difficulty*z"))


def test_ranks_share_the_steps_and_another_number_of_them_goes_on(own, recipe):
    config = load_recipe(recipe, ["stream.curriculum=nll", "optim.micro_batch=2"])
    shards = ShardSet(own)
    curriculum = open_curriculum(config.stream, shards)

    def rows(ranks: int, done: int, steps: int) -> list[list[str]]:
        """Each step's sequences over all ranks, from the step `done` on."""
        progress = Progress(stage_step=done, samples=done * config.windows_per_step)
        found: list[list[str]] = [[] for _ in range(steps - done)]
        for rank in range(ranks):
            world = World(rank, ranks, torch.device("cpu"))
            data = stage_data(config, shards, progress, steps, world, None, curriculum)
            for number, step in enumerate(each for each in data if each is not None):
                found[number] += [str(row.tolist()) for batch in step.micro_batches for row in batch.tokens]
        return [sorted(step) for step in found]

    whole = rows(1, 0, 4)
    assert rows(2, 0, 4) == whole and rows(4, 2, 4) == whole[2:]
    assert whole != rows(1, 0, 0) and len(whole) == 4


def test_a_run_trains_by_it_logs_competence_and_refuses_another_order(sibling, own):
    run = sibling("stream.curriculum=nll", "stream.curriculum_start=0.2", "stages.1.tokens=512", "stages.0.tokens=1024")
    logits = run.path("data", "logits")
    source = logits.resolve()
    logits.unlink()
    logits.mkdir()
    (logits / "holdout").symlink_to(source / "holdout")
    (logits / "train").symlink_to(own)
    in_process("train", run.folder)
    count = len(ShardSet(own))
    found = [row["competence"] for row in metrics(run.folder)]
    assert found == pytest.approx([math.sqrt(16 * n * 0.96 / count + 0.04) for n in range(3)])
    saved = published(run.path("checkpoints"))[0]
    assert saved.progress.stage_step == 2  # training is over there; a run in its middle compares
    [file] = own.glob("difficulty-nll-*.npz")
    other = np.load(file)["difficulty"][::-1].copy()
    with file.open("wb") as opened:
        np.savez(opened, difficulty=other)
    shutil.rmtree(run.path("checkpoints", "all"))
    assert "how hard its sequences are (stream.curriculum), changed" in in_process("train", run.folder, code=2)
    file.unlink()


def test_a_curriculum_needs_cached_logits_and_all_shards(recipe, tmp_path):
    for overrides, message in (
        (["objective.kind=sar", "stream.curriculum=nll"], "no cached logits say how hard a sequence is"),
        (["stream.lanes=2", "stream.curriculum=nll"], "draws from all shards at once: set stream.lanes=0"),
        (["stream.curriculum_start=0.5"], "it needs stream.curriculum=nll or entropy"),
    ):
        with pytest.raises(UserError, match=message):
            Run.create(recipe, overrides, tmp_path / "run")
