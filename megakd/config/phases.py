"""A stage of online distillation as phases that switch its components on one after the other."""

from typing import Any

# what each third of a stage has other than its objective
PHASES: dict[str, dict[str, Any]] = {
    "basic": {"feature": 0, "attention": 0, "layers": 0, "contrastive": 0},
    "aligned": {"layers": 0, "contrastive": 0},
    "all": {},
}
RAMPS = ("alpha", "temperature")  # fields that may be a pair [start, end] over a stage


def in_phases(
    stage: dict[str, Any], objective: dict[str, Any], phases: dict[str, dict[str, Any]] = PHASES
) -> list[dict[str, Any]]:
    """The stages, named STAGE-PHASE, that take the place of one; each has its own warmup and learning-rate schedule.

    They share its length: steps add up to its own, of passes and tokens each has its part. objective: the fields in
    force in the stage; its ramps go on from phase to phase.
    """
    found = []
    for index, (name, changes) in enumerate(phases.items()):
        length = {
            key: _part(key, stage[key], index, len(phases)) for key in ("tokens", "steps", "epochs") if stage.get(key)
        }
        ramps = {
            key: _ramp(objective[key], index, len(phases)) for key in RAMPS if isinstance(objective[key], list | tuple)
        }
        settings = {**stage.get("objective", {}), **ramps, **changes}
        found.append({**stage, **length, "name": f"{stage['name']}-{name}", "objective": settings})
    return found


def _part(key: str, length: float, index: int, parts: int) -> float:
    if key == "epochs":
        return length / parts
    return (int(length) + parts - 1 - index) // parts


def _ramp(ramp: list[float] | tuple[float, float], index: int, parts: int) -> list[float]:
    return [ramp[0] + (ramp[1] - ramp[0]) * at / parts for at in (index, index + 1)]
