"""The command lines of the systems that MegaKD unites, as written, with small local folders under the hub's names."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from megakd.config.run import flatten
from megakd.run import Run
from megakd.system.files import read_json_lines
from megakd.system.verbs import Verbs
from tests.conftest import ROOT, metrics, run_to_end
from tests.forks import Forked
from tests.objectives.sar import dense_student
from tests.tools.examples import refused, tool

COMPAT = ROOT / "tools" / "compat"
TEACHER = "Qwen/Qwen3-30B-A3B-Base"


@pytest.fixture
def folder(teacher, recipe, tmp_path, monkeypatch) -> Path:
    """The working directory: a teacher and data sets under their names at the hub, and the shipped conf made small."""
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


@pytest.fixture
def student_aware(folder, tokenizer) -> Path:
    """The same with what train.py names, and its shipped configuration made small."""
    Path("huihui-ai").mkdir()
    Path("huihui-ai/Huihui-MoE-1B-A0.6B").symlink_to(Path(TEACHER).resolve())
    dense_student().save_pretrained("HuggingFaceTB/SmolLM-135M")
    tokenizer.save_pretrained("HuggingFaceTB/SmolLM-135M")
    for name in ("openwebtext", "c4"):
        Path(name).symlink_to("wikitext")
    shutil.copytree(COMPAT / "configs", "configs")
    edit("configs/default_config.json", {
        "max_length": 64, "gradient_accumulation_steps": 12, "dataset_subset_size": 10, "warmup_steps": 1,
        "use_amp": False, "eval_steps": 100, "learning_rate": 1e-2,
    })  # fmt: skip
    return folder


def edit(file: str, changes: dict) -> None:
    value = yaml.safe_load(Path(file).read_text())
    for key, change in changes.items():
        value[key] = {**value[key], **change} if isinstance(value.get(key), dict) else change
    Path(file).write_text(json.dumps(value) if file.endswith(".json") else yaml.safe_dump(value))


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
FINEWEB = """python scripts/generate_teacher_logits.py \\
    distillation.dataset.name=HuggingFaceFW/fineweb \\
    distillation.dataset.streaming=true
"""


def test_compress_cache_distil_and_evaluate(folder, cheap, capsys, monkeypatch):
    """One run by all scripts: the first makes it, the others go on with its configuration."""
    with pytest.raises(SystemExit):
        start("python scripts/run_async_eval.py")
    assert "outputs/distillation: no run here" in capsys.readouterr().err
    start("python scripts/run_compression.py")
    run = Run.open("outputs/distillation")
    module = tool("compat/generate_teacher_logits")
    monkeypatch.setattr(module, "start", lambda *argv, env: Forked("megakd", *argv, env=env))
    module.main(words(folder, "./scripts/generate_teacher_logits_parallel.sh 4"))
    events = {event["worker"] for event in run.events("generate-logits")}
    assert events == {f"{i}/4" for i in range(4)}
    for line in ("generate_teacher_logits.py", "run_distillation.py", "run_async_eval.py"):
        start(f"python scripts/{line}")
    printed = capsys.readouterr()
    assert "no GPU here: 4 processes share the CPU" in printed.err
    assert "run: 2 of 2: generate-logits: finished already" in printed.err
    assert f"student: {run.path('export')}" in printed.out and run.path("export", "model.safetensors").exists()
    assert len(metrics(run.folder)) == 4
    assert [row["model"] for row in read_json_lines(run.path("evals.jsonl"))] == ["all/step-000002", "all/step-000004"]

    edit("conf/evaluation/default.yaml", {"limit": 7})  # a mutable setting
    start("python scripts/run_async_eval.py evaluation.num_fewshot=2")
    assert (Run.open(run.folder).config.eval.limit, Run.open(run.folder).config.eval.few_shot) == (7, 2)
    assert "compress.rank is frozen" in refused(tool("compat/run_compression"), capsys, "compression.rank=5")
    edit("conf/distillation/default.yaml", {"loss": {"alpha": 0.7}})
    said = refused(tool("compat/run_distillation"), capsys)
    assert "conf/config.yaml was edited since the run was made: objective.alpha is 0.7 now, was 0.5; for a run" in said
    assert "--output_dir outputs/distillation-2 teacher.cache_dir=outputs/distillation" in said


def words(folder: Path, line: str) -> list[str]:
    """What a shell script of tools/compat passes on."""
    program = folder / "program"
    program.write_text('#!/bin/sh\nshift\necho "$@"\n')
    program.chmod(0o755)
    script, *argv = shlex.split(line)
    environment = {**os.environ, "PYTHON": str(program)}
    return subprocess.check_output([COMPAT / Path(script).name, *argv], text=True, env=environment).split()


@pytest.mark.ranks
def test_a_cache_in_a_folder_of_its_own_and_torchrun(folder, cheap, capsys):
    edit("conf/config.yaml", {"engine": {"kind": "deepspeed", "config": "zero2"}})
    start(CACHE)
    cache = Run.open("teacher_logits")
    assert (cache.config.logits.top_k, cache.config.logits.batch_size, cache.config.data.subset) == (64, 4, None)
    assert "wikitext: files of this machine, where dataset.config has no effect" in capsys.readouterr().err
    other = "its logits are of another configuration: data.sequence_length is 64 instead of 32"
    argv = ("--output_dir", "b", "distillation.dataset.max_length=64")
    assert other in refused(tool("compat/run_compression"), capsys, *argv)
    start("python scripts/run_compression.py")
    run = Run.open("outputs/distillation")
    assert run.path("data", "logits").is_symlink() and run.path("data", "tokens").is_symlink()
    shutil.move(run.path("student-0"), "aside")
    torchrun = (2, COMPAT / "run_distillation.py")  # as torchrun --nproc_per_node=2 starts it
    assert "student-0" in run_to_end(*torchrun, code=2) and not run.path("checkpoints").exists()
    shutil.move("aside", run.path("student-0"))
    output = run_to_end(*torchrun)
    assert output.count(f"student: {run.path('export')}") == 1
    assert [row["step"] for row in metrics(run.folder)] == [1, 2, 3, 4] and run.events("train")[-1]["ranks"] == 2


def test_what_the_command_lines_ask_for(folder, monkeypatch, capsys):
    """Without running it: the configuration of the run, and the verbs."""
    verbs = []
    monkeypatch.setattr(Verbs, "run", lambda self, verb, folder: verbs.append(verb) or 0)
    start("python scripts/run_distillation.py")
    assert verbs == ["tokenize", "compress", "generate-logits", "train", "export"]
    printed = capsys.readouterr().err
    assert "wikitext: files of this machine, where dataset.config has no effect" in printed
    assert re.search(r"distillation.dataset.config +–  skipped: data.subset=null counts", printed)
    shutil.rmtree("HuggingFaceFW")
    start(FINEWEB)  # nothing was made of the first run
    assert "data.source is frozen; the run is made anew, for it has no data yet" in capsys.readouterr().err
    data = Run.open("outputs/distillation").config.data
    assert (data.source, data.subset, data.streaming) == ("HuggingFaceFW/fineweb", None, True)
    for words in ("", "distillation=default"):  # the run's data set, not that of the file
        start(f"python scripts/run_distillation.py {words}")
        assert Run.open("outputs/distillation").config.data == data
    before = Path("outputs/distillation/config.json").read_bytes()
    assert "compress.rank" in refused(tool("compat/run_compression"), capsys, "compression.rank=0")
    start("python scripts/run_compression.py compression.rank=2")
    assert Run.open("outputs/distillation").config.data == data
    start("python scripts/run_compression.py compression.rank=3")
    assert Path("outputs/distillation/config.json").read_bytes() == before
    Path("outputs/distillation/data/logits").mkdir(parents=True)
    module = tool("compat/run_distillation")
    said = refused(module, capsys, "dataset.name=wikitext")
    assert said.endswith(
        "distillation: data.source is frozen; for a run of its own: --output_dir outputs/distillation-2"
    )
    said = refused(module, capsys, "compression.rank=5")
    assert "compress.rank is frozen; for a run of its own: --output_dir outputs/distillation-2 teacher.cache" in said
    start(f"{FINEWEB} --output_dir outputs/distillation-2 teacher.cache_dir=outputs/distillation")
    assert Path("outputs/distillation-2/data/logits").is_symlink()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    module = tool("compat/generate_teacher_logits")
    assert "4 workers, one per GPU, but this machine shows 2 GPUs" in refused(module, capsys, "--num_gpus", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert module.gpus(2) == ["5", "7"] and module.gpus(1) == []
    shutil.copyfile("conf/compression/default.yaml", "conf/compression/mine.yaml")
    for words in ("dataset.name=some/set dataset.config=a dataset.split=b", ""):
        start(f"python scripts/run_compression.py --output_dir hub {words}")
        data = Run.open("hub").config.data
        assert (data.source, data.subset, data.split, data.streaming) == ("some/set", "a", "b", True)
    for _ in range(2):
        start("python scripts/run_compression.py --output_dir chosen compression=mine")
    Path("chosen/data").mkdir()
    said = refused(tool("compat/run_compression"), capsys, "--output_dir", "chosen", "compression=default")
    assert "chosen: made without compression=default; for a run of its own: --output_dir chosen-2" in said
    shutil.rmtree("conf")
    monkeypatch.setattr(Verbs, "run", lambda self, verb, folder: 0)
    start("python scripts/run_compression.py --output_dir shipped")
    config = Run.open("shipped").config
    assert (config.model.teacher, config.compress.rank, config.objective.alpha) == (TEACHER, 64, 0.5)
    assert (config.optim.lr, config.stages[0].epochs, config.logits.top_k, config.data.subset) == (5e-5, 3, 64, None)


def test_train_and_resume_from_an_epoch(student_aware, capsys):
    """Exactly from the checkpoint that is named; a run that has later ones keeps them."""
    start("python train.py --config configs/default_config.json --batch-size 4 --epochs 3")
    run, printed = Run.open("checkpoints"), capsys.readouterr()
    steps = [row["step"] for row in metrics(run.folder)]
    ends = [path.name for path in sorted(run.path("checkpoints", "online").iterdir())]
    assert len(ends) == 3 and ends[-1] == f"step-{steps[-1]:06d}" and ends[0] == f"step-{-(-len(steps) // 3):06d}"
    assert "no effect" not in printed.err and "student: checkpoints/student" in printed.out
    assert {row["model"] for row in read_json_lines(run.path("evals.jsonl"))} > {f"online/{name}" for name in ends}

    line = "python train.py --resume checkpoints/checkpoint_epoch_1"
    said = refused(tool("compat/train_student_aware"), capsys, *line.split()[2:])
    assert "later checkpoints" in said and said.endswith("in a run of its own: --output_dir checkpoints-2")
    start(f"{line} --output_dir checkpoints-2 --skip-eval")
    again, said = Run.open("checkpoints-2"), capsys.readouterr().err
    assert f"train: going on from checkpoints-2/checkpoints/online/{ends[0]}" in said
    assert metrics(again.folder) == metrics(run.folder)
    shutil.rmtree(again.path("checkpoints", "online", ends[2]))
    start("python train.py --resume checkpoints-2/checkpoint_epoch_2 --skip-eval")  # the newest one there
    assert metrics(again.folder) == metrics(run.folder)


STUDENT_AWARE = {
    "python train.py": {},
    "python train.py --batch-size 4 --epochs 3": {},
    "python train.py --datasets wikitext openwebtext c4": {},
    "python train.py --config custom_config.json": {
        "optim.lr": 1e-4, "objective.kl": 0.8, "objective.temperature": 5.0, "objective.initial_top_k": 2,
        "objective.final_top_k": 6,
    },
    'python train.py --config configs/default_config.json --use-wandb --project-name "my-distillation"': {
        "log.wandb": "online", "log.wandb_project": "my-distillation",
    },
}  # fmt: skip


def test_what_the_command_lines_of_student_aware_distillation_ask_for(student_aware, monkeypatch, capsys):
    """Without training: the configuration of the run."""
    module, started = tool("compat/train_student_aware"), []
    monkeypatch.setattr(module, "to_the_end", lambda run, evaluate: started.append(run))
    monkeypatch.setattr("megakd.tracking._logged_in", lambda: True)
    keys = {"learning_rate": 1e-4, "alpha_kd": 0.8, "temperature": 5.0, "initial_top_k": 2, "final_top_k": 6}
    Path("custom_config.json").write_text(json.dumps(keys))
    for line, expected in STUDENT_AWARE.items():
        start(line)
        config = dict(flatten(started.pop().config.model_dump(mode="json")))
        assert {key: config[key] for key in expected} == expected, line
        assert config["optim.micro_batch"] == 4 and config["stages"][0]["epochs"] == 3
        count = len(Path(config["data.source"]).read_text().splitlines())
        assert count == (60 if "custom" in line else 30 if "c4" in line else 10), line
        shutil.rmtree("checkpoints")
    shutil.rmtree("configs")
    args = module.build_parser().read([], greedy="datasets")
    assert module.read_settings(args).batch_size == 4 and args.config == COMPAT / "configs" / "default_config.json"
