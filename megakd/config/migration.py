"""Configurations of older versions, and of another kind of objective, as this version reads them.

0.1 had sections `sar` and `online` next to `objective`; their fields are fields of the objective of that kind now. What
belongs to another kind and is its default there goes without a word: a recipe whose kind an override changes.
"""

from typing import Any

from megakd.config.objective import KINDS


def migrate(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration in today's form, and a line for each field of a section of 0.1 that has no effect in it."""
    objective = raw.get("objective", {})
    if not isinstance(objective, dict):
        return raw, []
    kind = objective.get("kind", "cached")
    if not isinstance(kind, str) or kind not in KINDS:
        return raw, []
    old = {name: raw[name] for name in ("sar", "online") if isinstance(raw.get(name), dict)}
    raw = {name: section for name, section in raw.items() if name not in old}
    dropped: list[str] = []
    for name, section in old.items():
        if name == kind:
            objective = objective | section
        else:
            why = f"objective.kind={name} alone reads it; leave it out, or set objective.kind={name}"
            dropped += [
                f"{name}.{key}={value} has no effect: {why}" for key, value in _changed(section, [name]).items()
            ]
    others = {key: value for key, value in objective.items() if key not in KINDS[kind].model_fields}
    changed = _changed(others, [other for other in KINDS if other != kind])
    if old and "tail" in changed:
        why = "a live teacher gives its whole distribution, which has no tail"
        dropped.append(f"objective.tail={changed.pop('tail')} has no effect: {why}")
    objective = {key: value for key, value in objective.items() if key not in others or key in changed}
    return ({**raw, "objective": objective} if objective else raw), dropped


def _changed(section: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Those of a section's fields that are not the default of any of the given kinds."""
    fields = [KINDS[kind].model_fields for kind in kinds]
    return {
        key: value
        for key, value in section.items()
        if not any(key in each and value == _plain(each[key].default) for each in fields)
    }


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default
