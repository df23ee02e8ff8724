"""Training next to a capture that still runs: it waits for shards, and a signal ends it all the same."""

import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megakd import cli
from megakd.data.shards import ShardSet
from megakd.data.stream import shards_digest
from megakd.errors import UserError
from megakd.run import Run
from megakd.system.dist import World
from megakd.system.files import read_json, read_json_lines
from megakd.train.data import in_step
from tests.conftest import forked_ranks, metrics, start_ranks
from tests.forks import Forked

Make = Callable[..., Run]
RANKS = ["engine.kind=deepspeed", "engine.config=zero2", "engine.ranks=2"]


def megakd(*argv: object) -> None:
    """`megakd ARGV` in this process, which has loaded the libraries."""
    cli.run_verb([str(each) for each in argv])


@contextmanager
def waiting(run: Run, ranks: int = 1) -> Iterator[tuple[list[Forked], str]]:
    """`megakd train RUN` that follows a capture, once it says that it waits; its ranks are killed at the end."""
    processes = start_ranks(ranks, "megakd", "train", run.folder, "stream.follow=true", stderr=subprocess.PIPE)
    first, line = processes[0], ""
    assert first.stderr is not None
    try:
        for line in first.stderr:
            if "waiting for" in line:
                break
        assert first.poll() is None
        yield processes, line
    finally:
        for each in processes:
            each.kill()
            each.communicate()


def captured(run: Run, part: str) -> Run:
    """The run without its link to a whole capture, and with the shards of one worker of several instead."""
    run.path("data", "logits").unlink()
    megakd("generate-logits", run.folder, "--part", part)
    return run


def steps_done(run: Run) -> int:
    """Steps made by a run that waits, once there are some and no more come: reading is ahead of training."""
    done, deadline = 0, time.monotonic() + 120
    while time.monotonic() < deadline:
        before, done = done, len(read_json_lines(run.path("metrics.jsonl")))
        if 0 < done == before:
            break
        time.sleep(2)
    return done


@pytest.fixture
def half_captured(sibling: Make) -> Run:
    """Shards 0, 2 and 4 of 5, three of which training reads at a time."""
    return captured(sibling("stream.lanes=3"), "0/2")


def test_training_follows_an_unfinished_capture(sibling: Make, half_captured: Run):
    """It waits, says for what, and in the end has done what a run does that is started afterwards."""
    with pytest.raises(UserError, match=r"not finished.*stream\.follow=true"):
        megakd("train", half_captured.folder)
    with waiting(half_captured) as ((process,), line):
        assert line == "train: waiting for shard-00001 from the capture (the next step needs 1 shards more)\n"
        megakd("generate-logits", half_captured.folder, "--part", "1/2")
        process.communicate(timeout=120)
        assert process.returncode == 0
    afterwards = sibling("stream.lanes=3")
    megakd("train", afterwards.folder)
    assert metrics(half_captured.folder) == metrics(afterwards.folder)
    assert len(metrics(half_captured.folder)) == 10
    megakd(
        "train", half_captured.folder, "stream.follow=false"
    )  # the capture is whole now: nothing to follow, or to do


def test_a_signal_ends_a_run_that_waits(half_captured: Run):
    """It made no step, so there is nothing to save; started again it waits again."""
    for _ in range(2):
        with waiting(half_captured) as ((process,), _):
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            assert process.returncode == 85
        assert not half_captured.path("checkpoints").exists()


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, engine", [(1, []), (2, RANKS)])
def test_a_run_that_waits_saves_what_it_has_done_when_a_signal_comes(sibling: Make, ranks, engine):
    """The signal reaches the last rank alone; what follows is what an undisturbed run does."""
    options = ["stream.lanes=1", "checkpoint.every_steps=100", *engine]
    run = captured(sibling(*options), "0/3")  # shards 0 and 3: some steps, then it waits for shard 1
    with waiting(run, ranks) as (processes, line):
        assert "waiting for shard-00001" in line
        done = steps_done(run)
        processes[-1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=60) for process in processes] == [85] * ranks
    assert len(metrics(run.folder)) == done
    newest = sorted(run.path("checkpoints").glob("*/step-*"), key=lambda path: path.name)[-1]
    assert 0 < done < 10 and done % 4 and read_json(newest / "progress.json")["step"] == done
    megakd("generate-logits", run.folder)
    undisturbed = sibling(*options)
    for each in (run, undisturbed):
        forked_ranks(ranks, "train", each.folder)
    assert metrics(run.folder) == metrics(undisturbed.folder)


def test_a_capture_that_grows_between_stop_and_resume_is_refused(sibling: Make):
    """Until the shards are those of before again; a run that is finished does not care."""
    run, finished = (sibling() for _ in range(2))
    run.path("data", "logits").unlink()
    megakd("generate-logits", run.folder, "--max-tokens", "4000")
    finished.path("data", "logits").unlink()
    finished.path("data", "logits").symlink_to(run.path("data", "logits"))
    for each in (run, finished):
        megakd("train", each.folder)
    expected, train = metrics(run.folder), run.path("data", "logits", "train")
    for folder in run.path("checkpoints").glob("*/step-*"):
        if folder.name > "step-000004":  # the end of the first stage stays: the position counts across stages
            shutil.rmtree(folder)
    before = ShardSet(train)
    megakd("generate-logits", run.folder)
    now = ShardSet(train)
    assert len(now) > len(before)
    digests = [shards_digest(shards.names, shards.sizes) for shards in (before, now)]
    with pytest.raises(UserError, match="step-000004.*{}.*{}.*--max-tokens".format(*digests)):
        megakd("train", run.folder)
    assert metrics(run.folder) == expected
    megakd("train", finished.folder)
    (train / "manifest.json").unlink()
    megakd("generate-logits", run.folder, "--max-tokens", "4000")
    megakd("train", run.folder)
    assert metrics(run.folder) == expected and len(expected) == 10


class Meeting:
    """Signals and readiness of ranks that are threads; a rank that does not come breaks the meeting of the others."""

    def __init__(self, ranks: int):
        self.barrier = threading.Barrier(ranks, timeout=10)
        self.ready, self.asked = [True] * ranks, [False] * ranks
        self.meetings = 0


class Stop:
    """What StopSignals is to one rank."""

    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank, self.agreed = meeting, rank, False

    def agree(self, world: World, ready: bool = True) -> bool:
        meeting = self.meeting
        meeting.ready[self.rank] = ready
        meeting.barrier.wait()
        found, self.agreed = all(meeting.ready), any(meeting.asked)
        if meeting.barrier.wait() == 0:
            meeting.meetings += 1
        return found


def test_ranks_take_the_same_steps_whenever_each_gets_its_data():
    """Each waits (None) when and as long as it likes; in half of the cases one gets a signal in the middle."""
    for seed in range(40):
        meet(seed)


def meet(seed: int) -> None:
    chooser = random.Random(seed)
    ranks, steps = chooser.randint(1, 4), chooser.randint(0, 8)
    waits = [[chooser.choice([0, 0, 1, 3]) for _ in range(steps)] for _ in range(ranks)]
    signalled = (chooser.randrange(ranks), chooser.randrange(steps)) if seed % 2 and steps else None
    meeting = Meeting(ranks)
    taken: list[list[Any]] = [[] for _ in range(ranks)]

    def data(rank: int) -> Iterator[Any]:
        for step in range(steps):
            yield from [None] * waits[rank][step]
            if (rank, step) == signalled:
                meeting.asked[rank] = True
            yield step

    def train(rank: int) -> None:
        stop: Any = Stop(meeting, rank)
        for step in in_step(data(rank), World(rank, ranks, torch.device("cpu")), stop):
            taken[rank].append(step)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not meeting.barrier.broken and not any(thread.is_alive() for thread in threads), seed
    assert taken == [list(range(signalled[1] if signalled else steps))] * ranks, seed
    if not signalled:  # one meeting a step, one at the end, one for each time that some rank waits
        assert meeting.meetings == steps + 1 + sum(max(column) for column in zip(*waits, strict=True))
