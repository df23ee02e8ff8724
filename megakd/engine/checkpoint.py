"""Checkpoints: written aside, published whole, found again, rotated.

checkpoints/<stage>/step-000500/   progress.json   where the run stands
                                   weights/        a Hugging Face folder, for evaluate, export and the next stage
                                   auxiliary.safetensors  what else the objective trains, like a teacher's routers
                                   state/          the engine's own, for exact resume
                                   carried.json    what its stage inherited: {parameter: updates before the stage}
                                   checksums/      a file of each rank that saved: {path: [bytes, crc32]}
"""

import glob
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from megakd.engine.base import Engine
from megakd.engine.guard import Health
from megakd.errors import UserError
from megakd.models.hub import write_weights
from megakd.system.dist import World, barrier, gather, sum_over_ranks
from megakd.system.files import read_json, remove, swap, sync, write_json
from megakd.system.logging import say
from megakd.system.version import made_with

AUXILIARY, OLD_AUXILIARY = "auxiliary.safetensors", "beside.safetensors"  # the second one: its name in 0.1
REPLACED = ".replaced"  # ends the name of a checkpoint while another takes its place
LAYOUT = "layout.json"  # of the ranks that saved, in a state that DeepSpeed wrote


def auxiliary_file(checkpoint: Path) -> Path:
    """The file of what the objective trains together with the student; of a checkpoint of 0.1 by its old name."""
    old = checkpoint / OLD_AUXILIARY
    return old if old.exists() else checkpoint / AUXILIARY


class Progress(NamedTuple):
    """Where training stands: `step` of all stages, `stage_step` of stage `stage`, samples and counted tokens taken.

    shards: which shards `samples` counts over (`shards_digest`); empty in checkpoints that do not say.
    health: which losses are usual, and how many updates were skipped. memory: the objective's.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    samples: int = 0
    tokens: int = 0
    shards: str = ""
    health: Health = Health()
    memory: dict[str, list[float]] = {}  # noqa: RUF012 (never changed)


class Saved(NamedTuple):
    folder: Path
    progress: Progress

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    @property
    def auxiliary(self) -> dict[str, Tensor]:
        """What the objective trains besides the student, by its name there."""
        path = auxiliary_file(self.folder)
        return load_file(path) if path.exists() else {}

    @property
    def updates(self) -> dict[str, int]:
        """How often each parameter had been updated when the stage began; the optimizer's groups follow from it."""
        path = self.folder / "carried.json"
        return read_json(path) if path.exists() else {}


def save_checkpoint(
    folder: Path,
    engine: Engine,
    progress: Progress,
    world: World,
    describe: Callable[[Path], None],
    updates: dict[str, int],
) -> None:
    """Publish a checkpoint of all ranks at `folder`: readers see nothing until it is whole.

    describe: adds config and tokenizer to the weights folder. A checkpoint cut short by a kill stays in a folder
    ending in `.tmp`; `remove_unpublished` takes it away.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    if world.first:
        remove(temporary)
        temporary.mkdir(parents=True)
    barrier()
    engine.save(temporary / "state")
    if world.first:
        write_models(temporary, engine)
        describe(temporary / "weights")
        write_json(temporary / "carried.json", updates)
        where = {**progress._asdict(), "memory": dict(progress.memory), "ranks": world.size, "megakd": made_with()}
        write_json(temporary / "progress.json", where)
    else:
        for _ in engine.weights():  # gathering is collective: every rank takes part in it
            pass
    barrier()
    write_checksums(temporary, world)
    barrier()
    if world.first:
        publish(temporary, folder)
    barrier()  # no rank goes on, or reports the checkpoint, before it can be loaded


def write_models(checkpoint: Path, engine: Engine) -> None:
    """The student's weights as they come, one tensor in memory at a time; after them what is trained with it."""
    auxiliary: dict[str, Tensor] = {}

    def student() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in engine.weights():
            if name.startswith("student."):
                yield name.removeprefix("student."), tensor
            else:
                auxiliary[name] = tensor.detach().cpu().contiguous()

    write_weights(checkpoint / "weights", student())
    if auxiliary:
        save_file(auxiliary, checkpoint / AUXILIARY)


def write_checksums(checkpoint: Path, world: World) -> None:
    """A file of each rank: size and CRC of its share of all files."""
    # on shared storage a rank may not see yet what another wrote: each lists its own at least, and all share one list
    mine = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    names = sorted({name for listed in gather(mine) for name in listed})
    sums = {name: checksum(checkpoint / name) for name in names[world.rank :: world.size]}
    write_json(checkpoint / "checksums" / f"{world.rank:05d}.json", sums)


def publish(temporary: Path, folder: Path) -> None:
    """Give a whole checkpoint its name, in place of one that has it already."""
    replaced = folder.with_name(folder.name + REPLACED)
    # contents reach the disk before the name does: after a power cut the name must not stand for less
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    swap(temporary, folder, replaced)
    sync(folder.parent)
    remove(replaced)


def checksum(path: Path) -> list[int]:
    """[bytes, crc32] of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def last_sound(checkpoints: Path, world: World) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written, and what is wrong with newer ones.

    All ranks read a share each. Damaged ones are put aside as step-N.damaged, out of the sight of every verb.
    """
    reasons = []
    for saved in reversed(gather(published(checkpoints))[0]):  # what the first rank sees, else ranks wait for others
        found = list(_damage(saved.folder, world))
        bad = sum_over_ranks([float(len(found))], world.device)[0]
        if not bad:
            return saved, reasons
        reasons += found
        barrier()  # all have read
        if world.first:
            aside = saved.folder.with_name(saved.folder.name + ".damaged")
            remove(aside)
            os.replace(saved.folder, aside)
        barrier()
    return None, reasons


def is_sound(saved: Saved, world: World) -> bool:
    """Whether every byte of this rank's share of a checkpoint is as it was written."""
    return not any(_damage(saved.folder, world))


def _damage(folder: Path, world: World) -> Iterator[str]:
    """What is wrong with this rank's share of the files; nothing where a checkpoint lists no checksums."""
    known: dict[str, list[int]] = {}
    for part in gather(sorted(path.name for path in (folder / "checksums").glob("*.json")))[0]:
        try:
            known |= read_json(folder / "checksums" / part)
        except UserError as error:
            yield str(error)
    for name in sorted(known)[world.rank :: world.size]:
        if not (folder / name).exists():
            yield f"{folder / name} is missing"
        elif checksum(folder / name) != known[name]:
            yield f"{folder / name} is not what was written (it was {known[name][0]:,} bytes)"


def listing(folder: Path, pattern: str) -> list[Path]:
    """Paths below `folder` that match; others may delete folders meanwhile, at which Path.glob raises."""
    return [folder / name for name in glob.glob(pattern, root_dir=folder)]


def published(checkpoints: Path) -> list[Saved]:
    """All whole checkpoints of a run, oldest first."""
    found = []
    for path in listing(checkpoints, "*/step-*"):
        if re.fullmatch(r"step-\d+", path.name) and (path / "progress.json").exists():
            try:
                fields = {"shards": "", "health": Health(), "memory": {}, **read_json(path / "progress.json")}
            except UserError:
                if (path / "progress.json").exists():
                    raise
                continue  # rotation took it meanwhile
            recent, *counts = fields["health"]
            fields["health"] = Health(tuple(recent), *counts)
            found.append(Saved(path, Progress(**{name: fields[name] for name in Progress._fields})))
    return sorted(found, key=lambda saved: saved.progress[:3])


def check_ranks(saved: Saved, ranks: int) -> None:
    """A state that only the ranks that saved it can load is refused to others: UserError names both numbers."""
    before = read_json(saved.folder / "progress.json")["ranks"]
    if before != ranks and not elastic(saved.folder / "state"):
        raise UserError(
            f"{saved.folder}: saved by {before} ranks, this is a world of {ranks}; resume with {before} ranks"
        )


def elastic(state: Path) -> bool:
    """Whether other ranks can load the engine's state below `state`, or other ranks' shares of the experts."""
    layout = state / LAYOUT
    return layout.exists() and read_json(layout)["zero"] > 0  # DeepSpeed converts no state of stage 0


def check_shards(saved: Saved, shards: str, folder: Path) -> None:
    """The samples taken must have been those of `folder` as it is now: UserError names both digests."""
    before = saved.progress.shards
    if before and before != shards:
        raise UserError(
            f"{saved.folder}: its position counts over the shards {before}, but {folder} lists {shards} now: "
            "the capture, or how hard its sequences are (stream.curriculum), changed; delete its manifest.json and run "
            "generate-logits with the --max-tokens of then, or train in a new run: megakd new RUN-2 --from RUN"
        )


def remove_unpublished(checkpoints: Path) -> None:
    """Delete what a kill left half written or half deleted; for the one process that trains here.

    A checkpoint that was to be replaced by one that did not get its name yet gets its name back.
    """
    for path in listing(checkpoints, f"*/step-*{REPLACED}"):
        whole = path.with_name(path.name.removesuffix(REPLACED))
        if not whole.exists() and whole.with_name(whole.name + ".tmp").exists():
            os.replace(path, whole)
        else:
            remove(path)
    for path in listing(checkpoints, "*/step-*.tmp"):
        remove(path)


def rotate(checkpoints: Path, keep: int, protected: set[Path]) -> None:
    """Delete all but the newest `keep` checkpoints (0: none), those protected and the best that `watch` names."""
    if not keep:
        return
    try:
        best = pinned(checkpoints)
    except UserError as error:  # no reason to end a training
        say(f"train: {error}; no checkpoint is deleted, for the best must stay")
        return
    for saved in published(checkpoints)[:-keep]:
        if saved.folder not in {*protected, best}:
            # out of sight first: a kill half way must not leave a checkpoint that looks whole
            aside = saved.folder.with_name(saved.folder.name + ".tmp")
            os.replace(saved.folder, aside)
            remove(aside)


def best_file(checkpoints: Path) -> Path:
    """What `watch` writes of the best checkpoint: model, step, metric, value; checkpoint and weights, paths in RUN."""
    return checkpoints / "best.json"


def pinned(checkpoints: Path) -> Path | None:
    """The checkpoint that rotation spares; None where no `watch` named one."""
    path = best_file(checkpoints)
    return checkpoints.parent / read_json(path)["checkpoint"] if path.exists() else None


def best_weights(checkpoints: Path) -> Path:
    """The weights folder of the best checkpoint."""
    path = best_file(checkpoints)
    if not path.exists():
        raise UserError(f"{path}: no best checkpoint yet; run: megakd watch {checkpoints.parent}")
    return checkpoints.parent / read_json(path)["weights"]
