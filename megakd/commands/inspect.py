"""Explain what lies at a path: a run (its stages, and which rule each parameter gets), shards, a checkpoint, a model.

examples:
  megakd inspect runs/a                            which parameters train at which rate, stage by stage
  megakd inspect runs/a/data/logits/train          what the shards hold; one record in words
  megakd inspect runs/a/data/logits/train --verify read every byte again
  megakd inspect runs/a/checkpoints/all/step-000150
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from megakd.config import flatten
from megakd.data.records import TeacherTargets
from megakd.data.shards import ShardSet
from megakd.data.tokens import load_tokenizer
from megakd.engine.optim import assign_rules
from megakd.errors import UserError
from megakd.files import read_json
from megakd.log import short, table
from megakd.models.hub import Checkpoint, empty_model, load_config, resolve
from megakd.run import Run


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path)
    parser.add_argument("--verify", action="store_true", help="shards: check every byte against the hashes")


def main(args: argparse.Namespace) -> None:
    path: Path = args.path
    if (path / "history.jsonl").exists():
        text = describe_run(Run.open(path))
    elif (path / "manifest.json").exists():
        shards = ShardSet(path)
        if args.verify:
            shards.verify()
        text = describe_shards(shards) + (f"\nverified: {len(shards)} samples, every byte" if args.verify else "")
    elif (path / "progress.json").exists():
        text = f"checkpoint {path}\n" + table(
            ["progress", ""], [[k, str(v)] for k, v in read_json(path / "progress.json").items()], left=True
        )
        text += "\n\n" + describe_model(path / "weights")
    elif (path / "config.json").exists():
        text = describe_model(path)
    else:
        raise UserError(f"{path}: neither a run, nor shards, nor a checkpoint, nor a model folder")
    print(text)


def describe_run(run: Run) -> str:
    """The run's stages; for each rule, how many parameters it got, their elements, and one of them."""
    parts = [f"run {run.folder}: {run.config.name}, fingerprint {run.config.fingerprint()}"]
    if not (run.student_folder / "config.json").exists():
        return "\n".join([*parts, f"no student yet; run: megakd compress {run.folder}"])
    model = empty_model(run.student_folder)
    for stage in run.config.stages:
        assigned = assign_rules(model, stage.lr_multipliers)
        rows = []
        for index in [*range(len(stage.lr_multipliers)), None]:
            mine = [a for a in assigned if a.rule == index]
            if mine:
                pattern = "(no rule)" if index is None else stage.lr_multipliers[index].pattern
                count = sum(a.parameter.numel() for a in mine)
                rows.append([pattern, f"{mine[0].multiplier:g}", str(len(mine)), f"{count:,}", mine[0].name])
        lr = stage.lr or run.config.optim.lr
        parts.append(f"\nstage {stage.name}: {short(stage.tokens)} tokens, lr {lr:g}")
        parts.append(table(["rule", "x lr", "tensors", "parameters", "for example"], rows))
    return "\n".join(parts)


def describe_shards(shards: ShardSet) -> str:
    """What a folder of shards is, and its first sample in words."""
    rows = [[key, str(value)] for key, value in flatten(shards.facts)]
    rows += [["shards", str(len(shards.names))], ["samples", f"{len(shards):,}"], ["tokens", f"{shards.tokens:,}"]]
    rows += [["bytes a token", f"{shards.bytes / shards.tokens:.1f}"]]
    return table([str(shards.folder), ""], rows, left=True) + "\n\n" + _describe_sample(shards)


def _describe_sample(shards: ShardSet) -> str:
    sample = shards[0]
    lines = [f"sample {sample.key}: {len(sample.tokens)} tokens, documents begin at {sample.starts.tolist()[:8]}"]
    if sample.targets is None:
        return lines[0]
    show = _token_text(shards)
    for position in range(min(3, len(sample.tokens) - 1)):
        targets = sample.targets
        lines.append(
            f"after {show(sample.tokens[position])} comes {show(sample.tokens[position + 1])} "
            f"(NLL {targets.label_nll[position]:.2f}); {_describe_position(targets, position, show)}"
        )
    return "\n".join(lines)


def _describe_position(targets: TeacherTargets, position: int, show: Any) -> str:
    parts = []
    if targets.ids.shape[1]:
        logprobs = targets.logprobs[position]
        best = ", ".join(
            f"{show(targets.ids[position][i])} {np.exp(logprobs[i]):.1%}" for i in np.argsort(-logprobs)[:4]
        )
        tail, count = float(np.exp(targets.log_tails[position][0])), int(np.isfinite(logprobs).sum())
        parts.append(f"the teacher says {best}, …; {tail:.1%} outside the {count} stored")
    if targets.draw_ids.shape[1]:
        shares = targets.draw_shares[position]
        drawn = ", ".join(f"{show(targets.draw_ids[position][i])} {shares[i]:.0%}" for i in np.argsort(-shares)[:4])
        parts.append(f"draws: {drawn}, … ({int((shares > 0).sum())} distinct); entropy {targets.entropy[position]:.2f}")
    return "; ".join(parts)


def _token_text(shards: ShardSet) -> Any:
    teacher = shards.facts["teacher"]
    try:
        tokenizer = load_tokenizer(resolve(teacher["id"], teacher["revision"], weights=False))
    except UserError:
        return lambda token: f"#{token}"
    return lambda token: repr(tokenizer.decode([int(token)]))


def describe_model(folder: Path) -> str:
    """Parameters and bytes of a model folder, by kind of tensor."""
    checkpoint = Checkpoint(folder)
    kinds: dict[str, list[int]] = {}
    for name in checkpoint.files:
        tensor = checkpoint.tensor(name)
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        entry = kinds.setdefault(kind, [0, 0, 0])
        for i, n in enumerate((1, tensor.numel(), tensor.numel() * tensor.element_size())):
            entry[i] += n
    rows = [[kind, str(c), f"{n:,}", short(b)] for kind, (c, n, b) in kinds.items()]
    total = [sum(v[i] for v in kinds.values()) for i in range(3)]
    rows.append(["all", str(total[0]), f"{total[1]:,}", short(total[2])])
    return table([f"{folder} ({load_config(folder).model_type})", "tensors", "parameters", "bytes"], rows)
