"""The checklists of docs/contributing.md, followed step by step in a copy of the repository.

The copy gets what MegaKD lacks: the family FlexOlmo, an objective, a codec, a training metric and a held-out measure.
STEPS has, for each step of the page, the changes that it asks for. The tests that the page names, and those of
tests/contributions, then run in the copy.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pages import DOCS, section_of

PAGE = DOCS / "contributing.md"
Changes = dict[str, list[tuple[str, str]]]  # file → (text, what replaces it)

SMOOTH_CONFIG = '''class SmoothConfig(LossConfig):
    """Cross entropy with smoothed labels."""

    kind: Literal["smooth"] = Field("smooth", description="smoothed labels; the teacher is not read")
    smoothing: float = Field(0.1, ge=0, le=1, description="share of a label that all tokens get alike")


class SarConfig('''
AXK2 = "| axk2 | `mlp` | one by one: `down_proj`, `gate_proj`, `up_proj` | works | exact | found | separate |"
STEPS: dict[str, dict[str, Changes]] = {
    "add-a-model-family": {
        "`tests/models/families.py`": {"tests/models/families.py": [('"axk1",', '"axk1", "axk2",')]},
        "What its experts do": {},
        "[Families]": {"docs/families.md": [("| bailing_hybrid |", f"{AXK2}\n| bailing_hybrid |")]},
    },
    "add-an-objective": {
        "`megakd/config/objective.py`": {
            "megakd/config/objective.py": [
                ("class SarConfig(", SMOOTH_CONFIG),
                ('{"cached": CachedConfig, ', '{"cached": CachedConfig, "smooth": SmoothConfig, '),
                ("    Annotated[CachedConfig,", '    Annotated[SmoothConfig, Tag("smooth")] | Annotated[CachedConfig,'),
            ]
        },
        "One file in `megakd/objectives/`": {},  # tests/contributions/smooth.py
        "`megakd/objectives/build.py`": {
            "megakd/objectives/build.py": [
                ("import CachedConfig, ", "import CachedConfig, SmoothConfig, "),
                ("\n\ndef build(", "\nfrom megakd.objectives.smooth import Smooth\n\n\ndef build("),
                (
                    "    objective = config.objective\n",
                    "    objective = config.objective\n    if isinstance(objective, SmoothConfig):\n"
                    "        return Smooth(student, objective)\n",
                ),
            ]
        },
        "Write the fields into": {},  # done by the command of the step
        "A recipe in `launch/recipes/`": {},  # tests/contributions/check_objective.py
        "A case in `tools/fake_cuda.py`": {},
        "[papers]": {
            "docs/papers.md": [("## Online objectives", "Smoothed labels: Szegedy et al. (2016).\n\n## Online")]
        },
    },
    "add-a-codec": {
        "`megakd/data/codec.py`": {
            "megakd/data/codec.py": [
                ('"mkd-3"', '"mkd-4"'),
                ('b"MKD3"', 'b"MKD4"'),
                ("LOG_STEPS = 32", "LOG_STEPS = 40"),
            ]
        },
        "`tests/data/reference_codec.py`": {
            "tests/data/reference_codec.py": [('b"MKD3"', 'b"MKD4"'), ("0) / 32) - 1", "0) / 40) - 1")]
        },
        "Fuzz tests": {
            "tests/data/damage.py": [('b"MKD3"', 'b"MKD4"')],
            "tests/data/test_codec.py": [("254.5 / 32", "254.5 / 40")],
        },
        "Measure with": {},
    },
    "add-a-metric": {
        "A training metric": {
            "megakd/report/series.py": [
                ("TERMS = {\n", 'TERMS = {\n    "sharpness": Term("probability of the first token", "%"),\n'),
            ]
        },
        "A held-out measure": {
            "megakd/evals/holdout.py": [
                ("    nll: float\n", "    nll: float\n    double_nll: float\n"),
                ("        nll=nll,\n", "        nll=nll,\n        double_nll=2 * nll,\n"),
            ],
            "megakd/config/train.py": [('HIGHER_IS_BETTER = {"kl"', 'HIGHER_IS_BETTER = {"double_nll": False, "kl"')],
        },
        "Titles and tables": {
            "megakd/report/series.py": [
                ("MEASURES = {\n", 'MEASURES = {\n    "double_nll": Term("twice the held-out NLL", NATS),\n')
            ],
            "megakd/report/tables.py": [
                (
                    "COLUMNS = (\n",
                    'COLUMNS = (\n    Column("2 NLL", "double_nll", ".3f"),\n',
                )
            ],
        },
        "Document it in": {"docs/evaluation.md": [("| `top1` |", "| `double_nll` | twice the NLL |\n| `top1` |")]},
    },
}
CHECKS = {  # checklist → tests in the copy that prove it
    "add-a-model-family": ("tests/models/test_any_family.py", "axk2 or the_page_has"),
    "add-an-objective": ("tests/objectives/test_smooth.py", "objective or fields"),
    "add-a-codec": ("tests/data/test_codec.py", ""),
    "add-a-metric": ("tests/objectives/test_smooth.py", "measure"),
}


def steps_of(anchor: str) -> list[str]:
    """The steps of a checklist, each as one line."""
    text = section_of(PAGE.read_text(), anchor)
    return [" ".join(step.split()) for step in re.findall(r"^- \[ \] (.*(?:\n  .*)*)", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """What pytest says of each test in the copy, and under "" its output."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("megakd", "tests", "launch", "ds_configs", "docs"):
        shutil.copytree(ROOT / folder, copy / folder)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for checklist in STEPS.values():
        for changes in checklist.values():
            for name, edits in changes.items():
                change(copy / name, edits)
    shutil.move(copy / "tests/contributions/smooth.py", copy / "megakd/objectives/smooth.py")
    shutil.move(copy / "tests/contributions/check_objective.py", copy / "tests/objectives/test_smooth.py")
    files = sorted({file for file, _ in CHECKS.values()})
    words = " or ".join(f"({words})" for _, words in CHECKS.values() if words)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "-k",
        f"test_codec or {words}",
        *files,
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600, env=environment(copy))
    lines = re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {test: result for result, test in lines} | {"": done.stdout + done.stderr}


def environment(copy: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(copy)}


def change(path: Path, edits: list[tuple[str, str]]) -> None:
    text = path.read_text()
    for old, new in edits:
        assert old in text, f"{path.name}: {old!r} is not in it; mend the step in this test"
        text = text.replace(old, new, 1)
    path.write_text(text)


@pytest.mark.parametrize("anchor", STEPS)
def test_every_step_of_the_page_is_followed(anchor):
    steps, followed = steps_of(anchor), list(STEPS[anchor])
    assert len(steps) == len(followed), steps
    for step, words in zip(steps, followed, strict=True):
        assert step.startswith(words), f"{step!r} does not begin with {words!r}"
        for file in STEPS[anchor][words]:
            assert Path(file).name in step or file in ADDRESSED, f"the step does not name {file}: {step}"


ADDRESSED = ("docs/compression.md", "docs/papers.md", "docs/evaluation.md")  # by links


@pytest.mark.demo
@pytest.mark.parametrize("anchor", CHECKS)
def test_what_the_checklist_adds_works(anchor, results):
    file, words = CHECKS[anchor]
    named = words.split(" or ") if words else [""]
    found = {
        test: result for test, result in results.items() if test.startswith(file) and any(w in test for w in named)
    }
    assert found and set(found.values()) == {"PASSED"}, results[""]
