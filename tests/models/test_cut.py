"""Stock models with fewer experts: any family's config and routers, and which numbers of experts are possible."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megakd.compress.choose import best_experts
from megakd.compress.job import Job, kept_experts, open_sources, undescribed
from megakd.compress.pruning import write_pruned
from megakd.config.model import CompressConfig
from megakd.errors import UserError
from megakd.models.cut import cut_to, possible_counts
from megakd.models.hub import Checkpoint
from megakd.models.spec import spec_for
from tests.conftest import for_each
from tests.models.students import logits, relative
from tests.models.test_any_family import small_model

TOKENS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))
DEAD = 1  # the expert that no token is routed to


def with_a_dead_expert(family: str) -> Any:
    """A small model in which the routers give one expert no token: the stream has a part that is always positive."""
    model = small_model(family)
    spec = spec_for(model.config, family)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 5.0  # more than what layers write there
        for name in cut_to(model.config, spec, spec.experts - 1, family).axes:
            tensor = model.state_dict()[name]
            if tensor.shape == (spec.experts, spec.hidden):
                tensor[DEAD] = 0
                tensor[DEAD, 0] = -200
    return model


def pruned(teacher: Path, folder: Path, count: int) -> Path:
    """The folder of a teacher without the experts behind the first `count`, the dead one dropped first."""
    model: Any = AutoModelForCausalLM.from_pretrained(teacher)
    spec = spec_for(model.config, str(teacher))
    settings = CompressConfig(method="prune", experts=count)
    run: Any = SimpleNamespace(config=SimpleNamespace(compress=settings, model=SimpleNamespace(dtype="float32")))
    cut = cut_to(model.config, spec, count, str(teacher))
    layers, opener = list(spec.layers), open_sources(teacher, model.config)
    job = Job(run, teacher, model.config, opener, spec, layers, folder, torch.device("cpu"), undescribed, cut)
    scores = -torch.arange(spec.experts, dtype=torch.float32)
    scores[DEAD] = -100
    folder.mkdir()
    for layer in layers:
        save_file(best_experts(scores, count)._asdict(), job.part(layer, "plan"))
    write_pruned(job, job.pruned)
    return job.pruned


# all of test_any_family's WORKS but zaya were tried in this way; these have routers of every kind
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "granitemoe", "lfm2_moe", "ernie4_5_moe", "gemma4_text"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_without_experts_that_no_token_uses_logits_are_the_teachers(family, tmp_path):
    """But for the rounding of products of another size."""
    with_a_dead_expert(family).save_pretrained(tmp_path / "teacher")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    folder = pruned(tmp_path / "teacher", tmp_path / "work", 3)
    student: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(student) is type(model)
    assert relative(logits(student, TOKENS), logits(model, TOKENS)) <= 1e-6
    student.save_pretrained(tmp_path / "again")
    assert Checkpoint(folder).files.keys() == Checkpoint(tmp_path / "again").files.keys()


def test_a_router_that_counts_more_than_experts_is_refused():
    config = small_model("zaya").config
    with pytest.raises(
        UserError, match=r"here: zaya cannot have 7 of its 8 experts: .*balancing_biases of shape \(9,\)"
    ):
        cut_to(config, spec_for(config, "here"), 7, "here")


def test_every_group_of_a_grouped_router_keeps_as_many():
    config = small_model("deepseek_v3", num_local_experts=16, n_group=4, topk_group=2, num_experts_per_tok=5).config
    spec = spec_for(config, "here")
    assert possible_counts(config, spec) == [12, 16]  # 2 of 4 groups with 3 experts each are enough for 5
    assert kept_experts(CompressConfig(method="prune", budget=0.9), config, spec, "here") == 12
    with pytest.raises(UserError, match=r"compress.experts=10: a token uses 5 of 16 experts in 4 groups; possible are"):
        kept_experts(CompressConfig(method="prune", experts=10), config, spec, "here")
    plan = best_experts(torch.arange(16.0), 12, groups=4)
    assert plan.leading.tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15]


@for_each(
    "settings, said",
    [
        (
            {"budget": 0.3},
            r"compress.budget=0.3 keeps 1 experts, but a token uses 2 of 4 experts; set it to 0.5 at least",
        ),
        ({"experts": 1}, r"compress.experts=1: a token uses 2 of 4 experts; possible are 2, 3, 4"),
        ({"experts": 5}, r"possible are 2, 3, 4"),
        ({"method": "shared_core", "experts": 2, "budget": 0.5}, r"compress.budget=0.5 must be below it"),
    ],
)
def test_numbers_of_experts_that_cannot_be_are_refused_with_those_that_can(settings, said):
    config = small_model("qwen3_moe").config
    with pytest.raises(UserError, match=said):
        kept_experts(CompressConfig(**{"method": "prune"} | settings), config, spec_for(config, "here"), "here")
