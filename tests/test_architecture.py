"""The import order as data: who may see whom; no cycles; folders' __init__ files stay empty."""

import ast
from pathlib import Path

from tests.conftest import ROOT, for_each

# Downward only: a layer sees those before it and itself; rooms in one layer do not see each other.
ORDER: tuple[set[str], ...] = (
    {"errors"},
    {"system"},
    {"names"},
    {"outputs", "doctor"},
    {"config"},
    {"run", "identity", "tracking", "measured"},
    {"data"},
    {"models", "losses"},
    {"compress", "capture", "objectives"},
    {"engine"},
    {"train"},
    {"evals"},
    {"report"},
    {"serve"},
    {"integrations"},
    {"finish"},
    {"commands"},
    {"cli"},
    {"__main__", "api", "hf_trainer", "log"},  # the last two: names of 0.1
)
# A verb that runs other verbs is the one exception.
ALLOWED = {("megakd.commands.demo", "megakd.cli")}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "megakd").rglob("*.py"))
    if path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """The megakd modules that a file imports, at its head or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in MODULES}
    return found


def level(module: str) -> int:
    part = module.split(".")[1]
    return next(index for index, names in enumerate(ORDER) if part in names)


@for_each("module", MODULES)
def test_imports_go_downward(module: str):
    for other in imports(MODULES[module]) - {module}:
        if (module, other) in ALLOWED:
            continue
        same_package = module.split(".")[1] == other.split(".")[1]
        assert level(other) < level(module) or same_package, f"{module} imports {other}, which is above or next to it"


def test_no_cycles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "import cycle: " + " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for other in sorted(imports(MODULES[module]) - {module}):
            if (module, other) not in ALLOWED:
                visit(other, (*path, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def test_engine_sees_of_models_only_what_it_saves_with():
    for module, path in MODULES.items():
        if module.startswith("megakd.engine"):
            seen = {m for m in imports(path) if m.startswith(("megakd.models", "megakd.objectives", "megakd.losses"))}
            assert seen <= {"megakd.models.hub"}, (module, seen)


def test_packages_are_empty_and_no_file_is_called_utils():
    for path in (ROOT / "megakd").rglob("*.py"):
        if path.name == "__init__.py" and path.parent.name != "megakd":  # that one registers the student
            assert path.read_text() == "", path
        assert path.stem not in ("utils", "helpers", "common", "misc"), path


@for_each("module", MODULES)
def test_every_file_says_in_one_line_what_it_is(module: str):
    docstring = ast.get_docstring(ast.parse(MODULES[module].read_text())) or ""
    assert docstring.strip(), f"{module} has no docstring"
    assert docstring.splitlines()[0].endswith((".", ":", ";")) or "\n" not in docstring.strip(), module


def test_the_kind_of_the_objective_is_asked_in_config_and_objectives_alone():
    """What follows from it are attributes of `config.objective`: live, trains_routers, reads, …"""
    for module, path in MODULES.items():
        if module.split(".")[1] not in ("config", "objectives"):
            asked = [
                node.lineno
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Attribute)
                and node.attr == "kind"
                and ast.unparse(node).endswith("objective.kind")
            ]
            assert not asked, (module, asked)


def test_nothing_foreign_is_unpickled():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert not call.startswith("pickle."), module
                if call == "torch.load":
                    assert keywords.get("weights_only") == "True", module
                if call == "np.load":
                    assert keywords.get("allow_pickle") == "False", module


def test_the_package_mocks_nothing():
    for module, path in MODULES.items():
        assert "unittest" not in path.read_text(), module
