"""Folders as people have them: hidden, temporary and explaining files in them, one file in several forms, links."""

import errno
import gzip
import os
from pathlib import Path

import pytest

from megakd.data.documents import SUFFIXES, find_files, iter_documents, source_files
from megakd.data.folders import data_files
from megakd.errors import UserError

LINE = b'{"text": "one"}\n'
NO_DATA = {
    "hidden or temporary": [
        "._a.jsonl", ".cache/a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "_temporary/0/attempt_1/a.jsonl",
        "__MACOSX/._a.jsonl", "_SUCCESS", ".a.jsonl.crc", "Thumbs.db", "a.jsonl.tmp", ".a.jsonl.swp", "a.jsonl~",
        "~$b.txt", "b.jsonl.tmp-host-12/c.jsonl", "lost+found/a.jsonl",
    ],
    "of other kinds": ["table.csv", "notes.md", "a.json"],
    "about the data": ["README.txt", "LICENSE.txt", "deep/license-apache.txt", "COPYING.txt", "SHA256SUMS.txt"],
}  # fmt: skip


def put(folder: Path, name: str, content: bytes = LINE) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("why", NO_DATA)
def test_files_that_are_no_data_are_never_read_as_text(tmp_path, why):
    put(tmp_path, "a.jsonl")
    put(tmp_path, "deep/b.txt", b"two")
    for name in NO_DATA[why]:
        put(tmp_path, name)
    assert list(iter_documents(str(tmp_path))) == ["one", "two"]
    found = find_files(str(tmp_path))
    assert found.counts(SUFFIXES) == "2 files (1 .jsonl, 1 .txt)"
    assert list(found.passed) == [why]
    # files in a hidden folder are counted with that folder, once
    assert {path.relative_to(tmp_path).parts[0] for path in found.passed[why]} == {
        n.split("/")[0] for n in NO_DATA[why]
    }
    assert f"passed over: {len(found.passed[why])} {why} (" in found.passed_over()
    if why != "of other kinds":  # named one by one, those are refused by name
        assert list(iter_documents(f"{tmp_path}/**/*[tl]")) == ["one", "two"]


def test_a_hidden_folder_above_the_data_hides_nothing(tmp_path):
    put(tmp_path, ".cache/corpus/_x/a.jsonl")
    assert list(iter_documents(str(tmp_path / ".cache" / "corpus" / "_x"))) == ["one"]
    assert list(iter_documents(f"{tmp_path}/.cache/corpus/_x/*.jsonl")) == ["one"]
    assert list(iter_documents(str(put(tmp_path, "LICENSE.txt", b"asked for by name")))) == ["asked for by name"]


def test_a_file_and_its_packed_twin_are_read_once(tmp_path):
    put(tmp_path, "x.jsonl")
    put(tmp_path, "x.jsonl.gz", gzip.compress(LINE))
    put(tmp_path, "deep/x.jsonl", b'{"text": "two"}\n')
    for source in (tmp_path, f"{tmp_path}/**/*.jsonl*"):
        assert list(iter_documents(str(source))) == ["two", "one"]
        found = find_files(str(source))
        assert [path.name for path in found.taken] == ["x.jsonl", "x.jsonl.gz"]
        assert "1 of the same name as another that was taken (x.jsonl)" in found.passed_over()
    assert source_files(str(tmp_path))["count"] == 2  # type: ignore[index]


def test_one_name_in_two_formats_is_refused(tmp_path):
    put(tmp_path, "x.jsonl")
    put(tmp_path, "x.parquet")
    with pytest.raises(UserError, match=r"x\.jsonl, x\.parquet: is this one text in several formats\?"):
        find_files(str(tmp_path))
    assert list(iter_documents(f"{tmp_path}/*.jsonl")) == ["one"]


def test_links_do_not_read_a_file_twice_nor_for_ever(tmp_path):
    put(tmp_path, "corpus/a.jsonl")
    put(tmp_path, "elsewhere/b.jsonl", b'{"text": "two"}\n')
    os.symlink("a.jsonl", tmp_path / "corpus" / "c.jsonl")
    os.symlink(tmp_path / "corpus", tmp_path / "corpus" / "loop")
    os.symlink(tmp_path / "elsewhere", tmp_path / "corpus" / "more")
    assert list(iter_documents(str(tmp_path / "corpus"))) == ["one", "two"]
    assert "1 linked twice (c.jsonl)" in find_files(str(tmp_path / "corpus")).passed_over()


def test_a_folder_of_nothing_but_hidden_files_says_so(tmp_path):
    put(tmp_path, "._a.jsonl")
    with pytest.raises(
        UserError, match=r"holds no file ending in .*; passed over: 1 hidden or temporary \(\._a\.jsonl\)"
    ):
        find_files(str(tmp_path))
    with pytest.raises(UserError, match=r"matches no file of text; passed over: 1 hidden"):
        find_files(f"{tmp_path}/.*.jsonl")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a.jsonl")
    put(tmp_path, "closed/b.jsonl")
    scandir = os.scandir

    def denied(path: str) -> object:  # root may read what others may not
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"closed: cannot be read"):
        find_files(str(tmp_path))


def test_folders_below_are_named_where_they_are_not_read(tmp_path):
    put(tmp_path, "a.parquet")
    put(tmp_path, "deep/b.parquet")
    put(tmp_path, "._a.parquet")
    found = data_files(tmp_path, (".parquet",), below=False)
    assert found.taken == [tmp_path / "a.parquet"]
    assert found.passed_over() == "; passed over: 1 hidden or temporary (._a.parquet), 1 folders (deep)"
