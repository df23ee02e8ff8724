"""Documentation uses the field's standard terms: words that must not occur, as data.

The words are those of the project's rules for readers who know PyTorch, DeepSpeed, Hugging Face and Slurm and read
English as a second language. To hold docstrings and messages to the same list, add globs to PYTHON.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# pattern, in lower case unless it begins with (?-i:  → what to write instead
WORDS: dict[str, str] = {
    r"teachers? that (is|are) (asked|there)|asked while training": "online distillation, live teacher",
    r"stored targets|what was captured": "cached teacher logits, offline distillation",
    r"\bbeside\b|beside\.safetensors": "auxiliary parameters; together with",
    r"\bfeeds?\b|stage's data as steps": "micro-batch iterator, training data",
    r"\bborders?\b(?!-)|\bcrossed\b|\bhand(s|ed|ing)? over\b": "stage transition, optimizer-state carry-over",
    r"\b(take|takes|took|taken) over\b|(?-i:\bCarried\b)": "stage transition, optimizer-state carry-over",
    r"\blanes?\b": "interleaved shard readers; worker threads",
    r"\bbooks?\b": "codebook",
    r"\b(leave|leaves|leaving|left) out\b|\bleft-out\b": "skip",
    r"\bgo(es)? wrong\b|\bwent wrong\b|\bguards?\b": "non-finite and loss-spike handling",
    r"\blive fields?\b": "mutable settings",
    r"\bspread over\b|\bspread experts\b": "sharded inference; divided among ranks",
    r"\bwhat travels\b|\btravels?\b": "communication volume",
    r"\brow a (rank|row)\b": "one row per (token, rank)",
    r"forgets? what layers computed": "activation checkpointing",
    r"\bmend(s|ed|ing)?\b": "user error",
    r"\bhold-?outs?\b": "validation set (held-out)",
    r"way to a line|\bclaim(s|ed)?\b|\blet(s|ting)? go\b": "checkpoint watcher: pin, lock, evaluate, append, unpin",
    r"lack of entropy|way from where|where they began": "1 − normalised router entropy, router drift (relative L2)",
    # rule 3: "per" for rates and shares
    r"\b(tokens?|bytes?|rows?|bits|numbers|windows|sequences|parameters|entries|seconds|ms|FLOPs|process|processes|task)"
    r" an? (second|token|rank|row|step|position|layer|matrix|expert|GPU|node|host|epoch)\b": "per",
    # rule 4: name things
    r"\b(that|which) (is|are) there\b": "existing",
    r"\bwhat is there\b|\bthat which\b|\bthe other one\b|\bof these\b": "the name of the thing",
    # rule 10
    r"\bthe seeds\b|\bseeds' form\b": "the unfused form (docs/papers.md)",
}
PAGES_ONLY: dict[str, str] = {r"\bwindows?\b": "sequences (packed sequences)"}

PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "ds_configs/README.md")]
PYTHON = ["megakd/**/*.py", "tools/**/*.py"]
# configuration.md repeats descriptions of megakd/config, and joins with them
PAGES += sorted(p for p in (ROOT / "docs").rglob("*.md") if PYTHON or p.name != "configuration.md")
OLD_ENTRIES = "\n## 2026-11-29"  # of docs/log.md, which keep their words


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of what a reader reads: no code, no names of fields, flags and files."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield from enumerate(map(_without_names, node.value.splitlines()), node.lineno)
        return
    if path.name == "log.md":
        text = text.partition(OLD_ENTRIES)[0]
    text = re.sub(r"^[ ]*```\w.*?^[ ]*```", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`", lambda m: "\n" * m[0].count("\n"), text)
    yield from enumerate(map(_without_names, text.splitlines()), 1)


def _without_names(line: str) -> str:
    line = re.sub(r"\]\([^)]*\)", "]", line)
    return re.sub(r"[\w{},.-]+/[\w{},./-]+|--[\w-]+|\b\w+(\.\w+)+(=\S*)?|\b\w+_\w+\b", "", line)


def offences(path: Path, words: dict[str, str]) -> list[str]:
    numbered, found = list(prose(path)), []
    numbers, text = [number for number, _ in numbered], "\n".join(line for _, line in numbered)
    for pattern, instead in words.items():
        for hit in re.finditer(pattern.replace(" ", r"\s+"), text, re.IGNORECASE):  # phrases continue on the next line
            number = numbers[text.count("\n", 0, hit.start())]
            found.append(f"{path.relative_to(ROOT)}:{number}: {hit[0]!r}: write {instead}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_page_uses_standard_terms(page: Path):
    assert not (found := offences(page, WORDS | PAGES_ONLY)), "\n".join(found)


def test_docstrings_and_messages_use_standard_terms():
    paths = sorted(path for glob in PYTHON for path in ROOT.glob(glob))
    found = [line for path in paths for line in offences(path, WORDS)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line, caught",
    [
        ("the border of a stage", True),
        ("bytes a token", True),
        ("bytes per token", False),
        ("set `stream.lanes=8` or stream.lanes=8", False),
        ("eight lanes of shards", True),
        ("the codebook of a set", False),
        ("RUN/data/tokens/{train,holdout}", False),
        ("activations go\nwrong", True),
    ],
)
def test_words_are_found_in_prose_and_not_in_names(line: str, caught: bool, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_language.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{line}\n")
    assert bool(offences(page, WORDS)) == caught
