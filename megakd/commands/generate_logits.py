"""Run the teacher over the token shards once: RUN/data/logits/{train,holdout}, the same samples with its targets.

Input shard i gives output shard i. Any number of workers (ranks or array tasks; RANK and WORLD_SIZE, or SLURM_*) take
shards[rank::world]; a finished shard is skipped, one that a kill cut short is made again, a rerun at any width goes on.

examples:
  megakd generate-logits runs/a logits.batch_size=16
  sbatch --array=0-15 launch/generate_logits.sbatch runs/a
"""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megakd.data import codec
from megakd.data.batches import collate
from megakd.data.records import Sample, TeacherTargets
from megakd.data.shards import ShardSet, finished, write_manifest, write_shard
from megakd.data.tokens import load_tokenizer, tokenizer_facts
from megakd.dist import World, read_world
from megakd.errors import UserError
from megakd.log import Progress, say
from megakd.models.hub import load_model, resolve, weights_fingerprint
from megakd.models.teacher import teacher_targets
from megakd.run import Run


def main(run: Run, args: argparse.Namespace) -> None:
    world = read_world()
    folder = resolve(run.config.model.teacher, run.config.model.revision)
    tokenizer = tokenizer_facts(load_tokenizer(folder))
    sets = {part: ShardSet(run.path("data", "tokens", part)) for part in ("holdout", "train")}
    for tokens in sets.values():
        if tokens.facts["tokenizer"] != tokenizer:
            raise UserError(
                f"{tokens.folder}: tokenized with another tokenizer than {folder} has; "
                "run: megakd tokenize RUN in a new run"
            )
    if run.config.logits.top_k > tokenizer["vocab_size"]:
        raise UserError(f"logits.top_k: {run.config.logits.top_k} exceeds the vocabulary of {tokenizer['vocab_size']}")
    teacher: list[Any] = []  # loaded when the first shard needs it
    for part, tokens in sets.items():
        target = run.path("data", "logits", part)
        facts = logits_facts(run, tokens.facts, weights_fingerprint(folder))
        mine = list(zip(tokens.manifest["shards"], tokens.sidecars, strict=True))[world.rank :: world.size]
        todo = [name for name, _ in mine if finished(target, name, facts) is None]
        if todo and not teacher:
            teacher.append(load_model(folder, getattr(torch, run.config.logits.dtype)).eval().to(world.device))
        done = sum(sidecar["tokens"] for name, sidecar in mine if name not in todo)
        progress = Progress(
            f"generate-logits {part}", sum(sidecar["tokens"] for _, sidecar in mine), "tokens", done=done
        )
        write_manifest(target, facts, tokens.manifest["shards"])
        for name in todo:
            first = sum(len(s["samples"]) for n, s in zip(tokens.names, tokens.sidecars, strict=True) if n < name)
            count = len(tokens.sidecars[tokens.names.index(name)]["samples"])
            samples = _with_targets(run, teacher[0], tokens, range(first, first + count), facts, world, progress)
            write_shard(target, name, samples, facts)
        progress.close()
        run.record("generate-logits", part=part, worker=f"{world.rank}/{world.size}", shards=todo)
        missing = [name for name in tokens.names if finished(target, name, facts) is None]
        if missing:
            say(f"generate-logits {part}: this worker's share is done; {len(missing)} shards are left to others")
        else:
            stored = ShardSet(target)
            say(f"generate-logits {part}: {stored.bytes / stored.tokens:.0f} bytes a token, with tokens and tar")


def logits_facts(run: Run, tokens: dict[str, Any], weights: str) -> dict[str, Any]:
    """What a folder of logits says of itself: whose they are, of which tokens, and how they are stored."""
    model, logits = run.config.model, run.config.logits
    return {
        "tokens": tokens,
        "teacher": {"id": model.teacher, "revision": model.revision, "weights": weights},
        "vocab_size": tokens["tokenizer"]["vocab_size"],
        "codec": codec.NAME,
        "top_k": logits.top_k,
        "temperatures": [1.0, *(t for t in logits.temperatures if t != 1.0)],
        "dtype": logits.dtype,
    }


def _with_targets(
    run: Run, teacher: Any, tokens: ShardSet, indices: range, facts: dict[str, Any], world: World, progress: Progress
) -> Iterator[Sample]:
    size, length = run.config.logits.batch_size, tokens.facts["sequence_length"]
    for start in range(indices.start, indices.stop, size):
        samples = [tokens[i] for i in range(start, min(start + size, indices.stop))]
        targets = teacher_targets(
            teacher, collate(samples, length), facts["vocab_size"], facts["top_k"], tuple(facts["temperatures"])
        )
        for row, sample in enumerate(samples):
            count = len(sample.tokens) - 1
            own = TeacherTargets(*(np.asarray(field[row, :count]) for field in targets))
            progress.update(count)
            yield sample._replace(targets=own)
