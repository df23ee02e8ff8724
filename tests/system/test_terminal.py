"""Terminals and logs that are not UTF-8 end no program."""

import io
import sys

import pytest

from megakd import cli
from megakd.errors import UserError
from megakd.system.terminal import accept_any_encoding, one_line_errors
from tests.conftest import ROOT


def stream(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str = "strict") -> io.BytesIO:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors))
    return written


@pytest.mark.parametrize("words", ["--help", "export --help", "generate-logits --help"])
def test_help_is_printed_on_a_terminal_that_is_not_utf8(monkeypatch, words):
    written = stream(monkeypatch, "ascii")
    monkeypatch.setattr(sys, "argv", ["megakd", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.run_command_line()
    sys.stdout.flush()
    assert ended.value.code == 0 and b"usage: megakd" in written.getvalue()


@pytest.mark.parametrize("encoding, errors", [("ascii", "strict"), ("latin-1", "strict"), ("ascii", "surrogateescape")])
def test_what_an_encoding_lacks_is_written_in_ascii(monkeypatch, encoding, errors):
    written = stream(monkeypatch, encoding, errors)
    accept_any_encoding()
    sys.stdout.write("tokens → logits, V ≥ 3, 東\n")
    sys.stdout.flush()
    assert written.getvalue() == b"tokens -> logits, V >= 3, \\u6771\n"


def test_name_of_a_file_that_is_not_utf8_is_printed(monkeypatch):
    written = stream(monkeypatch, "utf-8")
    accept_any_encoding()
    sys.stdout.write("caf\udce9 → é\n")  # as Python reads the bytes of such a name
    sys.stdout.flush()
    assert written.getvalue() == "caf\\udce9 → é\n".encode()


def test_what_the_user_chose_for_a_stream_stays(monkeypatch):
    written = stream(monkeypatch, "ascii", "replace")
    accept_any_encoding()
    sys.stdout.write("→\n")
    sys.stdout.flush()
    assert written.getvalue() == b"?\n"


def test_every_tool_accepts_any_encoding():
    for path in (ROOT / "tools").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "    main()\n" in text:
            assert "\n    accept_any_encoding()\n" in text, path


@pytest.mark.parametrize(
    "error, code, line", [(UserError("no file"), 2, "no file"), (KeyboardInterrupt(), 130, "later")]
)
def test_a_tool_ends_with_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as ended, one_line_errors("some_tool", "later"):
        raise error
    assert (ended.value.code, capsys.readouterr().err) == (code, f"some_tool: {line}\n")
    with pytest.raises(ValueError, match="a fault"), one_line_errors("some_tool"):
        raise ValueError("a fault")  # of the tool itself: a traceback


def test_no_tool_writes_this_ending_again():
    for path in (ROOT / "tools").rglob("*.py"):
        assert "except UserError as error:\n        sys." not in path.read_text(encoding="utf-8"), path
