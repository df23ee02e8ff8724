"""Every family of transformers with experts: works as a student, or is refused by what its modules say.

docs/families.md is what this file and `families.py` find.
"""

import inspect
from argparse import Namespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megakd.commands import compress
from megakd.errors import UserError
from megakd.models.hub import Checkpoint, load_config, write_config, write_weights
from megakd.models.loading import load_model
from megakd.models.spec import spec_for
from megakd.models.student import stock_config
from megakd.objectives.cached import fused_head
from megakd.run import Run
from megakd.serve.export import dense_tensors
from tests.conftest import ROOT
from tests.models.families import HEAD, REFUSED, WORKS, row, small_model
from tests.models.students import logits, relative

FAMILIES = sorted([*WORKS, *REFUSED])
PAGE = (ROOT / "docs" / "families.md").read_text()


def test_the_page_has_every_family():
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    assert lines[0] == HEAD and [cells[0] for cells in lines[2:]] == FAMILIES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_a_small_model_shows(family):
    """Where its experts lie, whether its layers run one at a time as in the whole model, routers, packed documents."""
    assert f"| {' | '.join(row(family))} |" in PAGE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", WORKS)
def test_compressed_at_full_rank_it_answers_as_its_teacher(family, recipe, tokenizer, tmp_path):
    """Through the verb; loaded, trained a step, generating; and as a stock model again in the hub's names."""
    small_model(family).save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    teacher = load_model(tmp_path / "stock", torch.float32).eval()
    settings = [f"model.teacher={tmp_path / 'stock'}", f"compress.rank={min(spec_for(teacher.config, family).sizes)}"]
    run = Run.create(recipe, settings, tmp_path / "run")
    compress.main(run, Namespace())
    folder = run.path("student-0")
    student = load_model(folder, torch.float32).eval()
    tokens = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = logits(teacher, tokens)
    assert relative(logits(student, tokens), expected) <= 1e-5
    assert student.generate(tokens[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
    fused_head(student, student.config.vocab_size)  # distillation makes logits with it, and refuses what differs
    student.train()
    student(tokens, labels=tokens, use_cache=False).loss.backward()
    factors = {name: p.grad for name, p in student.named_parameters() if "_wrapper_" in name}
    assert factors and all(gradient is not None and gradient.any() for gradient in factors.values())
    config = load_config(folder)
    write_weights(tmp_path / "dense", dense_tensors(Checkpoint(folder), config, torch.float32))
    write_config(tmp_path / "dense", stock_config(config))
    assert Checkpoint(tmp_path / "dense").files.keys() == Checkpoint(tmp_path / "stock").files.keys()
    dense: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert type(dense) is type(teacher) and relative(logits(dense, tokens), expected) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_by_what_their_modules_say(family):
    with pytest.raises(UserError, match=f"here: {family} cannot be compressed: its experts .* have {REFUSED[family]}"):
        spec_for(small_model(family).config, "here")


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v4", "nemotron_h"])
def test_no_family_passes_by_its_shapes(family):
    """D = F makes all matrices square: transposed, interleaved and clamped experts look like any others."""
    equal = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    known = {n: v for n, v in equal.items() if n in inspect.signature(CONFIG_MAPPING[family].__init__).parameters}
    with pytest.raises(UserError, match="cannot be compressed"):
        spec_for(small_model(family, **known).config, "here")
