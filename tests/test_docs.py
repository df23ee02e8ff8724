"""The documentation is true: commands, flags, fields, files and links of README and docs exist, examples run."""

import argparse
import ast
import importlib.util
import inspect
import itertools
import json
import re
import shlex
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
from megakd.config.effects import check
from megakd.config.parsing import apply_overrides, load_recipe, parse
from megakd.config.run import RunConfig, is_mutable
from megakd.names import find_recipe
from tests.conftest import ROOT, forked

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "ds_configs" / "README.md"]
PAGES += sorted(DOCS.rglob("*.md"))
HISTORY = (DOCS / "log.md", ROOT / "CHANGELOG.md")  # name what was
CURRENT = [page for page in PAGES if page not in HISTORY]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^([ ]*)```{language}\n(.*?)^\1```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [body for _, body in found]


# ---- commands ----------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the page's bash blocks; of `deepspeed … --module megakd VERB`, those of megakd."""
    for body in blocks(page, "bash(?: run)?"):
        for line in body.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\s*\w+=\$\((.*)\)\s*$", r"\1", line)
            words = shlex.split(line, comments=True)
            for whole, part in itertools.groupby(words, lambda word: word in ("&&", "&", "|")):
                command = list(part)
                while command and re.match(r"[A-Z_]+=", command[0]):
                    command.pop(0)
                if whole or not command:
                    continue
                if "--module" in command:
                    command = command[command.index("--module") + 1 :]
                yield command


MEGAKD = sorted({(named(p), tuple(c[1:])) for p in CURRENT for c in commands(p) if c[0] == "megakd"})
TOOLS = sorted({(named(p), tuple(c[1:])) for p in CURRENT for c in commands(p) if c[0] == "python" and len(c) > 1})
LAUNCHES = sorted({(named(p), tuple(c)) for p in CURRENT for c in commands(p) if any("launch/" in w for w in c)})


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


@pytest.mark.parametrize("page, arguments", MEGAKD)
def test_commands_of_megakd_are_parsed_and_their_overrides_valid(page, arguments, parsers_only):
    if list(arguments) == ["--help"]:
        assert not vars(parsed_by(cli.run_verb, ["--help"]))
        return
    found = parsed_by(cli.run_verb, list(arguments))
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


def check_field(item: str) -> None:
    """`section.key` or `section.key=value`; values in capitals stand for the reader's own."""
    path, _, text = item.partition("=")
    section, _, key = path.partition(".")
    if section in ("name", "seed", "stages"):
        return
    assert section in fields(), f"{item}: no section {section}"
    assert key in fields()[section], f"{item}: no field {key} in {section}"
    if text and not text.isupper():
        assert any(accepts(adapter, value_of(text)) for adapter in fields()[section][key]), item


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


@pytest.mark.parametrize("page, arguments", TOOLS)
def test_commands_of_tools_are_parsed_and_their_overrides_valid(page, arguments, parsers_only, monkeypatch):
    program, *rest = arguments
    assert program.startswith("tools/"), program
    monkeypatch.setattr(sys, "argv", [program, *rest])
    found = parsed_by(tool(program).main)
    for item in getattr(found, "overrides", []):
        check_field(item)


def test_flags_of_the_smoke_test_exist():
    script = (ROOT / "tools" / "bench" / "gpu_smoke.sh").read_text()
    script += (ROOT / "tools" / "bench" / "gpu_smoke.py").read_text()
    for page in CURRENT:
        for command in commands(page):
            if command[0] == "bash":
                assert command[1] == "tools/bench/gpu_smoke.sh"
                assert all(word in script for word in command[2:] if word.startswith("--")), command


@pytest.mark.parametrize("page, words", LAUNCHES)
def test_launch_files_exist_and_their_overrides_may_change(page, words):
    script = next(word for word in words if re.match(r"launch/.*(sh|sbatch)$", word) or "launch/" in word)
    if "*" not in script:
        assert (ROOT / script).exists(), script
    check_mutable([word for word in words[words.index(script) + 1 :] if re.match(r"\w+\.\w+=", word)])


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_verbs_flags_and_fields_of_the_text_exist(page, parsers_only):
    text = page.read_text()
    for verb, rest in re.findall(r"`megakd ([a-z][a-z-]+)([^`]*)`", text):
        assert verb in cli.VERBS, verb
        for flag in re.findall(r"--[\w-]+", rest):
            assert flag in flags_of(verb), f"megakd {verb} {flag}"
    known = fields()
    for path in re.findall(r"`([a-z]+\.[a-z]\w*(?:=[^`]*)?)`", text):
        section, _, key = path.partition("=")[0].partition(".")
        if section in known and key not in ("safetensors", "py", "json", "md", "png", "layers"):
            check_field(path)
    assert not (old := re.findall(r"`(?:sar|online)\.(?!py)\w+", text)), old


@cache
def flags_of(verb: str) -> set[str]:
    command = importlib.import_module(f"megakd.commands.{verb.replace('-', '_')}")
    parser = argparse.ArgumentParser()
    if hasattr(command, "arguments"):
        command.arguments(parser)
    return set(parser._option_string_actions)


# ---- examples that run -------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_readme_walkthrough_runs_line_by_line(tmp_path, monkeypatch, recipe):
    """Every line of the `bash run` blocks, in order; the recipe's sizes are overridden by those of a test."""
    value = json.loads(recipe.read_text())
    for section in ("objective", "checkpoint", "stages"):
        value.pop(section)  # what the shipped recipe says stays
    small = [
        f"{section}.{k}={json.dumps(v)}"
        for section, fields in value.items()
        if isinstance(fields, dict)
        for k, v in fields.items()
    ]
    small += ["data.subset=null", "compress.calibration_tokens=2048", "stages.0.tokens=1024", "stages.1.tokens=1024"]
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in "".join(blocks(README, "bash run")).splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "megakd"
        if arguments[:2] == ["new", "runs/qwen3"]:
            arguments += small
        forked(*arguments)
        ran.append(arguments[0])
    assert {"new", "plan", "compress", "tokenize", "generate-logits", "train", "evaluate", "export", "report"} <= set(
        ran
    )
    assert (tmp_path / "runs" / "qwen3" / "report.html").exists()


def test_python_example_of_the_data_format(prepared, capsys):
    code, _ = blocks(DOCS / "data-format.md", "python")
    exec(code.replace("data/logits/train", str(prepared / "data" / "logits" / "train")), {})
    assert "(33,) (32, 16)" in capsys.readouterr().out


def test_python_example_of_the_readme(prepared, tmp_path):
    """With the path of a student made here."""
    (code,) = blocks(README, "python")
    done: dict = {}
    exec(code.replace("runs/qwen3/export", str(prepared / "student-0")), done)
    assert type(done["model"]).__name__ == "SharedCoreQwen3MoeForCausalLM"


def test_stages_of_the_examples_are_valid():
    first, second = blocks(DOCS / "offline-distillation.md", "json")
    stages = json.loads("{" + first + "}")["stages"] + [json.loads(second)]
    assert [stage.name for stage in parse({"stages": stages}, "the page").stages] == ["experts", "all", "anneal"]


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


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:megakd|tests|launch|ds_configs|tools|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:data|models|losses|engine|objectives|evals|commands|system|config)/\w+\.py)`", text):
        assert (ROOT / "megakd" / path).exists(), path


def anchors(page: Path) -> set[str]:
    """Of each heading, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {slug(title) for title in titles}


def slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def links(page: Path) -> list[tuple[Path, str]]:
    found = []
    for target, anchor in re.findall(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)", page.read_text()):
        found.append(((page.parent / target).resolve() if target else page, anchor))
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_of_a_page_lead_to_pages_and_headings(page):
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target.name}#{anchor}"


def within_two_links() -> set[Path]:
    once = {target for target, _ in links(README)}
    return once | {target for page in once if page.suffix == ".md" and page.exists() for target, _ in links(page)}


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


@pytest.mark.parametrize("question", QUESTIONS)
def test_newcomers_question_is_answered_within_two_links_of_the_readme(question):
    name, anchor, word = QUESTIONS[question]
    page = DOCS / name
    assert (page, anchor) in [link for start in (README, DOCS / "index.md") for link in links(start)]
    text = page.read_text()
    if anchor:
        assert anchor in anchors(page)
        text = section_of(text, anchor)
    assert word.lower() in text.lower(), f"{name}#{anchor} does not say {word}"


def section_of(text: str, anchor: str) -> str:
    """The text below the heading with this anchor, up to the next heading of its level or above."""
    parts = re.split(r"^(#+) (.+)$", text, flags=re.MULTILINE)[1:]
    levels, titles, bodies = parts[0::3], [slug(title) for title in parts[1::3]], parts[2::3]
    start = titles.index(anchor)
    inner = itertools.takewhile(lambda i: len(levels[i]) > len(levels[start]), range(start + 1, len(titles)))
    return "".join([bodies[start], *(bodies[i] for i in inner)])


@pytest.mark.parametrize("page", [p for p in CURRENT if p.name != "configuration.md"], ids=named)
def test_a_page_begins_with_what_the_reader_can_do(page):
    first = page.read_text().split("\n\n")[1]
    assert re.search(r"\blets? you\b|^Run `", first), first


def test_readme_is_short_and_names_targets_of_the_makefile():
    assert len(README.read_text().splitlines()) <= 150
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make (\w+)", "".join(blocks(page, "bash")), re.MULTILINE):
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
