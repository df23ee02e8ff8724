"""What is measured of a run whose teacher learns too: the student, and the teacher with its new routers."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from megakd.data.shards import ShardSet
from megakd.engine.base import saved_buffers
from megakd.engine.checkpoint import rotate
from megakd.evals.attention import attention_overlap
from megakd.evals.holdout import evaluate_model
from megakd.evals.measure import Meter, Unusable, set_routers
from megakd.models.loading import load_model
from megakd.models.routers import find_routers
from megakd.models.tiny import train_tokenizer
from megakd.run import Run
from tests.conftest import VOCABULARY, files, in_process, make_teacher
from tests.models.students import FAMILIES, make_model
from tests.objectives.sar import sar_recipe
from tests.report.page import Page

NAMES = ["first/step-000003", "second/step-000006", "second/step-000007"]
COMPARED = {"kl", "top1", "topk", "teacher_kl"}
GATE = "model.layers.{}.mlp.gate.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, recipe, tokenizer) -> Path:
    """A finished training of three checkpoints, without stored logits; read-only: see `run`."""
    folder = tmp_path_factory.mktemp("sar")
    in_process("new", folder / "run", "--from", sar_recipe(recipe, folder, tokenizer))
    in_process("tokenize", folder / "run")
    in_process("train", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def captured(trained, tmp_path_factory) -> Path:
    """The same with targets of the validation set; read-only."""
    folder = tmp_path_factory.mktemp("captured") / "run"
    shutil.copytree(trained, folder)
    in_process("generate-logits", folder)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def compared(captured, tmp_path) -> Path:
    return Path(shutil.copytree(captured, tmp_path / "compared"))


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "evals.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lines_of(run: Path) -> dict[str, dict[str, Any]]:
    return {line["model"]: line for line in lines(run)}


def watch(run: Path, *argv: object, code: int = 0) -> str:
    return in_process("watch", run, "eval.poll_seconds=0.02", *argv, code=code)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return Run.open(run).events(kind)


def change_routers(checkpoint: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As if training had made these of them."""
    shutil.rmtree(checkpoint / "checksums")
    tensors = {name: change(tensor) for name, tensor in load_file(checkpoint / "auxiliary.safetensors").items()}
    save_file(tensors, checkpoint / "auxiliary.safetensors")


def pieces(holdout: ShardSet) -> Iterator[list[int]]:
    """The documents in every window, as far as they lie in it."""
    for sample in (holdout[i] for i in range(len(holdout))):
        for start, stop in pairwise([*sample.starts.tolist(), len(sample.tokens)]):
            yield sample.tokens[start:stop].tolist()


def nll_sum(model: Any, tokens: list[int]) -> float:
    """Of all tokens but the first, in float64."""
    if len(tokens) < 2:
        return 0.0
    ids = torch.tensor(tokens)
    with torch.no_grad():
        logits = model(ids[None, :-1], use_cache=False).logits[0].double()
    return -logits.log_softmax(-1).gather(1, ids[1:, None]).sum().item()


def reference_nll(model: Any, holdout: ShardSet) -> float:
    found = [(nll_sum(model, tokens), len(tokens) - 1) for tokens in pieces(holdout)]
    return sum(nll for nll, _ in found) / sum(count for _, count in found)


def teacher_with(teacher: Path, checkpoint: Path) -> Any:
    model = load_model(teacher, torch.float32).eval()
    routers = load_file(checkpoint / "auxiliary.safetensors")
    for layer in range(2):
        model.get_parameter(GATE.format(layer)).data = routers[f"routers.model:layers:{layer}:mlp:gate.weight"]
    return model


def test_without_targets_what_needs_none_is_measured(run, teacher):
    """NLL by hand, for the student and for the teacher, with as many experts a token as it was trained with."""
    said = in_process("evaluate", run)
    found = lines_of(run)
    assert list(found) == ["teacher", "student-0", *NAMES]
    assert said.count(f"no kl, top1 and topk yet; to have them, run: megakd generate-logits {run}") == 1
    assert all(not COMPARED & line.keys() for line in found.values())
    holdout = ShardSet(run / "data" / "tokens" / "holdout")
    text = holdout.manifest["text_tokens"] / holdout.manifest["text_bytes"]
    for name, line in found.items():
        assert line["perplexity"] == pytest.approx(math.exp(line["nll"]))
        assert line["bits_per_byte"] == pytest.approx(line["nll"] / math.log(2) * text)
        assert line["positions"] == sum(holdout.entry(i).labels for i in range(len(holdout)))
        assert ("teacher_nll" in line) == (name in NAMES)
    for name in (NAMES[0], NAMES[2]):
        checkpoint = run / "checkpoints" / name
        student, model = load_model(checkpoint / "weights", torch.float32).eval(), teacher_with(teacher, checkpoint)
        assert found[name]["nll"] == pytest.approx(reference_nll(student, holdout), rel=1e-5)
        assert found[name]["teacher_nll"] == pytest.approx(reference_nll(model, holdout), rel=1e-5)
        assert found[name]["teacher_perplexity"] == pytest.approx(math.exp(found[name]["teacher_nll"]))
    assert abs(found[NAMES[2]]["teacher_nll"] - found["teacher"]["nll"]) > 1e-6
    rows = [line.split() for line in said.splitlines()]
    (row,) = [row for row in rows if row[:1] == [NAMES[2]] and len(row) == 9]
    assert row[3:6] == ["-", "-", "-"]
    assert [NAMES[2], f"{found[NAMES[2]]['teacher_perplexity']:.2f}", "-"] in [row[:3] for row in rows]
    assert any(row[:2] == ["its", "own"] and len(row) == 7 for row in rows)
    share = found[NAMES[2]]["parameters"] / found["teacher"]["parameters"]
    assert any(row[:2] == [NAMES[2], f"{share:.1%}"] for row in rows)
    before = lines(run)
    in_process("evaluate", run)
    assert lines(run) == before


def test_the_holdout_alone_is_captured_of_the_teacher_as_it_was(run, prepared):
    """The same bytes as in a run that trains on stored logits."""
    said = in_process("generate-logits", run)
    assert said.count("the validation set alone, for training has a live teacher\n") == 1
    stored = files(run / "data" / "logits")
    theirs = files(prepared / "data" / "logits")
    assert stored == {name: content for name, content in theirs.items() if not name.startswith("train/")}
    assert "--max-tokens has no effect" in in_process("generate-logits", run, "--max-tokens", "100")
    assert files(run / "data" / "logits") == stored


def test_a_cached_sibling_captures_the_rest(compared, tmp_path, prepared):
    sibling = tmp_path / "sibling"
    in_process("new", sibling, "--from", compared, "objective.kind=cached")
    in_process("tokenize", sibling)  # the teacher's tokenizer makes the tokens now: they were not linked
    in_process("generate-logits", sibling)
    assert files((sibling / "data" / "logits").resolve()) == files((prepared / "data" / "logits").resolve())


def test_targets_that_come_later_complete_the_lines(run, teacher):
    """All of models that are there are measured again, once; of one that is gone the old line stays."""
    watch(run, "eval.best=perplexity")
    in_process("evaluate", run)
    first = lines_of(run)
    assert not any(COMPARED & line.keys() for line in first.values())
    shutil.rmtree(run / "checkpoints" / NAMES[0])
    in_process("generate-logits", run)
    said = in_process("evaluate", run)
    assert "no kl" not in said
    found = lines_of(run)
    for name, line in found.items():
        assert line["nll"] == pytest.approx(first[name]["nll"], rel=1e-8)  # summed in another order
        assert line["positions"] == first[name]["positions"]
        assert (COMPARED - {"teacher_kl"} <= line.keys()) == (name != NAMES[0])
        assert ("teacher_kl" in line) == (name in NAMES[1:])
    assert len(lines(run)) == 2 * 5 - 1
    for again in (["evaluate", run], ["watch", run, "eval.best=kl", "eval.poll_seconds=0.02"]):
        in_process(*again)
        assert len(lines(run)) == 2 * 5 - 1 and not events(run, "evaluation_lost")
    holdout = ShardSet(run / "data" / "logits" / "holdout")
    model = teacher_with(teacher, run / "checkpoints" / NAMES[2])
    expected = evaluate_model(model, holdout, 1.0, 8, torch.device("cpu"), "reference")
    assert found[NAMES[2]]["teacher_kl"] == pytest.approx(expected.kl, rel=1e-6)
    assert found["teacher"]["kl"] < found[NAMES[2]]["teacher_kl"] < found[NAMES[2]]["kl"]


def test_a_teacher_with_its_old_routers_is_the_teacher_and_a_collapse_shows(compared, teacher):
    gates = load_model(teacher, torch.float32).state_dict()
    old = iter([gates[GATE.format(layer)].clone() for layer in range(2)])
    change_routers(compared / "checkpoints" / NAMES[0], lambda tensor: next(old))
    change_routers(compared / "checkpoints" / NAMES[1], lambda tensor: -20 * tensor)
    said = watch(compared)
    in_process("evaluate", compared)
    found = lines_of(compared)
    same, collapsed, real = (found[name] for name in NAMES)
    for name in ("nll", "perplexity", "kl"):
        assert same[f"teacher_{name}"] == found["teacher"][name]  # bit by bit, whatever was measured before
        assert collapsed[f"teacher_{name}"] > real[f"teacher_{name}"]
    assert collapsed["teacher_kl"] > 0.1 > 10 * real["teacher_kl"]
    assert same["teacher_routers"] == found["teacher"]["teacher_routers"]
    assert "idle experts" in in_process("evaluate", compared)
    for gate in collapsed["teacher_routers"]:  # weights 20 times as large decide with hardly any doubt
        assert collapsed["teacher_routers"][gate]["entropy"] < 0.5 * same["teacher_routers"][gate]["entropy"]
    assert f"teacher_perplexity {collapsed['teacher_perplexity']:.4g}" in said
    assert f"teacher_kl {collapsed['teacher_kl']:.4g}" in said


def test_attention_is_compared_with_the_teacher_as_it_was(run, teacher):
    """Whatever routers were measured before; the same for those who ask later."""
    for name in NAMES:
        change_routers(run / "checkpoints" / name, lambda tensor: -20 * tensor)
    watch(run, "eval.best=perplexity", "eval.attention=2", "log.tensorboard=true")
    first = lines_of(run)
    holdout, guide = ShardSet(run / "data" / "tokens" / "holdout"), load_model(teacher, torch.float32).eval()
    for name in NAMES:
        student = load_model(run / "checkpoints" / name / "weights", torch.float32).eval()
        expected = attention_overlap(student, guide, holdout, 2, torch.device("cpu"), name)
        assert first[name]["attention"] == pytest.approx(expected, rel=1e-6) and 0 < expected < 1
    points = EventAccumulator(str(run / "tensorboard" / "eval")).Reload().Scalars("eval/attention")
    assert {event.step: event.value for event in points} == pytest.approx(
        {line["step"]: line["attention"] for line in first.values()}
    )
    lost = lines(run)
    for line in lost:
        del line["attention"]
    (run / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lost))
    watch(run)
    assert {name: line["attention"] for name, line in lines_of(run).items()} == {
        name: line["attention"] for name, line in first.items()
    }


def test_watch_wants_a_measure_that_it_has(run):
    said = watch(run, "eval.best=kl", code=2)
    assert (
        "megakd: eval.best: kl needs the teacher's targets of the validation set, which are not stored; run: megakd "
        in said
    )
    assert not lines(run)
    assert "auto ranks checkpoints by perplexity" in watch(run, "eval.best=auto")
    assert [line["model"] for line in lines(run)] == NAMES
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["value"] == min(line["perplexity"] for line in lines(run)) and best["metric"] == "perplexity"


def test_the_best_is_measured_again_when_rotation_took_it(compared):
    """What `watch` keeps of it holds the routers too; curves have the teacher."""
    watch(compared, "log.tensorboard=true")
    found = lines_of(compared)
    best = json.loads((compared / "checkpoints" / "best.json").read_text())
    assert list(found) == NAMES and best["model"] == min(NAMES, key=lambda name: found[name]["kl"])
    assert not list(compared.glob("watch/held/*/*"))
    shutil.rmtree(compared / "checkpoints" / best["model"])
    in_process("evaluate", compared, "--model", "best")
    again = lines(compared)[-1]
    assert again["model"] == best["model"]
    speed = {"tokens_per_second": 0, "machine_load": {}}
    assert {**again, **speed} == {**found[best["model"]], **speed}
    # file by file: TensorBoard orders those of one second by a counter as text, 10 before 9, and drops what goes back
    boards = [EventAccumulator(str(file)).Reload() for file in compared.glob("tensorboard/eval/*")]
    for key in ("kl", "teacher_kl", "teacher_perplexity"):
        points = {event.step: event.value for board in boards for event in board.Scalars(f"eval/{key}")}
        assert points == pytest.approx({line["step"]: line[key] for line in found.values()}, rel=1e-6)


def test_what_is_finished_outlives_a_kill(compared, monkeypatch):
    """Killed at the teacher: the student is not measured again; before the line: nothing is."""
    measured: list[str] = []
    original = Meter._measured

    def once(self: Meter, model: Any, name: str, *rest: Any) -> Any:
        measured.append(name)
        if measured == [NAMES[0], f"the teacher of {NAMES[0]}"]:
            raise KeyboardInterrupt
        return original(self, model, name, *rest)

    monkeypatch.setattr(Meter, "_measured", once)
    with pytest.raises(KeyboardInterrupt):
        watch(compared)
    assert not lines(compared)
    del measured[:]
    watch(compared)
    assert measured[0] == f"the teacher of {NAMES[0]}" and measured.count(NAMES[0]) == 0 and len(measured) == 5
    assert list(lines_of(compared)) == NAMES


@pytest.mark.parametrize("how", ["one bit", "missing", "other shape", "one of two"])
def test_a_checkpoint_with_bad_routers_is_named_and_left_out(how, compared):
    path = compared / "checkpoints" / NAMES[1] / "auxiliary.safetensors"
    content = path.read_bytes()
    if how == "one bit":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif how == "missing":
        path.unlink()
    elif how == "one of two":
        shutil.rmtree(path.parent / "checksums")
        save_file(dict([*load_file(path).items()][:1]), path)
    else:
        change_routers(path.parent, lambda t: t[:, :-1].contiguous())
    said = watch(compared, code=2)
    assert list(lines_of(compared)) == [NAMES[0], NAMES[2]]
    (event,) = events(compared, "bad_checkpoint")
    assert (
        event["checkpoint"] == NAMES[1] and "auxiliary.safetensors" in event["reason"] and "\n" not in event["reason"]
    )
    assert f"{NAMES[1]} cannot be evaluated and is skipped" in said
    assert "skipped" not in watch(compared, code=2)
    if how in ("one bit", "missing"):  # another content is tried
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        watch(compared, "--once")
        assert NAMES[1] in lines_of(compared)


def test_nan_of_the_teacher_with_new_routers_is_null(compared):
    """The student of the checkpoint is measured all the same."""
    change_routers(compared / "checkpoints" / NAMES[1], lambda t: t.fill_(torch.nan))
    said = watch(compared, code=2)
    assert (
        f"{NAMES[1]}: teacher_nll: " in said
        and "the teacher with these routers: teacher_nll on the validation set is NaN" in said
    )
    line = lines_of(compared)[NAMES[1]]
    assert list(lines_of(compared)) == NAMES and line["kl"] > 0 and line["nll"] > 0
    assert {line[name] for name in ("teacher_nll", "teacher_perplexity", "teacher_kl")} == {None}
    assert all(each["entropy"] is None for each in line["teacher_routers"].values())
    in_process("evaluate", compared, code=2)  # its tables print


def test_rotation_may_take_a_checkpoint_while_its_teacher_is_measured(compared, monkeypatch):
    original = Meter._teacher_quality

    def rotated(self: Meter, *args: Any) -> Any:
        rotate(compared / "checkpoints", 1, set())
        return original(self, *args)

    monkeypatch.setattr(Meter, "_teacher_quality", rotated)
    watch(compared)
    assert list(lines_of(compared)) == NAMES and all("teacher_kl" in line for line in lines(compared))


@pytest.mark.parametrize("targets", [True, False])
def test_the_page_draws_the_teacher(targets, run, compared):
    folder = compared if targets else run
    in_process("evaluate", folder)
    in_process("report", folder)
    page = Page((folder / "report.html").read_text())
    drawn = [title for title in page.figures if "held-out" in title or title == "top-1 agreement"]
    student = ["held-out perplexity", "held-out bits per byte", "held-out KL(teacher || student)", "top-1 agreement"]
    teacher = ["held-out perplexity of the teacher with its new routers"]
    teacher += ["held-out KL(teacher || teacher with its new routers)"]
    assert drawn == ([*student, *teacher] if targets else [*student[:2], teacher[0]])
    assert "load of the busiest expert" in page.figures
    assert page.rows[0][-2:] == ["teacher's perplexity", "teacher's KL"]
    line = lines_of(folder)[NAMES[2]]
    (row,) = [row for row in page.rows if row[:1] == [NAMES[2]]]
    assert row[-2] == f"{line['teacher_perplexity']:.2f}"
    assert [row[i] == "-" for i in (4, 5, 6, -1)] == [not targets] * 4
    assert page.rows[1][0] == "teacher" and page.rows[1][-2:] == ["-", "-"]


def test_a_capture_that_is_not_finished_is_no_reason_to_leave_measures_out(compared):
    path = compared / "data" / "logits" / "holdout" / "manifest.json"
    os.remove(path.with_name("shard-00000.json"))
    said = in_process("evaluate", compared, code=2)
    assert "shard-00000.json" in said and "run: megakd generate-logits RUN" in said


def test_a_teacher_with_another_tokenizer_reads_the_same_text_in_its_own(trained, tmp_path, documents, tokenizer):
    """Bits per byte by hand: every document of every window decoded, and encoded for the teacher."""
    own = train_tokenizer([text[::2] for text in documents[:30]], VOCABULARY)
    folder = make_teacher(tmp_path / "teacher", own, documents, seed=3, steps=100)
    run = tmp_path / "run"
    in_process("new", run, "--from", trained, f"model.teacher={folder}")
    in_process("tokenize", run)
    in_process("train", run)
    assert "needs no logits" in in_process("generate-logits", run, code=2)
    assert "the teacher has another tokenizer; set eval.best=perplexity" in watch(run, "eval.best=kl", code=2)
    in_process("watch", run, "--once", "eval.best=auto")
    said = in_process("evaluate", run, "eval.attention=2")
    assert (
        "the teacher has another tokenizer than the student" in said and said.count("validation set: no attention") == 1
    )
    found = lines_of(run)
    holdout = ShardSet(run / "data" / "tokens" / "holdout")
    model = load_model(folder, torch.float32).eval()
    total, size = 0.0, 0
    for tokens in pieces(holdout):
        ended = tokens[-1] == tokenizer.eos_token_id
        ids = own(tokenizer.decode(tokens[: len(tokens) - ended]), add_special_tokens=False)["input_ids"]
        total += nll_sum(model, [*ids, *[own.eos_token_id] * ended])
        size += len(tokens) - 1
    text = holdout.manifest["text_tokens"] / holdout.manifest["text_bytes"]
    assert found["teacher"]["bits_per_byte"] == pytest.approx(total / math.log(2) / (size / text), rel=0.05)
    assert found["teacher"]["positions"] != found["student-0"]["positions"]
    assert found[NAMES[0]]["teacher_nll"] == pytest.approx(found["teacher"]["nll"], rel=0.05)
    assert all(not (COMPARED | {"attention"}) & line.keys() for line in found.values())
    change_routers(run / "checkpoints" / NAMES[2], lambda tensor: -20 * tensor if tensor.shape[0] == 4 else tensor)
    in_process("evaluate", run, "--model", "last")
    assert lines(run)[-1]["teacher_nll"] > found[NAMES[2]]["teacher_nll"]
    in_process("evaluate", run, "--model", "teacher", "--quantize", "int8")
    rounded = lines(run)[-1]
    assert rounded["model"] == "teacher@int8" and rounded["positions"] == found["teacher"]["positions"]
    assert rounded["teacher_routers"].keys() == found["teacher"]["teacher_routers"].keys()


def test_pieces_without_targets_are_not_taken_for_whole(run, monkeypatch):
    """Killed at the teacher; targets come; then all is measured against them."""

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Meter, "_teacher_quality", killed)
        watch(run, "eval.best=perplexity")
    assert len(list(run.glob("watch/held/first/*/holdout*.json"))) == 1
    in_process("generate-logits", run)
    watch(run, "eval.best=kl")
    assert list(lines_of(run)) == NAMES and all(line.keys() >= COMPARED for line in lines(run))


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_go_into_a_teacher_of_any_family_as_training_wrote_them(family, tmp_path):
    """Weights, and the bias of DeepSeek-V3's, which is a buffer; what else the file holds is left alone."""
    trained, teacher = make_model(family), make_model(family)
    found = find_routers(trained, "here")
    held = nn.ModuleDict({router.name.replace(".", ":"): router.module for router in found})
    with torch.no_grad():
        for tensor in (*held.parameters(), *held.buffers()):
            tensor.add_(torch.randn(tensor.shape))
    whole = nn.ModuleDict({"routers": held, "projector": nn.Linear(3, 2)})
    tensors = {**dict(whole.named_parameters()), **dict(saved_buffers(whole))}
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "auxiliary.safetensors")
    routers = find_routers(teacher, "here")
    set_routers(routers, tmp_path / "auxiliary.safetensors")
    for (name, mine), (_, theirs) in zip(teacher.named_parameters(), trained.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for (name, mine), (_, theirs) in zip(teacher.named_buffers(), trained.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    name = next(iter(tensors))
    save_file({**tensors, "routers.other.weight": tensors[name].clone()}, tmp_path / "more.safetensors")
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, tmp_path / "less.safetensors")
    for file in ("more", "less"):
        with pytest.raises(Unusable, match=r"does not hold the teacher's routers: .* is in one of them alone"):
            set_routers(routers, tmp_path / f"{file}.safetensors")
    save_file({n: t for n, t in tensors.items() if "bias" not in n}, tmp_path / "trained.safetensors")
    set_routers(routers, tmp_path / "trained.safetensors")


def test_a_holdout_without_a_whole_document_is_refused(recipe, tokenizer, tmp_path):
    path = sar_recipe(recipe, tmp_path, tokenizer)
    in_process("new", tmp_path / "run", "--from", path, "data.holdout_tokens=32")
    said = in_process("tokenize", tmp_path / "run", code=2)  # before hours of training, not by `evaluate` after them
    assert (
        "32 tokens end inside the first document of the validation set" in said and "evaluate needs a whole one" in said
    )
