import json
import os
import random
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megakd.config.train import OptimConfig
from megakd.data.batches import collate
from megakd.data.shards import ShardSet
from megakd.engine import checkpoint
from megakd.engine.checkpoint import (
    Progress,
    Saved,
    auxiliary_file,
    check_ranks,
    check_shards,
    last_sound,
    published,
    remove_unpublished,
    rotate,
    save_checkpoint,
)
from megakd.engine.local import LocalEngine
from megakd.engine.optim import build_optimizer
from megakd.errors import UserError
from megakd.models.hub import load_config, write_config
from megakd.run import Run
from megakd.system.dist import World
from megakd.train.build import build_objective
from tests.conftest import files

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def engine(prepared, dataset) -> LocalEngine:
    run = Run.open(prepared)
    objective = build_objective(run.config, run.student_folder, dataset.facts)
    return LocalEngine(objective, build_optimizer(objective, (), OptimConfig(lr=1e-3)), 1.0, "float32", WORLD.device)


def step(engine: LocalEngine, dataset: ShardSet) -> Any:
    return engine.step([collate([dataset[0], dataset[1]], 32)], 60, 1.0)


@pytest.fixture
def save(prepared, engine, tmp_path):
    """save(path, progress, fails): a checkpoint below tmp_path."""

    def describe(weights: Path) -> None:
        write_config(weights, load_config(prepared / "student-0"))

    def fail(weights: Path) -> None:
        raise RuntimeError("killed here")

    def run(path: str, progress: Progress, fails: bool = False, ranks: int = 1) -> Path:
        world = World(0, ranks, WORLD.device)
        save_checkpoint(tmp_path / path, engine, progress, world, fail if fails else describe, {})
        return tmp_path / path

    return run


def fake(checkpoints: Path, path: str, progress: Progress) -> Path:
    """A published checkpoint as far as finding and rotating go."""
    folder = checkpoints / path
    (folder / "weights").mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps({**progress._asdict(), "ranks": 1}))
    return folder


def test_a_checkpoint_is_found_whole(save, engine, dataset, tmp_path):
    step(engine, dataset)
    progress = Progress(1, 4, 12, 345, 6789)
    folder = save("all/step-000012", progress)
    assert published(tmp_path) == [Saved(folder, progress)]
    names = ["carried.json", "checksums", "progress.json", "state", "weights"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert [p.name for p in folder.parent.iterdir()] == ["step-000012"]  # nothing temporary is left
    loaded = dict(AutoModelForCausalLM.from_pretrained(published(tmp_path)[0].weights).named_parameters())
    mine = {name.removeprefix("student."): tensor for name, tensor in engine.weights()}
    assert loaded.keys() == mine.keys() and all(torch.equal(loaded[name], tensor) for name, tensor in mine.items())


def test_auxiliary_parameters_of_0_1_are_read_by_their_old_name(tmp_path):
    for name in ("auxiliary.safetensors", "beside.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        assert Saved(folder, Progress()).auxiliary == {}
        save_file({"routers.a": torch.ones(2)}, folder / name)
        assert auxiliary_file(folder) == folder / name
        assert Saved(folder, Progress()).auxiliary["routers.a"].tolist() == [1, 1]


def test_the_engine_goes_on_from_it(save, engine, dataset):
    step(engine, dataset)
    folder = save("all/step-000001", Progress(0, 1, 1, 2, 60))
    expected = [step(engine, dataset) for _ in range(2)]
    engine.load(folder / "state")
    assert [step(engine, dataset) for _ in range(2)] == expected


def test_what_is_not_published_is_not_listed(tmp_path):
    (tmp_path / "all" / "step-000007").mkdir(parents=True)  # no progress.json
    assert published(tmp_path) == [] and published(tmp_path / "missing") == []
    fake(tmp_path, "all/step-000008.tmp", Progress(0, 8, 8))  # complete, but never renamed
    fake(tmp_path, "all/step-last", Progress(0, 9, 9))
    assert published(tmp_path) == []
    good = fake(tmp_path, "all/step-000002", Progress(0, 2, 2))
    assert [saved.folder for saved in published(tmp_path)] == [good]


def test_a_checkpoint_that_is_replaced_is_never_missing(save, tmp_path, monkeypatch):
    """A kill while a step is saved again: the old one, or the new one, is there for the next start."""
    rename = os.replace
    for count, expected in ((1, 1), (2, 1), (3, 2)):
        path, made = f"kill-{count}/step-000001", 0
        folder = save(path, Progress(0, 1, 1, tokens=1))

        def dies(source: Path, target: Path) -> None:
            nonlocal made
            made += folder in (source, target)  # noqa: B023
            if made >= count:  # noqa: B023
                raise KeyboardInterrupt
            rename(source, target)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", dies)
            save(path, Progress(0, 1, 1, tokens=2))
        remove_unpublished(tmp_path)
        [saved] = [each for each in published(tmp_path) if each.folder == folder]
        assert saved.progress.tokens == expected
        assert [p.name for p in folder.parent.iterdir()] == ["step-000001"]


def test_a_save_cut_short_leaves_what_was_published(save, tmp_path):
    """An error between weights and progress; the next save clears what it left and publishes."""
    first = save("all/step-000001", Progress(0, 1, 1))
    before = files(first)
    for path, progress in (("all/step-000001", Progress(0, 1, 1)), ("all/step-000002", Progress(0, 2, 2))):
        with pytest.raises(RuntimeError, match="killed here"):
            save(path, progress, fails=True)
        assert files(first) == before
        assert [saved.folder for saved in published(tmp_path)] == [first]
    leftover = tmp_path / "all" / "step-000002.tmp"
    assert leftover.is_dir()
    (leftover / "weights" / "rubbish.safetensors").write_bytes(b"x")
    second = save("all/step-000002", Progress(0, 2, 2))
    assert [saved.folder for saved in published(tmp_path)] == [first, second]
    assert not leftover.exists() and not list(second.rglob("rubbish*"))


def test_saving_again_replaces_it_whole(save):
    folder = save("all/step-000001", Progress(0, 1, 1, 10, 100))
    (folder / "weights" / "old-file").write_text("x")
    save("all/step-000001", Progress(0, 1, 1, 20, 200))
    assert published(folder.parent.parent)[0].progress.tokens == 200
    assert not (folder / "weights" / "old-file").exists()


def test_oldest_first_whatever_the_names(tmp_path):
    """By stage, then steps as numbers: neither stage names nor digits sort like that."""
    order = [
        ("warm", 0, 5),
        ("warm", 0, 90),
        ("b", 1, 100),
        ("b", 1, 999_999),
        ("a", 2, 1_000_000),
        ("a", 2, 10_000_000),
    ]
    for stage, index, steps in random.Random(0).sample(order, len(order)):
        fake(tmp_path, f"{stage}/step-{steps:06d}", Progress(index, steps - index * 95, steps))
    assert [
        (saved.folder.parent.name, saved.progress.stage, saved.progress.step) for saved in published(tmp_path)
    ] == order


@pytest.mark.parametrize(
    "keep, protected, left",
    [
        (0, [], [1, 2, 3, 4, 5]),
        (1, [], [5]),
        (2, [], [4, 5]),
        (2, [1, 4], [1, 4, 5]),
        (1, [5], [5]),
        (9, [], [1, 2, 3, 4, 5]),
    ],
)
def test_rotate_keeps_the_newest_and_the_protected(tmp_path, keep, protected, left):
    folders = {n: fake(tmp_path, f"{'ab'[n > 2]}/step-{n:06d}", Progress(int(n > 2), n, n)) for n in (3, 1, 5, 2, 4)}
    unpublished = tmp_path / "a" / "step-000000.tmp"
    unpublished.mkdir()
    rotate(tmp_path, keep, {folders[n] for n in protected})
    assert [saved.progress.step for saved in published(tmp_path)] == left
    assert [n for n in sorted(folders) if folders[n].exists()] == left and unpublished.exists()


def test_what_a_kill_left_of_a_checkpoint_goes(tmp_path):
    kept = [fake(tmp_path, "a/step-000002", Progress(0, 2, 2)), fake(tmp_path, "b/step-last", Progress(1, 1, 3))]
    left = [fake(tmp_path, f"{stage}/step-000001.tmp", Progress(0, 1, 1)) for stage in "ab"]
    remove_unpublished(tmp_path)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in left)
    remove_unpublished(tmp_path / "missing")


def test_another_number_of_ranks_is_refused_naming_both(save, tmp_path):
    folder = save("all/step-000001", Progress(0, 1, 1), ranks=4)
    saved = published(tmp_path)[0]
    check_ranks(saved, 4)
    with pytest.raises(UserError, match=rf"{folder}.*saved by 4 ranks.*world of 2.*resume with 4 ranks"):
        check_ranks(saved, 2)


@pytest.mark.parametrize("zero, taken", [(0, False), (1, True), (2, True), (3, True)])
def test_a_partitioned_state_is_taken_on_by_another_number_of_ranks(tmp_path, zero, taken):
    folder = fake(tmp_path, "all/step-000001", Progress(0, 1, 1))
    (folder / "state").mkdir()
    (folder / "state" / "layout.json").write_text(json.dumps({"ranks": 1, "expert_parallel": 1, "zero": zero}))
    check_ranks(published(tmp_path)[0], 1)
    with nullcontext() if taken else pytest.raises(UserError, match="saved by 1 ranks, this is a world of 2"):
        check_ranks(published(tmp_path)[0], 2)


def test_weights_hold_the_buffers_of_a_state_dict():
    """Groups of a basis, a router's correction bias: without them the checkpoint cannot be loaded."""
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    module[1].register_buffer("passing", torch.zeros(2), persistent=False)
    engine = LocalEngine(module, build_optimizer(module, (), OptimConfig(lr=1e-3)), 1.0, "float32", WORLD.device)
    assert dict(engine.weights()).keys() == module.state_dict().keys()


def test_a_position_over_other_shards_is_refused_naming_both(save, tmp_path):
    folder = save("all/step-000001", Progress(0, 1, 1, 16, 400, "0123"))
    saved = published(tmp_path)[0]
    assert saved.progress.shards == "0123"
    check_shards(saved, "0123", tmp_path / "train")
    with pytest.raises(
        UserError, match=rf"{folder}.*shards 0123, but {tmp_path}/train lists 4567 now.*new run"
    ) as caught:
        check_shards(saved, "4567", tmp_path / "train")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_say_its_shards_goes_on(tmp_path):
    """Those of before wrote five fields and the ranks."""
    folder = fake(tmp_path, "all/step-000002", Progress(0, 2, 2, 32, 900))
    fields = json.loads((folder / "progress.json").read_text())
    del fields["shards"]
    (folder / "progress.json").write_text(json.dumps(fields))
    saved = published(tmp_path)[0]
    assert saved.progress == Progress(0, 2, 2, 32, 900)
    check_shards(saved, "4567", tmp_path)


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_used(save, tmp_path):
    first = save("all/step-000001", Progress(0, 1, 1))
    for number, (name, change) in enumerate(
        [
            ("weights/model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
            ("state/local.pt", lambda path: path.write_bytes(path.read_bytes()[:-9] + b"123456789")),
            ("carried.json", lambda path: path.unlink()),
            ("checksums/00000.json", lambda path: path.write_text("{")),
        ]
    ):
        second = save("all/step-000002", Progress(0, 2, 2))
        change(second / name)
        saved, reasons = last_sound(tmp_path, WORLD)
        assert saved is not None and saved.folder == first
        assert len(reasons) == 1 and str(second / name) in reasons[0], number
        assert not second.exists() and second.with_name("step-000002.damaged").exists()
        assert [s.folder for s in published(tmp_path)] == [first]
    second = save("all/step-000002", Progress(0, 2, 2))
    assert last_sound(tmp_path, WORLD)[0] == Saved(second, Progress(0, 2, 2))
    assert last_sound(tmp_path / "empty", WORLD) == (None, [])


def test_ranks_that_see_other_files_of_a_checkpoint_leave_none_without_a_checksum(save, tmp_path, monkeypatch):
    """On shared storage a rank may not see yet what another wrote: shares of two lists left files out of both."""
    monkeypatch.setattr(checkpoint, "gather", lambda names: [names[: len(names) // 2], names[len(names) // 2 :]])
    folder = save("all/step-000001", Progress(0, 1, 1))
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    sums = json.loads((folder / "checksums" / "00000.json").read_text())
    assert sums.keys() == {name for name in written if not name.startswith("checksums")}


def test_ranks_resume_from_what_the_first_rank_sees(save, tmp_path, monkeypatch):
    """A rank that saw one checkpoint more waited in a collective that the others never reached."""
    first = save("all/step-000001", Progress(0, 1, 1))
    save("all/step-000002", Progress(0, 2, 2))
    monkeypatch.setattr(checkpoint, "gather", lambda value: [value[:1], value])
    assert last_sound(tmp_path, WORLD) == (Saved(first, Progress(0, 1, 1)), [])


def test_gradient_norms_of_float16_without_zero_are_free_of_the_loss_scale():
    """DeepSpeed reports them times the scale; its optimizer is made without a GPU here, for it needs one to step."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    from megakd.system.deepspeed_internals import norm_scale

    optimizer = object.__new__(FP16_UnfusedOptimizer)
    optimizer.loss_scale_config = SimpleNamespace(cur_scale=1024.0)
    assert norm_scale(optimizer) == 1024.0 and norm_scale(object()) == 1.0
