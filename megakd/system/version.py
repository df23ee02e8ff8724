"""Which MegaKD this is: its version, and the commit of the checkout or of the wheel that it runs from.

hatch_build.py loads this file by its path when a wheel is built, so it imports nothing of MegaKD.
"""

import re
from functools import cache
from pathlib import Path

VERSION = "0.1.0"
COMMIT_FILE = "COMMIT"  # in the package, in a wheel that was built from a checkout
SHOWN = 7  # digits of a commit, as many as git shows
BESIDE = ("torch", "transformers", "deepspeed")


@cache
def made_with() -> dict[str, str | None]:
    """What is recorded under "megakd" with all that MegaKD writes: {"version", "commit"}; commit None: unknown."""
    package = Path(__file__).parents[1]
    commit = checkout_commit(package.parent) or wheel_commit(package)
    return {"version": VERSION, "commit": commit[:SHOWN] if commit else None}


def version_line(name: str = "megakd") -> str:
    """`megakd 0.1.0 (abc1234)`; without the bracket where the commit is unknown."""
    made = made_with()
    return f"{name} {made['version']}" + (f" ({made['commit']})" if made["commit"] else "")


def library_versions() -> list[str]:
    """A line for each library whose version results depend on most; none of them is imported."""
    from importlib import metadata  # 20 ms, which `import megakd` does without

    found = []
    for name in BESIDE:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
    return found


def checkout_commit(root: Path) -> str | None:
    """The commit that is checked out in `root`, read from git's files; None where it is no checkout of MegaKD.

    A worktree's .git is a file with the place of its git folder, and that one's `commondir` names the folder with the
    branches. A branch is a file of its own, or a line of packed-refs.
    """
    try:
        if not (root / "megakd").is_dir() or 'name = "megakd"' not in (root / "pyproject.toml").read_text("utf-8"):
            return None
        git = root / ".git"
        if git.is_file():
            git = root / git.read_text("utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text("utf-8").strip()
        if not head.startswith("ref:"):
            return _commit(head)
        shared = git / (git / "commondir").read_text("utf-8").strip() if (git / "commondir").exists() else git
        branch = head.removeprefix("ref:").strip()
        if (shared / branch).is_file():
            return _commit((shared / branch).read_text("utf-8"))
        packed = (shared / "packed-refs").read_text("utf-8").splitlines()
        lines = (line.partition(" ") for line in packed)
        return next((_commit(commit) for commit, _, name in lines if name == branch), None)
    except (OSError, ValueError):  # no checkout, or one that this user cannot read
        return None


def wheel_commit(package: Path) -> str | None:
    """The commit that a wheel was built from, as its build noted it."""
    try:
        return _commit((package / COMMIT_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _commit(text: str) -> str | None:
    return text.strip() if re.fullmatch(r"[0-9a-f]{40,64}", text.strip()) else None
