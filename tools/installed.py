"""Ends the process with one line where MegaKD is not installed; imported before any other library."""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

if getattr(find_spec("megakd"), "origin", None) is None:  # none, or a folder without modules
    checkout = Path(__file__).resolve().parents[1]
    sys.exit(
        f"MegaKD is not installed in this Python; run: {sys.executable} -m pip install -e {shlex.quote(str(checkout))}"
    )
