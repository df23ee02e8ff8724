import errno
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megakd.errors import UserError
from megakd.names import shipped
from megakd.system.files import (
    _locked_file,
    append_json,
    digest,
    discard,
    locked,
    publishing,
    read_json,
    read_json_lines,
    read_sealed,
    remove,
    settle,
    sha256,
    write_json,
    write_sealed,
)

SETTLE = """if True:
    import sys
    from pathlib import Path
    from megakd.system.files import settle
    settle(Path(sys.argv[1]))
"""
HOLD = """if True:
    import sys
    from pathlib import Path
    from megakd.system.files import locked
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_appears_whole_at_the_end(tmp_path):
    path = tmp_path / "deep" / "file"
    with publishing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.parent.parent == path.parent
    assert files(tmp_path) == {"deep/file": "new"}
    with publishing(path) as temporary:
        temporary.write_text("newer")
        assert path.read_text() == "new"
    assert files(tmp_path) == {"deep/file": "newer"}


def test_a_folder_replaces_the_one_before(tmp_path):
    for names in (["a", "b"], ["b", "c"]):
        with publishing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            before = files(tmp_path / "folder")
            for name in names:
                (temporary / name).write_text(name)
            assert files(tmp_path / "folder") == before
        assert files(tmp_path) == {f"folder/{name}": name for name in names}
    with publishing(tmp_path / "folder" / "a") as temporary:
        temporary.write_text("file")
    with pytest.raises(UserError, match="is a file, where a folder belongs"), publishing(tmp_path / "folder/a") as new:
        new.mkdir()
    assert files(tmp_path) == {"folder/a": "file", "folder/b": "b", "folder/c": "c"}


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt(), UserError("theirs"), OSError("some")])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_left_after_an_exception(tmp_path, kind, error):
    path = tmp_path / "target"
    write_json(path, 1)
    with pytest.raises(type(error)) as caught, publishing(path) as temporary:
        if kind == "folder":
            temporary.mkdir()
            (temporary / "half").write_text("half")
        else:
            temporary.write_text("half")
        raise error
    assert caught.value is error
    assert files(tmp_path) == {"target": "1\n"} and list(tmp_path.iterdir()) == [path]


def in_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "x.json"


def below_a_file(folder: Path) -> Path:
    return in_a_file(folder).parent / "deep" / "x.json"


def at_a_folder(folder: Path) -> Path:
    (folder / "folder" / "inside").mkdir(parents=True)
    return folder / "folder"


@pytest.mark.parametrize("place", [in_a_file, below_a_file, at_a_folder])
@pytest.mark.parametrize("write", [write_json, append_json])
def test_target_that_cannot_be_written_is_a_user_error(tmp_path, write: Callable, place: Callable):
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="cannot be written") as caught:
        write(path, {})
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No space left") as caught, publishing(tmp_path / "x") as temporary:
        temporary.write_text("half")
        Path("/dev/full").write_text("more")  # as a write to the file itself would fail
    assert str(tmp_path / "x") in str(caught.value) and list(tmp_path.iterdir()) == []
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC


def test_remove_takes_what_is_there_but_not_what_a_link_points_to(tmp_path):
    for name in ("file", "link", "broken", "none", "folder"):
        (tmp_path / "kept").mkdir(exist_ok=True)
        (tmp_path / "kept" / "x").write_text("x")
        (tmp_path / "file").write_text("")
        (tmp_path / "folder" / "deep").mkdir(parents=True, exist_ok=True)
        for link, target in (("link", "kept"), ("broken", "nowhere")):
            if not (tmp_path / link).is_symlink():
                (tmp_path / link).symlink_to(target)
        remove(tmp_path / name)
        assert not (tmp_path / name).exists() and not (tmp_path / name).is_symlink()
        assert (tmp_path / "kept" / "x").read_text() == "x"


def test_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"Grüße": "東京 🙂\n"}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json") == value == json.loads(text)
    assert (
        "東京" in text and text.endswith("}\n") and text.index('"b"') < text.index('"a"')
    )  # readable, in the given order


@pytest.mark.parametrize(
    "content, place",
    [(b'{"a": 1,\n  "b": }', ":2:8: not valid JSON"), (b"", ":1:1: not valid JSON"), (b'"\xff"', ": not valid JSON")],
)
def test_read_json_names_the_place(tmp_path, content, place):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "x.json")
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}{place}") and "\n" not in str(caught.value)


def test_read_json_of_no_file(tmp_path):
    for path, reason in (
        (tmp_path / "none.json", "no such file"),
        (tmp_path, "cannot be read"),
        (in_a_file(tmp_path), "cannot be read"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            read_json(path)
        assert str(path) in str(caught.value)


def test_json_lines_round_trip(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    assert read_json_lines(path) == []
    rows = [{"step": 1, "note": "Grüße\n"}, {"step": 2}, {}, {"loss": None}]
    for row in rows:
        append_json(path, row)
    assert read_json_lines(path) == rows and len(path.read_text(encoding="utf-8").splitlines()) == 4


def test_a_last_line_cut_anywhere_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    first, last = b'{"step": 1}\n', '{"step": 2, "note": "Grüße"}'.encode()
    for length in range(len(last)):  # in the middle of a character, too
        path.write_bytes(first + last[:length])
        assert read_json_lines(path) == [{"step": 1}], length
    path.write_bytes(first + last)  # only the end of the line is missing
    assert read_json_lines(path)[0] == {"step": 1}


def test_appending_after_a_cut_line_spoils_no_row(tmp_path):
    """A run that was killed while it wrote goes on: what it adds must not be glued to the half line."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    append_json(path, {"step": 2, "loss": 0.5})
    append_json(path, {"step": 3})
    assert read_json_lines(path) == [{"step": 1}, {"step": 2, "loss": 0.5}, {"step": 3}]


APPEND = """if True:
    import sys
    from pathlib import Path
    from megakd.system.files import append_json
    sys.stdin.read(1)
    for number in range(1500):
        append_json(Path(sys.argv[1]), {"row": [int(sys.argv[2]), number, "x" * (number % 7 * 3000)]})
"""


def test_processes_that_append_to_one_file_lose_no_line(tmp_path):
    """Long lines go to the file in several writes; one that was not whole was taken for one that a kill cut short."""
    path = tmp_path / "history.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", APPEND, str(path), str(number)], stdin=subprocess.PIPE)
        for number in range(4)
    ]
    for writer in writers:  # all at once
        assert writer.stdin is not None
        writer.stdin.write(b"x")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=300)
        assert writer.returncode == 0
    found = [(writer, number) for writer, number, _ in (row["row"] for row in read_json_lines(path))]
    assert sorted(found) == [(writer, number) for writer in range(4) for number in range(1500)]
    for writer in range(4):
        assert [n for w, n in found if w == writer] == list(range(1500))  # in the order in which it wrote them


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    for content in (
        '{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n',
        '{"step": 1}\nbroken\n',
        '{"step": 1}\nbroken\n{"cut',
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=r"x\.jsonl:2: not valid JSON"):
            read_json_lines(path)


def test_sha256_is_that_of_coreutils(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(256)) * 99)
    listed = subprocess.run(["sha256sum", str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert sha256(tmp_path / "x") == listed.stdout.split()[0]


def test_digest_is_canonical():
    assert digest({"a": 1, "b": [1, {"c": None, "d": "é"}]}) == digest({"b": [1, {"d": "é", "c": None}], "a": 1})
    values = [
        {},
        [],
        None,
        0,
        "0",
        "",
        {"a": 1},
        {"a": 2},
        {"a": "1"},
        {"b": 1},
        {"a": [1]},
        [1, 2],
        [2, 1],
        {"a": {"b": 1}},
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest((1, 2)) == digest([1, 2])  # as JSON has it
    assert digest({"a": 1}) == "015abd7f5cc57a2d"  # printf '{"a":1}' | sha256sum: fingerprints in old runs stay valid


def test_sealed_round_trip(tmp_path):
    value = {"format": "kind", "version": 3, "b": [1, 2.5, None, True], "a": {"Grüße": "東京", "x": []}}
    write_sealed(tmp_path / "x.json", value)
    assert read_sealed(tmp_path / "x.json", "kind", 3) == value
    first = (tmp_path / "x.json").read_bytes()
    write_sealed(tmp_path / "x.json", dict(reversed(value.items())))
    assert read_sealed(tmp_path / "x.json", "kind", 3) == value  # the seal is of what it says, not of its order
    write_sealed(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_bytes() == first


def test_another_kind_or_version_is_named_before_the_seal(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"format": "kind", "version": 2})  # of a time without seals
    for kind, version, message in (("other", 2, "not a file of format 'other'"), ("kind", 3, "version 2 of 'kind'")):
        with pytest.raises(UserError, match=message) as caught:
            read_sealed(path, kind, version)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    for content in ([], 3, None, "text", {}):
        write_json(path, content)
        with pytest.raises(UserError, match="not a file of format 'kind'"):
            read_sealed(path, "kind", 2)


def test_a_changed_or_missing_seal_is_refused(tmp_path):
    path = tmp_path / "x.json"
    write_sealed(path, {"format": "kind", "version": 3, "shards": [1, 2]})
    whole = read_json(path)
    for change in ({"shards": [1, 3]}, {"shards": [2, 1]}, {"seal": "0" * 16}, {"seal": None}, {"more": 0}):
        write_json(path, {**whole, **change})
        with pytest.raises(UserError, match=r"x\.json.*does not match its content") as caught:
            read_sealed(path, "kind", 3)
        assert "\n" not in str(caught.value)
    write_json(path, {k: v for k, v in whole.items() if k != "seal"})
    with pytest.raises(UserError, match="does not match"):
        read_sealed(path, "kind", 3)


def test_a_compact_seal_is_checked_by_the_text_and_by_the_value(tmp_path):
    """Sidecars of 100,000 sequences took 0.04 s of their 0.2 s for making the canonical form again."""
    path, value = (
        tmp_path / "x.json",
        {"format": "kind", "version": 3, "rows": [["a", 1], ["東", 2.5]], "seal of": '"}'},
    )
    write_sealed(path, value, compact=True)
    assert read_sealed(path, "kind", 3) == value
    text = path.read_text()
    with patch("megakd.system.files.canonical", side_effect=AssertionError):
        assert read_sealed(path, "kind", 3) == value
    assert json.loads(text)["seal"] == digest(value)  # a reader that knows values alone agrees
    for other in (json.dumps(json.loads(text), indent=1), text.rstrip("\n"), text.replace(",", ", ", 1)):
        path.write_text(other)  # another text of the same value
        assert read_sealed(path, "kind", 3) == value
    for changed in (text.replace("2.5", "2.6"), text.replace(digest(value), "0" * 16), text.replace('"a"', '"b"')):
        path.write_text(changed)
        with pytest.raises(UserError, match=r"x\.json.*does not match its content"):
            read_sealed(path, "kind", 3)


CALLS = ("mkdir", "open", "replace", "rename", "fsync", "unlink", "rmdir", "link", "truncate")


def replace_folder(path: Path) -> None:
    with publishing(path) as temporary:
        (temporary / "deep").mkdir(parents=True)
        for name in ("a", "deep/b"):
            (temporary / name).write_text("new")


class Killed(BaseException):
    """No code of the process runs any more; here: whatever it does fails."""


def stopped(call: Callable[[], object], count: int, error: BaseException) -> bool:
    """Whether `call` makes fewer than `count` system calls that change files; that one raises `error`.

    Killed is raised by every call after it too, so that no handler can do anything.
    """
    made = 0
    with pytest.MonkeyPatch.context() as patch:

        def counted(real: Callable, *args: Any, **more: Any) -> Any:
            nonlocal made
            made += 1
            if made == count or (made > count and isinstance(error, Killed)):
                raise error
            return real(*args, **more)

        for name in CALLS:
            patch.setattr(os, name, partial(counted, getattr(os, name)))
        with suppress(OSError, UserError, Killed):
            call()
    return made < count


@pytest.fixture(scope="module")
def old() -> dict[str, str]:
    return {"folder/a": "old", "folder/only old": "old"}


@pytest.mark.parametrize("error", [Killed(), OSError(errno.EIO, "Input/output error")], ids=repr)
@pytest.mark.parametrize("existing", [True, False])
def test_a_folder_is_wholly_old_or_wholly_new_wherever_its_writer_stops(tmp_path, old, existing, error):
    """Stopped at each system call in turn, by a kill or by an error; `settle` is what the next reader does."""
    new, done, seen = {"folder/a": "new", "folder/deep/b": "new"}, False, []
    for count in range(1, 100):
        place = tmp_path / str(count)
        for name, text in old.items() if existing else ():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        place.mkdir(exist_ok=True)
        done = stopped(lambda place=place: replace_folder(place / "folder"), count, error)
        settle(place)
        seen.append(files(place))
        assert seen[-1] in (new, old if existing else {}), count
        assert {path.name for path in place.iterdir()} <= {"folder"}, count
        if done:
            break
    assert done and seen[-1] == new and any(each != new for each in seen)


def test_settling_may_be_killed_too(tmp_path, old):
    """A writer is killed between its two renames, and `settle` at each call in turn; the next one finds the old."""
    (tmp_path / "folder").mkdir()
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    child = os.fork()
    if not child:
        rename, os.replace = os.replace, lambda a, b: os._exit(9) if Path(a).name == "new" else rename(a, b)
        replace_folder(tmp_path / "folder")
    os.waitpid(child, 0)
    assert not (tmp_path / "folder").exists()
    for count in range(1, 100):
        place = tmp_path / str(count)
        place.mkdir()
        shutil.copytree(next(tmp_path.glob("folder.tmp-*")), place / "folder.tmp-0123456789ab")
        done = stopped(lambda place=place: settle(place), count, Killed())
        settle(place)
        assert files(place) == old and [path.name for path in place.iterdir()] == ["folder"], count
        if done:
            break
    assert done and count > 5


def test_an_error_while_a_folder_is_replaced_gives_the_old_one_its_name_back(tmp_path, old, monkeypatch):
    (tmp_path / "folder").mkdir()
    for name, text in old.items():
        (tmp_path / name).write_text(text)

    def fails(source: Path, target: Path, rename: Callable = os.replace) -> None:
        if Path(target) == tmp_path / "folder" and Path(source).name == "new":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Input/output"):
        replace_folder(tmp_path / "folder")
    assert files(tmp_path) == old and [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_living_writer_is_not_settled_whatever_its_process_id_and_host_are(tmp_path, monkeypatch):
    """Containers share a host name, and have process ids of their own: all of them are process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with publishing(tmp_path / "x") as first, publishing(tmp_path / "x") as second:
        assert first != second
        first.write_text("first")
        for staging in tmp_path.iterdir():
            for path in (staging, *staging.iterdir()):
                os.utime(path, (0, 0))
        assert subprocess.run([sys.executable, "-c", SETTLE, str(tmp_path)], timeout=60).returncode == 0
        settle(tmp_path)
        assert first.read_text() == "first"
        second.write_text("second")
    assert files(tmp_path) == {"x": "first"}  # the last to finish


@pytest.mark.parametrize("moment", ["unlink", "rmdir"])
def test_a_writer_between_its_folder_and_its_lock_loses_both_or_neither(tmp_path, monkeypatch, moment):
    """Settled at that moment, it went on with the lock of a folder that was being deleted, and lost what it wrote."""
    staging = tmp_path / "x.tmp-0123456789ab"
    staging.mkdir()
    mine: list[Any] = []

    def interrupted(real: Callable, *args: Any, **more: Any) -> Any:
        """The writer's turn: the lock that it opened before, or a new one; then what it writes."""
        if not mine:
            mine.append(None)
            with suppress(FileNotFoundError, BlockingIOError):
                mine[0] = _locked_file(staging)
                (staging / "new").write_text("mine")
        return real(*args, **more)

    monkeypatch.setattr(os, moment, partial(interrupted, getattr(os, moment)))
    settle(tmp_path)
    monkeypatch.undo()
    assert mine
    if mine[0] is None:
        assert not staging.exists()
    else:
        assert (staging / "new").read_text() == "mine" and held(staging / "lock")
        mine[0].close()


def test_settle_deletes_what_writers_left_and_no_foreign_names(tmp_path):
    left = tmp_path / "shard.tar.tmp-0123456789ab"
    for folder in (left, tmp_path / "a.tmp-0123456789ab", tmp_path / "b.tmp-HOST-12", tmp_path / ".tmp-0123456789ab"):
        folder.mkdir()
        (folder / "new").write_text("x")
    (tmp_path / "a.tmp-0123456789ab" / "thesis").write_text("mine")
    (tmp_path / "c.tmp-0123456789ab").write_text("a file")
    before = {path.name for path in tmp_path.iterdir()}
    settle(tmp_path, "shard")
    assert left.exists()
    settle(tmp_path, "shard.tar")
    assert not left.exists()
    left.mkdir()  # killed before it had a lock
    settle(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before - {left.name}
    settle(tmp_path / "none")


def test_discarded_folders_are_whole_or_gone(tmp_path, old):
    for count in range(1, 100):
        place = tmp_path / str(count)
        (place / "folder").mkdir(parents=True)
        for name, text in old.items():
            (place / name).write_text(text)
        if stopped(lambda place=place: discard(place / "folder"), count, Killed()):
            break
        seen = {name: text for name, text in files(place).items() if name.startswith("folder/")}
        assert seen in (old, {}), count
        settle(place)
        assert files(place) == seen, count
    assert count > 3 and files(place) == {}
    discard(tmp_path / "none")


def held(path: Path) -> bool:
    """Whether somebody holds the lock."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_locked_excludes_a_second_process_until_it_lets_go_or_dies(tmp_path):
    path = tmp_path / "deep" / "lock"
    for end in ("let go", "die"):
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            assert held(path)
            if end == "let go":
                other.communicate(timeout=60)
                assert other.returncode == 0
            else:
                other.kill()
                other.wait()
        finally:
            other.kill()
            other.communicate()
        with locked(path):  # would wait for ever
            assert held(path)
        assert not held(path)


def test_locked_waits_for_the_holder(tmp_path):
    """The second process says that it holds the lock only after the first has let go."""
    path = tmp_path / "lock"
    program = HOLD.replace("    with", "    print('begun', flush=True)\n    with")
    with locked(path):
        argv = [sys.executable, "-c", program, str(path)]
        other = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert other.stdout is not None and other.stdout.readline() == b"begun\n"
        assert select.select([other.stdout], [], [], 0.2)[0] == []
    output, _ = other.communicate(timeout=60)
    assert output == b"held\n" and other.returncode == 0


def test_locked_can_refuse_instead_of_waiting(tmp_path):
    path = tmp_path / "lock"
    with locked(path, otherwise="somebody trains here"):
        with (
            pytest.raises(UserError, match="somebody trains here") as caught,
            locked(path, otherwise="somebody trains here"),
        ):
            pass
        assert str(tmp_path) in str(caught.value) and held(path)
    with locked(path, otherwise="somebody trains here"):
        pass


def test_shipped_files_are_found():
    assert read_json(shipped("ds_configs", "zero3.json"))["zero_optimization"]["stage"] == 3
    assert shipped("launch/recipes", "demo.json").is_file() and not shipped("ds_configs", "none.json").exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("null", ":2: not a JSON object"),
        ("[1]", ":2: not a JSON object"),
        ('{"a": 1}', ":2: no 'step'"),
        ('{"step": null}', ":2: no 'step'"),
    ],
)
def test_line_that_is_no_record_is_named_with_its_number(tmp_path, line, words):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=f"{re.escape(str(path))}{words}"):
        read_json_lines(path, "step")
    path.write_text("")
    assert read_json_lines(path, "step") == []
