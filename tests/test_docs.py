"""The documentation is true: commands, flags, fields, files and links of README and docs exist.

tests/test_docs_commands.py runs the commands and the examples.
"""

import argparse
import ast
import importlib.util
import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from megakd import cli
from megakd.config import objective
from megakd.config.base import Section
from megakd.config.checks import check
from megakd.config.parsing import apply_overrides, load_recipe, parse
from megakd.config.run import RunConfig, is_mutable
from megakd.names import find_recipe
from tests.conftest import ROOT, for_each
from tests.pages import (
    CURRENT,
    DOCS,
    PAGES,
    README,
    blocks,
    commands,
    find,
    headings,
    links,
    named,
    programs,
    section_of,
)


def programs_named(name: str) -> list[tuple[str, list[str]]]:
    """(where it stands, words) of every program of this name in a page; of `--module megakd VERB`, from megakd on."""
    found = []
    for command in itertools.chain.from_iterable(map(commands, CURRENT)):
        for program in programs(command.text):
            words = program.words
            if "--module" in words:
                words = words[words.index("--module") + 1 :]
            if words and words[0] == name:
                found.append((str(command), words[1:]))
    return found


class Parsed(BaseException):
    """Ends a program behind its parser; .args[0] is what was parsed."""


@pytest.fixture
def parsers_only(monkeypatch):
    """Programs end with `Parsed` as soon as their command line is parsed."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parsed(self, *args, original=original, **kwargs):
            result = original(self, *args, **kwargs)
            if self.prog == "megakd":  # the parser of verbs, before that of the verb
                return result
            raise Parsed(result)

        monkeypatch.setattr(argparse.ArgumentParser, name, parsed)


def parsed_by(program: Any, *args: Any) -> argparse.Namespace:
    with pytest.raises((Parsed, SystemExit)) as ended:
        program(*args)
    if isinstance(ended.value, Parsed):
        return ended.value.args[0]
    assert ended.value.code == 0, f"exit code {ended.value.code}"  # --help
    return argparse.Namespace()


@for_each("place, arguments", programs_named("megakd"))
def test_commands_of_megakd_are_parsed_and_their_overrides_valid(place, arguments, parsers_only):
    if arguments == ["--help"]:
        assert not vars(parsed_by(cli.run_verb, ["--help"]))
        return
    found = parsed_by(cli.run_verb, arguments)
    overrides = getattr(found, "overrides", [])
    if arguments[0] in ("new", "demo"):
        check_new(getattr(found, "recipe", "demo"), overrides)
    else:
        check_mutable(overrides)


def check_new(recipe: str, overrides: list[str]) -> None:
    """Overrides over a shipped recipe; another run's recipe is not known here."""
    shipped = re.fullmatch(r"[\w.-]+", recipe) is not None
    if shipped:
        check(load_recipe(find_recipe(recipe), [item for item in overrides if not item.startswith("model.")]), recipe)
    for item in overrides:
        check_field(item)


def check_mutable(overrides: list[str]) -> None:
    for item in overrides:
        check_field(item)
        assert is_mutable(item.partition("=")[0]), f"{item}: may not change after `megakd new`"


@cache
def fields() -> dict[str, dict[str, list[TypeAdapter[Any]]]]:
    """Fields of each section with a validator of their values; of `objective` those of every kind."""
    sections = {
        name: [field.annotation]
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    sections["objective"] = [c for _, c in inspect.getmembers(objective, inspect.isclass) if issubclass(c, Section)]
    found: dict[str, dict[str, list[TypeAdapter[Any]]]] = {}
    for name, classes in sections.items():
        for field, info in itertools.chain.from_iterable(c.model_fields.items() for c in classes):
            adapter = TypeAdapter(Annotated[info.annotation, Field(), *info.metadata])
            found.setdefault(name, {}).setdefault(field, []).append(adapter)
    return found


def check_field(item: str, place: str = "") -> None:
    """`section.key` or `section.key=value`; values in capitals stand for the reader's own."""
    path, _, text = item.partition("=")
    section, _, key = path.partition(".")
    if section in ("name", "seed", "stages"):
        return
    assert section in fields(), f"{place} {item}: no section {section}"
    assert key in fields()[section], f"{place} {item}: no field {key} in {section}"
    if text and not text.isupper():
        assert any(accepts(adapter, value_of(text)) for adapter in fields()[section][key]), f"{place} {item}"


def value_of(text: str) -> Any:
    return apply_overrides({}, [f"value={text.strip(chr(39))}"])["value"]


def accepts(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


@cache
def tool(path: str) -> Any:
    for folder in (ROOT / "tools", (ROOT / path).parent):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(f"docs_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@for_each("place, arguments", programs_named("python"))
def test_commands_of_tools_are_parsed_and_their_overrides_valid(place, arguments, parsers_only, monkeypatch):
    program, *rest = arguments
    assert program.startswith("tools/"), program
    monkeypatch.setattr(sys, "argv", [program, *rest])
    found = parsed_by(tool(program).main)
    for item in getattr(found, "overrides", []):
        check_field(item)


def test_flags_of_the_smoke_test_exist():
    script = (ROOT / "tools" / "bench" / "gpu_smoke.sh").read_text()
    script += (ROOT / "tools" / "bench" / "gpu_smoke.py").read_text()
    for place, words in programs_named("bash"):
        assert words[0] == "tools/bench/gpu_smoke.sh", place
        assert all(word in script for word in words[1:] if word.startswith("--")), place


def launches() -> Iterator[tuple[str, list[str]]]:
    """(where it stands, words) of every program with a file of launch/ among its words."""
    for command in itertools.chain.from_iterable(map(commands, CURRENT)):
        for program in programs(command.text):
            if any("launch/" in word for word in program.words):
                yield str(command), program.words


@for_each("place, words", launches())
def test_launch_files_exist_and_their_overrides_may_change(place, words):
    script = next(word for word in words if "launch/" in word)
    assert list(ROOT.glob(script)), script
    check_mutable([word for word in words[words.index(script) + 1 :] if re.match(r"\w+\.\w+=", word)])


@for_each("page", CURRENT)
def test_verbs_flags_and_fields_of_the_text_exist(page, parsers_only):
    for place, match in find(r"`megakd ([a-z][a-z-]+)([^`]*)`", page):
        verb, rest = match.groups()
        assert verb in cli.VERBS, f"{place}: megakd {verb}"
        for flag in re.findall(r"--[\w-]+", rest):
            assert flag in flags_of(verb), f"{place}: megakd {verb} {flag}"
    known = fields()
    for place, match in find(r"`([a-z]+\.[a-z]\w*(?:=[^`]*)?)`", page):
        section, _, key = match[1].partition("=")[0].partition(".")
        if section in known and key not in ("safetensors", "py", "json", "md", "png", "layers"):
            check_field(match[1], place)
    assert not (old := [place for place, _ in find(r"`(?:sar|online)\.(?!py)\w+", page)]), old


@cache
def flags_of(verb: str) -> set[str]:
    command = importlib.import_module(f"megakd.commands.{verb.replace('-', '_')}")
    parser = argparse.ArgumentParser()
    if hasattr(command, "arguments"):
        command.arguments(parser)
    return set(parser._option_string_actions)


# ---- examples of configuration and messages ----------------------------------------------------------------------


def test_stages_of_the_examples_are_valid():
    first, second, rounding = (block.text for block in blocks(DOCS / "offline-distillation.md", "json"))
    stages = json.loads("{" + first + "}")["stages"] + [json.loads(second)]
    assert [stage.name for stage in parse({"stages": stages}, "the page").stages] == ["experts", "all", "anneal"]
    assert [stage.quantize for stage in parse(json.loads(rounding), "the page").stages] == [None, "int4"]


@cache
def messages() -> str:
    """All texts of the package and the launch files, one per line; … for a value."""
    found = []
    for path in (ROOT / "megakd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    found += [path.read_text() for path in (ROOT / "launch").glob("*.s*")]
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_messages_of_the_code():
    """In the first column of its tables, in code: texts without the values, which are … there."""
    rows = re.findall(r"^\| ([^|]+) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    for quoted in re.findall(r"`([^`]+)`", " ".join(rows)):
        for part in re.split(r"…|=…|\bN\b", quoted):
            assert part.strip() in messages(), f"no message says {part.strip()!r}"


# ---- files, links, pages -----------------------------------------------------------------------------------------


@for_each("page", CURRENT)
def test_files_that_a_page_names_exist(page):
    for place, match in find(r"`((?:megakd|tests|launch|ds_configs|tools|docs)/[\w./-]+\.\w+)`", page):
        assert (ROOT / match[1]).exists(), f"{place}: {match[1]}"
    folders = "data|models|losses|engine|objectives|evals|commands|system|config"
    for place, match in find(rf"`((?:{folders})/\w+\.py)`", page):
        assert (ROOT / "megakd" / match[1]).exists(), f"{place}: {match[1]}"


@for_each("page", PAGES)
def test_links_of_a_page_lead_to_pages_and_headings(page):
    for place, target, anchor in links(page):
        assert target.exists(), f"{place}: {target}"
        assert not anchor or anchor in headings(target), f"{place}: {target.name}#{anchor}"


def within_two_links() -> set[Path]:
    once = {link.target for link in links(README)}
    pages = [page for page in once if page.suffix == ".md" and page.exists()]
    return once | {link.target for page in pages for link in links(page)}


def test_every_page_is_at_most_two_links_from_the_readme():
    assert not {named(page) for page in PAGES if page != README} - {
        str(page.relative_to(ROOT)) for page in within_two_links()
    }


QUESTIONS = {
    "change the loss": ("offline-distillation.md", "the-loss", "objective.divergence"),
    "add a model family": ("contributing.md", "add-a-model-family", "MoESpec"),
    "own text": ("quickstart.md", "your-own-teacher-and-text", "data.source"),
    "own teacher": ("quickstart.md", "your-own-teacher-and-text", "model.teacher"),
    "own tokenizer": ("online-distillation.md", "another-tokenizer", "spans"),
    "resume on fewer ranks": ("scaling.md", "resume-with-another-number-of-ranks", "engine.ranks"),
    "read a shard without MegaKD": ("data-format.md", "read-a-shard-without-megakd", "reference_codec.py"),
    "what a field does": ("configuration.md", "", "default"),
    "why my run stopped": ("troubleshooting.md", "why-did-my-run-stop", "85"),
    "evaluate a checkpoint with lm-eval": ("evaluation.md", "lm-eval-tasks", "eval.tasks"),
    "use the student in plain transformers": ("hugging-face.md", "the-student-in-plain-transformers", "export"),
    "which paper a formula is from": ("papers.md", "", "Reference"),
}


@for_each("question", QUESTIONS)
def test_newcomers_question_is_answered_within_two_links_of_the_readme(question):
    name, anchor, word = QUESTIONS[question]
    page = DOCS / name
    assert (page, anchor) in [link[1:] for start in (README, DOCS / "index.md") for link in links(start)]
    text = page.read_text()
    if anchor:
        assert anchor in headings(page)
        text = section_of(text, anchor)
    assert word.lower() in text.lower(), f"{name}#{anchor} does not say {word}"


@for_each("page", [p for p in CURRENT if p.name != "configuration.md"])
def test_a_page_begins_with_what_the_reader_can_do(page):
    first = page.read_text().split("\n\n")[1]
    assert re.search(r"\blets? you\b|^Run `", first), first


def test_readme_is_short_and_names_targets_of_the_makefile():
    assert len(README.read_text().splitlines()) <= 150
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make (\w+)", "".join(block.text for block in blocks(page, "bash")), re.MULTILINE):
            assert f"\n{target}:" in makefile, target
    assert "make check test" in (ROOT / ".ci" / "run").read_text()


def test_architecture_document_lists_every_module():
    text = (DOCS / "architecture.md").read_text()
    for path in sorted((ROOT / "megakd").rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py") and path.parent.name != "commands":
            assert path.name in text, path


def test_no_file_names_a_page_that_has_moved():
    known = {path.name for path in PAGES}
    for folder, glob in itertools.product(
        ("megakd", "tools", "launch", "tests"), ("*.py", "*.sh", "*.sbatch", "*.yaml")
    ):
        for path in (ROOT / folder).rglob(glob):
            for name in re.findall(r"docs/(?:experiments/)?([\w-]+\.md)", path.read_text()):
                assert name in known, f"{path}: docs/{name}"
