"""Explain a run, a folder of shards, a shard or a model in words and tables."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megakd.capture.teacher import Teacher, batch_targets
from megakd.config.data import LogitsConfig
from megakd.config.run import RunConfig, flatten
from megakd.data.batches import collate
from megakd.data.records import TeacherTargets
from megakd.data.shards import ShardSet
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer
from megakd.engine.optim import assign_rules
from megakd.errors import UserError
from megakd.identity import TeacherIdentity, changed_fingerprint
from megakd.models.checks import find_live_teacher
from megakd.models.hub import Checkpoint, empty_model, is_student, load_config
from megakd.models.loading import load_model
from megakd.models.spec import MoESpec, active_experts, find_experts
from megakd.names import resolve
from megakd.objectives.build import build
from megakd.report.stored import stored_shards, training_windows
from megakd.run import Run
from megakd.system.dist import read_world
from megakd.system.text import short, table

CHECKED_SAMPLES = 8


MOST_NLL_DIFFERENCE = 0.2  # nats; rounding costs 0.02 to 0.05 in float32, other tokens or another teacher cost nats


def describe_run(run: Run) -> str:
    """The run's shards and stages; for each rule, how many parameters it got, their elements, and one of them."""
    parts = [f"run {run.folder}: {run.config.name}, fingerprint {run.config.fingerprint()}"]
    parts.append(table(["shards", ""], stored_shards(run), left=True))
    if not (run.student_folder / "config.json").exists():
        return "\n".join([*parts, f"no student yet; run: megakd compress {run.folder}"])
    trained, windows = _trained(run), training_windows(run)
    for stage in run.config.stages:
        assigned = assign_rules(trained(run.config.at(stage)), stage.lr_multipliers)
        rows = []
        for index in [*range(len(stage.lr_multipliers)), None]:
            mine = [a for a in assigned if a.rule == index]
            if mine:
                pattern = "(no rule)" if index is None else stage.lr_multipliers[index].pattern
                count = sum(a.parameter.numel() for a in mine)
                rows.append([pattern, f"{mine[0].multiplier:g}", str(len(mine)), f"{count:,}", mine[0].name])
        config = run.config.at(stage)
        length = f"{run.config.steps_of(stage, windows)} steps of {short(config.optim.batch_tokens)} tokens"
        parts.append(f"\nstage {stage.name}: {length}, lr {config.optim.lr:g}")
        parts.append(table(["rule", "x lr", "tensors", "parameters", "for example"], rows))
    return "\n".join(parts)


def _trained(run: Run) -> Callable[[RunConfig], nn.Module]:
    """What a stage's rules apply to: the student; next to a live teacher its routers and projectors too."""
    student = empty_model(run.student_folder)
    if not run.config.objective.live:
        return lambda config: student
    manifest = run.path("data", "tokens", "train", "manifest.json")
    # before `tokenize` the student's own tokenizer is the data's
    facts = ShardSet(manifest.parent).facts if manifest.exists() else {"tokenizer": _tokenizer_facts(run)}
    live = find_live_teacher(run.config, facts)
    assert live is not None
    teacher, size = empty_model(live.folder), live.other_vocab_size
    return lambda config: student if not config.objective.live else build(config, student, teacher, facts, size)


def _tokenizer_facts(run: Run) -> dict[str, Any]:
    return identify_tokenizer(load_tokenizer(run.student_folder)).record()


def describe_shards(shards: ShardSet) -> str:
    """What a folder of shards is, and its first sample in words."""
    rows = [[key, str(value)] for key, value in flatten(shards.facts) if key != "sources"]
    rows += _describe_sources(shards)
    rows += [["shards", str(len(shards.names))], ["samples", f"{len(shards):,}"], ["tokens", f"{shards.tokens:,}"]]
    rows += [["bytes per token", f"{shards.bytes / shards.tokens:.1f}"]]
    return table([str(shards.folder), ""], rows, left=True) + "\n\n" + _describe_sample(shards)


def _describe_sources(shards: ShardSet) -> list[list[str]]:
    """What each of several sources gave, and how many lines were skipped."""
    rows = [
        [
            f"source {each['source']}",
            f"{each['tokens']:,} tokens, {each['share']:.2%} (asked for: {each['weight']:.2%}), "
            f"{each['documents']:,} documents",
        ]
        for each in shards.manifest.get("sources", [])
    ]
    skipped = [name for name in ("bad_lines", "refused") if name in shards.manifest]
    return rows + [[f"{name} (skipped)", f"{shards.manifest[name]:,}"] for name in skipped]


def describe_shard(tar: Path) -> str:
    """One shard of a folder, by the folder's manifest, and its first sample in words."""
    if not (tar.parent / "manifest.json").exists():
        raise UserError(
            f"{tar}: a shard is read by the manifest.json next to it, and there is none; give a folder of shards"
        )
    shards = ShardSet(tar.parent)
    if tar.stem not in shards.names:
        raise UserError(f"{tar}: not a shard of {tar.parent / 'manifest.json'}")
    number = shards.names.index(tar.stem)
    rows = [["shard", f"{number + 1} of {len(shards.names)}"], ["samples", f"{shards.sizes[number]:,}"]]
    rows += [["bytes", f"{tar.stat().st_size:,}"], ["sha256", shards.manifest["shards"][number]["sha256"]]]
    first = sum(shards.sizes[:number])
    return table([str(tar), ""], rows, left=True) + "\n\n" + _describe_sample(shards, first)


def _describe_sample(shards: ShardSet, index: int = 0) -> str:
    sample = shards[index]
    lines = [f"sample {sample.key}: {len(sample.tokens)} tokens, documents begin at {sample.starts.tolist()[:8]}"]
    if sample.targets is None:
        return lines[0]
    show = _token_text(shards)
    counted = np.ones(len(sample.tokens) - 1, bool) if sample.mask is None else sample.mask
    if sample.mask is not None:
        lines[0] += f"; {sample.label_count} of {len(counted)} labels count"
    for position in np.flatnonzero(counted)[:3]:
        targets = sample.targets
        lines.append(
            f"after {show(sample.tokens[position])} comes {show(sample.tokens[position + 1])} "
            f"(NLL {targets.label_nll[position]:.2f}); {_describe_position(targets, position, show)}"
        )
    return "\n".join(lines)


def verify_teacher(shards: ShardSet, where: str | None) -> str:
    """Run the teacher over some samples; UserError when its NLL of their labels is not what the records say.

    A record that belongs to other tokens, or to another teacher, is off by whole nats; rounding by a few hundredths.
    """
    made_by = TeacherIdentity.of(shards.facts["teacher"])
    if made_by.id == "unknown" or shards.facts.get("converted", {}).get("label_nll", "stored") != "stored":
        return "not compared with a teacher: the data was converted from a file that does not name it or its NLL"
    try:
        folder = resolve(where or made_by.id, made_by.revision)
    except UserError:
        return f"not compared with the teacher: {made_by.id} is not here (say where with --teacher)"
    if now := changed_fingerprint(made_by.weights, folder):
        raise UserError(f"{shards.folder}: made by a teacher of fingerprint {made_by.weights}, {folder} has {now}")
    keep, device = LogitsConfig(top_k=1, temperatures=(1.0,)), read_world().device
    model = load_model(folder, getattr(torch, shards.facts["dtype"])).eval().to(device)
    teacher = Teacher(model, keep, shards.facts["vocab_size"])
    indices = sorted({len(shards) * i // CHECKED_SAMPLES for i in range(CHECKED_SAMPLES)})
    differences = []
    for index in indices:
        sample = shards[index]
        count = len(sample.tokens) - 1
        batch = collate([sample._replace(targets=None)], count)
        found = batch_targets(teacher, batch, torch.zeros(1, count), device).label_nll[0].numpy()
        assert sample.targets is not None
        rows = slice(None) if sample.mask is None else sample.mask
        off = np.abs(found - sample.targets.label_nll)[rows]
        differences.append(float(off.sum()) / max(len(off), 1))
        if differences[-1] > MOST_NLL_DIFFERENCE:
            raise UserError(
                f"{shards.place(index)}: the teacher's NLL of its labels is off by {differences[-1]:.2f} nats a token; "
                "it is not this teacher's answer to these tokens: run: megakd generate-logits RUN in a new run"
            )
    return f"the teacher's NLL of the labels of {len(indices)} samples: within {max(differences):.3f} nats on average"


def _describe_position(targets: TeacherTargets, position: int, show: Any) -> str:
    parts = []
    if targets.ids.shape[1]:
        logprobs = targets.logprobs[position]
        best = ", ".join(
            f"{show(targets.ids[position][i])} {np.exp(logprobs[i]):.1%}"
            for i in np.argsort(-logprobs)[: min(4, np.isfinite(logprobs).sum())]
        )
        tail, count = float(np.exp(targets.log_tails[position][0])), int(np.isfinite(logprobs).sum())
        parts.append(f"the teacher says {best}, …; {tail:.1%} outside the {count} stored")
    if targets.draw_ids.shape[1]:
        shares = targets.draw_shares[position]
        drawn = ", ".join(
            f"{show(targets.draw_ids[position][i])} {shares[i]:.0%}"
            for i in np.argsort(-shares)[: min(4, (shares > 0).sum())]
        )
        parts.append(f"draws: {drawn}, … ({int((shares > 0).sum())} distinct); entropy {targets.entropy[position]:.2f}")
    return "; ".join(parts)


def _token_text(shards: ShardSet) -> Any:
    teacher = TeacherIdentity.of(shards.facts["teacher"])
    try:
        tokenizer = load_tokenizer(resolve(teacher.id, teacher.revision, weights=False))
    except UserError:
        return lambda token: f"#{token}"
    return lambda token: repr(tokenizer.decode([int(token)]))


def describe_model(folder: Path) -> str:
    """Parameters and bytes of a model folder, by kind of tensor; files' headers say it, tensors are not read."""
    checkpoint, config = Checkpoint(folder), load_config(folder)
    sizes: dict[str, tuple[int, int]] = {}
    for file in sorted(set(checkpoint.files.values())):
        sizes |= tensor_sizes(checkpoint, file)
    kinds: dict[str, list[int]] = {}
    for name in checkpoint.files:
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        entry = kinds.setdefault(kind, [0, 0, 0])
        for i, n in enumerate((1, *sizes[name])):
            entry[i] += n
    rows = [[kind, str(c), f"{n:,}", short(b)] for kind, (c, n, b) in kinds.items()]
    total = [sum(v[i] for v in kinds.values()) for i in range(3)]
    rows.append(["all", str(total[0]), f"{total[1]:,}", short(total[2])])
    text = table([f"{folder} ({config.model_type})", "tensors", "parameters", "bytes"], rows)
    spec = None if is_student(config) else find_experts(config, str(folder))
    if isinstance(spec, MoESpec):
        (hidden, inner), experts = spec.sizes, spec.experts
        count = len(spec.layers) * experts * 3 * hidden * inner
        text += f"\n\n{len(spec.layers)} layers of {experts} experts, {active_experts(config)} active, "
        text += f"hidden {hidden} → {inner}: {count / total[1]:.1%} of the parameters"
        text += f"\nwhat they are like: megakd inspect {folder} --experts"
    return text


def tensor_sizes(checkpoint: Checkpoint, file: str) -> dict[str, tuple[int, int]]:
    """(numbers, bytes) of every tensor of a file, from its header."""
    return {
        name: (math.prod(tensor.shape), tensor.stop - tensor.start)
        for name, tensor in checkpoint.stored.items()
        if tensor.file == file
    }
