"""Rows of messages, prompts and completions → conversations, whatever file they lie in."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megakd.data.conversations import Columns, Origin, iter_conversations
from megakd.errors import UserError
from tests.data.chats import CHATS, TOOL, WITH_TOOLS, document, said

MESSAGES = Columns("messages", "messages", "prompt", "completion", "tools")
PROMPTS = MESSAGES._replace(format="prompt_completion")


def read(source: Path, columns: Columns = MESSAGES) -> list[str]:
    return [found for found, _ in iter_conversations(Origin(str(source)), columns)]


def lines(folder: Path, *rows: Any, name: str = "some.jsonl") -> Path:
    path, text = folder / name, "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def error_of(source: Path, columns: Columns = MESSAGES) -> str:
    with pytest.raises(UserError) as caught:
        read(source, columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz"])
def test_messages_of_jsonl(tmp_path, name):
    rows = [{"messages": chat} for chat in CHATS.values()]
    path = lines(tmp_path, *rows, {"messages": []}, {"messages": None}, name=name)
    assert read(path) == [document(chat) for chat in CHATS.values()]


def test_messages_and_tools_of_parquet_are_those_that_were_written(tmp_path):
    """Arrow gives every message the keys of all others; only those that hold something come back."""
    tool = {"type": "function", "function": {"name": "weather", "description": "of a city"}}
    table = pyarrow.table({"messages": [WITH_TOOLS, said("Hi", "Hello")], "tools": [[tool], None]})
    pyarrow.parquet.write_table(table, tmp_path / "some.parquet")
    first, second = map(json.loads, read(tmp_path / "some.parquet"))
    assert (first["messages"], first["tools"]) == (WITH_TOOLS, [tool])
    assert (second["messages"], second["tools"]) == (said("Hi", "Hello"), None)


def test_an_answer_without_text_keeps_its_content(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[*said("Hi"), call]]}), tmp_path / "some.parquet")
    assert json.loads(read(tmp_path / "some.parquet")[0])["messages"] == [*said("Hi"), call]


@pytest.mark.parametrize("name", ["some.jsonl", "some.parquet"])
def test_messages_of_sharegpt_are_those_of_roles(tmp_path, name):
    """The same conversations as with role and content, in a column of another name."""
    senders = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}
    chats = [[*said("Hi", "Hello", "More", "No"), {"role": "tool", "content": "3"}], said("Hi", "Hello")]
    chats[1].insert(0, {"role": "system", "content": "Be kind"})
    rows = [
        {"conversations": [{"from": senders[m["role"]], "value": m["content"]} for m in chat], "id": "7"}
        for chat in chats
    ]
    rows[0]["conversations"][0]["weight"] = 0  # of a question, which never counts
    rows[0]["conversations"][1]["weight"] = 1
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        lines(tmp_path, *rows)
    chats[0][0]["weight"], chats[0][1]["weight"] = 0, 1
    assert read(tmp_path / name, MESSAGES._replace(messages="conversations")) == [document(chat) for chat in chats]


def test_columns_that_store_json_as_text(tmp_path):
    path = lines(tmp_path, {"messages": json.dumps(WITH_TOOLS), "tools": json.dumps([TOOL])})
    assert read(path) == [document(WITH_TOOLS, [TOOL])]


def test_prompts_and_completions_are_text_or_messages(tmp_path):
    before = said("Hi", "Hello", "More")
    rows = [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": before, "completion": [{"role": "assistant", "content": "again"}]},
        {"prompt": "Hi", "completion": ""},
    ]
    path = lines(tmp_path, *rows)
    last = [*before, {"role": "assistant", "content": "again"}]
    assert read(path, PROMPTS) == [document(said("Hi", "Hello"), None, 1), document(last, None, 3)]


def test_columns_have_the_names_that_are_given(tmp_path):
    path = lines(tmp_path, {"chat": said("Hi", "Hello"), "functions": [TOOL], "question": "Hi", "answer": "Hello"})
    assert read(path, MESSAGES._replace(messages="chat", tools="functions")) == [document(said("Hi", "Hello"), [TOOL])]
    named = PROMPTS._replace(prompt="question", completion="answer")
    assert read(path, named) == [document(said("Hi", "Hello"), None, 1)]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "Hi"}, "no column 'messages'; data.messages_field of data.format=messages may be text"),
        ({"messages": 3}, "messages: int, expected a list of messages"),
        ({"messages": ["Hi"]}, "message 0 is no {"),
        ({"messages": [{"from": "narrator", "value": "Hi"}]}, "message 0: unknown role 'narrator' in from; known are"),
        ({"messages": [{"from": ["gpt"], "value": "Hi"}]}, "message 0: unknown role ['gpt'] in from"),
        ({"messages": [{"from": "gpt", "value": None}]}, "message 0: value holds NoneType, not text"),
        ({"messages": [{"from": "gpt"}]}, "message 0 is no {"),
        ({"messages": [*said("Hi"), {"from": "gpt", "value": "", "weight": 0}]}, "message 1 has the weight 0; every"),
        ({"messages": [{"role": "assistant", "content": "", "weight": 0.5}]}, "message 0 has the weight 0.5"),
        ({"messages": [{"speaker": "human", "text": "Hi"}]}, "it has speaker, text"),
        ({"messages": "no JSON"}, "text that is no JSON"),
        ({"messages": said("Hi"), "tools": {"name": "f"}}, "expected a list of JSON schemas"),
        (3, "int, expected a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    error = error_of(lines(tmp_path, {"messages": said("Hi")}, row))
    assert f"{tmp_path / 'some.jsonl'}:2" in error and message in error, error


def test_text_is_refused(tmp_path):
    (tmp_path / "some.txt").write_text("Hi")
    assert "is plain text; set data.format=text" in error_of(tmp_path / "some.txt")
    assert "is plain text" in error_of(Path("python-docs"))


def test_a_parquet_file_without_the_column_names_those_that_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["Hi"], "id": [1]}), tmp_path / "some.parquet")
    assert "some.parquet: no column 'messages'" in error_of(tmp_path / "some.parquet")
