import hashlib
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.demo
def test_tool_trains_and_records_a_teacher(tmp_path):
    """One step: the text, the tokenizer, the folder and its record are what the shipped teacher's are."""
    script = [sys.executable, str(ROOT / "tools" / "train_demo_teacher.py"), str(tmp_path), "--steps", "1"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "training.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["weights_sha256"] and record["tokens"] == 4096
    shipped = ROOT / "megakd" / "assets" / "demo-teacher"
    same_python = (
        json.loads((shipped / "training.json").read_text())["versions"]["python"] == record["versions"]["python"]
    )
    if same_python:  # the text follows the Python version
        assert (tmp_path / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()
