"""Teachers that cannot be compressed, for their experts have another form: captured, and asked while training."""

from pathlib import Path

import pytest
import torch

from megakd.data.shards import ShardSet
from megakd.models.loading import load_model
from megakd.run import Run
from tests.conftest import VOCABULARY, in_process
from tests.models.families import small_model

DOCUMENTS = "data.packing=documents"  # both mix packed documents
SMALL = ["data.tokens=2000", "data.shard_tokens=1000", DOCUMENTS]


@pytest.fixture(scope="module", params=["gpt_oss", "nemotron_h"])
def other(request, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    small_model(request.param, vocab_size=VOCABULARY).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_stored_targets_are_the_teachers_own(other, teacher, recipe, tmp_path):
    """Against log-probabilities of each sample alone; the student is any model of its tokenizer."""
    run = Run.create(recipe, [f"model.teacher={other}", f"model.student={teacher}", *SMALL], tmp_path / "run")
    for verb in ("tokenize", "generate-logits"):
        in_process(verb, run.folder)
    model, shards = load_model(other, torch.float32), ShardSet(run.path("data", "logits", "train"))
    for index in range(3):
        sample = shards[index]
        tokens = torch.from_numpy(sample.tokens.astype("int64"))[None]
        expected = model(tokens, use_cache=False).logits[0].log_softmax(-1)
        assert sample.targets is not None and len(sample.starts) == 1
        for ids, found, theirs in zip(sample.targets.ids, sample.targets.logprobs, expected, strict=False):
            assert set(ids.tolist()) == set(theirs.topk(16).indices.tolist())
            torch.testing.assert_close(torch.from_numpy(found), theirs[ids.astype("int64")], rtol=0, atol=0.1)


@pytest.mark.filterwarnings("ignore")
def test_it_is_asked_while_a_student_trains(other, teacher, recipe, tmp_path):
    settings = [f"model.teacher={other}", f"model.student={teacher}", "objective.kind=online", *SMALL]
    settings += ['stages=[{"name":"all","tokens":1024}]']
    run = Run.create(recipe, [*settings, "objective.attention=0"], tmp_path / "run")
    in_process("tokenize", run.folder)
    assert "kl" in in_process("train", run.folder)
    if "nemotron_h" in other.name:  # most of its layers have no attention; a traceback before
        run = Run.create(recipe, settings, tmp_path / "maps")
        in_process("tokenize", run.folder)
        said = in_process("train", run.folder, code=2)
        assert "of its 4 layers give attention maps; set objective.attention=0" in said


def test_as_a_target_of_compression_it_is_refused(other, recipe, tmp_path):
    run = Run.create(recipe, [f"model.teacher={other}", *SMALL], tmp_path / "run")
    assert "cannot be compressed: its experts" in in_process("compress", run.folder, code=2)


def test_packed_documents_of_it_are_refused(other, teacher, recipe, tmp_path):
    settings = [f"model.teacher={other}", f"model.student={teacher}", *SMALL[:-1]]
    said = in_process("tokenize", Run.create(recipe, settings, tmp_path / "run").folder, code=2)
    assert "set data.packing=documents" in said
