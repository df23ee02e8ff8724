"""The command lines of the systems that MegaKD unites, as written, with small local folders under the hub's names."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from megakd.run import Run
from megakd.system.verbs import Verbs
from tests.conftest import ROOT, forked, metrics, run_to_end
from tests.tools.examples import refused, tool

COMPAT = ROOT / "tools" / "compat"
TEACHER = "Qwen/Qwen3-30B-A3B-Base"


@pytest.fixture
def cheap(monkeypatch):
    """Verbs run in processes forked from one that has loaded the libraries."""

    def run(self: Verbs, *argv: str) -> int:
        forked(*argv)
        return 0

    monkeypatch.setattr(Verbs, "run", run)


@pytest.fixture
def folder(teacher, recipe, tmp_path, monkeypatch) -> Path:
    """The working directory: a teacher and a data set under their names at the hub, and the shipped conf/ made small."""
    monkeypatch.chdir(tmp_path)
    Path(TEACHER).parent.mkdir()
    Path(TEACHER).symlink_to(teacher)
    for name in ("wikitext", "HuggingFaceFW/fineweb"):
        Path(name).mkdir(parents=True)
        shutil.copyfile(recipe.parent / "text.jsonl", Path(name, "train.jsonl"))
    shutil.copytree(COMPAT / "conf", "conf")
    edit("conf/config.yaml", {
        "model": {"name": TEACHER, "torch_dtype": "float32"}, "engine": {"kind": "local"},
        "data": {"shard_tokens": 2048, "tokens": 6000, "holdout_fraction": 0.1, "holdout_tokens": 1000},
        "compress": {"calibration_tokens": 2048}, "log": {"tensorboard": False, "wandb": "disabled"},
        "logits": {"dtype": "float32"},
    })  # fmt: skip
    edit("conf/compression/default.yaml", {"rank": 3})
    edit("conf/distillation/default.yaml", {"dataset": {"max_length": 32}, "training": {
        "bf16": False, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "warmup_steps": 1}})  # fmt: skip
    edit("conf/evaluation/default.yaml", {"poll_seconds": 0.1})
    return tmp_path


def edit(file: str, changes: dict) -> None:
    value = yaml.safe_load(Path(file).read_text())
    for key, change in changes.items():
        value[key] = {**value[key], **change} if isinstance(value.get(key), dict) else change
    Path(file).write_text(yaml.safe_dump(value))


def start(line: str) -> None:
    """A documented command line: `python scripts/NAME.py …`, continued lines and all."""
    python, script, *argv = shlex.split(line.replace("\\\n", " "))
    assert python == "python"
    tool(f"compat/{Path(script).stem}").main(argv)


CACHE = """python scripts/generate_teacher_logits.py \\
    --teacher_model Qwen/Qwen3-30B-A3B-Base \\
    --dataset wikitext \\
    --dataset_config wikitext-2-raw-v1 \\
    --output_dir ./teacher_logits \\
    --top_k 64 \\
    --batch_size 4
"""


def test_compress_cache_distil_and_evaluate(folder, cheap, capsys):
    """One run by all scripts: the first makes it, the others go on with its configuration."""
    start("python scripts/run_compression.py")
    run = Run.open("outputs/distillation")
    start("python scripts/generate_teacher_logits.py")
    start("python scripts/run_distillation.py")
    start("python scripts/run_async_eval.py")
    printed = capsys.readouterr()
    print(printed.out, printed.err)
    assert len(metrics(run.folder)) == 4
