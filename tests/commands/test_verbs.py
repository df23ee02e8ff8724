"""What the other verbs write and print, on a real small run."""

import json

import numpy as np
import pytest

from megakd.data.shards import ShardSet
from megakd.report.series import PLACE, TERMS
from tests.conftest import files, in_process
from tests.report.page import Page


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("verbs") / "run"
    in_process("new", run, "--from", prepared, "log.tensorboard=true", "checkpoint.keep=2")
    in_process("train", run)
    return run


def test_holdout_and_training_tokens_share_no_document(prepared):
    train, holdout = (ShardSet(prepared / "data" / "tokens" / part) for part in ("train", "holdout"))
    assert holdout.manifest["documents"] > 0 and train.manifest["documents"] > 0
    assert train.manifest["text_hash"] != holdout.manifest["text_hash"]

    def windows(shards: ShardSet) -> set[bytes]:
        return {shards[i].tokens.tobytes() for i in range(len(shards))}

    assert not windows(train) & windows(holdout)


def test_stored_targets_are_the_teachers(prepared, teacher):
    """A float64 softmax of the live teacher over one window, against what the shards decode to."""
    import torch

    from megakd.data.batches import collate
    from megakd.models.loading import load_model

    shards = ShardSet(prepared / "data" / "logits" / "train")
    sample = shards[5]
    batch = collate([sample], 32)
    with torch.no_grad():
        model = load_model(teacher, torch.float32)
        logits = model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
    logp = logits[0].double().log_softmax(-1).numpy()
    targets = sample.targets
    assert targets is not None and shards.layout is not None
    step, angle_step = 1 / shards.layout.levels, np.pi / 2 / 255
    for t in range(len(sample.tokens) - 1):
        kept = np.isfinite(targets.logprobs[t])
        ids = targets.ids[t][kept]
        assert len(set(ids)) == kept.sum() == min((logp[t] >= np.log(3e-4)).sum(), 16)
        # rounded in steps of sqrt(p) and of the tail's angle, then scaled to a sum of 1
        assert np.allclose(np.exp(logp[t, ids] / 2), np.exp(targets.logprobs[t][kept] / 2), atol=2 * step)
        rest = np.delete(logp[t], ids)
        for column, temperature in enumerate((1.0, 2.0)):
            found = [np.exp(targets.logprobs[t][kept] / temperature).sum(), np.exp(targets.log_tails[t, column])]
            expected = [np.exp(logp[t, ids] / temperature).sum(), np.exp(rest / temperature).sum()]
            angles = [np.arcsin(np.sqrt(tail / (head + tail))) for head, tail in (found, expected)]
            assert abs(angles[0] - angles[1]) < 0.51 * angle_step
        if batch.labels[0, t] >= 0:
            assert np.isclose(-logp[t, batch.labels[0, t]], targets.label_nll[t], rtol=0.02, atol=0.02)


def test_evaluate_measures_once_and_knows_the_teacher(trained):
    first = in_process("evaluate", trained)
    rows = {r["model"]: r for r in map(json.loads, (trained / "evals.jsonl").read_text().splitlines())}
    assert list(rows) == ["teacher", "student-0", "all/step-000007", "all/step-000010"]  # rotation kept two
    assert rows["teacher"]["kl"] < 1e-4 and rows["teacher"]["top1"] > 0.999
    assert rows["all/step-000010"]["kl"] < rows["student-0"]["kl"]
    assert rows["all/step-000010"]["step"] == 10 and "teacher" in first
    in_process("evaluate", trained)
    assert len((trained / "evals.jsonl").read_text().splitlines()) == 4
    assert "teacher" in in_process("evaluate", trained, "--model", "teacher")


def test_report_has_all_parts(trained, tmp_path):
    in_process("evaluate", trained)
    for _ in range(2):
        in_process("report", trained, "--png", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
    (tmp_path / "notes.txt").write_text("megakd report")
    for place in (tmp_path / "notes.txt", trained / "config.json", trained / "report.html", tmp_path):
        before = files(tmp_path), (trained / "config.json").read_bytes()
        in_process("report", trained, "--png", place, code=2)
        assert (files(tmp_path), (trained / "config.json").read_bytes()) == before
    page = (trained / "report.html").read_text()
    drawn = {title.partition(" (machine shared")[0]: drawn for title, drawn in Page(page).figures.items()}
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for key in {key for row in rows for key in row} - set(PLACE):
        traces = drawn[TERMS[key.partition("/")[0]].title]["traces"]
        logged = {row["step"]: row[key] for row in rows if key in row}
        rate = max(logged.values()) if key == "lr" else None  # of groups with a multiplier of 1, among others
        assert any(dict(zip(t["x"], t["y"], strict=True)) == logged for t in traces) or rate in traces[0]["y"], key
    for text in ("held-out", "experts", "sequence_length", "Compression", "all/step-000010"):
        assert text.lower() in page.lower()


def test_report_shows_what_teacher_and_student_write(trained):
    """Made once per student; a page without --samples shows those that are kept."""
    assert "text samples of teacher" in in_process("report", trained, "--samples", 2)
    kept = json.loads((trained / "samples.json").read_text())
    assert kept["student"] == "all/step-000010" and len(kept["samples"]) == 2
    assert [list(each["continuations"]) for each in kept["samples"]] == [["teacher", "student, all/step-000010"]] * 2
    for arguments in (["--samples", 2], ["--samples", 1], []):
        assert "text samples of" not in in_process("report", trained, *arguments)
    assert "student, all/step-000010" in (trained / "report.html").read_text()
    in_process("report", trained, "--samples", -1, code=2)


def test_inspect_shows_rules_shards_and_checkpoints(trained):
    run = in_process("inspect", trained)
    assert "shared_core|wrapper" in run and "stage all" in run and "embed_tokens" in run
    shards = in_process("inspect", trained / "data" / "logits" / "train", "--verify")
    assert "the teacher says" in shards and "verified" in shards
    assert "stage_step" in in_process("inspect", trained / "checkpoints" / "all" / "step-000010")
    assert "qwen3_moe_shared_core" in in_process("inspect", trained / "student-0")


def test_plan_counts_what_compress_makes(trained):
    from safetensors.torch import load_file

    from megakd.report.plan import sizes
    from megakd.run import Run
    from megakd.system.text import short

    student = sum(t.numel() for t in load_file(trained / "student-0" / "model.safetensors").values())
    assert short(student) in dict(sizes(Run.open(trained)))["student"]
    assert "steps of" in in_process("plan", trained)


def test_plan_knows_qwen3_30b_a3b():
    """At rank 64: 75.5 and 22.8 MFLOP a layer (docs/compression.md), 5 core-hours of 20 sweeps, 3 GB as measured."""
    from transformers import Qwen3MoeConfig

    from megakd.config.model import CompressConfig
    from megakd.report.plan import expert_flops, fit_costs

    config = Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
    flops = expert_flops(config, CompressConfig(), "here")
    assert [round(f / 1e6, 1) for f in flops if f] == [75.5, 22.8]
    assert expert_flops(config, CompressConfig(budget=0.2), "here")[1] is None
    assert expert_flops(config, CompressConfig(budget=0.2, flops=0.5), "here")[1] == flops[0] / 2
    seconds, memory = fit_costs(CompressConfig(), 48, 128, 2048, 768)
    assert seconds == pytest.approx(48 * 3 * 128 * 20 * 0.05) and memory == 3e9
    # half as wide, at half the rank; in 3 experts of 4
    smaller, _ = fit_costs(CompressConfig(rank=32), 48, 96, 1024, 768)
    assert smaller == pytest.approx(48 * 3 * 128 * 20 * 0.05 * 3 / 16)


@pytest.mark.parametrize(
    "changes",
    [
        ["compress.align=off"],
        ["compress.calibration_tokens=2048", "compress.super_experts=auto"],
        ["compress.budget=0.4", "compress.calibration_tokens=2048"],
    ],
)
def test_plan_counts_the_tasks_of_compress(changes, prepared, tmp_path):
    from megakd.compress.job import open_job
    from megakd.compress.pipeline import tasks
    from megakd.names import resolve
    from megakd.report.plan import compression
    from megakd.run import Run

    run = Run.create(prepared, changes, tmp_path / "run")
    job = open_job(run, resolve(run.config.model.teacher))
    assert compression(run)[0][1].startswith(f"{len(tasks(job))} tasks ")


def test_compress_report_names_every_matrix(prepared):
    report = json.loads((prepared / "student-0" / "compress.json").read_text())
    assert {(p["layer"], p["projection"], len(p["errors"])) for p in report["parts"]} == {
        (layer, projection, 4) for layer in range(2) for projection in ("gate", "up", "down")
    }
    assert all(0 < e < 1 for p in report["parts"] for e in p["errors"])
