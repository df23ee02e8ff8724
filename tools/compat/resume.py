"""--resume PATH of the tools: training goes on from exactly this checkpoint, and no later one is touched.

In the checkpoint's own run that is possible where it is the newest one. Where there are later ones another run goes on
from it, in an --output_dir of its own, with linked data (`megakd new --from CHECKPOINT`).
"""

import json
import re
from pathlib import Path
from typing import Any

from run_from_flags import RECIPE, open_run

from megakd.config.parsing import parse
from megakd.config.run import flatten
from megakd.data.shards import read_manifest
from megakd.engine.checkpoint import published
from megakd.errors import UserError, listed
from megakd.names import expand, holds_run
from megakd.run import Run
from megakd.system.files import write_json
from megakd.system.logging import say


def find_checkpoint(text: str) -> Path:
    """A checkpoint's folder: the folder itself, or RUN/checkpoint_epoch_K, which the end of epoch K has here."""
    path = expand(text)
    if (path / "progress.json").is_file():
        path = path if len(path.parts) > 3 else path.absolute()  # as it was given, where its run's folder is in it
        if holds_run(run_of(path)):
            return path
    epoch = re.fullmatch(r"checkpoint_epoch_(\d+)(\.pt)?", path.name)
    folder = path.parent
    if not holds_run(folder):
        raise UserError(f"--resume {text}: no checkpoint here, and {folder} is no run's folder")
    run, saved = Run.open(folder), published(folder / "checkpoints")
    if epoch:
        step = dict(enumerate(_epoch_ends(run), 1)).get(int(epoch[1]))
        if found := [each.folder for each in saved if each.progress.step == step]:
            say(f"--resume {text}: {found[0]}")
            return found[0]
    there = [str(each.folder.relative_to(folder)) for each in reversed(saved)]
    raise UserError(f"--resume {text}: no such checkpoint; {folder} has {listed(there, 6) if there else 'none yet'}")


def _epoch_ends(run: Run) -> list[int]:
    """The step, counted over all stages, with which each epoch of the run ends."""
    manifest = run.path("data", "tokens", "train")
    windows, ends, before = read_manifest(manifest)["windows"], [], 0
    for stage in run.config.stages:
        ends += [before + step for step in run.config.epoch_ends(stage, windows)]
        before += run.config.steps_of(stage, windows)
    return ends


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    return checkpoint.parent.parent.parent


def resume_run(checkpoint: Path, folder: Path, value: dict[str, Any]) -> Run:
    """The run of a recipe in `folder`, whose training goes on from the checkpoint; UserError where it would not."""
    owner = run_of(checkpoint)
    if folder.resolve() == owner.resolve():
        newest = published(owner / "checkpoints")[-1].folder
        if newest.resolve() != checkpoint.resolve():
            raise UserError(
                f"--resume {checkpoint}: {folder} has later checkpoints, up to {newest.parent.name}/{newest.name}, and "
                f"goes on from the newest; to go on from this one in a run of its own: --output_dir {folder}-2"
            )
        return open_run(folder, value)
    if not (folder / "config.json").exists():
        before = dict(flatten(Run.open(owner).config.model_dump(mode="json")))
        now = flatten(parse(value, "--resume").model_dump(mode="json"))
        write_json(folder / RECIPE, value)
        Run.create(checkpoint, [f"{k}={json.dumps(v)}" for k, v in now if before.get(k) != v], folder)
    elif Run.open(folder).events("new")[0]["recipe"] != str(checkpoint):
        raise UserError(
            f"--resume {checkpoint}: {folder} is a run that did not begin with it; name another --output_dir"
        )
    return open_run(folder, value)
