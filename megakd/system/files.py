"""Files that appear whole or not at all: written under a temporary name, synced, renamed."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from megakd.errors import UserError

CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC}
CANNOT_WRITE |= {errno.EDQUOT, errno.ENAMETOOLONG}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of a file system that knows no flock
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
STAGING = re.compile(r"(.+)\.tmp-[0-9a-f]{12}")
LOCK, NEW, OLD = "lock", "new", "old"


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write a file or folder at; on success it is synced and gets the name `path`.

    It lies in a staging folder next to `path`, NAME.tmp-TOKEN, with a lock that this process holds. A folder that is
    replaced is renamed into the staging folder, the new one gets its name, then the old one is deleted. Two writers of
    one path do not meet; the last to finish wins. An exception leaves `path` as it was. A kill leaves the staging
    folder, which no reader looks at; `settle` undoes what was half done.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staging(path) as staging:
            new = staging / NEW
            yield new
            for file in [new, *new.rglob("*")] if new.is_dir() else [new]:
                sync(file)
            if new.is_dir() and path.exists() and not path.is_dir():
                raise UserError(f"{path}: is a file, where a folder belongs; move it away")
            swap(new, path, staging / OLD)
            sync(path.parent)
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def swap(new: Path, path: Path, aside: Path) -> None:
    """Rename `new` to `path`; a folder that has this name is renamed to `aside` first, and stays there.

    All three are on one file system. A file replaces a file in one step.
    """
    if not new.is_dir():
        os.replace(new, path)
        return
    while True:
        try:
            with suppress(FileNotFoundError):
                os.replace(path, aside)
            os.replace(new, path)
            return
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            remove(aside)  # another writer's folder has the name since


def settle(folder: Path, name: str | None = None) -> None:
    """Undo what killed writers left half done in `folder` (of the path `name` alone), and delete their staging folders.

    A folder that had lost its name to one that did not get it yet gets it back. Whether a writer lives, its lock says:
    host names and process ids are not unique among containers.
    """
    for staging in folder.glob(f"{'*' if name is None else glob.escape(name)}.tmp-*"):
        match = STAGING.fullmatch(staging.name)
        with suppress(OSError):  # a living writer's, gone meanwhile, or not ours to write
            if match and {entry.name for entry in staging.iterdir()} <= {LOCK, NEW, OLD}:
                with _locked_file(staging) as lock:
                    _clear(staging, folder / match[1], lock)


def discard(path: Path) -> None:
    """Delete a folder that others may look into, out of their sight first: a kill leaves all of it or nothing."""
    with suppress(FileNotFoundError), _staging(path) as staging:
        os.replace(path, staging / OLD)


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    staging, lock = _make_staging(path)
    with lock:
        try:
            yield staging
        finally:
            _clear(staging, path, lock)


def _make_staging(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        staging = path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")
        staging.mkdir()
        try:
            return staging, _locked_file(staging)
        except (FileNotFoundError, BlockingIOError):  # `settle` of another process came before the lock
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return staging, (staging / LOCK).open("ab")  # nobody will settle it


def _locked_file(staging: Path) -> BinaryIO:
    """The lock of a staging folder, held until the file is closed; BlockingIOError when another process holds it."""
    file = (staging / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), (staging / LOCK).stat()):
            raise FileNotFoundError(errno.ENOENT, "deleted before it was locked", str(staging))
    except BaseException:
        file.close()
        raise
    return file


def _clear(staging: Path, path: Path, lock: BinaryIO) -> None:
    """Give an old folder its name back where the new one did not get it; then delete the staging folder."""
    new, old = staging / NEW, staging / OLD
    if os.path.lexists(old) and os.path.lexists(new) and not os.path.lexists(path):
        os.replace(old, path)
        sync(path.parent)
    for entry in (new, old):
        with suppress(OSError):  # `settle` deletes what cannot be deleted now
            remove(entry)
    # before it is released: a writer that waits for a moment between its folder and its lock must see that it came late
    with suppress(OSError):
        (staging / LOCK).unlink()
    lock.close()  # on NFS a folder with an open file cannot be deleted
    with suppress(OSError):  # a writer came after the lock was gone: the folder is its own
        staging.rmdir()


@contextmanager
def locked(path: Path, otherwise: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made if missing); a process that dies releases it.

    otherwise: instead of waiting for another holder, raise UserError with this message.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if otherwise else 0))
        except BlockingIOError:
            raise UserError(f"{path.parent}: {otherwise}") from None
        yield


def sync(path: Path) -> None:
    """Flush a file or folder to its device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink(missing_ok=True)


def link_file(source: str | Path, target: str | Path) -> None:
    """A hard link, or a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(source, target)


def write_json(path: Path, value: Any) -> None:
    """Publish `value` as indented JSON."""
    with publishing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The JSON value of a file; UserError naming file, line and column when it is missing or not JSON."""
    return _read_json(path)[0]


def _read_json(path: Path) -> tuple[Any, str]:
    """The JSON value of a file, and the text of the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
        return json.loads(text), text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        place = f":{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{place}: not valid JSON ({getattr(error, 'msg', error)})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
        raise UserError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def write_sealed(path: Path, value: dict[str, Any], compact: bool = False) -> None:
    """Publish a JSON object with a checksum of itself under "seal".

    compact: in the canonical form of `digest` with the seal at the end, which `read_sealed` checks without making that
    form again; else indented, for people. Keys are sorted in both: equal values give equal bytes.
    """
    text = canonical(value)
    if not compact:
        write_json(path, {**json.loads(text), "seal": _digest(text)})
        return
    with publishing(path) as temporary:
        temporary.write_text(text[:-1] + _sealed_end(text), encoding="utf-8")


def read_sealed(path: Path, kind: str, *versions: int) -> dict[str, Any]:
    """What `write_sealed` wrote; UserError when it is another format or version, or was changed since."""
    value, text = _read_json(path)
    if not isinstance(value, dict) or value.get("format") != kind:
        raise UserError(f"{path}: not a file of format {kind!r}")
    if value.get("version") not in versions:
        known = " and ".join(map(str, versions))
        raise UserError(f"{path}: version {value.get('version')} of {kind!r}, this MegaKD reads version {known}")
    seal = value.pop("seal", None)
    unsealed = f"{text[: -len(_sealed_end(''))]}}}"
    if text == unsealed[:-1] + _sealed_end(unsealed):
        return value
    try:
        own = digest(value)
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if seal != own:
        raise UserError(f"{path}: its seal {seal!r} does not match its content: it was changed after it was written")
    return value


def _sealed_end(canonical_text: str) -> str:
    """What follows a canonical JSON object, in the place of its last bracket, to seal it; of fixed length."""
    return f',"seal":"{_digest(canonical_text)}"}}\n'


def append_json(path: Path, value: Any) -> None:
    """Append one line of JSON, one process at a time; a last line that a kill cut short is taken away first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # else what another has half written looks like what a kill cut short
            _drop_cut_line(file)
            file.write((json.dumps(value, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _drop_cut_line(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read_json_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each with the keys `needed`; a last line that a kill cut short is skipped.

    UserError with the line's number where a line is no such object. No file: no lines.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut short
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}:{number}: not a JSON object; delete the line")
        if missing := [key for key in needed if rows[-1].get(key) is None]:
            raise UserError(f"{path}:{number}: no {missing[0]!r} in this line; delete it")
    return rows


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form, the first 16 hex digits."""
    return _digest(canonical(value))


def canonical(value: Any) -> str:
    """JSON with sorted keys and without spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
