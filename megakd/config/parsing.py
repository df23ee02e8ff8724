"""A recipe or a run's config.json, with overrides, as a RunConfig; errors name the key and what would be right."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megakd.config import hydra, originals
from megakd.config.migration import migrate
from megakd.config.objective import KINDS
from megakd.config.run import RunConfig, nearest
from megakd.errors import UserError
from megakd.names import find_deepspeed
from megakd.system.files import read_json
from megakd.system.logging import say


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """A recipe (or a run's config.json) with overrides applied, the DeepSpeed file copied in, and checked."""
    raw, overrides = read_recipe(path, list(overrides))
    if any(item.startswith("engine.config=") for item in overrides) and isinstance(raw.get("engine"), dict):
        raw["engine"] = {k: v for k, v in raw["engine"].items() if k != "deepspeed"}  # the copy that it replaces
    config = parse(_of_one_process(raw, _of_one_kind(raw, apply_overrides(raw, overrides))), str(path))
    _check_distinct([stage.name for stage in config.stages], path)
    return _with_deepspeed(config, path.parent)


def read_recipe(path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """A recipe of JSON or YAML in today's keys, and the overrides that are left to apply.

    Old keys (`config.originals`) and choices of Hydra's groups among the overrides are applied already.
    """
    file, overrides = read_tree(path, overrides)
    raw, overrides = in_our_keys(file, overrides, str(path), path.suffix in hydra.SUFFIXES)
    unknown = [f"{key}={value}: {value.why}" for key, value in _values(raw) if isinstance(value, hydra.Unresolved)]
    if unknown:
        raise UserError(f"{path}: {'; '.join(unknown)}")
    return raw, overrides


def read_tree(path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """A recipe in the keys that it is written in, and the overrides but for choices of Hydra's groups, which it has."""
    if path.suffix in hydra.SUFFIXES:
        pairs = [item.lstrip("+").partition("=") for item in overrides]
        chosen = {
            key: name for key, _, name in pairs if key in hydra.groups(path) and key not in RunConfig.model_fields
        }
        overrides = [item for item in overrides if item.lstrip("+").partition("=")[0] not in chosen]
        file = hydra.compose(path, chosen)
    else:
        file = read_json(path)
    if not isinstance(file, dict):
        raise UserError(f"{path}: a recipe is a JSON object, not {type(file).__name__}")
    return file, overrides


def in_our_keys(
    file: dict[str, Any], overrides: list[str], source: str, interpolates: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """A tree with the old keys of it and of the overrides in ours, and the overrides that are left to apply."""
    old, ours = originals.sort_out(overrides, file)
    early = [item for item in ours if not item.startswith("stages")]  # stages may be made of old keys first
    full = apply_overrides(file, [*old, *early])
    if interpolates:
        file, full = hydra.resolve(file), hydra.resolve(full)
    if not old and not originals.any_old(file):
        return file, ours
    return originals.modern(file, full, [*old, *ours], source, RunConfig().model_dump(mode="json")), ours


def _values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf, also in lists."""
    if isinstance(node, dict | list):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _values(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _of_one_kind(before: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` without what belongs to the kind of objective that it had before overrides changed the kind."""
    objectives = before.get("objective", {}), raw.get("objective", {})
    if not all(isinstance(each, dict) for each in objectives):
        return raw
    was, now = objectives
    kind, old = now.get("kind", "cached"), was.get("kind", "cached")
    if kind == old or not all(isinstance(each, str) and each in KINDS for each in (kind, old)):
        return raw
    foreign = [key for key in now if key not in KINDS[kind].model_fields and key in was and now[key] == was[key]]
    defaults = KINDS[old]().model_dump(mode="json")
    changed = [key for key in foreign if now[key] != defaults.get(key)]
    if changed:
        say(f"objective.kind={kind}: drops {', '.join(changed)}, which objective.kind={old} had")
    return {**raw, "objective": {key: value for key, value in now.items() if key not in foreign}}


def _of_one_process(before: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` without the ranks of a recipe for DeepSpeed, where an override sets engine.kind=local."""
    was, now = before.get("engine", {}), raw.get("engine", {})
    if not (isinstance(was, dict) and isinstance(now, dict)) or now.get("kind") != "local":
        return raw
    ranks = now.get("ranks", 1)
    if was.get("kind", "deepspeed") == "local" or ranks == 1 or was.get("ranks") != ranks:
        return raw
    say(f"engine.kind=local: drops engine.ranks={ranks}, which engine.kind=deepspeed had")
    return {**raw, "engine": {key: value for key, value in now.items() if key != "ranks"}}


def _check_distinct(names: list[str], path: Path) -> None:
    """UserError for two stages of one name, as file systems see it: some take "All" and "all" for one."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            both = f"two stages are named {name!r}"
            if seen[key] != name:
                both = f"the names {seen[key]!r} and {name!r} differ in case or accents' form alone"
            raise UserError(f"{path}: stages: {both}; checkpoints need distinct names")
        seen[key] = name


def parse(raw: dict[str, Any], source: str, frozen: bool = False) -> RunConfig:
    """Validate; the first thing wrong becomes a UserError `SOURCE: key: what is wrong and what would be right`.

    frozen: a run's own config.json, in which fields of an older version that have no effect are skipped; else they are
    refused.
    """
    raw, dropped = migrate(raw)
    if dropped and not frozen:
        more = f" (and {len(dropped) - 1} more)" if dropped[1:] else ""
        raise UserError(f"{source}: {dropped[0]}{more}")
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_fault(error, raw)}") from None
    vars(config)["dropped"] = tuple(dropped)
    return config


def _first_fault(error: ValidationError, raw: Any) -> str:
    first = error.errors()[0]
    location: tuple[int | str, ...] = first["loc"]
    if location[:1] == ("objective",):  # pydantic names the member of the union too
        location = tuple(part for at, part in enumerate(location) if at != 1 or part not in KINDS)
    value = first["input"]
    if first["type"] == "kind":  # what tells the members of the union apart
        location, value = (*location, "kind"), value.get("kind") if isinstance(value, dict) else value
    path = ".".join(str(part) for part in location)
    others = sum(e["type"] != "too_short" for e in error.errors()[1:])  # a broken list also counts as too short
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        kind = raw["objective"].get("kind", "cached") if location[0] == "objective" else "cached"
        return f"unknown key {path!r}{nearest(location, kind)}{more}"
    got = "" if first["type"] == "missing" else f", got {json.dumps(value, default=str)[:80]}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{path}: {message}{got}{more}"


def parse_frozen(raw: Any, source: str) -> RunConfig:
    """`parse` of a run's own config.json, in which fields that its version did not have mean what that version did."""
    if isinstance(raw, dict) and raw.get("objective", {}).get("kind") == "sar" and isinstance(raw.get("sar"), dict):
        raw["sar"].setdefault("router_lr_multiplier", 1.0)
    return parse(raw, source, frozen=True)


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with every `section.key=value` set; value is JSON, or a string where it is not."""
    raw = json.loads(json.dumps(raw))
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UserError(f"override {item!r}: expected section.key=value, like optim.lr=1e-4")
        dotted = re.sub(r"\[(\d+)\]", r".\1", path)
        if dotted != path:
            raise UserError(f"override {item!r}: write {dotted}={text}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        _set(raw, path.split("."), value, item)
    return raw


def _set(node: Any, keys: list[str], value: Any, item: str) -> None:
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise UserError(f"override {item!r}: {_right_index(node, keys, key, item)}")
            place: Any = int(key)
        elif isinstance(node, dict):
            place = key
        else:
            raise UserError(f"override {item!r}: {key!r} is below a value that holds no keys")
        if following is None:
            node[place] = value
        else:
            if isinstance(node, dict):
                node.setdefault(place, {})
            node = node[place]


def _right_index(node: list[Any], keys: list[str], key: str, item: str) -> str:
    """What to write instead of `key`, which may be the name of an element, as stages have one."""
    named = [index for index, each in enumerate(node) if isinstance(each, dict) and each.get("name") == key]
    if named:
        return f"write {item.replace(f'.{key}', f'.{named[0]}', 1)}"
    return f"{key!r} is no index into a list of {len(node)}; {keys[0]} are counted from 0: {keys[0]}.0"


def _with_deepspeed(config: RunConfig, folder: Path) -> RunConfig:
    """Copy the named DeepSpeed files into the config, so that the run never depends on a file that may change."""
    engine = config.engine
    if engine.kind != "deepspeed":
        return config
    if engine.deepspeed is None:
        content = _deepspeed_file(engine.config, folder, "engine.config")
        config = config.model_copy(update={"engine": engine.model_copy(update={"deepspeed": content})})
    stages = []
    for index, stage in enumerate(config.stages):
        if stage.config is not None and stage.deepspeed is None:
            content = _deepspeed_file(stage.config, folder, f"stages.{index}.config")
            stage = stage.model_copy(update={"deepspeed": content})
        stages.append(stage)
    return config.model_copy(update={"stages": tuple(stages)})


def _deepspeed_file(name: str, folder: Path, key: str) -> dict[str, Any]:
    path = find_deepspeed(name, folder, key)
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a DeepSpeed file is a JSON object, not {type(content).__name__}")
    return content
