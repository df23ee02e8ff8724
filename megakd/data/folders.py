"""Which files of a folder are data: no hidden, temporary or explaining ones, and none of them twice."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megakd.errors import UserError, listed

HIDDEN = re.compile(
    r"[._~#$].*"  # of the system, of editors, of notebooks (.ipynb_checkpoints), of Spark (_SUCCESS, _temporary)
    r"|.*(~|\.(tmp|temp|swp|swo|bak|crc|part|partial|crdownload|incomplete|lock))|.*\.tmp-.*"
    r"|thumbs\.db|desktop\.ini|lost\+found",
    re.IGNORECASE,
)
ABOUT = re.compile(
    r"(read[-_]?me|licen[cs]e|copying|copyright|notice|authors|contributors|change(s|log)|citation|requirements"
    r"|checksums?|(sha(1|256|512)|md5)(sums?)?)([-_.](apache|mit|bsd|gpl|lgpl|cc|[a-z]{2}|\d)[-_.\w]*)?\.txt",
    re.IGNORECASE,
)


class Listing(NamedTuple):
    """Files of data in the order of their names, and the others of the same place by the reason why they are none."""

    taken: list[Path]
    passed: dict[str, list[Path]]

    def counts(self, suffixes: Sequence[str]) -> str:
        """`12 files (10 .parquet, 2 .jsonl)`."""
        kinds = [_suffix(path, suffixes) for path in self.taken]
        each = ", ".join(f"{kinds.count(kind):,} {kind}" for kind in suffixes if kind in kinds)
        return f"{len(self.taken):,} file{'s' * (len(self.taken) != 1)} ({each})"

    def passed_over(self) -> str:
        """`; passed over: 2 hidden or temporary (._a.parquet, _SUCCESS)`; empty when nothing was."""
        each = (f"{len(paths):,} {why} ({listed(path.name for path in paths)})" for why, paths in self.passed.items())
        return f"; passed over: {', '.join(each)}" if self.passed else ""


def data_files(folder: Path, suffixes: Sequence[str], below: bool = True) -> Listing:
    """The files of data in a folder; with `below`, in all folders in it, too.

    Files that are hidden, temporary, of other suffixes or about the data (README.txt) are passed over, and so is a
    file that a link names again. Of x.jsonl and x.jsonl.gz the one whose suffix comes first in `suffixes` is taken.
    UserError when x.parquet and x.jsonl may hold one text twice, or when a folder cannot be read.
    """
    return sort_out(folder, _walk(folder, below), suffixes, below)


def _walk(folder: Path, below: bool) -> Iterator[Path]:
    """The files below a folder and its links to folders; hidden folders (not `below`: all) as they are."""
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        if (identity := _identity(Path(place))) in seen:  # a link back to a folder that was read
            folders.clear()
            continue
        seen.add(identity)
        closed = {name for name in folders if not below or HIDDEN.fullmatch(name)}
        folders[:] = set(folders) - closed
        yield from (Path(place, name) for name in (*names, *closed))


def sort_out(
    root: Path, paths: Iterator[Path] | Sequence[Path], suffixes: Sequence[str], below: bool = True
) -> Listing:
    """`data_files` of paths below `root` that were found otherwise, by a pattern say."""
    passed: dict[str, list[Path]] = {}
    forms: dict[Path, list[Path]] = {}  # of one file, by its name without suffix
    seen: set[tuple[int, int]] = set()
    for path in sorted(paths):
        suffix = _suffix(path, suffixes)
        if any(HIDDEN.fullmatch(part) for part in path.relative_to(root).parts):
            passed.setdefault("hidden or temporary", []).append(path)
        elif path.is_dir() and not below:
            passed.setdefault("folders", []).append(path)
        elif not suffix:
            passed.setdefault("of other kinds", []).append(path)
        elif ABOUT.fullmatch(path.name):
            passed.setdefault("about the data", []).append(path)
        elif path.exists() and _identity(path) in seen:
            passed.setdefault("linked twice", []).append(path)
        else:
            seen |= {_identity(path)} if path.exists() else set()
            forms.setdefault(path.with_name(path.name.removesuffix(suffix)), []).append(path)
    for same in forms.values():
        _check_kinds(same, suffixes)
        same.sort(key=lambda path: suffixes.index(_suffix(path, suffixes)))
        if same[1:]:
            passed.setdefault("of the same name as another that was taken", []).extend(same[1:])
    return Listing(sorted(same[0] for same in forms.values()), passed)


def _check_kinds(paths: list[Path], suffixes: Sequence[str]) -> None:
    """UserError when files of one name are not one file in several packings."""
    kinds = {_suffix(path, suffixes).removesuffix(".gz").removesuffix(".zst") for path in paths}
    if len(kinds) > 1:
        raise UserError(
            f"{paths[0].parent}: {listed(path.name for path in paths)}: is this one text in several formats? name "
            f"those to read by a pattern, like '{paths[0].parent}/*{paths[0].suffix}', or give them different names"
        )


def _suffix(path: Path, suffixes: Sequence[str]) -> str:
    """The one of `suffixes` that a file has, or nothing."""
    return next((suffix for suffix in suffixes if path.name.endswith(suffix)), "")


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
