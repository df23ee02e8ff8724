"""A recipe or a run's config.json, with overrides, as a RunConfig; errors name the key and what would be right."""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from megakd.config.run import RunConfig, _nearest
from megakd.errors import UserError
from megakd.names import find_deepspeed
from megakd.system.files import read_json


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """A recipe (or a run's config.json) with overrides applied, the DeepSpeed file copied in, and checked."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a JSON object, not {type(raw).__name__}")
    overrides = list(overrides)
    if any(item.startswith("engine.config=") for item in overrides) and isinstance(raw.get("engine"), dict):
        raw["engine"] = {k: v for k, v in raw["engine"].items() if k != "deepspeed"}  # the copy that it replaces
    config = parse(apply_overrides(raw, overrides), str(path))
    _check_distinct([stage.name for stage in config.stages], path)
    return _with_deepspeed(config, path.parent)


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


def parse(raw: dict[str, Any], source: str) -> RunConfig:
    """Validate; the first thing wrong becomes a UserError `SOURCE: key: what is wrong and what would be right`."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        others = sum(e["type"] != "too_short" for e in error.errors()[1:])  # a broken list also counts as too short
        more = f" (and {others} more)" if others else ""
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: unknown key {path!r}{_nearest(first['loc'])}{more}") from None
        got = "" if first["type"] == "missing" else f", got {json.dumps(first['input'], default=str)[:80]}"
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"{source}: {path}: {message}{got}{more}") from None


def parse_frozen(raw: Any, source: str) -> RunConfig:
    """`parse` of a run's own config.json, in which fields that its version did not have mean what that version did."""
    if isinstance(raw, dict) and raw.get("objective", {}).get("kind") == "sar":
        raw.get("sar", {}).setdefault("router_lr_multiplier", 1.0)
    return parse(raw, source)


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with every `section.key=value` set; value is JSON, or a string where it is not."""
    raw = json.loads(json.dumps(raw))
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UserError(f"override {item!r}: expected section.key=value, like optim.lr=1e-4")
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
                raise UserError(f"override {item!r}: {key!r} is no index into a list of {len(node)}")
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
