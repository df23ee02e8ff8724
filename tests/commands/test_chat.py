"""Conversations from jsonl to training: labels where the assistant speaks, targets there alone."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from megakd.commands import tokenize
from megakd.data import windows
from megakd.data.batches import collate
from megakd.data.documents import held_out
from megakd.data.records import IGNORED
from megakd.data.shards import MASKED_VERSION, ShardSet
from megakd.data.tokenizers import load_tokenizer, pair_bos
from megakd.errors import UserError
from megakd.models.checks import find_live_teacher
from megakd.models.tiny import train_tokenizer
from megakd.report.samples import chat_prompt
from megakd.run import Run
from megakd.system.files import read_json
from megakd.system.text import short
from megakd.train.build import build_objective
from tests.commands.test_tokenize import interrupted
from tests.conftest import files, in_process, metrics
from tests.data.chats import document, said
from tests.tools.examples import converted, refused, tool

# the tiny tokenizer has one special token: it closes every message
TEMPLATE = """{%- for m in messages -%}
{{ '[' + m.role + ']\\n' }}{%- if m.role == 'assistant' -%}G[{{ m.content + eos_token }}]G
{%- else -%}{{ m.content + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[assistant]\\n' }}{%- endif -%}"""
LENGTH = 128


def plain(template: str = TEMPLATE) -> str:
    return template.replace("G[", "").replace("]G", "")


def marked(folder: Path) -> Any:
    found = load_tokenizer(folder)
    found.chat_template = TEMPLATE.replace("G[", "{% generation %}").replace("]G", "{% endgeneration %}")
    return found


@pytest.fixture(scope="module")
def chats(documents: list[str]) -> list[list[dict[str, Any]]]:
    """Conversations of real English, about a third of it the user's; some of them too long for a sequence."""
    words, found = " ".join(documents).split()[:6000], []
    while len(words) > 60:
        turns = []
        for turn in range(2 * (1 + len(found) % 3)):
            size = (3, 7 + len(found) % 5)[turn % 2]
            turns.append(" ".join(words[:size]))
            words = words[size:]
        found.append(said(*turns))
    return found


@pytest.fixture(scope="module")
def chat_recipe(tmp_path_factory: pytest.TempPathFactory, recipe: Path, teacher: Path, chats) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(teacher, folder / "teacher")
    tokenizer = load_tokenizer(teacher)
    tokenizer.chat_template = plain()
    tokenizer.save_pretrained(folder / "teacher")
    rows = [{"messages": chat} for chat in chats]
    extra = [{"messages": said("nobody answers")}, {"messages": said("why " * 200, "because")}]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:9], *extra, *rows[9:]]))
    value = json.loads(recipe.read_text())
    value["model"]["teacher"] = str(folder / "teacher")
    value["data"] |= {"source": str(folder / "chats.jsonl"), "format": "messages", "sequence_length": LENGTH}
    value["data"] |= {"tokens": 10**6, "holdout_tokens": 10**5, "shard_tokens": 8 * LENGTH, "holdout_fraction": 0.1}
    value["optim"]["batch_tokens"] = 8 * LENGTH
    value["stages"] = [{"name": "all", "tokens": 4 * 8 * LENGTH}]
    (folder / "recipe.json").write_text(json.dumps(value))
    return folder / "recipe.json"


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, chat_recipe: Path) -> tuple[Run, str]:
    """A run with student, tokens and logits, and what tokenize said."""
    run = Run.create(chat_recipe, [], tmp_path_factory.mktemp("runs") / "chat")
    said = in_process("tokenize", run.folder)
    in_process("compress", run.folder)
    in_process("generate-logits", run.folder)
    return run, said


def chats_of(run: Run) -> list[list[dict[str, Any]]]:
    rows = map(json.loads, Path(run.config.data.source).read_text().splitlines())
    return [row["messages"] for row in rows]


def expected(run: Run, chats, part: str, room: int = LENGTH + 1) -> list[tuple[list[int], list[bool]]]:
    """Tokens and mask of every conversation of a part, by the template's own marks; cut after the answer that fits."""
    tokenizer, found = marked(Path(run.config.model.teacher)), []
    for chat in chats:
        if held_out(document(chat), run.config.data.holdout_fraction) != (part == "holdout"):
            continue
        for end in range(len(chat), 0, -2):
            rendered = tokenizer.apply_chat_template(chat[:end], return_dict=True, return_assistant_tokens_mask=True)
            if len(rendered["input_ids"]) <= room:
                found.append((rendered["input_ids"], [bool(said) for said in rendered["assistant_masks"]]))
                break
    return found


def found_in(shards: ShardSet) -> list[tuple[list[int], list[bool]]]:
    """Tokens and mask of every conversation of a folder; nothing is said of a conversation's first token."""
    found = []
    for index in range(len(shards)):
        sample = shards[index]
        assert sample.mask is not None
        spoken, ends = [False, *sample.mask.tolist()], [*sample.starts[1:].tolist(), len(sample.tokens)]
        for start, end in zip(sample.starts.tolist(), ends, strict=True):
            found.append((sample.tokens[start:end].tolist(), spoken[start:end]))
    return found


@pytest.mark.parametrize("part", ["train", "holdout"])
@pytest.mark.parametrize("kind", ["tokens", "logits"])
def test_every_conversation_has_the_labels_of_the_templates_own_mask(captured, chats, kind, part):
    run, _ = captured
    found = found_in(ShardSet(run.path("data", kind, part)))
    assert found == expected(run, chats, part)
    assert len(found) > (40 if part == "train" else 1)


def test_what_is_not_used_is_counted_and_said(captured, chats):
    run, said = captured
    both = [read_json(run.path("data", "tokens", part, "manifest.json")) for part in ("train", "holdout")]
    assert [sum(made.get(count, 0) for made in both) for count in ("silent", "too_long")] == [1, 1]
    for part, made in zip(("train", "holdout"), both, strict=True):
        whole = expected(run, chats, part, 10**6)
        shortened = sum(len(tokens) > LENGTH + 1 for tokens, _ in whole)
        assert made["shortened"] == shortened and shortened
        assert made["documents"] == len(whole)
        assert made["text_tokens"] == sum(sum(spoken) for _, spoken in expected(run, chats, part))
        assert f"tokenize {part}: {shortened:,} conversations lost their last messages" in said
    assert "1 conversations are not used: nothing in them is spoken by the assistant" in said
    assert "of whole conversations" in said and "the assistant speaks" in said


@pytest.mark.parametrize("packing", ["packed", "documents"])
def test_workers_and_a_resume_make_no_difference(captured, chat_recipe, tmp_path, monkeypatch, packing):
    whole = Run.create(chat_recipe, [f"data.packing={packing}"], tmp_path / "whole")
    tokenize.main(whole, Namespace())
    again = Run.create(chat_recipe, [f"data.packing={packing}"], tmp_path / "again")
    interrupted(monkeypatch, again, "shard-00002")
    in_process("tokenize", again.folder, "data.workers=2")
    assert files(again.path("data", "tokens")) == files(whole.path("data", "tokens"))
    shards = ShardSet(whole.path("data", "tokens", "train"))
    if packing == "documents":
        assert all(len(shards[index].starts) == 1 for index in range(len(shards)))


def test_masked_labels_have_no_targets_and_cost_few_bytes(captured, chat_recipe, tmp_path, monkeypatch):
    run, _ = captured
    masked = ShardSet(run.path("data", "logits", "train"))
    pack_whole = windows.pack_whole

    def all_spoken(conversations: Any, *rest: Any) -> Any:
        return pack_whole(((index, ids, [True] * len(ids)) for index, ids, _ in conversations), *rest)

    monkeypatch.setattr(windows, "pack_whole", all_spoken)
    every = Run.create(chat_recipe, [], tmp_path / "every")
    in_process("tokenize", every.folder)
    in_process("generate-logits", every.folder)
    whole = ShardSet(every.path("data", "logits", "train"))
    assert len(whole) == len(masked)
    labels = [sum(shards[i].label_count for i in range(len(shards))) for shards in (masked, whole)]
    records = [sum(len(shards.members(i)["mkd"]) for i in range(len(shards))) for shards in (masked, whole)]
    print(f"{labels[0] / labels[1]:.1%} of the labels count and take {records[0] / records[1]:.1%} of the bytes")
    assert records[0] / records[1] < labels[0] / labels[1] + 0.12
    for index in range(len(masked)):
        ours, theirs = masked[index], whole[index]
        assert ours.mask is not None and ours.targets is not None and theirs.targets is not None
        assert np.isneginf(ours.targets.logprobs[~ours.mask]).all()
        kept = [np.sort(each.targets.ids[ours.mask], 1) for each in (ours, theirs)]
        assert kept[0].shape == kept[1].shape


def test_batches_ignore_what_the_assistant_does_not_speak(captured):
    shards = ShardSet(captured[0].path("data", "logits", "train"))
    samples = [shards[index] for index in range(4)]
    labels = collate(samples, LENGTH).labels.numpy()
    for sample, row in zip(samples, labels, strict=True):
        count = len(sample.tokens) - 1
        assert sample.mask is not None
        assert np.array_equal(row[:count] != IGNORED, sample.mask) and (row[count:] == IGNORED).all()
        assert np.array_equal(row[:count][sample.mask], sample.tokens[1:][sample.mask])


def test_training_and_evaluation_count_the_spoken_labels_alone(captured):
    run, _ = captured
    in_process("train", run.folder)
    steps = metrics(run.folder)
    assert len(steps) == 4 and all(np.isfinite(step["loss"]) for step in steps)
    said = in_process("inspect", run.path("data", "logits", "train"), "--verify")
    assert "labels count" in said and "the teacher's NLL of the labels" in said
    in_process("evaluate", run.folder)
    spoken = sum(sum(said) for _, said in expected(run, chats_of(run), "holdout"))
    found = {row["model"]: row for row in map(json.loads, run.path("evals.jsonl").read_text().splitlines())}
    assert {row["positions"] for row in found.values()} == {spoken}
    assert found["teacher"]["kl"] < 1e-3 < found["student-0"]["kl"], found


OBJECTIVES: dict[str, list[str]] = {
    "topk": [],
    "online": ["objective.kind=online"],
    "sar": ["objective.kind=sar"],
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_objective_is_the_sum_over_the_labels_that_count(captured, tmp_path, kind):
    """Of two halves of a mask and their union: what is masked adds nothing, and nothing counts twice."""
    run, _ = captured
    config = Run.create(run.folder, OBJECTIVES[kind], tmp_path / "run").config
    shards = ShardSet(run.path("data", "logits" if kind == "topk" else "tokens", "train"))
    live = find_live_teacher(config, shards.facts)
    objective = build_objective(config.at(config.stages[0]), run.student_folder, shards.facts, live)
    samples = [shards[index] for index in range(3)]
    assert all(sample.mask is not None for sample in samples)
    first = [sample._replace(mask=sample.mask & (np.arange(len(sample.mask)) % 2 == 0)) for sample in samples]
    second = [sample._replace(mask=sample.mask & (np.arange(len(sample.mask)) % 2 == 1)) for sample in samples]
    whole, *halves = [objective(collate(part, LENGTH)) for part in (samples, first, second)]
    assert whole.terms.keys() >= {"ce", "kl"}
    for name in ("ce", "kl"):
        assert whole.terms[name].item() == pytest.approx(sum(half.terms[name].item() for half in halves), rel=1e-5)


@pytest.mark.parametrize("kind", ["online", "sar"])
def test_a_live_teacher_of_another_tokenizer_is_refused(captured, documents, tmp_path, kind):
    """The template of its tokenizer writes another text of a conversation."""
    run, _ = captured
    student = Path(shutil.copytree(run.config.model.teacher, tmp_path / "student"))
    train_tokenizer(documents, 300).save_pretrained(student)
    other = Run.create(run.folder, [f"objective.kind={kind}", f"model.student={student}"], tmp_path / "other")
    for verb in ("plan", "tokenize"):
        said = in_process(verb, other.folder, code=2)
        assert "data.format=messages and prompt_completion need one tokenizer" in said
    with pytest.raises(UserError, match="makes another text"):
        pair_bos(ShardSet(run.path("data", "tokens", "train")).facts, load_tokenizer(student), "auto")


def test_a_report_asks_models_for_the_first_answer(captured):
    run, _ = captured
    holdout = ShardSet(run.path("data", "tokens", "holdout"))
    own = load_tokenizer(run.student_folder)
    tokens, spoken = expected(run, chats_of(run), "holdout")[0]
    prompt = chat_prompt(own, holdout[0])
    assert prompt.ids == tokens[: spoken.index(True)] and prompt.text.endswith("[assistant]\n")
    assert prompt.closing == own.eos_token_id
    assert "2 text samples of teacher" in in_process("report", run.folder, "--samples", 2)


def test_plan_counts_the_labels_that_the_cache_holds(captured, chat_recipe, tmp_path):
    run, _ = captured
    spoken = short(read_json(run.path("data", "tokens", "train", "manifest.json"))["text_tokens"])
    assert f"{spoken} tokens that the assistant speaks" in in_process("plan", run.folder)
    assert "tokenize counts them" in in_process("plan", Run.create(chat_recipe, [], tmp_path / "new").folder)


@pytest.mark.parametrize("name", ["hdf5", "parquet"])
def test_converters_keep_the_label_mask(captured, tmp_path, name):
    """Tokens, documents and masks as they are; the targets of labels that count within a step of the codec."""
    module, shards = tool(f"convert/convert_{name}"), ShardSet(captured[0].path("data", "logits", "train"))
    module.main(["to", str(shards.folder), str(tmp_path / "out")])
    found = converted(module, tmp_path / "out", tmp_path / "again")
    assert found.facts["codec"] == shards.facts["codec"] and found_in(found) == found_in(shards)
    for index in range(len(shards)):
        sample, before = found[index], shards[index]
        assert np.array_equal(sample.mask, before.mask) and not sample.mask.all()
        new, old = (np.sort(each.targets.logprobs, axis=1) for each in (sample, before))
        assert np.array_equal(new > -np.inf, old > -np.inf) and not (new[~sample.mask] > -np.inf).any()
        there = old > -np.inf
        assert np.abs(np.exp(new[there] / 2) - np.exp(old[there] / 2)).max() <= 1 / shards.facts["levels"]


@pytest.mark.parametrize("name", ["hdf5", "parquet"])
def test_a_mask_and_facts_that_do_not_fit_are_refused(captured, tmp_path, capsys, name):
    module, source = tool(f"convert/convert_{name}"), captured[0].path("data", "logits", "train")
    module.main(["to", str(source), str(tmp_path / "out")])
    if name == "hdf5":
        with h5py.File(tmp_path / "out", "a") as file:
            del file["label_mask"]
    else:
        table = pq.read_table(tmp_path / "out")
        pq.write_table(table.drop_columns(["label_mask"]), tmp_path / "out")
    error = refused(module, capsys, "from", tmp_path / "out", tmp_path / "again")
    assert "label_mask is missing: its facts are those of conversations" in error


def test_reshard_keeps_the_mask(captured, tmp_path):
    source = captured[0].path("data", "logits", "train")
    tool("convert/reshard").main([str(source), str(tmp_path / "out"), "--samples", "7"])
    assert found_in(ShardSet(tmp_path / "out")) == found_in(ShardSet(source))


def test_an_old_reader_refuses_the_shards(captured):
    run, _ = captured
    for kind, codec in (("tokens", None), ("logits", "mkd-3-masked")):
        manifest = read_json(run.path("data", kind, "train", "manifest.json"))
        assert manifest["version"] == MASKED_VERSION and manifest["facts"].get("codec") == codec


def test_text_shards_keep_the_version_that_old_readers_know(prepared):
    manifest = read_json(prepared / "data" / "tokens" / "train" / "manifest.json")
    assert manifest["version"] == 2 and "format" not in manifest["facts"]
    assert not {"silent", "too_long", "shortened"} & manifest.keys()


def test_a_template_of_a_file_takes_the_place_of_the_tokenizers(captured, recipe, tmp_path, monkeypatch):
    """Of a tokenizer that has none; in workers too. One that changes meanwhile, or later, is refused."""
    run, _ = captured
    template = tmp_path / "chat.jinja"
    template.write_text(plain())
    data = {name: getattr(run.config.data, name) for name in ("source", "format", "sequence_length", "shard_tokens")}
    data |= {"holdout_fraction": 0.1, "holdout_tokens": 10**5, "tokens": 10**6, "chat_template": str(template)}
    overrides = [f"data.{name}={json.dumps(value)}" for name, value in data.items()]
    other = Run.create(recipe, overrides, tmp_path / "other")
    interrupted(monkeypatch, other, "shard-00002")
    template.write_text(plain().replace("[assistant]", "[model]"))
    error = in_process("tokenize", other.folder, code=2)
    assert "was made with the chat template" in error and "data.chat_template" in error
    template.write_text(plain())
    in_process("tokenize", other.folder, "data.workers=1")
    for part in ("train", "holdout"):
        kinds = [ShardSet(each.path("data", "tokens", part)) for each in (other, run)]
        assert found_in(kinds[0]) == found_in(kinds[1]) and kinds[0].facts["template"] == kinds[1].facts["template"]
    missing = Run.create(recipe, [*overrides[:-1], "data.chat_template=nowhere.jinja"], tmp_path / "missing")
    assert "data.chat_template: nowhere.jinja: No such file" in in_process("tokenize", missing.folder, code=2)


def test_a_tokenizer_without_a_template_is_one_line(recipe, tmp_path):
    run = Run.create(recipe, ["data.format=messages"], tmp_path / "run")
    said = in_process("tokenize", run.folder, code=2)
    assert "has no chat template" in said
