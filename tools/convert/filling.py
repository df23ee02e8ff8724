"""Fill a folder with shards, one after the other; killed and started again, a tool goes on after the last finished one.

The manifest comes first, unfinished and with a plan: who finds another plan, or anything else, leaves it as it is.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megakd.data.codebook import Book, save_book
from megakd.data.shard_writer import finished, shard_name, summary_of, write_manifest
from megakd.data.shards import read_manifest
from megakd.errors import UserError
from megakd.outputs import check_place
from megakd.system.logging import Progress, say

Item = TypeVar("Item")


class Plan(NamedTuple):
    """What a folder will hold: how many samples, `per_shard` a shard; origin: what else its content depends on.

    more: further keys of the manifest.
    """

    facts: dict[str, Any]
    book: Book | None
    samples: int
    per_shard: int
    origin: dict[str, Any]
    more: dict[str, Any]

    def write_manifest(self, folder: Path, shards: list[dict[str, Any]], complete: bool) -> None:
        write_manifest(folder, self.facts, shards, complete, origin=self.whole_origin, **self.more)

    @property
    def whole_origin(self) -> dict[str, Any]:
        return {**self.origin, "samples": self.samples, "samples_per_shard": self.per_shard}


def fill(
    folder: Path,
    plan: Plan,
    title: str,
    items: Callable[[int], Iterator[Item]],
    write: Callable[[str, Iterator[Item]], dict[str, Any]],
) -> None:
    """Write what is missing of `plan`; items(n): what becomes sample n, n + 1, …; write gives a sidecar."""
    if not _begin(folder, plan):
        say(f"{title}: {folder} is finished already")
        return
    shards, done = [], 0
    while done < plan.samples and (found := finished(folder, shard_name(len(shards)), plan.facts)):
        shards.append(summary_of(shard_name(len(shards)), found))
        done += len(found["samples"])
    progress = Progress(title, plan.samples, "samples", done=done)
    rest = items(done)
    while done < plan.samples:
        size, name = min(plan.per_shard, plan.samples - done), shard_name(len(shards))
        sidecar = write(name, _counted(islice(rest, size), progress))
        assert len(sidecar["samples"]) == size, (name, len(sidecar["samples"]), size)
        shards.append(summary_of(name, sidecar))
        done += size
    plan.write_manifest(folder, shards, complete=True)
    progress.close(f"{folder}: {len(shards)} shards")


def _begin(folder: Path, plan: Plan) -> bool:
    """Lock the folder; False when it holds all of the plan, UserError when it holds something else."""
    if (folder / "manifest.json").exists():
        found = read_manifest(folder)
        if (found["facts"], found.get("origin")) != (plan.facts, plan.whole_origin):
            raise UserError(f"{folder}: holds something else already; remove it or name another folder")
        if found["complete"]:
            return False
    else:
        check_free(folder)
    plan.write_manifest(folder, [], complete=False)
    if plan.book is not None:
        save_book(folder, plan.book)
    return True


def check_free(folder: Path) -> None:
    """UserError when something is there that no tool began to fill, or another verb of a run is to write."""
    check_place(folder, part="data")
    if not folder.exists() or (folder / "manifest.json").exists():
        return
    if not folder.is_dir() or any(".tmp-" not in path.name for path in folder.iterdir()):
        raise UserError(f"{folder}: exists already and is no folder that this tool began; remove it or name another")


def _counted(items: Iterator[Item], progress: Progress) -> Iterator[Item]:
    for item in items:
        yield item
        progress.update(1)
