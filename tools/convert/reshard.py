"""Rearrange shards of tokens or logits: their size, the first N samples, another order, a share apart, several as one.

    python tools/convert/reshard.py runs/a/data/logits/train small --shard-tokens 1e6
    python tools/convert/reshard.py runs/a/data/logits/train first --count 1000 --samples 100
    python tools/convert/reshard.py runs/a/data/logits/train runs/b/data/logits/train both  # one after the other
    python tools/convert/reshard.py all mixed --shuffle 0                             # any sample may come anywhere
    python tools/convert/reshard.py all train --split 0.01 --split-to validation

Folders become one only if their facts are equal. --count takes the first N of all sources, then --shuffle orders them,
then --split sets apart those windows whose tokens' sha256 falls below the fraction: the same window lands on the same
side in every folder, with targets or without. Samples get new keys, 000000000 on; what they hold is copied byte by
byte. Killed and started again, it goes on after the last finished shard.
"""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import numpy as np
from filling import Plan, fill

from megakd.config.run import flatten
from megakd.data.shard_writer import Stored, write_stored
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.names import expand
from megakd.system.files import digest
from megakd.system.logging import Progress
from megakd.system.terminal import accept_any_encoding, one_line_errors


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", type=expand, nargs="+", metavar="SRC", help="folders of shards with equal facts")
    add("out", type=expand, metavar="DST", help="the folder to make")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-tokens", type=float, help="tokens of a shard (default: what the facts say)")
    size.add_argument("--samples", type=int, help="samples of a shard")
    add("--count", type=float, metavar="N", help="use only the first N samples")
    add("--shuffle", type=int, metavar="SEED", help="a random order over all of them")
    add("--split", type=float, metavar="FRACTION", help="share of the windows that go to --split-to instead")
    add("--split-to", type=expand, metavar="DST2")
    args = parser.parse_args(argv)
    with one_line_errors("reshard"):
        if (args.split is None) != (args.split_to is None):
            raise UserError("--split and --split-to: one needs the other")
        if args.split_to is not None and args.out.resolve() == args.split_to.resolve():
            raise UserError(f"{args.out}: named twice; --split-to needs a folder of its own")
        reshard(args)


def reshard(args: argparse.Namespace) -> None:
    pile = Pile([ShardSet(folder) for folder in args.sources])
    for option in ("count", "samples", "shard_tokens"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')}: must be at least 1")
    tokens = pile.facts.get("tokens", pile.facts)
    per_shard = args.samples or int(args.shard_tokens or tokens["shard_tokens"]) // tokens["sequence_length"]
    order = np.arange(len(pile))[: None if args.count is None else int(args.count)]
    if args.shuffle is not None:
        order = np.random.default_rng(args.shuffle).permutation(order)
    origin = {"sources": pile.digests, "shuffle": args.shuffle, "split": args.split}
    sides = {args.out: order}
    if args.split is not None:
        apart = pile.apart(order, args.split)
        sides = {args.out: order[~apart], args.split_to: order[apart]}
    for folder, indices in sides.items():
        if not len(indices):
            raise UserError(f"{folder}: no sample of {len(order)} would go there; change --split {args.split:g}")
    for number, (folder, indices) in enumerate(sides.items()):
        plan = Plan(pile.facts, pile.book, len(indices), max(per_shard, 1), {**origin, "side": number}, pile.text)
        copy(pile, folder, plan, indices)


def copy(pile: "Pile", folder: Path, plan: Plan, indices: np.ndarray) -> None:
    """Write the samples `indices` of the pile, in that order, as the shards of a folder."""

    def items(first: int) -> Iterator[Stored]:
        return (pile.sample(int(indices[n]))._replace(key=f"{n:09d}") for n in range(first, len(indices)))

    fill(folder, plan, "reshard", items, lambda name, samples: write_stored(folder, name, samples, plan.facts))


class Pile:
    """The samples of several folders, one folder after the other, as the bytes that lie in their tars."""

    def __init__(self, sets: Sequence[ShardSet]):
        self.sets = sets
        self.facts, layout = sets[0].facts, sets[0].layout
        for other in sets[1:]:
            _check_equal(sets[0], other)
        self.book = None if layout is None else layout.book
        self.digests = [digest(shards.manifest) for shards in sets]
        self.ends = np.cumsum([len(shards) for shards in sets])
        # what evaluate reads of a folder of tokens; tokens per byte of text change little when samples are skipped
        keys = ("documents", "text_bytes", "text_tokens")
        self.text: dict[str, Any] = {
            key: sum(shards.manifest[key] for shards in sets) for key in keys if key in sets[0].manifest
        }

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Which folder, and which sample of it."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, index - (int(self.ends[number - 1]) if number else 0)

    def sample(self, index: int) -> Stored:
        number, own = self.locate(index)
        shards = self.sets[number]
        entry, tokens = shards.entry(own), shards[own].tokens  # decoded: what cannot be read is not copied
        return Stored(entry.key, shards.members(own), len(tokens), entry.labels)

    def apart(self, indices: np.ndarray, fraction: float) -> np.ndarray:
        """Which of the samples `in_split` sets apart, [len(indices)] bool."""
        if not 0 < fraction < 1:
            raise UserError(f"--split {fraction:g}: must be between 0 and 1")
        progress = Progress("reshard looks at", len(indices), "samples")
        found = np.zeros(len(indices), bool)
        for place, index in enumerate(indices):
            number, own = self.locate(int(index))
            found[place] = in_split(self.sets[number][own].tokens, fraction)
            progress.update(1)
        progress.close(f"{found.mean():.2%} are set apart")
        return found


def in_split(tokens: np.ndarray, fraction: float) -> bool:
    """Whether the first 64 bits of the tokens' sha256 (int32, little-endian) fall below `fraction` of their range."""
    name = hashlib.sha256(tokens.astype("<i4").tobytes()).digest()
    return int.from_bytes(name[:8], "big") < fraction * 2**64


def _check_equal(first: ShardSet, other: ShardSet) -> None:
    """UserError that names what differs between the facts of two folders."""
    mine, theirs = dict(flatten(first.facts)), dict(flatten(other.facts))
    differing = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {', '.join(differing[1:4])})" if len(differing) > 1 else ""
        raise UserError(
            f"{other.folder}: {key} is {theirs.get(key)!r}, in {first.folder} it is {mine.get(key)!r}{more}; "
            "only folders with equal facts become one"
        )


if __name__ == "__main__":
    main()
