"""Which shards of a run exist."""

from pathlib import Path

from megakd.data.shards import read_manifest
from megakd.errors import UserError
from megakd.models.checks import caches_logits
from megakd.run import Run
from megakd.system.text import short


def stored_shards(run: Run) -> list[list[str]]:
    """A row for each set of token and logit shards that the run has: how many of its shards are finished."""
    logits = ["data/logits/holdout"] if _expects_logits(run) else []
    if not run.config.objective.live:
        logits = ["data/logits/train", *logits]
    return [[name, _count(run.path(name))] for name in ("data/tokens/train", "data/tokens/holdout", *logits)]


def training_windows(run: Run) -> int | None:
    """How many sequences of tokens there are to train on; None before `tokenize`, or where the manifest is damaged."""
    folder = run.path("data", "tokens", "train")
    try:
        return sum(shard["samples"] for shard in read_manifest(folder)["shards"])
    except UserError:
        return None


def _expects_logits(run: Run) -> bool:
    """Whether generate-logits caches those of the validation set, or has done so."""
    if run.path("data", "logits", "holdout").exists():
        return True
    try:
        return caches_logits(run.config)
    except UserError:  # a model is not on this machine, so its tokenizer is unknown
        return True


def _count(folder: Path) -> str:
    """A shard counts when its tar and its sidecar are there; neither is read."""
    finished = {path.stem for path in folder.glob("shard-*.json") if path.with_suffix(".tar").exists()}
    where = f", in {folder.resolve()}" if folder.parent.is_symlink() else ""
    if not (folder / "manifest.json").exists():
        return f"{len(finished)} shards, not finished{where}" if finished else "none yet"
    try:
        listed = read_manifest(folder)["shards"]
    except UserError as error:
        return str(error)
    tokens = sum(shard["tokens"] for shard in listed if shard["name"] in finished)
    count = sum(shard["name"] in finished for shard in listed)
    return f"{count} of {len(listed)} shards, {short(tokens)} tokens{where}"
