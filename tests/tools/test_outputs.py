"""No tool replaces what it did not make: the rule of megakd/outputs.py at every place where a tool is told to write."""

import runpy
import sys

import pytest

from megakd.names import shipped
from megakd.system.files import write_json
from tests.conftest import ROOT, files
from tests.tools.examples import refused, tool

ABLATE = ("ablate", "demo", "--set", "sar", "engine.kind=local", "--list")


@pytest.mark.parametrize(
    "argv",
    [
        ("compat/apply_router_update", "demo", "nowhere.pt", "OUT"),
        ("make/real_models", "smollm2", "OUT"),
        ("make/real_models", "upcycle", "demo", "OUT"),
        ("make/real_models", "retokenize", "demo", "OUT"),
        ("make/real_models", "text", "OUT"),
        ("make/synthetic_moe", "OUT"),
        ("compat/seed_form", "to-seed", "nowhere", "OUT"),
        ("compat/seed_form", "from-seed", "nowhere", "OUT"),
        ("make/train_demo_teacher", "OUT", "--steps", "1"),
        (*ABLATE, "--json", "OUT"),
        (*ABLATE, "--plot", "OUT"),
        ("bench", "loss", "--quick", "--json", "OUT"),
    ],
    ids="-".join,
)
def test_a_tool_never_replaces_what_it_did_not_make(argv, tmp_path, capsys, monkeypatch):
    """A folder with a file, a file, a run, and a part of a run: refused at the start, everything as it was."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("megakd bench made by ablate")
    write_json(tmp_path / "run" / "config.json", {"stages": []})
    before = files(tmp_path)
    for name in ("folder", "file", "run", "run/config.json", "run/student-0"):
        words = [str(tmp_path / name) if word == "OUT" else word for word in argv[1:]]
        if argv[0] == "bench":  # reads sys.argv, and its name as a module is that of the package tools/bench
            monkeypatch.setattr(sys, "argv", ["bench", *words])
            monkeypatch.syspath_prepend(ROOT / "tools")
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / "tools" / "bench.py"), run_name="__main__")
            assert ended.value.code == 2 and "name another" in capsys.readouterr().err
        else:
            assert "name another" in refused(tool(argv[0]), capsys, *words)
        assert files(tmp_path) == before


def test_a_run_from_flags_takes_no_foreign_folder(tmp_path):
    """The student, the recipe and the run's own files have fixed names in --output_dir."""
    from megakd.errors import UserError

    module = tool("compat/run_from_flags")
    value = {"stages": [{"name": "a", "steps": 1}], "engine": {"kind": "local"}}
    for name in ("student", "recipe.json", "data", "export"):
        folder = tmp_path / name
        if name == "recipe.json":
            write_json(folder / name, {"name": "somebody else's"})
        else:
            (folder / name).mkdir(parents=True)
            (folder / name / "thesis.txt").write_text("years of work")
        before = files(folder)
        with pytest.raises(UserError, match=f"holds {name}, which this tool did not write"):
            module.open_run(folder, value)
        assert files(folder) == before
    for _ in range(2):  # and again, as after a kill between recipe and run
        assert module.open_run(tmp_path / "new", value).config.stages[0].name == "a"
        for name in ("config.json", "history.jsonl"):
            (tmp_path / "new" / name).unlink()


def test_a_shipped_model_is_no_folder_of_the_working_directory(tmp_path, monkeypatch):
    """Tools that make runs write local models by their whole path, and shipped ones by their names."""
    module = tool("compat/run_from_flags")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("demo", "own"):
        write_json(tmp_path / name / "config.json", {"model_type": "llama"})
    assert module.model_place("demo", "teacher_model") == "demo"
    assert module.model_place("demo", "student_model", found=True) == str(shipped("assets", "demo-teacher").resolve())
    for name in ("./demo", "own", "~/own"):
        assert module.model_place(name, "teacher_model") == str(tmp_path / name[-4:].strip("/"))
