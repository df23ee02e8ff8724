"""Standard output and error: of any encoding, what it lacks written in ASCII; a tool's errors as one line."""

import codecs
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megakd.errors import UserError

CLOSED_PIPE = 141  # exit code of a program that SIGPIPE (13) ends: 128 + 13
ASCII = {"→": "->", "←": "<-", "↔": "<->", "–": "-", "—": "-", "−": "-", "×": "x", "·": "|", "…": "...", "≤": "<="}
ASCII |= {"≥": ">=", "²": "^2", "‖": "||", "’": "'", "“": '"', "”": '"', "≈": "~", "±": "+-", "α": "alpha"}


def accept_any_encoding() -> None:
    """Let standard output and error take every character: terminals and logs of latin-1 or ASCII, odd file names."""
    codecs.register_error("megakd-ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        # what a user chose (PYTHONIOENCODING=ascii:replace) stays
        if getattr(stream, "errors", None) in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="megakd-ascii")  # type: ignore[union-attr]


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


@contextmanager
def one_line_errors(tool: str, interrupted: str = "interrupted") -> Iterator[None]:
    """End a script of tools/ with one line on standard error: exit code 2 for a UserError, 130 for Ctrl-C."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"{tool}: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"{tool}: {interrupted}\n")
        sys.exit(130)


def leave_closed_pipe() -> None:
    """End with exit code 141, as `cat` does, when the reader of standard output or error is gone: `megakd … | head`.

    Returns where both have their readers: then the pipe that broke is another one, and an error.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if _without_reader(stream)]
    for stream in streams:
        # what is still buffered goes nowhere: the interpreter would complain of it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if streams:
        sys.exit(CLOSED_PIPE)


def _without_reader(stream: Any) -> bool:
    try:
        waiting = select.poll()
        waiting.register(stream.fileno(), 0)  # errors alone
        return any(event & select.POLLERR for _, event in waiting.poll(0))
    except (OSError, ValueError):  # closed, or no file
        return False
