"""YAML recipes as OmegaConf and Hydra read them: `defaults` lists composed, `${…}` resolved.

5e-5 is a number (YAML 1.1 calls it text), yes, no, on and off are true and false (quote them where text is meant),
dates stay text, and a key that stands twice is refused. Of resolvers oc.env alone is known. What cannot be resolved
matters where its value is used alone: it stays in the tree as `Unresolved`.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megakd.errors import UserError, reason

SUFFIXES = (".yaml", ".yml")
INTERPOLATION = re.compile(r"\$\{([^${}]*)\}")


class Unresolved(str):
    """The text of a value that is not known, and why."""

    why: str

    def __new__(cls, text: str, why: str) -> "Unresolved":
        made = super().__new__(cls, text)
        made.why = why
        return made


class _Loader(yaml.SafeLoader):
    """safe_load with the numbers of YAML 1.2, as OmegaConf has them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag.removeprefix(_TAG) not in ("float", "int", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.inf)"
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(f"^(?:{_FLOAT}|\\.nan)$"), list("-+.0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; UserError naming file, line and column where it is none."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {reason(error)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, not {type(tree).__name__}")
    return _plain(tree, str(path), ())


def _plain(node: Any, source: str, above: tuple[int, ...]) -> Any:
    """The same tree with text as keys; UserError where a part contains itself."""
    if not isinstance(node, dict | list):
        return node
    if id(node) in above:
        raise UserError(f"{source}: not valid YAML here: an alias contains itself")
    above = (*above, id(node))
    if isinstance(node, list):
        return [_plain(each, source, above) for each in node]
    return {str(key): _plain(value, source, above) for key, value in node.items()}


def groups(path: Path) -> dict[str, Any]:
    """What a file's defaults list chooses of each group: `GROUP=NAME` on the command line chooses another."""
    listed = read_yaml(path).get("defaults")
    listed = listed if isinstance(listed, list) else []
    pairs = [pair for item in listed if isinstance(item, dict) for pair in item.items()]
    return {key.split()[-1].partition("@")[0].strip("/"): name for key, name in pairs}


def compose(path: Path, choices: Mapping[str, str], root: Path | None = None, package: str = "") -> dict[str, Any]:
    """A YAML file with what its defaults list names merged in, later ones over earlier ones, itself last or at _self_.

    choices: {group: name} instead of those of the list. root: the folder that groups are below. package: the dotted
    place of the file's keys in the whole tree; a group's is its name below that.
    """
    tree, root = read_yaml(path), root or path.parent
    listed = tree.pop("defaults", None)
    own = _nested(package, tree)
    if listed is None:
        return own
    if not isinstance(listed, list):
        raise UserError(f"{path}: defaults: a list is expected, like [_self_, GROUP: NAME]")
    tree = {}
    for item in listed if "_self_" in listed else [*listed, "_self_"]:
        if item == "_self_":
            tree = merge(tree, own)
            continue
        key, names = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else ("", item)
        words = key.split()
        group, _, given = (words[-1] if words else "").partition("@")
        if group.strip("/").startswith("hydra/"):  # how Hydra logs and launches
            continue
        names = choices.get(group.strip("/"), names)
        for name in names if isinstance(names, list) else [names]:
            if name is None:
                continue
            folder = root if group.startswith("/") else path.parent
            stem = folder / group.strip("/") / str(name).strip("/")
            found = next((f for f in (stem.with_name(stem.name + s) for s in SUFFIXES) if f.is_file()), None)
            if found is None:
                if "optional" in words:
                    continue
                raise UserError(f"{path}: defaults: {group or name}: no file {stem}.yaml")
            below = f"{package}.{given or group.strip('/').replace('/', '.')}"
            place = given if given == "_global_" else _package(found) if not given else ""
            place = (place or below).removeprefix("_global_").strip(".")
            tree = merge(tree, compose(found, choices, root, place))
    return tree


def _package(path: Path) -> str:
    """What `# @package NAME` at a file's head says."""
    found = re.match(r"(?:\s*#.*\n)*?\s*#\s*@package\s+(\S+)", path.read_text(encoding="utf-8"))
    return "" if found is None or found[1] == "_group_" else found[1]


def _nested(place: str, tree: dict[str, Any]) -> dict[str, Any]:
    for key in reversed([part for part in place.split(".") if part]):
        tree = {key: tree}
    return tree


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both trees; where they meet, the value of `above`."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


class _Unknown(Exception):
    """Why an interpolation has no value."""


def resolve(root: dict[str, Any]) -> dict[str, Any]:
    """The tree with `${a.b}`, `${.sibling}` and `${oc.env:NAME,default}` replaced; the rest is `Unresolved`."""
    return _resolved(root, root, (), frozenset())


def _resolved(root: dict[str, Any], node: Any, path: tuple[str, ...], active: frozenset[tuple[str, ...]]) -> Any:
    if isinstance(node, dict):
        return {key: _resolved(root, value, (*path, key), active) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolved(root, value, (*path, str(i)), active) for i, value in enumerate(node)]
    if node == "???":
        return Unresolved(node, "it has to be given")
    if not isinstance(node, str) or "${" not in node:
        return node
    try:
        if whole := INTERPOLATION.fullmatch(node):
            return _looked_up(root, whole[1], path, active)
        text = INTERPOLATION.sub(lambda found: str(_looked_up(root, found[1], path, active)), node)
    except _Unknown as error:
        return Unresolved(node, str(error))
    inside = "an interpolation inside another is not resolved here; write the value"
    return Unresolved(node, inside) if "${" in text else text


def _looked_up(root: dict[str, Any], name: str, path: tuple[str, ...], active: frozenset[tuple[str, ...]]) -> Any:
    resolver, colon, argument = name.partition(":")
    if colon and resolver.strip() == "oc.env":
        variable, comma, default = (part.strip() for part in argument.partition(","))
        if variable in os.environ or not comma:
            if variable not in os.environ:
                raise _Unknown(f"the variable {variable} is not set")
            return os.environ[variable]
        return None if default == "null" else default.strip("'\"")
    if colon:
        raise _Unknown(f"the resolver {resolver.strip()!r} is not known here; write the value")
    dots = len(name) - len(name.lstrip("."))
    keys = (*path[: len(path) - dots], *_keys(name[dots:])) if dots else tuple(_keys(name))
    if keys in active:
        raise _Unknown(f"{'.'.join(keys)} refers to itself")
    node: Any = root
    for key in keys:
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        else:
            raise _Unknown(f"there is no {'.'.join(keys)}")
    value = _resolved(root, node, keys, active | {keys})
    if isinstance(value, Unresolved):
        raise _Unknown(value.why)
    return value


def _keys(name: str) -> Iterable[str]:
    return [key for key in re.split(r"[.\[\]]+", name.strip()) if key]
