import pytest
import torch

from megakd.models.hub import INDEX, WEIGHTS, Checkpoint, load_config
from megakd.models.loading import load_model
from megakd.models.shared_core import PROJECTIONS
from megakd.models.spec import spec_for
from tests.conftest import files
from tests.models.students import experts_in
from tests.tools.examples import refused, tool

SMALL = ["--layers", 2, "--experts", 4, "--top-k", 2, "--hidden", 32, "--expert-hidden", 24, "--heads", 4]
SMALL += ["--kv-heads", 2, "--head-dim", 8, "--vocabulary", 64]


def made(folder, *argv):
    tool("make/synthetic_moe").main([str(arg) for arg in (folder, *SMALL, *argv)])
    return folder


@pytest.mark.parametrize("family", tool("make/synthetic_moe").FIELDS)
@torch.no_grad()
def test_every_family_loads_in_transformers(family, tmp_path):
    """In the hub's layout, one matrix an expert; nothing missing, and the logits are finite and not constant."""
    folder = made(tmp_path / "model", "--family", family)
    config, checkpoint = load_config(folder), Checkpoint(folder)
    spec = spec_for(config, str(folder))
    matrices = [name for name in checkpoint.files if f"layers.{spec.layers[-1]}." in name and ".experts." in name]
    assert len(matrices) == len(PROJECTIONS) * 4
    assert {checkpoint.tensor(name).dtype for name in checkpoint.files} == {torch.bfloat16}
    model = load_model(folder, torch.bfloat16)
    assert type(model).__name__ == config.architectures[0]
    logits = model(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all() and 0.3 < logits.float().std() < 3


def test_a_large_one_is_sharded(tmp_path):
    whole, sharded = made(tmp_path / "a"), made(tmp_path / "b", "--shard-megabytes", 0.01)
    assert (whole / WEIGHTS).exists() and (sharded / INDEX).exists()
    one, many = Checkpoint(whole), Checkpoint(sharded)
    assert len(set(many.files.values())) > 3 and one.files.keys() == many.files.keys()
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.files)


def test_equal_arguments_give_equal_bytes(tmp_path):
    assert files(made(tmp_path / "a")) == files(made(tmp_path / "b")) != files(made(tmp_path / "c", "--seed", 1))


def test_experts_have_the_stated_spectrum_and_cosine(tmp_path):
    argv = ["--hidden", 96, "--expert-hidden", 64, "--common", 0.1, "--head", 0.6, "--rank", 4, "--decay", 1]
    folder = made(tmp_path / "model", *argv)
    for projection in PROJECTIONS:
        experts = experts_in(folder, 1, projection).float()
        sigma = torch.linalg.svdvals(experts)
        share = (sigma[:, :4].square().sum(1) / sigma.square().sum(1)).mean().item()
        assert 0.55 < share < 0.75
        assert (sigma[:, 0] / sigma[:, 3]).mean() > 2
        flat = torch.nn.functional.normalize(experts.flatten(1), dim=1)
        cosine = (flat @ flat.T)[~torch.eye(4, dtype=torch.bool)].mean().item()
        assert cosine == pytest.approx(0.1, abs=0.04)
        assert experts.std().item() == pytest.approx(experts.shape[2] ** -0.5, rel=0.1)


def test_tokenizer_is_copied_and_sets_the_vocabulary(teacher, tokenizer, tmp_path):
    argv = SMALL[: SMALL.index("--vocabulary")]
    tool("make/synthetic_moe").main([str(arg) for arg in (tmp_path / "m", *argv, "--tokenizer", teacher)])
    config = load_config(tmp_path / "m")
    assert config.vocab_size == 400 == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "argv, said",
    [(["--top-k", 5], "--top-k 5"), (["--common", 0.7], "--common 0.7"), (["--rank", 0], "--rank 0")],
)
def test_what_cannot_be_is_refused(argv, said, capsys, tmp_path):
    assert said in refused(tool("make/synthetic_moe"), capsys, tmp_path / "m", *SMALL, *argv)
    assert not (tmp_path / "m").exists()


def test_an_existing_folder_and_a_small_vocabulary_are_refused(teacher, capsys, tmp_path):
    (tmp_path / "m").mkdir()
    assert "exists already" in refused(tool("make/synthetic_moe"), capsys, tmp_path / "m", *SMALL)
    said = refused(tool("make/synthetic_moe"), capsys, tmp_path / "n", *SMALL, "--tokenizer", teacher)
    assert "ids go up to 399" in said
