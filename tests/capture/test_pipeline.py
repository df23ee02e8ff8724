"""Capture by workers that are killed, on a full disk, by a teacher sharded over ranks: the bytes of one worker."""

import argparse
import os
import random
import shutil
import signal
import subprocess
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakd.commands import generate_logits
from megakd.data.records import Sample
from megakd.data.shards import ShardSet
from megakd.run import Run
from tests.conftest import files, forked, forked_ranks, in_process

# A rehearsal; MEGAKD_CHAOS_SECONDS=120 is the whole play.
SECONDS = float(os.environ.get("MEGAKD_CHAOS_SECONDS", "6"))
SETTINGS = ["data.shard_tokens=128", "logits.profile=hybrid", "logits.top_k=4", "logits.draws=8"]


@pytest.fixture(scope="module")
def quiet(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of some 60 shards, captured by one worker that nobody disturbs."""
    run = Run.create(recipe, SETTINGS, tmp_path_factory.mktemp("quiet") / "run")
    in_process("tokenize", run.folder)
    in_process("generate-logits", run.folder, "logits.batch_size=2")
    return run


def another(quiet: Run, folder: Path, logits: Path | None = None) -> Run:
    """A run with the same tokens; its logits are copied from `logits`, if given."""
    run = Run.create(quiet.folder, [], folder)
    run.path("data", "logits").unlink()
    if logits:
        shutil.copytree(logits, run.path("data", "logits"))
    return run


def worker(run: Run, part: str) -> int:
    """`megakd generate-logits RUN --part PART` in a process forked from this one, which has loaded the libraries."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        args = argparse.Namespace(
            part=part, max_tokens=None, reread=False, force=False, vllm_python=None, vllm_options=None
        )
        generate_logits.main(Run.open(run.folder, ["logits.batch_size=2"]), args)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def written(run: Run) -> dict[str, bytes]:
    return {name: data for name, data in files(run.path("data", "logits")).items() if ".tmp-" not in name}


@pytest.mark.ranks
def test_six_workers_killed_at_random_then_any_number_give_the_bytes_of_one(quiet, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, expected, rounds, kills = random.Random(seed), written(quiet), 0, 0
    run = another(quiet, tmp_path / "chaos")
    alive = {part: worker(run, f"{part}/6") for part in range(6)}
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        time.sleep(chance.uniform(0.0, 0.3))
        for part, pid in list(alive.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                assert status == 0, f"worker {part} failed"
                del alive[part]
        if not alive:  # all is captured: look at it, and begin again
            assert written(run) == expected
            rounds += 1
            run = another(quiet, tmp_path / f"chaos-{rounds}")
            alive = {part: worker(run, f"{part}/6") for part in range(6)}
        else:
            part = chance.choice(list(alive))
            os.kill(alive[part], signal.SIGKILL)
            os.waitpid(alive[part], 0)
            kills += 1
            alive[part] = worker(run, f"{part}/6")
    for pid in alive.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(f"{kills} kills, {rounds} whole captures in between")
    assert kills > 5
    for count in (1, 3, 5):
        again = another(quiet, tmp_path / f"after-{count}", run.path("data", "logits"))
        for pid in [worker(again, f"{part}/{count}") for part in range(count)]:
            assert os.waitpid(pid, 0)[1] == 0
        assert written(again) == expected, f"seed {seed}, {count} workers"
        keys = [again_key for again_key in _keys(again)]
        assert len(keys) == len(set(keys)) == len(ShardSet(again.path("data", "tokens", "train")))


def _keys(run: Run) -> list[str]:
    shards = ShardSet(run.path("data", "logits", "train"))
    return [shards.entry(i).key for i in range(len(shards))]


def test_damaged_output_is_found_and_made_again(quiet, tmp_path):
    run = another(quiet, tmp_path / "run", quiet.path("data", "logits"))
    train = run.path("data", "logits", "train")
    short, flipped, index = (train / f"shard-0000{n}" for n in (1, 2, 3))
    short.with_suffix(".tar").write_bytes(short.with_suffix(".tar").read_bytes()[:-1024])
    data = bytearray(flipped.with_suffix(".tar").read_bytes())
    data[700] ^= 1
    flipped.with_suffix(".tar").write_bytes(bytes(data))
    index.with_suffix(".json").write_text(
        index.with_suffix(".json").read_text().replace('"tokens": 1', '"tokens": 2', 1)
    )
    in_process("generate-logits", run.folder, "logits.batch_size=2", "--reread")
    assert written(run) == written(quiet)


def test_full_disk_is_one_line_and_nothing_is_lost(quiet, tmp_path):
    run = another(quiet, tmp_path / "run")
    disk = run.path("data", "logits")
    disk.mkdir()
    size = sum(len(data) for data in written(quiet).values())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 3}", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs root and mount: {mounted.stderr.decode().strip()}")
    try:
        message = forked("generate-logits", run.folder, "logits.batch_size=2", code=2)
        assert message.strip().splitlines()[-1].endswith("No space left on device")
        assert "shard-" in message.strip().splitlines()[-1]
        assert not list(disk.rglob("*.tmp-*"))
        kept = {name: data for name, data in written(run).items() if name.endswith(".tar")}
        assert kept and all(written(quiet)[name] == data for name, data in kept.items())
        subprocess.run(["mount", "-o", f"remount,size={3 * size}", disk], check=True)
        in_process("generate-logits", run.folder, "logits.batch_size=2")
        assert written(run) == written(quiet)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", ["zero3", "autoep"])
def test_teacher_spread_over_two_ranks_says_what_a_whole_one_says(quiet, tmp_path, parallel):
    run = another(quiet, tmp_path / "run")
    launched = ["--local_rank=0"] if parallel == "autoep" else []  # DeepSpeed's launcher puts it before the verb
    forked_ranks(2, *launched, "generate-logits", str(run.folder), f"logits.parallel={parallel}")
    for part in ("holdout", "train"):
        whole, spread = (ShardSet(r.path("data", "logits", part)) for r in (quiet, run))
        assert len(whole) == len(spread) and whole.facts == spread.facts
        different = sum(not same(whole[i], spread[i]) for i in range(len(whole)))
        # the last bit of a logit may move a byte across a rounding border
        assert different <= len(whole) / 50, (part, different, len(whole))


def same(left: Sample, right: Sample) -> bool:
    fields: list[tuple[Any, Any]] = list(zip(left.targets or (), right.targets or (), strict=True))
    return np.array_equal(left.tokens, right.tokens) and all(np.array_equal(a, b) for a, b in fields)
