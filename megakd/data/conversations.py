"""Rows of messages, or of prompt and completion, → conversations: one JSON string each.

A conversation is {"messages": [...], "tools": [...] or null, "counted_from": n}: the assistant's messages before the
n-th are context, as those of a prompt are. As a string it is a document like any other: the validation set, the hash of
what is packed and the worker processes treat it as text. Messages of ShareGPT's form ({"from": …, "value": …}) become
{"role": …, "content": …}.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megakd.data.documents import encodable, find_files
from megakd.data.hub import hub_rows
from megakd.data.lines import OnBad, json_lines, refuse
from megakd.data.tables import open_table
from megakd.errors import UserError, foreign, listed

# what `from` says in ShareGPT's form → the role of a chat template
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAREGPT |= {"tool": "tool"}


class Columns(NamedTuple):
    """Which columns of a row hold a conversation; format: `messages` alone, or `prompt` and `completion`."""

    format: Literal["messages", "prompt_completion"]
    messages: str
    prompt: str
    completion: str
    tools: str

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.messages,) if self.format == "messages" else (self.prompt, self.completion)

    @property
    def advice(self) -> str:
        """What to say before the columns that there are, where a needed one is not."""
        return f"data.{self.format.split('_')[0]}_field of data.format={self.format} may be"


class Origin(NamedTuple):
    """A source as the configuration names it; see documents.iter_documents."""

    source: str
    subset: str | None = None
    split: str = "train"
    streaming: bool = True
    revision: str | None = None


def iter_conversations(origin: Origin, columns: Columns, on_bad: OnBad = refuse) -> Iterator[tuple[str, str]]:
    """(conversation, where it is) of a source in a fixed order; rows without messages are none.

    UserError names the file, the line or row, and the column that is wrong. on_bad: is told of a single line or row
    that is wrong; where it returns, that is no conversation.
    """
    for row, place in _rows(origin, columns, on_bad):
        try:
            found = conversation_of(row, columns, place)
        except UserError as error:
            on_bad(error)
        else:
            if found is not None:
                yield found, place


def conversation_of(row: dict[str, Any], columns: Columns, place: str) -> str | None:
    """The conversation of a row; None where its messages, or its completion, are empty."""
    if missing := [name for name in columns.needed if name not in row]:
        raise UserError(f"{place}: no column {listed(map(repr, missing))}; {columns.advice} {listed(row, 30)}")
    prompt: list[Any] = []
    if columns.format == "prompt_completion":
        prompt = _messages(row[columns.prompt], "user", f"{place}, {columns.prompt}")
        messages = _messages(row[columns.completion], "assistant", f"{place}, {columns.completion}")
    else:
        messages = _messages(row[columns.messages], None, f"{place}, {columns.messages}")
    if not messages:
        return None
    tools = _parsed(row.get(columns.tools), f"{place}, {columns.tools}")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{place}, {columns.tools}: expected a list of JSON schemas, one per tool")
    value = {"messages": [*prompt, *messages], "tools": tools or None, "counted_from": len(prompt)}
    try:
        return encodable(json.dumps(value, ensure_ascii=False))
    except TypeError as error:
        raise UserError(f"{place}: a value that JSON has no form for ({error})") from error


def _messages(value: Any, role: str | None, place: str) -> list[dict[str, Any]]:
    """Messages of a column. role: of a column that may be plain text; None: it may not."""
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    messages = _parsed(value, place)
    if messages is None:
        return []
    if not isinstance(messages, list):
        raise UserError(f"{place}: {type(messages).__name__}, expected a list of messages")
    return [_message(message, f"{place}: message {number}") for number, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message with role and content, as chat templates take it."""
    if isinstance(message, dict) and {"from", "value"} <= message.keys() and "role" not in message:
        message = _of_sharegpt(message, place)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        keys = f"; it has {listed(message)}" if isinstance(message, dict) else ""
        raise UserError(f'{place} is no {{"role": …, "content": …}}{keys}')
    if message["role"] == "assistant" and message.get("weight") not in (None, 1):
        raise UserError(f"{place} has the weight {message['weight']!r}; every answer counts once: remove the weight")
    return message


def _of_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    sender, text = message["from"], message["value"]
    if not isinstance(sender, str) or sender not in SHAREGPT:
        raise UserError(f"{place}: unknown role {sender!r} in from; known are {', '.join(SHAREGPT)}")
    if not isinstance(text, str):
        raise UserError(f"{place}: value holds {type(text).__name__}, not text")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT[sender], "content": text, **others}


def _parsed(value: Any, place: str) -> Any:
    """The value, or what it is in JSON where a column stores it as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: text that is no JSON ({error})") from error


def _rows(origin: Origin, columns: Columns, on_bad: OnBad) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, where it is) of every row of a source."""
    files = [] if origin.source == "python-docs" else find_files(origin.source, origin.split).taken
    if origin.source == "python-docs" or any(file.name.endswith(".txt") for file in files):
        raise UserError(f"data.format={columns.format}: {origin.source} is plain text; set data.format=text")
    for path in files:
        with foreign(f"{path}: cannot be read to its end"):
            if ".jsonl" in path.suffixes[-2:] and not path.is_dir():
                yield from _json_rows(path, on_bad)
            else:
                yield from _table_rows(path, columns)
    if not files:
        rows = hub_rows(origin.source, origin.subset, origin.split, origin.streaming, origin.revision)
        for number, row in enumerate(rows, 1):
            yield _without_nulls(row), f"data.source: {origin.source}: row {number}"


def _table_rows(path: Path, columns: Columns) -> Iterator[tuple[dict[str, Any], str]]:
    with open_table(path) as table:
        table.check_columns(columns.needed, columns.advice)
        number = 0
        for batch in table.batches([n for n in (*columns.needed, columns.tools) if n in table.schema.names]):
            for row in batch.to_pylist():
                number += 1
                yield _without_nulls(row), f"{path}: row {number}"


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow, in which every struct has the keys of all others, without the keys that hold nothing.

    `content` stays: templates tell an answer without text (null) from a message without content.
    """

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items() if inner is not None or key == "content"}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    return {key: bare(value) for key, value in row.items()}


def _json_rows(path: Path, on_bad: OnBad) -> Iterator[tuple[dict[str, Any], str]]:
    for number, row in json_lines(path, on_bad):
        if isinstance(row, dict):
            yield row, f"{path}:{number}"
        else:
            on_bad(UserError(f"{path}:{number}: {type(row).__name__}, expected a JSON object"))
