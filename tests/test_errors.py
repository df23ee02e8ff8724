"""What a library raises about the user's material is one line, bounded, never empty; our own bugs stay tracebacks."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from megakd.errors import LONGEST_MESSAGE, UserError, foreign, listed, reason, shorten


class Silent(BaseException):
    """As a request to end that a library may define: no `Exception`."""


class PanicException(BaseException):
    """As Rust's panics reach Python."""


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("first\nsecond"), "a.txt: first; convert it"),
        (ValueError(""), "a.txt: ValueError; convert it"),
        (ValueError("\n\n  third"), "a.txt: third; convert it"),
        (KeyError("text"), "a.txt: KeyError: 'text'; convert it"),
        (RecursionError("too deep"), "a.txt: too deep; convert it"),
        (PermissionError(13, "Permission denied", "/b"), "a.txt: Permission denied: /b; convert it"),
        (PanicException("index out of bounds"), "a.txt: index out of bounds; convert it"),
    ],
)
def test_fault_of_a_library_is_one_line_whatever_its_class(error: BaseException, words: str):
    with pytest.raises(UserError) as said, foreign("a.txt", "convert it"):
        raise error
    assert str(said.value) == words and said.value.__cause__ is error


@pytest.mark.parametrize("error", [UserError("mine"), MemoryError(), KeyboardInterrupt(), SystemExit(85), Silent()])
def test_what_is_no_fault_of_the_material_passes(error: BaseException):
    with pytest.raises(type(error)) as said, foreign("a.txt", "convert it"):
        raise error
    assert said.value is error


def test_long_message_is_cut_in_its_middle_with_a_count():
    message = str(UserError("/path/file: " + "x" * 440_000 + "; run: megakd tokenize"))
    assert len(message) <= LONGEST_MESSAGE and message.startswith("/path/file: xxx")
    assert message.endswith("; run: megakd tokenize") and "[438,0" in message
    assert shorten("abc", 3) == "abc" and str(UserError("short")) == "short"


def test_list_in_a_message_is_bounded():
    assert listed("abc") == "a, b, c" and listed(range(20_000), 2) == "0, 1 and 19,998 more"
    assert len(reason(ValueError("x" * 10_000))) <= 300


def test_libraries_faults_are_caught(tmp_path: Path):
    for call in (lambda: json.loads("["), lambda: torch.load(tmp_path / "no"), lambda: Tokenizer.from_str("{")):
        with pytest.raises(UserError, match=r"here: .+"), foreign("here"):
            call()
