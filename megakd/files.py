"""Files that appear whole or not at all: written under a temporary name, synced, renamed."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from megakd.errors import UserError

CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC}
CANNOT_WRITE |= {errno.EDQUOT, errno.ENAMETOOLONG}


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write a file or folder at; on success it is synced and renamed.

    The temporary name carries host and process, so two writers of one file do not meet; the last to finish wins.
    An error leaves nothing behind; a kill leaves `NAME.tmp-HOST-PID`, which no reader looks at.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            sync(file)
        if temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno in CANNOT_WRITE:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        raise
    finally:
        remove(temporary)


def remove_stale(folder: Path) -> None:
    """Delete what killed writers of this machine left: their process is gone, and nobody wrote for a minute."""
    for path in folder.glob("*.tmp-*"):
        host, _, process = path.name.rpartition(".tmp-")[2].rpartition("-")
        if host == os.uname().nodename and process.isdigit() and not Path(f"/proc/{process}").exists():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > 60:
                    remove(path)


@contextmanager
def locked(path: Path, otherwise: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `path` (made if missing); a process that dies lets go of it.

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


def write_json(path: Path, value: Any) -> None:
    """Publish `value` as indented JSON."""
    with publishing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The JSON value of a file; UserError naming file, line and column when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        place = f":{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{place}: not valid JSON ({getattr(error, 'msg', error)})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
        raise UserError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Publish a JSON object with a checksum of itself under "seal"."""
    write_json(path, {**value, "seal": digest(value)})


def read_sealed(path: Path, kind: str, version: int) -> dict[str, Any]:
    """What `write_sealed` wrote; UserError when it is another format or version, or was changed since."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != kind:
        raise UserError(f"{path}: not a file of format {kind!r}")
    if value.get("version") != version:
        raise UserError(f"{path}: version {value.get('version')} of {kind!r}, this MegaKD reads version {version}")
    seal = value.pop("seal", None)
    try:
        own = digest(value)
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if seal != own:
        raise UserError(f"{path}: its seal {seal!r} does not match its content: it was changed after it was written")
    return value


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


def read_json_lines(path: Path) -> list[Any]:
    """Every line of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut short
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from error
    return rows


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form, the first 16 hex digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def shipped(kind: str, name: str) -> Path:
    """A file that comes with MegaKD: `ds_configs/zero3.json`, `launch/recipes/demo.json`, …

    In a checkout these folders stand beside the package, in an installed wheel inside it.
    """
    package = Path(__file__).parent
    inside, beside = package / kind / name, package.parent / kind / name
    return inside if inside.exists() else beside


def resolve(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a model: itself, the shipped `demo`, or a download of a hub id. UserError when it is none.

    weights: False downloads configuration and tokenizer alone.
    """
    if name == "demo":
        return shipped("assets", "demo-teacher")
    if (Path(name) / "config.json").exists():
        return Path(name)
    if Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: not a model folder (no config.json)")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's errors are many; each means that this model cannot be had
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{name}: neither a folder nor a model the hub gives: {reason}") from error
