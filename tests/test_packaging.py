"""What `pip install megakd` brings: ranges around the proven pins, extras, and what lies in the wheel."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megakd.errors import UserError
from megakd.system.deepspeed_internals import SUPPORTED
from megakd.system.extras import EXTRAS, require
from megakd.system.version import VERSION, made_with
from tests.conftest import ROOT, in_process

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
OPTIONAL = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
# brought by the library that alone they are used with
COMES_WITH = {"pydantic-core": "pydantic", "tqdm": "lm-eval"}


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


PINS = pins("requirements.txt")
DEV = pins("requirements-dev.txt")


def imported(folder: str) -> set[str]:
    """The installed distributions that a folder's files import, at their heads or inside functions."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    known = metadata.packages_distributions()
    distributions = {canonicalize_name(name) for module in found for name in known.get(module, ())} - {"megakd"}
    return {COMES_WITH.get(name, name) for name in distributions}


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements} - {"megakd"}


def test_every_range_holds_the_version_that_the_tests_run_with():
    for requirement in [*CORE, *(r for each in OPTIONAL.values() for r in each if r.name != "megakd")]:
        pinned = {**PINS, **DEV}.get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement}: no pin in requirements.txt or requirements-dev.txt"
        assert requirement.specifier.contains(pinned), f"{requirement} excludes {pinned}"


def test_every_pin_is_of_a_library_that_is_asked_for():
    runtime = names([*CORE, *(r for extra, each in OPTIONAL.items() if extra != "dev" for r in each)])
    assert PINS.keys() == runtime
    assert DEV.keys() == names(OPTIONAL["dev"])


def test_installed_versions_are_the_pinned_ones():
    for name, pinned in {**PINS, **DEV}.items():
        assert metadata.version(name).partition("+")[0] == pinned, name  # 2.13.0+cpu is a build of 2.13.0


def test_torch_is_pinned_exactly():
    assert PINS["torch"] == "2.13.0"  # a range installs the newest CUDA build


def test_package_imports_nothing_that_is_not_asked_for_and_asks_for_nothing_that_it_does_not_import():
    asked = names([*CORE, *(r for extra, each in OPTIONAL.items() if extra != "dev" for r in each)])
    package, tools, tests = (imported(folder) for folder in ("megakd", "tools", "tests"))
    assert package <= asked and tools <= asked, (package | tools) - asked
    assert tests <= asked | names(OPTIONAL["dev"]), tests - asked
    # torch.utils.tensorboard imports the library; transformers' server and lm-eval the others
    elsewhere = {"tensorboard", "fastapi", "openai", "uvicorn", "tenacity"}
    assert asked <= package | tools | elsewhere, asked - package - tools


def test_extras_are_those_of_pyproject():
    extras = {(extra, canonicalize_name(r.name)) for extra, each in OPTIONAL.items() if extra != "dev" for r in each}
    assert extras == {(extra, library) for library, extra in EXTRAS.values()}
    assert [r.extras for r in OPTIONAL["dev"] if r.name == "megakd"] == [OPTIONAL.keys() - {"dev"}]


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_extra_is_one_line_that_installs_it(module, monkeypatch):
    require(module, "here")
    monkeypatch.setitem(sys.modules, module, None)
    library, extra = EXTRAS[module]
    with pytest.raises(UserError) as raised:
        require(module, "here", "do without")
    assert str(raised.value) == f"here: needs {library}: pip install 'megakd[{extra}]', or do without"


def test_training_says_at_its_start_which_extra_it_lacks(sibling, monkeypatch):
    run = sibling("engine.kind=deepspeed")
    for module in ("deepspeed", "tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "engine.kind=deepspeed: needs deepspeed: pip install 'megakd[deepspeed]'" in in_process(
        "train", run.folder, code=2
    )
    assert "log.tensorboard=true: needs tensorboard: pip install 'megakd[log]', or set log.tensorboard=false" in (
        in_process("train", sibling("log.tensorboard=true").folder, code=2)
    )
    assert "log.wandb=offline: needs wandb: pip install 'megakd[log]'" in (
        in_process("train", sibling("log.wandb=offline").folder, code=2)
    )


def test_evaluation_and_sharded_capture_say_which_extra_they_lack(sibling, monkeypatch):
    for module in ("deepspeed", "lm_eval"):
        monkeypatch.setitem(sys.modules, module, None)
    evaluated, captured = sibling('eval.tasks=["piqa"]'), sibling("logits.parallel=zero3")
    assert "needs lm-eval: pip install 'megakd[eval]'" in in_process("evaluate", evaluated.folder, code=2)
    assert "needs deepspeed: pip install 'megakd[deepspeed]'" in in_process("generate-logits", captured.folder, code=2)


def test_conversion_says_that_it_lacks_h5py(tmp_path):
    (tmp_path / "h5py.py").write_text("raise ModuleNotFoundError(name='h5py')")
    line = [sys.executable, str(ROOT / "tools" / "convert" / "convert_hdf5.py"), "--help"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (2, "convert_hdf5: needs h5py: pip install 'megakd[convert]'\n")


def test_deepspeed_is_the_version_whose_internals_are_used():
    assert PINS["deepspeed"] == SUPPORTED


def test_every_verb_starts_without_extras():
    """Each module is imported where none of their libraries is there."""
    script = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({[*EXTRAS]!r}))\n"
        "from megakd.cli import VERBS\n"
        "for verb in VERBS: importlib.import_module('megakd.commands.' + verb.replace('-', '_'))\n"
        "importlib.import_module('megakd.integrations.hf_trainer')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_wheel_holds_what_lies_beside_the_package_in_a_checkout(tmp_path):
    """DeepSpeed files, recipes, launch scripts, the demo's teacher, the license and the commit."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed; pip installs it for each build alone")
    line = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name == f"megakd-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        held = set(opened.namelist())
        assert shipped_files() <= held, shipped_files() - held
        assert any(name.endswith("licenses/LICENSE") for name in held)
        if commit := made_with()["commit"]:
            assert opened.read("megakd/COMMIT").decode().startswith(commit)
        meta = opened.read(f"megakd-{VERSION}.dist-info/METADATA").decode()
    assert {m[1] for m in re.finditer(r"Provides-Extra: (\S+)", meta)} == OPTIONAL.keys()


def test_a_checkout_has_its_folders_its_environment_and_its_citation():
    """environment.yml installs the pinned requirements; CITATION.cff names what the Citation File Format requires."""
    folders = {"megakd", "launch", "ds_configs", "tools", "tests", "docs"}
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} >= folders and (ROOT / "README.md").is_file()
    for name in ("environment.yml", "environment-cuda.yml"):
        wanted = yaml.safe_load((ROOT / name).read_text())["dependencies"]
        [pip] = [each["pip"] for each in wanted if isinstance(each, dict)]
        assert "-r requirements.txt" in pip and "python=3.11" in wanted
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"} and citation["license"] == "Apache-2.0"


def test_folders_that_the_wheel_takes_in_are_there():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert config["force-include"] == {name: f"megakd/{name}" for name in ("ds_configs", "launch")}
    assert {Path(name).parts[1] for name in shipped_files()} >= {"ds_configs", "launch", "assets"}


def shipped_files() -> set[str]:
    """Files without which verbs do not work, by their names in a wheel."""
    found = {f"megakd/{path.relative_to(ROOT)}" for folder in ("ds_configs", "launch") for path in files_in(folder)}
    return found | {str(path.relative_to(ROOT)) for path in files_in("megakd") if "__pycache__" not in path.parts}


def files_in(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and os.access(path, os.R_OK)]
