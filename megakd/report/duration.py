"""How long each verb takes: from measured tokens/s where there are some, else from FLOPs at a stated utilisation.

A rate that was measured with other models is scaled by FLOPs per token (models/flops.py), and says so.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from megakd.config.run import RunConfig
from megakd.models.flops import forward_flops, step_flops
from megakd.report.layouts import Fleet
from megakd.system.text import finite, short

SAME = 0.02  # of FLOPs per token: the same models
HEADERS = ["verb", "tokens", "tokens/s per GPU", "time", "basis"]


class Work(NamedTuple):
    """tokens that a verb computes at `flops` each; verb: of measured.json. gpus: that share them."""

    name: str
    verb: str
    tokens: float
    flops: float
    gpus: int


def works(config: RunConfig, student: Any, teacher: Any, fleet: Fleet) -> Iterator[Work]:
    """What runs on GPUs. student, teacher: their configs."""
    length, held_out = config.data.sequence_length, config.data.holdout_tokens
    forward = {name: forward_flops(of, length, name) for name, of in (("student", student), ("teacher", teacher))}
    captured = held_out + (0 if config.objective.live else config.data.tokens)
    yield Work("generate-logits", "generate-logits", captured, forward["teacher"], fleet.gpus)
    flops = step_flops(config, student, teacher if config.objective.live else None)
    for stage in config.stages:
        tokens = config.steps_of(stage) * config.at(stage).optim.batch_tokens
        yield Work(f"train, stage {stage.name}", "train", tokens, flops, fleet.gpus)
    yield Work("evaluate, per checkpoint", "evaluate", held_out, forward["student"], 1)


def rows(found: list[Work], fleet: Fleet, rates: list[dict[str, Any]], utilization: float) -> Iterator[list[str]]:
    """The table under HEADERS."""
    for work in found:
        measured = [rate for rate in rates if rate["verb"] == work.verb and on_gpu(rate["device"], fleet)]
        if measured:
            rate, basis = measured_rate(measured[-1], work)
        elif fleet.gpu.flops is None:
            yield [work.name, short(work.tokens), "?", "?", "unknown: no FLOP/s of this GPU, nothing measured"]
            continue
        else:
            rate = utilization * fleet.gpu.flops / work.flops
            basis = (
                f"estimate: {short(work.flops)} FLOPs per token at {utilization:.0%} of {short(fleet.gpu.flops)} FLOP/s"
            )
        yield [work.name, short(work.tokens), short(rate), duration(work.tokens / rate / work.gpus), basis]


def measured_rate(found: dict[str, Any], work: Work) -> tuple[float, str]:
    """(tokens/s per GPU, what they are based on) of a line of measured.json."""
    rate, basis = found["tokens_per_second"], f"measured on {found.get('ranks', 1)} x {found['device']}"
    flops = finite(found.get("flops_per_token"))
    if not flops or abs(flops / work.flops - 1) < SAME:
        return rate, basis
    return rate * flops / work.flops, f"estimate: {basis} at {short(flops)} FLOPs per token, here {short(work.flops)}"


def on_gpu(device: str, fleet: Fleet) -> bool:
    """Whether a rate was measured on this kind of GPU."""
    return bool(fleet.gpu.device) and re.search(fleet.gpu.device, device) is not None


def duration(seconds: float) -> str:
    """In the unit that gives two or three digits."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
