"""What inspect says of shards of every profile, and what --verify finds."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from megakd import cli
from megakd.data.shard_writer import summary_of, write_manifest, write_shard
from megakd.data.shards import ShardSet, layout_of
from megakd.errors import UserError
from megakd.run import Run
from megakd.system.files import read_json
from tests.objectives.sar import sar_recipe

HEAD = r"after '.*?' comes '.*?' \(NLL (\d+\.\d\d)\); the teacher says (.*), …; (\S+)% outside the (\d+) stored"
DRAWS = r"draws: (.*), … \((\d+) distinct\); entropy (\d+\.\d\d)"


def inspect(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    cli.run_verb(["inspect", *map(str, argv)])
    return capsys.readouterr().out


@pytest.fixture(scope="module", params=["topk", "sampled", "hybrid"])
def captured(request, prepared, tmp_path_factory) -> Run:
    settings = [f"logits.profile={request.param}", "logits.top_k=5", "logits.pmin=0.02"]
    settings += ["logits.draws=9"] if request.param != "topk" else []
    if request.param == "sampled":
        settings += ["objective.tail=sampled", "objective.temperature=1.0"]
    run = Run.create(prepared, settings, tmp_path_factory.mktemp("inspected") / "run")
    cli.run_verb(["generate-logits", str(run.folder)])
    return run


def test_shards_are_explained_in_words(captured, capsys):
    """The numbers are those of the first three positions of the first sample."""
    folder = captured.path("data", "logits", "train")
    shards, profile = ShardSet(folder), captured.config.logits.profile
    text = inspect(capsys, folder)
    rows = dict(re.findall(r"^(\S.*?)  +(.*)$", text, re.MULTILINE))
    assert (rows["profile"], rows["draws"], rows["samples"]) == (profile, "0" if profile == "topk" else "9", "250")
    assert rows["bytes per token"] == f"{shards.bytes / shards.tokens:.1f}"
    targets = shards[0].targets
    lines = [line for line in text.splitlines() if line.startswith("after ")]
    assert len(lines) == 3
    for position, line in enumerate(lines):
        assert f"(NLL {targets.label_nll[position]:.2f})" in line
        head, draws = re.search(HEAD, line), re.search(DRAWS, line)
        assert (head is None, draws is None) == (profile == "sampled", profile == "topk")
        if head:
            kept = np.isfinite(targets.logprobs[position])
            assert int(head[4]) == kept.sum() and "nan" not in line and "inf" not in line
            shares = [float(share) for share in re.findall(r" (\d+\.\d)%", head[2])]
            probabilities = sorted(100 * np.exp(targets.logprobs[position][kept]), reverse=True)
            assert shares == pytest.approx(probabilities[: len(shares)], abs=0.051)
            assert float(head[3]) == pytest.approx(100 * np.exp(targets.log_tails[position, 0]), abs=0.051)
        if draws:
            shares = [float(share) for share in re.findall(r" (\d+)%", draws[1])]
            assert shares == pytest.approx(100 * np.sort(targets.draw_shares[position])[::-1][:4], abs=0.51)
            assert int(draws[2]) == (targets.draw_shares[position] > 0).sum()
            assert float(draws[3]) == pytest.approx(targets.entropy[position], abs=0.0051)


def test_only_entries_are_listed(sibling, capsys):
    """Heads of one entry and a single draw, with room for five of each."""
    run = sibling("logits.profile=hybrid", "logits.top_k=5", "logits.pmin=0.99", "logits.draws=5")
    cli.run_verb(["generate-logits", str(run.folder)])
    shards = ShardSet(run.path("data", "logits", "train"))
    lines = [line for line in inspect(capsys, shards.folder).splitlines() if line.startswith("after ")]
    for position, line in enumerate(lines):
        assert len(re.findall(r" \d+\.\d%", re.search(HEAD, line)[2])) == 1
        distinct = (shards[0].targets.draw_shares[position] > 0).sum()
        assert len(re.findall(r" \d+%", re.search(DRAWS, line)[1])) == min(distinct, 4)


def test_verify_reads_every_byte_and_asks_the_teacher(captured, capsys):
    for part in ("holdout", "train"):
        text = inspect(capsys, captured.path("data", "logits", part), "--verify")
        samples = len(ShardSet(captured.path("data", "logits", part)))
        assert f"verified: {samples} samples, every byte" in text
        assert re.search(r"the teacher's NLL of the labels of 8 samples: within 0\.0\d\d nats", text)


def test_verify_names_what_is_damaged(captured, tmp_path):
    folder = Path(shutil.copytree(captured.path("data", "logits"), tmp_path / "logits")) / "train"
    tar = folder / "shard-00001.tar"
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1  # in the zeros behind the last sample, which no reading of samples would meet
    tar.write_bytes(data)
    cli.run_verb(["inspect", str(folder)])
    with pytest.raises(UserError, match=r"shard-00001\.tar: sha256 differs"):
        cli.run_verb(["inspect", str(folder), "--verify"])


def test_verify_notices_targets_of_other_tokens(captured, tmp_path):
    """Well-formed records, true checksums, but each with the next sample's targets."""
    folder = Path(shutil.copytree(captured.path("data", "logits"), tmp_path / "logits")) / "train"
    shards = ShardSet(folder)
    samples = [shards[i] for i in range(10)]
    long = [s for s in samples if len(s.tokens) == 33]
    moved = [one._replace(targets=two.targets) for one, two in zip(long, long[1:] + long[:1], strict=True)]
    sidecar = write_shard(folder, "shard-00000", moved, shards.facts, layout_of(shards.facts, folder))
    write_manifest(folder, shards.facts, [summary_of("shard-00000", sidecar)], complete=True)
    for name in ("shard-00001", "shard-00002", "shard-00003", "shard-00004"):
        for suffix in ("tar", "json"):
            (folder / f"{name}.{suffix}").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.tar: sample .*not this teacher's answer"):
        cli.run_verb(["inspect", str(folder), "--verify"])


def test_a_teacher_that_is_elsewhere_or_another(captured, prepared, teacher, tmp_path, capsys):
    folder = Path(shutil.copytree(captured.path("data", "logits"), tmp_path / "logits")) / "train"
    manifest = read_json(folder / "manifest.json")
    manifest.pop("seal")
    moved = Path(shutil.copytree(teacher, tmp_path / "moved"))
    made_by = {**manifest["facts"]["teacher"], "id": str(tmp_path / "gone")}
    facts = {**manifest["facts"], "teacher": made_by}
    shards = ShardSet(folder)
    sidecar = write_shard(folder, "shard-00000", (shards[i] for i in range(9)), facts, shards.layout)
    write_manifest(folder, facts, [summary_of("shard-00000", sidecar)], complete=True)
    text = inspect(capsys, folder, "--verify")
    assert "not compared with the teacher" in text and "--teacher" in text and "after #" in text
    assert "the teacher's NLL of the labels of 8 samples" in inspect(capsys, folder, "--verify", "--teacher", moved)
    with pytest.raises(UserError, match="made by a teacher of fingerprint"):
        cli.run_verb(["inspect", str(folder), "--verify", "--teacher", str(prepared / "student-0")])


def test_an_unfinished_capture_says_so(captured, tmp_path):
    folder = Path(shutil.copytree(captured.path("data", "logits"), tmp_path / "logits")) / "train"
    manifest = read_json(folder / "manifest.json")
    write_manifest(folder, manifest["facts"], manifest["shards"], complete=False)
    with pytest.raises(UserError, match="not finished"):
        cli.run_verb(["inspect", str(folder)])


def test_shard_is_explained(prepared, capsys, tmp_path):
    folder = prepared / "data" / "logits" / "train"
    shards = ShardSet(folder)
    text = inspect(capsys, folder / f"{shards.names[1]}.tar")
    assert f"2 of {len(shards.names)}" in text and f"sample {shards[shards.sizes[0]].key}: " in text
    shutil.copy(folder / f"{shards.names[1]}.tar", tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json next to it"):
        cli.run_verb(["inspect", str(tmp_path / f"{shards.names[1]}.tar")])


@pytest.mark.parametrize("kind, pattern", [("sar", "^routers"), ("online", "projector")])
def test_run_with_rules_for_what_trains_beside_the_student_is_explained(
    recipe, tokenizer, tmp_path, capsys, kind, pattern
):
    """docs/online-distillation.md and the sar recipes have such rules; no parameter of the student alone gets them."""
    stages = [{"name": "all", "steps": 2, "lr_multipliers": [{"pattern": pattern, "lr_multiplier": 0.1}]}]
    objective = {"kind": kind, "alpha": 0.7, "temperature": 2.0}
    objective |= {"routing": "all"} if kind == "sar" else {"feature": 0.1}
    made = sar_recipe(recipe, tmp_path, tokenizer, objective=objective, stages=stages)
    cli.run_verb(["new", str(tmp_path / "run"), "--from", str(made)])
    if kind == "online":  # with and without tokens
        cli.run_verb(["tokenize", str(tmp_path / "run")])
    assert re.search(rf"^{re.escape(pattern)} +0.1 ", inspect(capsys, tmp_path / "run"), re.MULTILINE)
