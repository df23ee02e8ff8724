"""Version and commit: read from git's files, recorded by everything that writes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from megakd.data.shard_writer import known_manifest, write_manifest
from megakd.data.shards import ShardSet, read_manifest
from megakd.run import Run
from megakd.system.files import read_json, write_sealed
from megakd.system.version import (
    COMMIT_FILE,
    VERSION,
    checkout_commit,
    library_versions,
    made_with,
    version_line,
    wheel_commit,
)
from tests.conftest import ROOT, command, files, in_process

A, B = "a" * 40, "b" * 40


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout of MegaKD, on branch main, which is a file of its own."""
    root = tmp_path / "checkout"
    (root / "megakd").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\nname = "megakd"\n')
    write(root / ".git" / "HEAD", "ref: refs/heads/main\n")
    write(root / ".git" / "refs" / "heads" / "main", A + "\n")
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_commit_of_a_branch_of_a_packed_branch_and_of_no_branch(checkout):
    git = checkout / ".git"
    assert checkout_commit(checkout) == A
    (git / "refs" / "heads" / "main").unlink()
    write(git / "packed-refs", f"# pack-refs with: peeled\n{A} refs/heads/other\n{B} refs/heads/main\n^{A}\n")
    assert checkout_commit(checkout) == B
    write(git / "HEAD", A + "\n")
    assert checkout_commit(checkout) == A


@pytest.mark.parametrize("relative", [False, True])
def test_commit_of_a_worktree(checkout, tmp_path, relative):
    """Its .git is a file; its own HEAD names a branch that lies in the main checkout's .git."""
    git = checkout / ".git" / "worktrees" / "two"
    write(git / "HEAD", "ref: refs/heads/feature/x\n")
    write(git / "commondir", "../..\n")
    write(checkout / ".git" / "refs" / "heads" / "feature" / "x", B)
    two = tmp_path / "two"
    write(two / "megakd" / "__init__.py", "")
    write(two / "pyproject.toml", 'name = "megakd"')
    write(two / ".git", f"gitdir: {'../checkout/.git/worktrees/two' if relative else git}\n")
    assert checkout_commit(two) == B


def test_no_commit_where_there_is_none(checkout, tmp_path):
    assert checkout_commit(tmp_path) is None  # site-packages
    write(checkout / ".git" / "refs" / "heads" / "main", "no hash\n")
    assert checkout_commit(checkout) is None
    write(checkout / ".git" / "HEAD", "ref: refs/heads/unborn\n")
    assert checkout_commit(checkout) is None
    write(checkout / ".git" / "HEAD", A)
    assert checkout_commit(checkout) == A
    write(checkout / "pyproject.toml", 'name = "other"')  # a project that holds a copy of the package
    assert checkout_commit(checkout) is None


def test_commit_of_a_wheel(tmp_path):
    assert wheel_commit(tmp_path) is None
    (tmp_path / COMMIT_FILE).write_text(B + "\n")
    assert wheel_commit(tmp_path) == B


def test_commit_is_that_of_git():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git does not answer: {done.stderr.strip()}")
    assert checkout_commit(ROOT) == done.stdout.strip()
    assert made_with() == {"version": VERSION, "commit": done.stdout[:7]}


def test_version_names_the_libraries_that_are_installed_and_those_that_are_not(monkeypatch):
    monkeypatch.setattr("megakd.system.version.BESIDE", ("pytest", "no-such-library"))
    assert library_versions() == [f"pytest {pytest.__version__}", "no-such-library is not installed"]


def test_version_option():
    done = subprocess.run([*command("--version")], capture_output=True, text=True)
    first, *libraries = done.stdout.splitlines()
    assert done.returncode == 0 and first == version_line() and first.startswith(f"megakd {VERSION}")
    assert [line.split()[0] for line in libraries] == ["torch", "transformers", "deepspeed"]


def test_all_that_is_written_names_the_version(prepared, sibling):
    """History, manifests, compress.json, model card, progress.json of a checkpoint, megakd.json of an export."""
    run = Run.open(prepared)
    made = made_with()
    for event in ("new", "tokenize", "compress", "generate-logits"):
        assert run.events(event) and all(row["megakd"] == made for row in run.events(event)), event
    manifests = [run.path("data", kind, part) for kind in ("tokens", "logits") for part in ("holdout", "train")]
    assert [read_manifest(folder)["megakd"] for folder in manifests] == [made] * 4
    assert read_json(prepared / "student-0" / "compress.json")["megakd"] == made
    assert f"Made with {version_line('MegaKD')}." in (prepared / "student-0" / "README.md").read_text()
    trained = sibling()
    in_process("train", trained.folder)
    assert [row["megakd"] for row in trained.events("train")] == [made]
    saved = list(trained.path("checkpoints").glob("*/step-*/progress.json"))
    assert saved and all(read_json(path)["megakd"] == made for path in saved)
    in_process("export", trained.folder)
    assert read_json(trained.path("export", "megakd.json"))["megakd"] == made
    assert trained.events("export")[0]["megakd"] == made


def test_version_is_no_part_of_what_makes_shards_the_same(prepared, sibling, monkeypatch, tmp_path):
    """A later MegaKD opens them, finds them finished, and changes no byte of them."""
    run = sibling()
    path = run.path("data")
    target = path.resolve() if path.is_symlink() else path
    before = files(target)
    later = {"version": "9.9.9", "commit": None}
    monkeypatch.setattr("megakd.data.shard_writer.made_with", lambda: later)
    in_process("tokenize", run.folder)
    in_process("generate-logits", run.folder)
    assert files(target) == before
    folder = Path(shutil.copytree(prepared / "data" / "tokens" / "train", tmp_path / "copy"))
    manifest = read_manifest(folder)
    kept = {
        key: manifest[key] for key in manifest.keys() - {"format", "version", "facts", "shards", "complete", "megakd"}
    }
    (folder / "manifest.json").unlink()  # completed again by the later one: that one is named, and shards are the same
    write_manifest(folder, manifest["facts"], manifest["shards"], complete=True, **kept)
    assert read_manifest(folder) == {**manifest, "megakd": later}
    assert len(ShardSet(folder)) == len(ShardSet(prepared / "data" / "tokens" / "train"))


def test_shards_of_before_the_version_was_recorded_open_as_before(prepared, tmp_path):
    folder = Path(shutil.copytree(prepared / "data" / "tokens" / "train", tmp_path / "old"))
    manifest = {key: value for key, value in read_manifest(folder).items() if key != "megakd"}
    write_sealed(folder / "manifest.json", manifest)
    assert known_manifest(folder, manifest["facts"]) == manifest and ShardSet(folder)[0].key
