"""What tools say in a Python that has no MegaKD."""

import shlex
import subprocess
import sys

from tests.conftest import ROOT

FOUND = (path for path in sorted((ROOT / "tools").rglob("*.py")) if '__name__ == "__main__"' in path.read_text())
SCRIPTS = [path for path in FOUND if path.parent.name != "bench"]  # which bench.py and gpu_smoke.sh start


def test_a_python_without_megakd_is_told_to_install_it(tmp_path):
    """-S: without the .pth files by which an installation in place is found, nor any other library."""
    assert len(SCRIPTS) > 10
    for script in SCRIPTS:
        done = subprocess.run(
            [sys.executable, "-S", script], env={"PATH": ""}, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1 and done.stderr.count("\n") == 1, (script, done.stderr)
        assert done.stderr.startswith("MegaKD is not installed in this Python; run: "), script
        assert done.stderr.strip().endswith(f"-m pip install -e {shlex.quote(str(ROOT.resolve()))}"), script
