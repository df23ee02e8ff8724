"""What a run will take, from its configuration and the teacher's config.json alone; starts nothing.

examples:
  megakd plan runs/a
"""

import argparse
from typing import Any

from megakd.log import short, table
from megakd.models.hub import empty_model, load_config, resolve
from megakd.models.shared_core import Form, stored_parameters
from megakd.models.spec import spec_for
from megakd.run import Run


def main(run: Run, args: argparse.Namespace) -> None:
    print(table(["plan", ""], [*sizes(run), *lengths(run)], left=True))


def sizes(run: Run) -> list[list[str]]:
    """Parameters and bytes of teacher and student, experts apart."""
    folder = resolve(run.config.model.teacher, run.config.model.revision, weights=False)
    config = load_config(folder)
    dense, compact = expert_parameters(config, run.config.compress.rank, str(folder))
    if run.config.compress.budget is not None:
        compact = int(dense * run.config.compress.budget)
    rest = sum(p.numel() for p in empty_model(folder).parameters()) - dense
    width = 2 if run.config.model.dtype == "bfloat16" else 4
    student = compact + rest
    return [
        ["teacher", f"{short(dense + rest)} parameters, {short(dense)} in experts"],
        [
            "student",
            f"{short(student)} parameters, {short(compact)} in experts ({compact / dense:.1%} of the teacher's)",
        ],
        ["student weights", f"{short(student * width)}B in {run.config.model.dtype}"],
        [
            "training state",
            f"{short(student * 16)}B over all ranks (fp32 master, two Adam moments, gradient), before activations",
        ],
    ]


def expert_parameters(config: Any, rank: int, place: str) -> tuple[int, int]:
    """Parameters in the teacher's experts, and in the student's with wrappers of `rank`."""
    spec = spec_for(config, place)
    layers, experts = len(spec.moe_layers(config)), spec.num_experts(config)
    dense = compact = 0
    for projection, (rows, columns) in spec.shapes(config).items():
        dense += layers * experts * rows * columns
        compact += layers * stored_parameters(Form("wrappers", rank, rank), projection, experts, *spec.sizes(config))
    return dense, compact


def lengths(run: Run) -> list[list[str]]:
    """Tokens, bytes and steps of the passes."""
    config = run.config
    data, stored = config.data, config.data.tokens + config.data.holdout_tokens
    logits = config.logits
    # measured, docs/data-format.md: about 12 bits an entry of the head, 16 a distinct draw
    upper = 4 + (logits.profile != "sampled") * 1.7 * logits.top_k + (logits.profile != "topk") * 1.2 * logits.draws
    rows = [
        [
            "tokens to cache",
            f"{short(stored)} in {-(-data.tokens // data.shard_tokens)} shards of {short(data.shard_tokens)}",
        ],
        ["cache on disk", f"at most about {short(stored * upper)}B ({upper:.0f} bytes a token)"],
    ]
    for stage in config.stages:
        steps = config.steps_of(stage)
        passes = stage.tokens / data.tokens
        rows.append(
            [
                f"stage {stage.name}",
                f"{steps} steps of {short(config.optim.batch_tokens)} tokens, {passes:.2f} passes over the cache",
            ]
        )
    return rows
