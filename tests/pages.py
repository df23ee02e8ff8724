"""The pages of the documentation as tests read them: code blocks and commands with their lines, headings, links."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "ds_configs" / "README.md"]
PAGES += sorted(DOCS.rglob("*.md"))
HISTORY = (DOCS / "log.md", ROOT / "CHANGELOG.md")  # they describe older versions
CURRENT = [page for page in PAGES if page not in HISTORY]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    """A code block; line: that of its first line of code in the page, from 1."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """One command line of a page, with its continuation lines."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{named(self.page)}:{self.line}: {self.text}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The code blocks of a page in these languages, in order."""
    text = page.read_text()
    found = re.finditer(r"^([ ]*)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [
        Block(match[2], match[3], text.count("\n", 0, match.start(3)) + 1) for match in found if match[2] in languages
    ]


def commands_of(page: Path, block: Block) -> Iterator[Command]:
    """The command lines of a block."""
    line = block.line
    for text in block.text.replace("\\\n", "\0").splitlines():
        if text.strip() and not text.strip().startswith("#"):
            yield Command(page, line, text.replace("\0", "").strip())
        line += 1 + text.count("\0")


def commands(page: Path) -> Iterator[Command]:
    return itertools.chain.from_iterable(commands_of(page, block) for block in blocks(page, "bash"))


class Program(NamedTuple):
    """The words of one program of a command line, its variables, and what follows it: `&&`, `&` or nothing."""

    words: list[str]
    variables: dict[str, str]
    then: str


def programs(text: str) -> Iterator[Program]:
    """The programs of a command line; of `NAME=$(COMMAND)`, those of COMMAND."""
    words = shlex.split(re.sub(r"^\s*\w+=\$\((.*)\)\s*$", r"\1", text), comments=True)
    while words:
        end = next((i for i, word in enumerate(words) if word in ("&&", "&", "|")), len(words))
        program, then = words[:end], "".join(words[end : end + 1])
        words = words[end + 1 :]
        variables = dict(word.split("=", 1) for word in itertools.takewhile(is_assignment, program))
        yield Program(program[len(variables) :], variables, then)


def is_assignment(word: str) -> bool:
    return re.match(r"[A-Z_]+=", word) is not None


def find(pattern: str, page: Path) -> Iterator[tuple[str, re.Match[str]]]:
    """(page:line, match) of each place in a page."""
    text = page.read_text()
    for match in re.finditer(pattern, text, re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        yield f"{named(page)}:{line}", match


def headings(page: Path) -> set[str]:
    """The anchor of each heading, as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


class Link(NamedTuple):
    place: str
    target: Path
    anchor: str


def links(page: Path) -> list[Link]:
    """Each link that stays in the repository."""
    found = []
    for place, match in find(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)", page):
        target = (page.parent / match[1]).resolve() if match[1] else page
        found.append(Link(place, target, match[2] or ""))
    return found


def section_of(text: str, anchor: str) -> str:
    """The text below the heading with this anchor, up to the next heading of its level or above."""
    parts = re.split(r"^(#+) (.+)$", text, flags=re.MULTILINE)[1:]
    levels, titles, bodies = parts[0::3], [slug(title) for title in parts[1::3]], parts[2::3]
    start = titles.index(anchor)
    inner = itertools.takewhile(lambda i: len(levels[i]) > len(levels[start]), range(start + 1, len(titles)))
    return "".join([bodies[start], *(bodies[i] for i in inner)])
