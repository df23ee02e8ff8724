"""Exports in few bits: their numbers are those of `rounded`, in every library that loads them."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from megakd.config.precisions import WHOLE
from megakd.errors import UserError
from megakd.models.codes import pack, restored, stored, unpack
from megakd.models.hub import Checkpoint, load_config, model_of, write_config, write_weights
from megakd.models.loading import load_model
from megakd.models.parts import precisions, weight_parts
from megakd.models.rounding import PRECISIONS, line_axis, quantize, rounded
from megakd.serve.export import own_tensors
from megakd.serve.quantize import Quantizer, requested
from megakd.system.files import read_json, write_json
from tests.conftest import for_each, in_process
from tests.models.quantizing import packed
from tests.models.students import logits
from tests.serve.serving import student_of_all_forms


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return student_of_all_forms("qwen3_moe", tmp_path_factory.mktemp("student") / "student", hidden_size=64)


def exported(student, folder, words, dtype=torch.float32):
    """The student's folder in few bits, as `export` writes it."""
    config, checkpoint = load_config(student), Checkpoint(student)
    model = model_of(config, "student")
    quantizer = Quantizer(words, model, checkpoint, dtype)
    write_weights(folder, quantizer.tensors(own_tensors(checkpoint, model, torch.float32)))
    quantizer.mark(config)
    write_config(folder, config)
    return folder


def expected(student, said, dtype=torch.float32):
    """The student with each part rounded as training rounds it."""
    model = load_model(student, torch.float32)
    known = precisions(said)
    weights = dict(model.named_parameters())
    for name, part in weight_parts(model, "student").items():
        if part in known:
            weight = weights[name]
            weight.data = rounded(weight.data, known[part], line_axis(part, tuple(weight.shape)))
    return model.to(dtype)


@for_each("bits", [4, 8])
def test_integers_are_packed_as_compressed_tensors_packs_them(bits):
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (3, 5, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    words = pack(codes, bits)
    assert torch.equal(words.flatten(0, 1), packed(codes.int().flatten(0, 1) - low, bits))
    assert torch.equal(unpack(words, bits), codes)


@for_each("axis", [-1, -2])
@for_each("name", ["int8", "fp8", "int4"])
def test_stored_codes_give_the_rounded_weight_whatever_their_order(name, axis):
    weight = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0))
    weight = weight if axis == -2 else weight.mT
    made = stored("w", *quantize(weight, PRECISIONS[name], axis), PRECISIONS[name], axis)
    for order in (list(made.items()), list(made.items())[::-1]):
        ((found, tensor),) = restored(order, torch.float32)
        assert found == "w" and torch.equal(tensor, rounded(weight, PRECISIONS[name], axis))


def test_codes_without_scales_are_refused():
    with pytest.raises(ValueError, match="1 weights have codes without scales"):
        list(restored([("w_codes", torch.zeros(2, 2, dtype=torch.int8))], torch.float32))


WORDS = ["int8", "fp8", "int4", {"core": "int4", "factors": "int8", "linear": "fp8", "embedding": "int8"}]


@for_each("words", WORDS)
def test_export_is_the_rounded_student(student, tmp_path, words):
    """In MegaKD and in transformers, in float32 and bfloat16; all forms, experts kept dense, and a stock layer."""
    folder = exported(student, tmp_path / "few", words)
    said = read_json(folder / "config.json")["shared_core"]["precision"]
    assert said == (WHOLE[words] if isinstance(words, str) else words)
    tokens = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        reference = expected(student, said, dtype)
        ours, theirs = load_model(folder, dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for model in (ours, theirs):
            assert model.config.precision() == {}
            for (name, made), wanted in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
                assert torch.equal(made, wanted), name
        assert torch.equal(logits(ours, tokens), logits(theirs, tokens))
    assert len(Checkpoint(folder).quantized) > 20


TRUSTED = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True)
assert not any(name.startswith("megakd") for name in sys.modules)
torch.save(model(torch.arange(9)[None], use_cache=False).logits.detach(), sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


def test_transformers_alone_loads_the_folder_and_saves_whole_weights(student, tmp_path):
    folder = exported(student, tmp_path / "few", "int4")
    script = [sys.executable, "-I", "-c", TRUSTED, folder, tmp_path / "logits", tmp_path / "saved"]
    done = subprocess.run([*map(str, script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits", weights_only=True)
    ours = logits(load_model(folder, torch.float32), torch.arange(9)[None])
    assert (ours - found).norm() <= 1e-5 * found.norm()  # in another process, memory of another alignment
    assert "precision" not in str(read_json(tmp_path / "saved" / "config.json"))
    saved = load_model(tmp_path / "saved", torch.float32)  # in memory of another alignment
    assert (logits(saved, torch.arange(9)[None]) - found).norm() <= 1e-5 * found.norm()


def test_code_that_knows_no_codes_refuses_the_folder(student, tmp_path):
    """An older reader makes each form of all that config.json says of it; no weight has its own name in the files."""
    folder = exported(student, tmp_path / "few", {"linear": "int8"})
    layers = read_json(folder / "config.json")["shared_core"]["layers"]
    assert all("precision" in form for forms in layers.values() for form in forms.values())
    config = read_json(folder / "config.json")
    del config["shared_core"]["precision"]
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match="tensors of the model are missing"):
        load_model(folder, torch.float32)


def test_what_cannot_be_stored_is_refused():
    for said in ("int3", {"core": "int3"}):
        with pytest.raises(UserError, match="core=int3: no server reads a format of 3 bits; give int4"):
            requested(said, {"linear", "core"}, "m")


def test_quantised_student_is_not_quantised_again(student, tmp_path):
    folder = exported(student, tmp_path / "few", "int8")
    with pytest.raises(UserError, match="is quantised already"):
        exported(folder, tmp_path / "again", "int4")


def test_lines_that_fill_no_words_are_refused(tmp_path):
    odd = student_of_all_forms("qwen3_moe", tmp_path / "odd", hidden_size=60)
    with pytest.raises(UserError, match="lines of 60 numbers, of which 4 bits do not fill words"):
        exported(odd, tmp_path / "few", {"experts": "int4"})


def test_verb_writes_its_own_folder_that_evaluate_measures(prepared, tmp_path):
    run = tmp_path / "run"
    in_process("new", run, "--from", prepared)
    in_process("export", run)
    said = in_process("export", run, "--quantize", "int8")
    assert "core 6 int8" in said and "% of the model in 16 bits" in said
    assert "would be a stock model" in in_process("export", run, "--dense", "--quantize", "int8", code=2)
    assert (run / "export" / "model.safetensors").exists() and (run / "export-int8" / "model.safetensors").exists()
    assert "int8" in (run / "export-int8" / "README.md").read_text()
    assert "export-int8" in in_process("evaluate", run, "--model", run / "export-int8")
    again = tmp_path / "again"
    in_process("new", again, "--from", run, f"model.student={run / 'export-int8'}")
    assert "is quantised already" in in_process("export", again, "--quantize", "int4", code=2)
