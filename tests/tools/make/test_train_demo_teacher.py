import hashlib
import importlib.util
import json

import pytest

from tests.conftest import ROOT
from tests.tools.examples import tool


@pytest.mark.demo
def test_tool_trains_and_records_a_teacher(tmp_path, monkeypatch):
    """One step on less text: the tokenizer, the folder and its record are what the shipped teacher's are."""
    module = tool("make/train_demo_teacher")
    assert all(importlib.util.find_spec(package) for package in module.PACKAGES)
    monkeypatch.setattr(module, "PACKAGES", ("networkx",))  # reading all of them takes a minute
    module.main([str(tmp_path), "--steps", "1"])
    record = json.loads((tmp_path / "training.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["weights_sha256"] and record["tokens"] == 4096
    shipped = ROOT / "megakd" / "assets" / "demo-teacher"
    python = json.loads((shipped / "training.json").read_text())["versions"]["python"]
    if python == record["versions"]["python"]:  # the text follows the Python version
        assert (tmp_path / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()
