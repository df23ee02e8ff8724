"""Every field of a configuration: values, default and meaning, for the terminal and for docs/configuration.md."""

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megakd.config.base import Section
from megakd.config.data import SourceConfig
from megakd.config.objective import KINDS
from megakd.config.run import RunConfig, kinds_of
from megakd.config.train import LrRule, StageConfig
from megakd.errors import UserError


class Entry(NamedTuple):
    """A field: its dotted path, the values it takes, its default as JSON, whether it may change later, its meaning."""

    path: str
    values: str
    default: str
    mutable: bool
    meaning: str


class Part(NamedTuple):
    """A section, or a kind of objective: its title, what it is about, its fields."""

    title: str
    about: str
    entries: list[Entry]


def parts(section: str | None = None, mutable: bool = False) -> list[Part]:
    """The sections of a configuration, or one of them; mutable: the fields alone that may change after `megakd new`.

    UserError for a section that there is not.
    """
    found = [part for name in RunConfig.model_fields if section in (None, name) for part in _parts(name)]
    if section is None:
        plain = [_entry(name, field) for name, field in RunConfig.model_fields.items() if not _nested(name)]
        found.insert(0, Part("run", "What belongs to no section.", plain))
    elif not found:
        known = ", ".join(name for name in RunConfig.model_fields if _nested(name))
        raise UserError(f"{section}: no section of a configuration; the sections are {known}")
    if mutable:
        found = [part._replace(entries=[entry for entry in part.entries if entry.mutable]) for part in found]
    return [part for part in found if part.entries]


def _nested(name: str) -> bool:
    return name == "stages" or bool(kinds_of(name))


def _parts(name: str) -> Iterator[Part]:
    if name == "objective":
        for kind, section in KINDS.items():
            yield _part(f"objective, kind={kind}", name, section)
    elif name == "stages":
        yield _part("stages", "stages[]", StageConfig)
        yield _part("stages[].lr_multipliers", "stages[].lr_multipliers[]", LrRule)
    else:
        yield from (_part(name, name, section) for section in kinds_of(name))
        if name == "data":
            yield _part("data.sources", "data.sources[]", SourceConfig)


def _part(title: str, path: str, section: type[Section]) -> Part:
    about = " ".join((section.__doc__ or "").split())
    return Part(title, about, [_entry(f"{path}.{key}", field) for key, field in section.model_fields.items()])


def _entry(path: str, field: FieldInfo) -> Entry:
    default = "required" if field.is_required() else json.dumps(field.default, default=_plain)
    mutable = bool((field.json_schema_extra or {}).get("mutable"))  # type: ignore[union-attr]
    return Entry(path, _values(field), default, mutable, field.description or "")


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_none=True, exclude_defaults=True) if isinstance(value, Section) else str(value)


BOUNDS = {
    "ge": "≥ {}",
    "gt": "> {}",
    "le": "≤ {}",
    "lt": "< {}",
    "min_length": "at least {}",
    "max_length": "at most {}",
}


def _values(field: FieldInfo) -> str:
    """`int ≥ 1`, `als | adam`, `float > 0 | null`."""
    text = _type(field.annotation)
    bounds = [
        BOUNDS[name].format(f"{value:g}" if isinstance(value, float) else value)
        for each in field.metadata
        for name in BOUNDS
        if (value := getattr(each, name, None)) is not None
    ]
    null = " | null" if text.endswith(" | null") else ""
    return f"{text.removesuffix(' | null')}{''.join(f' {bound}' for bound in bounds)}{null}"


def _type(annotation: Any) -> str:
    """A Python type in the words of JSON: `list of float`, `als | adam`, `str | null`."""
    kind, inside = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _type(inside[0])
    if kind is Literal:
        return " | ".join(map(str, inside))
    if kind in (Union, types.UnionType):
        return " | ".join(map(_type, inside))
    if kind is tuple and inside[-1] is ...:
        entries = _type(inside[0])
        return f"list of ({entries})" if " | " in entries else f"list of {entries}"
    if kind is tuple:
        return f"[{', '.join(map(_type, inside))}]"
    names = {type(None): "null", bool: "true | false", str: "text", int: "integer", float: "number", LrRule: "rules"}
    names |= {SourceConfig: "sources"}
    return names.get(annotation, "object")


def markdown() -> str:
    """docs/configuration.md."""
    lines = [HEAD]
    for part in parts():
        lines += [
            f"\n## `{part.title}`\n",
            part.about,
            "",
            "| field | values | default | meaning |",
            "|---|---|---|---|",
        ]
        for entry in part.entries:
            values = entry.values.replace("|", "\\|")
            mark = " *(mutable)*" if entry.mutable else ""
            meaning = entry.meaning.replace("|", "\\|")
            lines.append(f"| `{entry.path}` | {values} | `{entry.default}` | {meaning}{mark} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# Configuration

This page lists every field of a run's configuration. `megakd config` prints the same list at the terminal.

```bash
megakd config                 # every field
megakd config optim           # one section
megakd config --mutable       # fields that may change after the run was made
```

A recipe is a JSON object with these sections; what it skips has its default. `megakd new RUN --from RECIPE
section.key=value …` checks it and writes it in full to `RUN/config.json`. Fields marked *(mutable)* may change later,
as `section.key=value` behind any verb; the change is recorded in `history.jsonl`. Any other change makes a new run:
`megakd new RUN2 --from RUN section.key=value`. A key that is no field is refused with the nearest name, and so
is a field that has no effect under the others.

Stages are counted from 0. A stage has one length: to give it in steps, take out the recipe's tokens:

```bash
megakd new runs/b --from demo stages.0.tokens=102400
megakd new runs/c --from demo stages.0.tokens=null stages.0.steps=20
```

<!-- Generated from megakd/config by `python -m megakd config --markdown`; a test holds both equal. -->"""
