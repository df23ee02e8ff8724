"""Quantised checkpoints are read as what they stand for: every layout, whole and in rows, against slow formulas."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from megakd.commands import compress
from megakd.errors import UserError
from megakd.identity import WEIGHTS, fingerprint
from megakd.models.hub import Checkpoint, check_readable, load_config
from megakd.models.loading import load_model
from megakd.models.spec import spec_for
from megakd.run import Run
from megakd.system.files import read_json, write_json
from tests.models.families import small_model
from tests.models.quantizing import E2M1, SCHEMES, compressed, fp8, quantize
from tests.models.students import expert_name, logits, make_model, sources_of

TOKENS = torch.randint(1, 61, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """D = 32, F = 24, four experts; one tensor per matrix in the files."""
    folder = tmp_path_factory.mktemp("stock")
    make_model("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=SCHEMES)
def folders(request, stock, tmp_path_factory) -> tuple[Path, Path]:
    """Quantised, and what it stands for in plain weights."""
    place = tmp_path_factory.mktemp("quantized")
    quantize(stock, place / "quantized", place / "twin", SCHEMES[request.param])
    return place / "quantized", place / "twin"


def test_every_tensor_is_the_one_it_stands_for(folders):
    quantized, twin = (Checkpoint(folder) for folder in folders)
    assert len(quantized.quantized) > 20 and quantized.stored.keys() == twin.stored.keys()
    for name, tensor in twin.stored.items():
        expected = twin.tensor(name)
        assert torch.equal(quantized.tensor(name), expected), name
        assert quantized.stored[name].shape == tensor.shape and quantized.stored[name].dtype == tensor.dtype, name
        if tensor.shape[0] > 7:
            assert torch.equal(quantized.rows(name, slice(3, 7)), expected[3:7]), name


def test_a_model_is_loaded_as_its_plain_twin(folders):
    """Whole, and without quantization_config, so that it can be saved and trained."""
    model, twin = (load_model(folder, torch.bfloat16) for folder in folders)
    assert not model.training and not hasattr(model.config, "quantization_config")
    expected = twin.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, TOKENS), logits(twin, TOKENS))


def test_experts_in_stacks_are_those_of_the_twin(folders):
    spec = spec_for(load_config(folders[0]), "here")
    quantized, twin = map(sources_of, folders)
    for projection in ("gate", "up", "down"):
        found, expected = (sources.experts(spec, 1, projection) for sources in (quantized, twin))
        assert torch.equal(found, expected), projection
    name = spec.fused(1)["gate_up_proj"]
    assert torch.equal(quantized.read(name, slice(1, 3)), twin.read(name)[1:3])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", [fp8((8, 4)), fp8((8, 8), modules_to_not_convert=["o_proj"])])
def test_transformers_reads_the_same_fp8(stock, scheme, tmp_path):
    """Blocks that divide the matrices: its reader refuses others, or takes smaller ones (24 = 16 + 8 as 12 + 12)."""
    skipped = tuple(scheme.config.get("modules_to_not_convert", ()))
    quantize(stock, tmp_path / "quantized", tmp_path / "twin", scheme, ("lm_head", "mlp.gate.", *skipped))
    reader: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    found = load_model(tmp_path / "quantized", torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in reader.state_dict().items())


def test_fp8_experts_in_one_stack(stock, tmp_path):
    """As some folders have them: [E, 2F, D] codes with [E, r, c] scales."""
    config, tensors = read_json(stock / "config.json"), {}
    scheme = fp8((16, 16))
    model = make_model("qwen3_moe")
    plain = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    for name, tensor in plain.items():
        if ".experts." in name:
            parts, exact = zip(*(scheme.encode(matrix) for matrix in tensor), strict=True)
            plain[name] = torch.stack(exact).float().bfloat16()
            tensors[name] = torch.stack([part["weight"] for part in parts])
            tensors[f"{name}_scale_inv"] = torch.stack([part["weight_scale_inv"] for part in parts])
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / WEIGHTS)
    write_json(tmp_path / "config.json", config | {"quantization_config": scheme.config})
    sources, spec = sources_of(tmp_path), spec_for(load_config(tmp_path), "here")
    gate_up, down = (plain[name] for name in spec.fused(0).values())
    for projection, expected in (("gate", gate_up[:, :24]), ("up", gate_up[:, 24:]), ("down", down)):
        assert torch.equal(sources.experts(spec, 0, projection), expected)
    assert torch.equal(sources.read(spec.fused(0)["gate_up_proj"], slice(1, 3)), gate_up[1:3])


def mxfp4_gpt_oss(folder: Path, hidden: int) -> None:
    """A tiny gpt_oss as its folder has it: blocks and scales of random bytes."""
    small_model("gpt_oss", hidden_size=hidden, intermediate_size=64).bfloat16().save_pretrained(folder)
    tensors, generator = load_file(folder / WEIGHTS), torch.Generator().manual_seed(3)
    for name in [name for name in tensors if is_stack(name)]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 125, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    write_json(folder / "config.json", config | {"quantization_config": settings})


def is_stack(name: str) -> bool:
    return name.endswith(("gate_up_proj", "down_proj"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hidden", [64, 96])
def test_mxfp4_of_gpt_oss(hidden, tmp_path):
    """D = F = 64 makes the transposed matrices square."""
    mxfp4_gpt_oss(tmp_path, hidden)
    model = load_model(tmp_path, torch.bfloat16)
    reader: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    expected = reader.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    stored, name = load_file(tmp_path / WEIGHTS), "model.layers.1.mlp.experts.down_proj"
    codes, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    for expert, row, column in ((0, 0, 0), (1, 5, 33), (3, hidden - 1, 63)):
        byte = int(codes[expert, row, column // 32, column % 32 // 2])
        value = E2M1[byte >> 4 if column % 2 else byte & 15] * 2.0 ** (int(scales[expert, row, column // 32]) - 127)
        assert float(model.state_dict()[name][expert, column, row]) == value
    part = sources_of(tmp_path).read(name, slice(1, 3))
    assert torch.equal(part, model.state_dict()[name][1:3].to(part.dtype))


def test_compressed_tensors_reads_the_same():
    """The library, where it is installed: it is no dependency."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    for kind, scheme in SCHEMES.items():
        if scheme.config["quant_method"] == "compressed-tensors":
            parts, exact = scheme.encode(weight)
            group = QuantizationScheme(**scheme.config["config_groups"]["group_0"])
            library = BaseCompressor.get_value_from_registry(scheme.config["format"]).decompress(parts, group)["weight"]
            half = torch.float16 if parts["weight_scale"].dtype == torch.float16 else torch.bfloat16
            assert torch.equal(library.to(half), exact.float().to(half)), kind


@pytest.mark.parametrize("kind", ["fp8, edges", "INT4 group asymmetric", "MXFP4"])
def test_students_have_the_bytes_of_those_of_the_twin(stock, kind, recipe, tokenizer, tmp_path, capsys):
    quantize(stock, tmp_path / "quantized", tmp_path / "twin", SCHEMES[kind])
    students = []
    for folder in (tmp_path / "quantized", tmp_path / "twin"):
        tokenizer.save_pretrained(folder)
        run = Run.create(recipe, [f"model.teacher={folder}", "compress.rank=8"], tmp_path / f"run-{folder.name}")
        compress.main(run, Namespace())
        students.append(run.path("student-0"))
    one, two = ((student / WEIGHTS).read_bytes() for student in students)
    assert one == two
    one, two = ({**read_json(student / "config.json"), "_name_or_path": ""} for student in students)
    assert one == two and "quantization_config" not in one
    assert "skipped" not in capsys.readouterr().err


def test_a_fingerprint_covers_scales_and_scheme(stock, tmp_path):
    quantize(stock, tmp_path / "quantized", tmp_path / "twin", SCHEMES["fp8"])
    folder = tmp_path / "quantized"
    before, tensors, config = fingerprint(folder), load_file(folder / WEIGHTS), read_json(folder / "config.json")
    tensors[next(name for name in tensors if name.endswith("scale_inv"))] *= 2
    save_file(tensors, folder / WEIGHTS)
    changed = fingerprint(folder)
    config["quantization_config"]["weight_block_size"] = [64, 64]
    write_json(folder / "config.json", config)
    assert len({before, changed, fingerprint(folder)}) == 3


EXPERT = expert_name(0, 1, "up")
INT4 = SCHEMES["INT4 group"]


def edited(stock: Path, tmp_path: Path, scheme: Any, edit: Any) -> Path:
    """A quantised folder whose tensors `edit` changed in place."""
    quantize(stock, tmp_path / "quantized", tmp_path / "twin", scheme)
    tensors = load_file(tmp_path / "quantized" / WEIGHTS)
    edit(tensors)
    save_file(tensors, tmp_path / "quantized" / WEIGHTS)
    return tmp_path / "quantized"


MODULE = EXPERT.removesuffix(".weight")
BROKEN = {
    "no scale": (SCHEMES["fp8"], lambda t: t.pop(f"{EXPERT}_scale_inv"), f"{EXPERT} is stored as F8_E4M3"),
    "too few scales": (
        fp8((16, 16)),
        lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(5, 5)}),
        rf"{EXPERT} is quantised .*shape \(24, 32\) with scales of \(5, 5\), in blocks of 16 x 16 \(fp8\)",
    ),
    "plain weight with a scale": (
        SCHEMES["fp8"],
        lambda t: t.update({EXPERT: torch.ones(24, 32)}),
        rf"{EXPERT} is quantised .*type F32 where F8_E4M3 or F8_E5M2 is known \(fp8\)",
    ),
    "columns in another order": (
        INT4,
        lambda t: t.update({f"{MODULE}.weight_g_idx": torch.zeros(32).int()}),
        rf"{MODULE}.weight_g_idx is quantised .*columns in another order \(compressed-tensors, pack-quantized\)",
    ),
    "zero points of symmetric weights": (
        INT4,
        lambda t: t.update({f"{MODULE}.weight_zero_point": torch.zeros(3, 4).int()}),
        f"{MODULE}.weight_packed is quantised .*zero points and symmetric=True",
    ),
    "another width": (
        INT4,
        lambda t: t.update({f"{MODULE}.weight_scale": torch.ones(24, 2).bfloat16()}),
        rf"{MODULE}.weight_packed is quantised .*shape \(24, 4\) for a weight of \(24, 16\)",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_together_is_refused_by_name(kind, stock, tmp_path):
    scheme, edit, message = BROKEN[kind]
    with pytest.raises(UserError, match=f"{tmp_path}.*{WEIGHTS}: {message}"):
        sources_of(edited(stock, tmp_path, scheme, edit))


UNKNOWN = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "mxfp4 of qwen3_moe": {"quant_method": "mxfp4"},
    "compressed-tensors, format marlin-24": compressed("marlin-24").config,
    "compressed-tensors, 3 bits packed": compressed("pack-quantized", num_bits=3).config,
    "compressed-tensors with sparse weights": INT4.config | {"sparsity_config": {"format": "sparse-bitmask"}},
    "compressed-tensors with transforms": INT4.config | {"transform_config": {"config_groups": {"R1": {}}}},
}


@pytest.mark.parametrize("why", UNKNOWN)
def test_unknown_schemes_are_refused_by_name(why, stock, tmp_path):
    config = read_json(stock / "config.json") | {"quantization_config": UNKNOWN[why]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config \({why}\) that MegaKD cannot dequantise; compress needs"):
        check_readable(tmp_path, load_config(tmp_path), "compress")
