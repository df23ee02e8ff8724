"""The README's commands run, its promises hold, and every file that the docs name exists."""

import json
import re
import shlex

import pytest

from megakd import cli
from tests.conftest import ROOT, megakd

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "ds_configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS.remove(ROOT / "docs" / "log.md")  # history names what was


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


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
    for line in "".join(blocks("bash run")).splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "megakd"
        if arguments[:2] == ["new", "runs/qwen3"]:
            arguments += small
        megakd(*arguments)
        ran.append(arguments[0])
    assert {"new", "plan", "compress", "tokenize", "generate-logits", "train", "evaluate", "export", "report"} <= set(
        ran
    )
    assert (tmp_path / "runs" / "qwen3" / "report.html").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_documents_name_only_verbs_and_files_that_exist(document):
    text = document.read_text()
    for verb in re.findall(r"`megakd ([a-z][a-z-]+)", text):
        assert verb in cli.VERBS, verb
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:megakd|tests|launch|ds_configs|tools|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:data|models|losses|engine|objectives|evals|commands)/\w+\.py)`", text):
        assert (ROOT / "megakd" / path).exists(), path


def test_readme_names_the_two_commands_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "".join(blocks("bash")), re.MULTILINE):
        assert f"\n{target}:" in makefile
    assert "make check test" in (ROOT / ".ci" / "run").read_text()


def test_architecture_document_lists_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in sorted((ROOT / "megakd").rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py") and path.parent.name != "commands":
            assert path.name in text, path


def test_python_example_of_the_data_format(prepared, capsys):
    text = (ROOT / "docs" / "data-format.md").read_text()
    code, _ = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(code.replace("data/logits/train", str(prepared / "data" / "logits" / "train")), {})
    assert "(33,) (32, 16)" in capsys.readouterr().out


def test_python_example_of_the_readme(prepared, tmp_path):
    """With the path of a student made here."""
    (code,) = blocks("python")
    done: dict = {}
    exec(code.replace("runs/qwen3/export", str(prepared / "student-0")), done)
    assert type(done["model"]).__name__ == "SharedCoreQwen3MoeForCausalLM"
