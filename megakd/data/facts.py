"""What a folder of token shards says of itself, everything that its content depends on; may a pass go on with it?"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megakd.config.data import DataConfig, SourceConfig
from megakd.data.documents import SUFFIXES, find_files, source_files
from megakd.data.hub import hub_commit
from megakd.data.shard_writer import shard_name
from megakd.data.shards import MANIFEST, SIDECAR, VERSIONS
from megakd.data.templates import template_of
from megakd.errors import UserError
from megakd.identity import TokenizerIdentity
from megakd.run import Run
from megakd.system.files import read_sealed
from megakd.system.logging import say

PLACES = ("files", "commit")  # of a source: where its rows lie, which a finished part needs no more


def token_facts(
    data: DataConfig,
    part: str,
    tokenizer: TokenizerIdentity,
    bos: list[int],
    commits: Sequence[str | None] = (),
    template: str | None = None,
) -> dict[str, Any]:
    """bos: the ids that documents begin with. commits: of each source, where it is on the hub. template: its hash."""
    commits = commits or [None] * len(data.origins)
    sources = [_source_facts(origin, commit) for origin, commit in zip(data.origins, commits, strict=True)]
    common = {name: getattr(data, name) for name in ("sequence_length", "packing", "shard_tokens", "holdout_fraction")}
    if data.sources:
        weights = [{"weight": origin.weight, "passes": origin.passes} for origin in data.origins]
        both = [{**facts, **weight} for facts, weight in zip(sources, weights, strict=True)]
        own, places = {"sources": both}, {}
    else:
        own = {name: value for name, value in sources[0].items() if name not in PLACES}
        places = {name: value for name, value in sources[0].items() if name in PLACES}
    chat = {"template": template} if template else {}
    return {"part": part, "tokenizer": tokenizer.record(), "bos": bos, **own, **common, **places, **chat}


def _source_facts(origin: SourceConfig, commit: str | None) -> dict[str, Any]:
    names: tuple[str, ...] = ("source", "subset", "split", "text_field")
    if origin.format != "text":
        names = (
            "source",
            "subset",
            "split",
            "format",
            *(f"{c}_field" for c in origin.format.split("_")),
            "tools_field",
        )
    files = source_files(origin.source, origin.split)
    places = {"files": files, "commit": commit}
    return {name: getattr(origin, name) for name in names} | {name: each for name, each in places.items() if each}


def sources_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of each source; of a single one they lie among the others."""
    return facts.get("sources", [facts])


def template_hash(tokenizer: Any) -> str:
    return hashlib.sha256(template_of(tokenizer).encode()).hexdigest()[:16]


def recorded_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of the shards that are in a folder; None when there are none that can be read."""
    for name, kind in (("manifest", MANIFEST), (shard_name(0), SIDECAR)):
        with suppress(UserError):  # missing or damaged: it is written again
            return read_sealed(folder / f"{name}.json", kind, *VERSIONS)["facts"]
    return None


def source_commits(run: Run) -> list[str | None]:
    """The commit of the hub at which each source is read: that of existing shards, else the one of now; None for files.

    Says which files or which commits they are.
    """
    recorded = [recorded_facts(run.path("data", "tokens", part)) or {} for part in ("train", "holdout")]
    return [
        _commit(origin, _known_commit(recorded, number, origin.source))
        for number, origin in enumerate(run.config.data.origins)
    ]


def _known_commit(recorded: Sequence[dict[str, Any]], number: int, source: str) -> str | None:
    """The commit at which existing shards have the source of this number: one name may stand there twice."""
    for facts in recorded:
        each = sources_of(facts)[number : number + 1]
        if each and each[0].get("source") == source and "commit" in each[0]:
            return each[0]["commit"]
    return None


def _commit(origin: SourceConfig, known: str | None) -> str | None:
    try:
        found = find_files(origin.source, origin.split)
    except UserError:  # a finished part needs its source no more; one that is not says what is missing
        return None
    if found.taken:
        what = f"{found.counts(SUFFIXES)}{found.passed_over()}"
        if found.taken[0].is_dir():
            what = f"a data set saved to {found.taken[0]}"
        say(f"data.source {origin.source}: {what}")
    if found.taken or origin.source == "python-docs":
        return None
    commit = known or hub_commit(origin.source, origin.revision)
    at = f"read at commit {commit}" if commit else "its commit is unknown, for the hub cannot be asked"
    say(f"data.source {origin.source}: {at}")
    return commit


def agreed(folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The facts to go on with in a folder that may hold shards.

    UserError when they are of other files of a source, for documents have moved, or of another chat template. They
    stand as they are where one side names no files or commit: a finished part needs its source no more. Those without
    `bos` were made before there was that fact, and have none; those without `packing` are packed. Shards that differ
    otherwise are made again.
    """
    before = recorded_facts(folder)
    if before is None:
        return now
    older, newer = _without_places({"packing": "packed", **before}), _without_places(now)
    names = {name for name in older.keys() | newer.keys() if older.get(name) != newer.get(name)}
    if names == {"bos"} and "bos" not in before:
        if now["bos"]:
            say(
                f"{folder}: documents there begin without a BOS token, as it was made before data.bos; a new run has it"
            )
        names -= {"bos"}
    if names == {"template"}:
        raise UserError(
            f"{folder}: was made with the chat template {before['template']}, it is {now['template']} now: the file of "
            f"data.chat_template, or the tokenizer's, was changed; restore it, or delete {folder.parent} and run this "
            "again"
        )
    if names:
        say(f"{folder}: shards there differ in {', '.join(sorted(names))} and are made again")
        return now
    for was, has in zip(sources_of(before), sources_of(now), strict=True):
        _check_files(folder, was.get("files"), has.get("files"), has["source"])
    return before


def _without_places(facts: dict[str, Any]) -> dict[str, Any]:
    bare = {name: value for name, value in facts.items() if name not in PLACES}
    return {**bare, "sources": [_without_places(each) for each in facts["sources"]]} if "sources" in facts else bare


def _check_files(folder: Path, was: dict[str, Any] | None, has: dict[str, Any] | None, source: str) -> None:
    if was == has or not was or not has:
        return
    before, now = (f"{files['count']} files of {files['bytes']:,} bytes ({files['digest']})" for files in (was, has))
    raise UserError(
        f"{folder}: was made from {before}, data.source {source} has {now} now; restore those, or delete "
        f"{folder.parent} and run this again"
    )
