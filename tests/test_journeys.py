"""Every verb in one folder, in the order a user types them, each twice, one of them killed."""

import json
from pathlib import Path

import pytest
import torch

from megakd.data.shards import ShardSet
from megakd.models.loading import load_model
from megakd.models.tiny import train_tokenizer
from megakd.run import Run
from tests.conftest import VOCABULARY, files, in_process, kill_when, make_teacher, metrics, run_to_end
from tests.objectives.sar import sar_recipe
from tests.tools.examples import tool
from tests.train.test_resume import steps_logged

CACHED = ("tokenize", "compress", "generate-logits", "train", "evaluate", "export", "export --dense", "watch")
LIVE = ("tokenize", "train", "evaluate", "export", "watch")
PRODUCTS = ("student-0", "data", "checkpoints", "export", "export-dense")


def content(run: Path) -> dict[str, bytes]:
    """What the verbs made, without what records when they did."""
    found = {}
    for name in PRODUCTS:
        found |= {f"{name}/{path}": data for path, data in files(run / name).items()}
    return found


def look(run: Path) -> None:
    """The verbs that only look at a run: a new one, in the midst of training, measured, and at its end."""
    for verb in ("inspect", "plan", "report"):
        in_process(verb, run)
    assert (run / "report.html").stat().st_size > 1000


def walk(run: Path, verbs: tuple[str, ...]) -> None:
    """Each verb, a look at the run, the verb again: the second time changes nothing. Training is killed once."""
    for number, line in enumerate(verbs, start=1):
        verb, *flags = line.split()
        if verb == "train":
            assert kill_when(["train", run], lambda: steps_logged(Run.open(run)) >= 2)
            look(run)
        in_process(verb, run, *flags)
        before, rows = content(run), measured(run)
        if number in (1, len(verbs)) or verb == "evaluate":
            look(run)
        in_process(verb, run, *flags)
        after = content(run)
        assert after.keys() == before.keys(), (line, after.keys() ^ before.keys())
        assert [name for name in before if before[name] != after[name]] == [], line
        assert measured(run) == rows, line


def measured(run: Path) -> list[str]:
    path = run / "evals.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def check_training(run: Path, steps: int) -> None:
    """All steps once, in order, whatever was killed; the student is better than it was."""
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    measures = [json.loads(line) for line in measured(run)]
    names = [row["model"] for row in measures]
    assert len(names) == len(set(names)) and "student-0" in names
    assert measures[-1]["perplexity"] < next(row for row in measures if row["model"] == "student-0")["perplexity"]


def rearrange(shards: Path, folder: Path, targets: bool) -> None:
    """reshard and, where there are targets, both converters there and back: the same windows."""
    tool("convert/reshard").main([str(shards), str(folder / "small"), "--samples", "7"])
    places = [folder / "small"]
    for name, suffix in (("convert_hdf5", "h5"), ("convert_parquet", "parquet")) if targets else ():
        tool(f"convert/{name}").main(["to", str(shards), str(folder / f"store.{suffix}")])
        tool(f"convert/{name}").main(["from", str(folder / f"store.{suffix}"), str(folder / name)])
        places.append(folder / name)
    whole = ShardSet(shards)
    for place in places:
        in_process("inspect", place)
        other = ShardSet(place)
        assert len(other) == len(whole)
        assert all((other[i].tokens == whole[i].tokens).all() for i in range(len(whole))), place
        other.close()
    whole.close()


@pytest.mark.ranks
def test_cached_run_and_a_run_derived_from_it(recipe, tmp_path):
    run = tmp_path / "run"
    in_process("new", run, "--from", recipe)
    assert "already a run" in in_process("new", run, "--from", recipe, code=2)
    walk(run, CACHED)
    check_training(run, 10)
    rearrange(run / "data/logits/train", tmp_path, targets=True)
    derived = tmp_path / "derived"
    in_process("new", derived, "--from", run, "objective.alpha=0.0", "name=ce-alone")
    for verb in ("tokenize", "compress", "generate-logits"):  # shared with the run, so nothing to do
        in_process(verb, derived)
    walk(derived, ("train", "evaluate", "export", "watch"))
    check_training(derived, 10)
    assert metrics(derived)[-1]["loss"] != metrics(run)[-1]["loss"]
    in_process("report", derived, "--baseline", run)


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory, documents) -> Path:
    """A teacher whose tokenizer cuts text in another way than the student's."""
    folder = tmp_path_factory.mktemp("other") / "teacher"
    tokenizer = train_tokenizer([text.upper() + text for text in documents[:20]], VOCABULARY)
    return make_teacher(folder, tokenizer, documents, seed=3, steps=100)


@pytest.mark.ranks
@pytest.mark.parametrize("tokenizers", ["one", "two"])
@pytest.mark.parametrize("kind", ["sar", "online"])
def test_run_with_a_live_teacher(kind, tokenizers, recipe, tokenizer, other_teacher, tmp_path):
    value = json.loads(sar_recipe(recipe, tmp_path, tokenizer).read_text())
    if kind == "online":
        value["objective"] = {"kind": "online", "alpha": 0.7, "temperature": 2.0}
        value["stages"][0]["lr_multipliers"] = []
    if tokenizers == "two":
        value["model"]["teacher"] = str(other_teacher)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(value))
    run = tmp_path / "run"
    in_process("new", run, "--from", path)
    walk(run, LIVE)
    check_training(run, 7)
    rearrange(run / "data/tokens/train", tmp_path, targets=False)


TRAINER = """
import sys
from megakd.integrations.hf_trainer import DistillationTrainer, DistillationTrainingArguments
from transformers import AutoModelForCausalLM, AutoTokenizer
import megakd

run, out, resume = sys.argv[1], sys.argv[2], len(sys.argv) > 3
args = DistillationTrainingArguments(
    output_dir=out, max_steps=6, save_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none",
    use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
)
student = AutoModelForCausalLM.from_pretrained(run + "/student-0", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(run + "/student-0")
trainer = DistillationTrainer(student, args, run + "/data/logits/train", run + "/data/logits/holdout", tokenizer)
trainer.train(resume_from_checkpoint=resume)
trainer.save_model(out + "/final")
"""


@pytest.mark.ranks
def test_trainer_over_the_data_of_a_run(prepared, tmp_path):
    """Killed once and resumed; what it saved is looked at, measured and exported like a student that was given."""
    script, out = tmp_path / "train.py", tmp_path / "out"
    script.write_text(TRAINER)
    assert kill_when([script, prepared, out], lambda: (out / "checkpoint-4").exists(), script=True)
    run_to_end(1, script, prepared, out, "resume")
    final = load_model(out / "final", torch.float32)
    assert sum(p.numel() for p in final.parameters()) > 0
    run = tmp_path / "run"
    in_process("new", run, "--from", prepared, f"model.student={out / 'final'}")
    walk(run, ("tokenize", "generate-logits", "evaluate", "export"))
