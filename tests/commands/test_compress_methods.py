"""compress.method=prune and merge end to end, and pruning before cores are shared."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.commands import compress
from megakd.data.batches import Batch, collate
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.models.hub import Checkpoint, load_config
from megakd.run import Run
from tests.commands.test_compress import CALIBRATED, load, real_tokens, report, student_of
from tests.conftest import files, in_process, kill_when
from tests.forks import Forked
from tests.models.quantizing import fp8, quantize
from tests.models.students import expert_name, logits, relative

PRUNE, MERGE = ["compress.method=prune", *CALIBRATED], ["compress.method=merge", *CALIBRATED]


def test_pruning_to_all_experts_is_the_teacher(recipe, teacher, prepared, tmp_path):
    run = student_of(recipe, tmp_path / "a", *PRUNE, "compress.experts=4", data=prepared)
    own, expected = (load_file(folder / "model.safetensors") for folder in (run.path("student-0"), teacher))
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    assert all(layer["output_error"] < 1e-6 for layer in report(run)["layers"])


def answers_of(teacher: Path, batch: Batch) -> list[tuple[torch.Tensor, ...]]:
    """In float64, of every layer: the experts and routing weights of each token, and what each expert answers."""
    model, found = load(teacher), []

    def note(module: Any, called: tuple[torch.Tensor, ...], _: Any) -> None:
        x, ids, weights = called
        gate_up, down = module.gate_up_proj.double(), module.down_proj.double()
        gate, up = torch.einsum("nd,efd->enf", x.double(), gate_up).chunk(2, -1)
        found.append((ids, weights, torch.einsum("enf,edf->end", torch.nn.functional.silu(gate) * up, down)))

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(note)
    with torch.no_grad():
        model(batch.tokens, position_ids=batch.position_ids, use_cache=False)
    return found


def calibration_windows(prepared: Path, every: int = 1) -> Batch:
    """The windows of 2,048 tokens of calibration, or every so many of them."""
    shards = ShardSet(prepared / "data" / "tokens" / "train")
    count = min(2048 // 32, len(shards))
    found = collate([shards[len(shards) * i // count] for i in range(0, count, every)], 32)
    shards.close()
    return found


@pytest.mark.parametrize("criterion", ["reap", "frequency"])
def test_the_experts_kept_are_those_of_a_brute_force(recipe, teacher, prepared, tmp_path, criterion):
    run = student_of(
        recipe, tmp_path / "a", *PRUNE, f"compress.criterion={criterion}", "compress.budget=0.5", data=prepared
    )
    windows = calibration_windows(prepared)
    training = (torch.arange(len(windows.tokens)) % 4 != 0)[:, None].expand(windows.tokens.shape).flatten()
    for layer, (ids, weights, answers) in zip(report(run)["layers"], answers_of(teacher, windows), strict=True):
        expected = []
        for expert in range(4):
            token, slot = ((ids == expert) & training[:, None]).nonzero(as_tuple=True)
            saliency = (weights[token, slot] * answers[expert, token].norm(dim=1)).mean()
            expected.append(float(saliency) if criterion == "reap" else float(len(token)))
        assert layer["scores"] == pytest.approx(expected, rel=1e-4)
        assert layer["kept"] == sorted(sorted(range(4), key=lambda e: -expected[e])[:2])


def test_errors_of_answers_are_those_of_a_brute_force(recipe, teacher, prepared, tmp_path):
    """The first layer's, whose input is the same in both: shared cores, pruned, merged."""
    windows = calibration_windows(prepared, every=4)
    ids, weights, answers = answers_of(teacher, windows)[0]
    expected = torch.stack([(answers[ids[n], n] * weights[n][:, None]).sum(0) for n in range(len(ids))])
    for number, overrides in enumerate((CALIBRATED, [*PRUNE, "compress.experts=2"], [*MERGE, "compress.experts=3"])):
        run = student_of(recipe, tmp_path / str(number), *overrides, data=prepared)
        student, found = load(run.path("student-0")), []
        student.model.layers[0].mlp.experts.register_forward_hook(lambda _, called, out, into=found: into.append(out))
        with torch.no_grad():
            student(windows.tokens, position_ids=windows.position_ids, use_cache=False)
        error = float((found[0].double() - expected).norm() / expected.norm())
        assert report(run)["layers"][0]["output_error"] == pytest.approx(error, rel=1e-3)


def test_students_are_stock_and_say_what_they_store(recipe, teacher, prepared, tmp_path):
    for method, key in (("prune", "kept"), ("merge", "clusters")):
        settings = [f"compress.method={method}", *CALIBRATED, "compress.budget=0.6"]
        run = student_of(recipe, tmp_path / method, *settings, data=prepared)
        folder, found = run.path("student-0"), report(run)
        config = load_config(folder)
        assert (config.model_type, config.num_experts) == ("qwen3_moe", 2)
        stored = sum(t.numel() for n, t in load_file(folder / "model.safetensors").items() if ".experts." in n)
        assert found["expert_parameters"] == stored == found["expert_bytes"] / 4
        assert (found["method"], found["experts"], found["expert_share"]) == (method, 2, 0.5)
        assert [len(layer[key]) for layer in found["layers"]] == [2, 2]
        assert "compress" not in files(folder) and not run.path("compress").exists()
        assert load(folder)(torch.tensor([[1, 2]])).logits.isfinite().all()
        assert (folder / "compress.png").read_bytes().startswith(b"\x89PNG")
        card = (folder / "README.md").read_text()
        assert "stock architecture" in card and "50.0%" in card and "multiplied out" not in card


def test_merging_copies_of_one_expert_gives_the_teacher(recipe, teacher, prepared, tmp_path):
    """All experts are one function, each with its hidden units in another order."""
    folder, generator = tmp_path / "copies", torch.Generator().manual_seed(0)
    shutil.copytree(teacher, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for expert in range(1, 4):
            order = torch.randperm(24, generator=generator)
            for projection in ("gate", "up", "down"):
                first = tensors[expert_name(layer, 0, projection)]
                copy = first[:, order] if projection == "down" else first[order]
                tensors[expert_name(layer, expert, projection)] = copy.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = real_tokens(prepared)
    for align, good in (("auto", True), ("off", False)):
        settings = [f"model.teacher={folder}", *MERGE, "compress.experts=2", f"compress.align={align}"]
        run = student_of(recipe, tmp_path / align, *settings, data=prepared)
        error = relative(logits(load(run.path("student-0")), tokens), logits(load(folder), tokens))
        assert (error < 1e-5) == good, (align, error)


def test_pruning_before_sharing_is_pruning_at_full_rank(recipe, prepared, tmp_path):
    """And keeps to a budget of the teacher's experts."""
    full = student_of(recipe, tmp_path / "a", *CALIBRATED, "compress.experts=2", "compress.rank=24", data=prepared)
    pruned = student_of(recipe, tmp_path / "b", *PRUNE, "compress.experts=2", data=prepared)
    tokens = real_tokens(prepared)
    students = [load(run.path("student-0")) for run in (full, pruned)]
    assert [type(each).__name__ for each in students] == ["SharedCoreQwen3MoeForCausalLM", "Qwen3MoeForCausalLM"]
    assert relative(*(logits(each, tokens) for each in students)) < 1e-4
    errors = [[layer["output_error"] for layer in report(run)["layers"]] for run in (full, pruned)]
    assert errors[0] == pytest.approx(errors[1], abs=1e-4)
    small = student_of(recipe, tmp_path / "c", *CALIBRATED, "compress.experts=3", "compress.budget=0.5", data=prepared)
    found = report(small)
    assert found["expert_parameters"] <= 0.5 * 2 * 4 * 3 * 32 * 24 and found["expert_share"] > 0.4
    assert found["experts"] == 3 and [len(layer["kept"]) for layer in found["layers"]] == [3, 3]


@pytest.mark.parametrize("overrides", [[*MERGE, "compress.budget=0.5"], [*CALIBRATED, "compress.experts=3"]], ids=str)
def test_any_processes_and_kills_give_the_same_bytes(recipe, prepared, tmp_path, overrides):
    """One process left alone; one killed, then two at once."""
    overrides = [*overrides, "compress.calibration_tokens=7000"]  # seconds, so that the kill is in time
    alone = student_of(recipe, tmp_path / "alone", *overrides, data=prepared)
    killed = Run.create(recipe, overrides, tmp_path / "killed")
    killed.path("data").mkdir()
    killed.path("data", "tokens").symlink_to((prepared / "data" / "tokens").resolve())
    assert kill_when(["compress", killed.folder], lambda: len(list(killed.path("compress").glob("*-answers.*"))) > 0)
    assert not killed.path("student-0").exists(), "the kill came too late to test anything"
    processes = [Forked("megakd", "compress", killed.folder) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert files(killed.path("student-0")) == files(alone.path("student-0"))
    assert not killed.path("compress").exists()


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["compress.method=prune", *CALIBRATED], "needs either budget, like 0.5, or experts"),
        ([*PRUNE, "compress.budget=0.5", "compress.experts=2"], "needs either budget"),
        (["compress.method=merge", "compress.budget=0.5"], "set calibration_tokens"),
        (["compress.experts=2"], "set calibration_tokens"),
        ([*PRUNE, "compress.budget=0.5", "compress.split=free"], 'compress.split="free" has no effect'),
        ([*PRUNE, "compress.budget=0.5", "compress.align=off"], 'compress.align="off" has no effect'),
        ([*MERGE, "compress.budget=0.5", "compress.criterion=frequency"], "compress.criterion=.* has no effect"),
        ([*CALIBRATED, "compress.criterion=frequency"], "compress.criterion=.* has no effect"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_a_method_are_refused(recipe, tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        Run.create(recipe, overrides, tmp_path / "a")


def test_a_finished_student_of_fewer_experts_is_left_alone(recipe, prepared, tmp_path):
    run = student_of(recipe, tmp_path / "a", *PRUNE, "compress.experts=2", data=prepared)
    before = files(run.path("student-0"))
    compress.main(run, Namespace())
    assert files(run.path("student-0")) == before
    assert len(Checkpoint(run.path("student-0")).files) > 0


def test_a_stock_student_goes_through_the_whole_stack(prepared, tmp_path):
    """Trained with cached logits on, evaluated, exported in the hub's names, shown in the report."""
    rule = {"pattern": r"shared_core|\.experts\.", "lr_multiplier": 2.0}
    stages = json.dumps([{"name": "all", "tokens": 2048, "lr_multipliers": [rule]}])
    run = tmp_path / "run"
    in_process("new", run, "--from", prepared, *PRUNE, "compress.experts=2", f"stages={stages}")
    assert "2 of 4 experts in each layer" in in_process("plan", run)
    for verb in ("compress", "train", "evaluate", "export", "report"):
        in_process(verb, run)
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < next(line for line in lines if line["model"] == "student-0")["kl"]
    stored = [Checkpoint(run / place).files.keys() for place in ("student-0", "export")]
    assert stored[0] == stored[1] and any(".experts.1.up_proj" in name for name in stored[0])
    weights = next((run / "checkpoints" / "all").glob("step-*/weights"))
    tokens = torch.randint(1, 60, (2, 9))
    assert relative(*(logits(load(folder), tokens) for folder in (weights, run / "export"))) == 0
    page = (run / "report.html").read_text()
    assert "compressed from the teacher (prune): 2 MoE layers, 2 of 4 experts in each" in page and "MoE output" in page
    assert "is stock already" in in_process("export", run, "--dense", code=2)


@pytest.mark.parametrize("overrides", [[*PRUNE, "compress.budget=0.5"], [*CALIBRATED, "compress.experts=3"]], ids=str)
def test_a_quantised_teacher_gives_the_student_of_its_plain_twin(recipe, teacher, prepared, tmp_path, overrides):
    folders = tmp_path / "quantized", tmp_path / "twin"
    quantize(teacher, *folders, fp8((8, 8)))
    students = []
    for folder in folders:
        run = student_of(recipe, tmp_path / f"{folder.name}-run", f"model.teacher={folder}", *overrides, data=prepared)
        students.append(run.path("student-0"))
    assert "quantization_config" not in (students[0] / "config.json").read_text()
    own, expected = (load_file(folder / "model.safetensors") for folder in students)
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
