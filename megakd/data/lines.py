"""Files of text, unpacked and decoded, and the objects in lines of JSON; what is wrong with one line names the line."""

import codecs
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from megakd.errors import UserError

BOM = "\ufeff"
OTHER_ENCODINGS = {  # the longer marks first: that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
UNDECODED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are no UTF-8

OnBad = Callable[[UserError], None]  # is told what is wrong with a line or row; where it returns, that is skipped


def refuse(error: UserError) -> None:
    """The OnBad that skips nothing."""
    raise error


def json_lines(path: Path, on_bad: OnBad = refuse) -> Iterator[tuple[int, Any]]:
    """(number of the line, from 1 on, and its value) of every line that is not blank."""
    with open_text(path, "surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BOM)
            if not line.strip():
                continue
            try:
                if not line.isascii() and UNDECODED.search(line):
                    raise UserError(f"{path}:{number}: bytes that are no UTF-8")
                value = json.loads(line)
            except UserError as error:
                on_bad(error)
            except RecursionError:
                on_bad(UserError(f"{path}:{number}: a JSON value nested too deeply"))
            except ValueError as error:
                on_bad(UserError(f"{path}:{number}: not a JSON object ({error})"))
            else:
                yield number, value


def open_text(path: Path, errors: str = "strict") -> Any:
    """A file of text, unpacked; UserError when its first bytes show that it is not UTF-8."""
    if path.name.endswith(".gz"):
        file: Any = gzip.open(path, "rb")  # noqa: SIM115 (its caller closes it)
    elif path.name.endswith(".zst"):
        file = io.BufferedReader(_WholeZstd(path))
    else:
        file = path.open("rb")
    head = file.peek(4096)[:4096]
    mark = next((mark for mark in OTHER_ENCODINGS if head.startswith(mark)), None)
    if mark or b"\0" in head:
        file.close()
        what = f"text in {OTHER_ENCODINGS[mark]}" if mark else "no text, or text in UTF-16: it has bytes of value 0"
        raise UserError(f"{path}: {what}; convert it to UTF-8")
    return io.TextIOWrapper(file, encoding="utf-8", errors=errors)


class _WholeZstd(io.RawIOBase):
    """A zstd file as a stream that refuses to end inside a frame: zstandard's own reader ends there in silence."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        self.decoder = zstandard.ZstdDecompressor().decompressobj()
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data = self.decoder.unused_data if self.decoder.eof else b""
            if self.decoder.eof:
                data = data or self.file.read(1 << 20)
                if not data:
                    return 0
                self.decoder = zstandard.ZstdDecompressor().decompressobj()
            else:
                data = self.file.read(1 << 20)
                if not data:
                    raise EOFError("the compressed data ends before its end marker")
            self.ready = self.decoder.decompress(data)
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
