"""Capture through vLLM: the records of transformers; what does not agree, or fits no vLLM, is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megakd.capture import vllm_client, vllm_teacher
from megakd.capture.source import check_engine
from megakd.capture.vllm_client import HiddenStates, Vllm, find_vllm
from megakd.capture.vllm_teacher import difference, split
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.run import Run
from megakd.serve import vllm_plugin
from tests.conftest import in_process
from tests.serve.serving import SETTINGS, shared_memory_removed

CPU = torch.device("cpu")
SMALL = ["data.tokens=2000", "data.shard_tokens=500", "data.holdout_tokens=500", "logits.dtype=float32"]
SMALL += ["data.sequence_length=128", "logits.top_k=16", "logits.batch_size=4"]
OPTIONS = '{"gpu_memory_utilization": 0.15}'


@pytest.mark.vllm
def test_both_engines_give_equal_records(vllm_python, tmp_path, monkeypatch):
    """In float32; a rerun makes a lost shard again with the same bytes; answers of a wrong model are refused."""
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, SETTINGS[name])
    one, other = tmp_path / "transformers", tmp_path / "vllm"
    with_vllm = ["generate-logits", other, "--vllm-python", vllm_python, "--vllm-options", OPTIONS]
    in_process("new", one, "--from", "demo", *SMALL)
    in_process("tokenize", one)
    in_process("generate-logits", one)
    assert "logits.engine" in in_process("new", other, "--from", one, "logits.engine=vllm")
    with shared_memory_removed():
        with monkeypatch.context() as patch:
            log_p = vllm_teacher.VllmTeacher._log_p
            patch.setattr(vllm_teacher.VllmTeacher, "_log_p", lambda *a: log_p(*a) * torch.rand(1))
            assert "log-probabilities of vLLM differ" in in_process(*with_vllm, code=2)
            assert not list(other.glob("data/logits/**/*.tar"))
        assert "vLLM and transformers agree" in in_process(*with_vllm)
        for part in ("train", "holdout"):
            assert_records_agree(*(ShardSet(Run.open(r).path("data", "logits", part)) for r in (one, other)))
        shard = other / "data/logits/train/shard-00001.tar"
        before = shard.read_bytes()
        shard.unlink()
        shard.with_suffix(".json").unlink()
        in_process(*with_vllm)
    assert shard.read_bytes() == before


def assert_records_agree(left: ShardSet, right: ShardSet) -> None:
    """The same sample, ids and, but for bytes that rounding moves, numbers."""
    assert "engine" not in left.facts and right.facts["engine"].startswith("vllm 0.32.")
    assert len(left) == len(right) > 0
    rows = moved = 0
    for a, b in ((left[i], right[i]) for i in range(len(left))):
        assert np.array_equal(a.tokens, b.tokens) and a.targets is not None and b.targets is not None
        same = (a.targets.ids == b.targets.ids).all(-1)
        rows, moved = rows + len(same), moved + int((~same).sum())
        for x, y in zip(a.targets, b.targets, strict=True):
            np.testing.assert_allclose(x[same], y[same], rtol=0, atol=0.05)
    assert moved <= rows / 50, (moved, rows)


def test_documents_begin_where_positions_restart():
    assert split(torch.arange(7), torch.tensor([0, 1, 2, 0, 0, 1, 2])) == [[0, 1, 2], [3], [4, 5, 6]]


def test_difference_is_over_the_top_tokens_of_both():
    theirs = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
    ours = torch.tensor([[[0.5, 0.2, 0.3]]]).log()
    mean, largest = difference(theirs, ours, 2)
    assert largest == pytest.approx(np.log(1.5)) and mean == pytest.approx(0.3 * np.log(1.5))
    assert np.isnan(difference(theirs, ours * float("nan"), 2)[1])


def test_version_is_that_of_the_plugin():
    assert vllm_client.SUPPORTED == vllm_plugin.VERSION


@pytest.mark.parametrize(
    "python, options, message",
    [
        ("/no/python", None, "/no/python: No such file or directory; name a Python"),
        (sys.executable, None, "has no vLLM; name a Python that has it with --vllm-python or MEGAKD_VLLM_PYTHON"),
    ],
)
def test_python_without_vllm_is_refused(python, options, message):
    with pytest.raises(UserError, match=message):
        find_vllm(python, options)


def fake(tmp_path: Path, line: str) -> str:
    """An interpreter that ignores its arguments."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("options", ["[1]", "{", '{"dtype": "half"}'])
def test_options_are_checked(tmp_path, options):
    with pytest.raises(UserError, match="--vllm-options"):
        find_vllm(fake(tmp_path, "echo 0.32.0+cpu"), options)


def test_other_versions_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has vLLM 0\.33\.0, supported is 0\.32"):
        find_vllm(fake(tmp_path, "echo 0.33.0"), None)


@pytest.mark.parametrize(
    "line, message",
    [
        ("echo no memory >&2", "ended; its last line: no memory"),
        (r"printf '\001\004\000\000\000oops'", "oops"),
        (r"printf '\000\001\000'", "ended"),
        (r"printf '\000\000\000\000\000\000\000\000\000'; head -c 1 >/dev/null", "ended"),
    ],
)
def test_worker_that_fails_is_one_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as raised:
        worker = HiddenStates(Vllm(fake(tmp_path, line), "0.32.0", {}), tmp_path, torch.float32, 8, CPU)
        worker([[1, 2]])
    assert "\n" not in str(raised.value)


def test_resuming_with_another_engine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megakd.capture.source._facts", lambda part: iter([{"engine": "vllm 0.32.0"}]))
    check_engine(tmp_path, "vllm 0.32.0")
    with pytest.raises(UserError, match=r"captured with vllm 0\.32\.0, this capture is with transformers"):
        check_engine(tmp_path, "transformers")
    monkeypatch.setattr("megakd.capture.source._facts", lambda part: iter([{}]))
    with pytest.raises(UserError, match=r"captured with transformers, this capture is with vllm 0\.32\.1"):
        check_engine(tmp_path, "vllm 0.32.1")
