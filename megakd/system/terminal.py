"""Standard output and error of any encoding: what it lacks is written in ASCII instead of ending the program."""

import codecs
import sys

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
