"""Build hook of hatchling: the commit that a wheel or sdist is built from goes into it, as megakd/COMMIT."""

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):
    """An sdist has no .git; a wheel that is built from it takes the file that the sdist has."""

    folder: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # runs from the checkout, where git's files say it
            return
        root = Path(self.root)
        spec = importlib.util.spec_from_file_location("version", root / "megakd" / "system" / "version.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if commit := module.checkout_commit(root):
            self.folder = tempfile.mkdtemp()
            file = Path(self.folder) / module.COMMIT_FILE
            file.write_text(f"{commit}\n", encoding="utf-8")
            build_data["force_include"][str(file)] = f"megakd/{module.COMMIT_FILE}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
