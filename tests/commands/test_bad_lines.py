"""Lines, rows and conversations that cannot be read: refused with their place, or skipped, counted and named."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megakd.commands import tokenize
from megakd.data.shards import ShardSet
from megakd.run import Run
from megakd.system.files import read_json
from tests.commands.test_tokenize import interrupted
from tests.conftest import files, in_process
from tests.data.chats import said

GOOD = [f"document number {i} of some length, with words in it" for i in range(300)]
BAD: dict[bytes, str] = {
    b'{"text": "cut': "not a JSON object",
    b'{"body": "another field"}': "not a JSON object with a field 'text'",
    b'{"text": 5}': "field 'text' holds int, not text",
    b'{"text": "\xff\xfe"}': "bytes that are no UTF-8",
    b"[" * 100_000: "a JSON value nested too deeply",
}
SMALL = ["data.sequence_length=32", "data.holdout_tokens=1e5", "data.shard_tokens=640", "data.holdout_fraction=0.1"]


def with_bad_lines(folder: Path) -> Path:
    """Good lines with a bad one after every thirty, and one more at the end."""
    lines: list[bytes] = []
    for number, text in enumerate(GOOD):
        lines.append(json.dumps({"text": text}).encode())
        if number % 30 == 29:
            lines.append(list(BAD)[number // 30 % len(BAD)])
    path = folder / "some.jsonl"
    path.write_bytes(b"\n".join([*lines, b"{"]) + b"\n")
    return path


def run_of(recipe: Path, folder: Path, source: Path, *overrides: str) -> Run:
    return Run.create(recipe, [f"data.source={source}", *SMALL, "data.tokens=1e6", *overrides], folder)


def test_bad_lines_are_refused_or_counted_and_named(recipe, tmp_path, monkeypatch):
    source = with_bad_lines(tmp_path)
    run = run_of(recipe, tmp_path / "run", source)
    error = in_process("tokenize", run.folder, code=2)
    assert f"{source}:31: not a JSON object" in error and "data.on_bad_line=skip goes on without it" in error
    error = in_process("tokenize", run.folder, "data.on_bad_line=skip")  # the run is the same
    assert error.count("tokenize train: skipped: ") == 5 and "tokenize train: 11 bad lines were skipped" in error
    for line, why in zip((31, 62, 93, 124, 155), BAD.values(), strict=True):
        assert f"tokenize train: skipped: {source}:{line}: {why}" in error
    manifests = [read_json(run.path("data", "tokens", part, "manifest.json")) for part in ("train", "holdout")]
    assert sum(manifest["documents"] for manifest in manifests) == len(GOOD)
    assert manifests[0]["bad_lines"] == 11
    assert next(e for e in run.events("tokenize") if e.get("part") == "train")["bad_lines"] == 11
    assert "bad_lines (skipped)" in in_process("inspect", run.path("data", "tokens", "train"))
    again = run_of(recipe, tmp_path / "again", source, "data.on_bad_line=skip")
    interrupted(monkeypatch, again, "shard-00002")
    in_process("tokenize", again.folder, "data.workers=2")
    assert files(again.path("data", "tokens")) == files(run.path("data", "tokens"))


def test_a_set_that_ends_before_the_bad_line_does_not_count_it(recipe, tmp_path):
    run = run_of(recipe, tmp_path / "run", with_bad_lines(tmp_path), "data.tokens=320", "data.on_bad_line=skip")
    tokenize.main(run, Namespace())
    manifest = ShardSet(run.path("data", "tokens", "train")).manifest
    assert manifest["documents"] < 30 and "bad_lines" not in manifest


TEMPLATE = """{%- for m in messages -%}
{%- if 'refuse' in m.content -%}{{ raise_exception('not this one') }}{%- endif -%}
{{ m.role + '\\n' + m.content + eos_token }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant\\n' }}{%- endif -%}"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_bad_conversations_count_as_bad_lines(recipe, tmp_path, kind):
    """Some that are no conversation, and some that the template refuses: in a worker process too."""
    rows: list[Any] = [{"messages": said(f"question {i}", f"answer {i}")} for i in range(200)]
    rows[50]["messages"][1]["role"] = None
    rows[60] = {"messages": said("refuse me", "no")}
    rows[90] = {"messages": said("refuse me too", "no")}
    source = tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        places = [f"{source}:51, messages: message 1 is no", f"{source}:61: the conversation of 2 messages"]
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
        places = [f"{source}: row 51, messages: message 1 is no", f"{source}: row 61: the conversation of 2 messages"]
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    chat = ["data.format=messages", f"data.chat_template={tmp_path / 'chat.jinja'}", "data.workers=1"]
    run = run_of(recipe, tmp_path / "run", source, *chat)
    assert f"{source}" in in_process("tokenize", run.folder, code=2)
    error = in_process("tokenize", run.folder, "data.on_bad_line=skip")
    assert "not this one" in error and all(place in error for place in places)
    made = [read_json(run.path("data", "tokens", part, "manifest.json")) for part in ("train", "holdout")]
    assert [sum(each.get("refused", 0) for each in made), made[0]["bad_lines"]] == [2, 1]
    assert sum(each["documents"] for each in made) == 197
