import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megakd.errors import UserError
from megakd.models.hub import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    check_readable,
    copy_side_files,
    load_config,
    model_of,
    write_config,
    write_weights,
)
from megakd.models.loading import load_model
from megakd.models.shared_core import PROJECTIONS
from megakd.models.spec import spec_for
from megakd.models.tiny import tiny_moe_config
from megakd.names import resolve, shipped
from tests.models.students import experts_in, sources_of

CONFIG = tiny_moe_config(16, hidden_size=10, moe_intermediate_size=6, num_experts=3, num_hidden_layers=2)
SPEC = spec_for(CONFIG, "here")


def matrices(layer: int, projection: str) -> Tensor:
    """[E, d_out, d_in], different for every layer and projection."""
    generator = torch.Generator().manual_seed(10 * layer + PROJECTIONS.index(projection))
    return torch.randn(3, *SPEC.shapes[projection], generator=generator)


def others() -> dict[str, Tensor]:
    """What is no routed expert's."""
    tensors = model_of(CONFIG, "here").state_dict()
    return {
        name: torch.zeros(t.shape) for name, t in tensors.items() if not SPEC.is_expert(name) and "lm_head" not in name
    }


def write_layout(folder: Path, tensors: dict[str, Tensor], limit: int = 2**30) -> None:
    """A model's folder."""
    write_weights(folder, tensors.items(), limit)
    write_config(folder, CONFIG)


def hub_layout() -> dict[str, Tensor]:
    """One 2-D tensor an expert and projection."""
    found = others()
    for layer in range(2):
        for projection in PROJECTIONS:
            for expert, matrix in enumerate(matrices(layer, projection)):
                found[f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"] = matrix.clone()
    return found


def fused_layout() -> dict[str, Tensor]:
    """Gate over up [E, 2F, D], and down [E, D, F]."""
    found = others()
    for layer in range(2):
        gate_up = torch.cat([matrices(layer, "gate"), matrices(layer, "up")], 1)
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = gate_up
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = matrices(layer, "down")
    return found


LAYOUTS = {"hub": hub_layout, "fused": fused_layout}


def refused(*parts: object) -> Any:
    """UserError that says each of `parts`."""
    return pytest.raises(UserError, match="(?s)" + "".join(f"(?=.*{re.escape(str(part))})" for part in parts))


@pytest.mark.parametrize("limit", [2**30, 500], ids=["one file", "many files"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_the_same_from_either_layout(layout, limit, tmp_path):
    write_layout(tmp_path, LAYOUTS[layout](), limit)
    assert (tmp_path / INDEX).exists() == (limit == 500)
    for layer in range(2):
        for projection in PROJECTIONS:
            assert torch.equal(experts_in(tmp_path, layer, projection), matrices(layer, projection))


def test_experts_are_those_of_the_loaded_model(teacher):
    for layer, block in enumerate(load_model(teacher, torch.float32).model.layers):
        gate, up = block.mlp.experts.gate_up_proj.chunk(2, dim=1)
        for projection, expected in zip(PROJECTIONS, (gate, up, block.mlp.experts.down_proj), strict=True):
            assert torch.equal(experts_in(teacher, layer, projection), expected)


@pytest.mark.parametrize(
    "layout, name",
    [("hub", "model.layers.1.mlp.experts.2.down_proj.weight"), ("fused", "model.layers.1.mlp.experts.down_proj")],
)
def test_a_missing_tensor_is_named(layout, name, tmp_path):
    tensors = LAYOUTS[layout]()
    del tensors[name]
    write_layout(tmp_path, tensors)
    with refused(tmp_path, name):
        sources_of(tmp_path)


@pytest.mark.parametrize(
    "layout, name, wrong, right",
    [
        ("hub", "model.layers.0.mlp.experts.1.up_proj.weight", (6, 11), (6, 10)),
        ("hub", "model.layers.0.mlp.experts.0.up_proj.weight", (10, 6), (6, 10)),  # transposed
        ("fused", "model.layers.0.mlp.experts.gate_up_proj", (3, 14, 10), (3, 12, 10)),
        # [E, D, 2F], as other families store it
        ("fused", "model.layers.0.mlp.experts.gate_up_proj", (3, 10, 12), (3, 12, 10)),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(layout, name, wrong, right, tmp_path):
    write_layout(tmp_path, LAYOUTS[layout]() | {name: torch.zeros(wrong)})
    with refused(tmp_path, name, wrong, right):
        experts_in(tmp_path, 0, "up")


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_experts_is_named(count, tmp_path):
    write_layout(tmp_path, fused_layout() | {"model.layers.0.mlp.experts.down_proj": torch.zeros(count, 10, 6)})
    with refused(tmp_path, "model.layers.0.mlp.experts.down_proj", (count, 10, 6), (3, 10, 6)):
        experts_in(tmp_path, 0, "down")


def test_more_experts_in_the_files_than_in_the_config_are_not_left_out_in_silence(tmp_path):
    """The hub's layout too: a config that says 3 next to a checkpoint of 4 is another model's."""
    extra = {f"model.layers.0.mlp.experts.3.{p}_proj.weight": torch.zeros(SPEC.shapes[p]) for p in PROJECTIONS}
    write_layout(tmp_path, hub_layout() | extra)
    with refused(tmp_path, "model.layers.0.mlp.experts.3.down_proj.weight", "config.json says 3 experts"):
        experts_in(tmp_path, 0, "up")


def test_an_unknown_tensor_is_named(teacher):
    with refused(teacher, "model.nothing"):
        Checkpoint(teacher).tensor("model.nothing")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with refused(tmp_path, WEIGHTS, INDEX):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_layout(tmp_path, hub_layout(), 500)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    lost = tmp_path / Checkpoint(tmp_path).files[name]
    lost.unlink()
    with refused(lost):
        experts_in(tmp_path, 1, "up")


@pytest.mark.parametrize("content", [b"", b"garbage that is no safetensors", b"\xff" * 64])
def test_garbage_is_named(content, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(content)
    with refused(tmp_path / WEIGHTS):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_file_cut_short_is_named(share, tmp_path):
    write_layout(tmp_path, hub_layout())
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with refused(file):
        experts_in(tmp_path, 0, "up")


def test_an_index_that_names_a_tensor_which_its_file_lacks(tmp_path):
    """As when one shard of another model was copied in."""
    write_layout(tmp_path, hub_layout(), 500)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    file = tmp_path / Checkpoint(tmp_path).files[name]
    save_file({"other": torch.zeros(2)}, file)
    with refused(file.name, name):
        Checkpoint(tmp_path).tensor(name)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_index_is_named(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with refused(tmp_path / INDEX):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("limit", [10_000, 40_000])
def test_sharded_weights_load_back(teacher, limit, tmp_path):
    original = Checkpoint(teacher)
    write_weights(tmp_path, ((name, original.tensor(name)) for name in original.files), limit)
    copied = Checkpoint(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and not list(tmp_path.glob("part-*"))
    assert [p.name for p in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert copied.files.keys() == original.files.keys() and set(copied.files.values()) == {p.name for p in shards}
    largest = max(original.tensor(name).nbytes for name in original.files)
    assert all(
        sum(copied.tensor(n).nbytes for n in copied.files if copied.files[n] == p.name) <= max(limit, largest)
        for p in shards
    )
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(original.tensor(name).nbytes for name in original.files)
    assert all(torch.equal(copied.tensor(name), original.tensor(name)) for name in original.files)
    write_config(tmp_path, load_config(teacher))
    theirs, mine = AutoModelForCausalLM.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), mine.parameters(), strict=True))


def test_no_more_than_one_file_is_in_memory(tmp_path):
    """And a tensor that owns its memory is not copied."""
    alive: set[int] = set()
    most = 0

    def tensors():
        nonlocal most
        for number in range(12):
            tensor = torch.full((1000,), float(number))
            alive.add(number)
            weakref.finalize(tensor.untyped_storage(), alive.discard, number)
            most = max(most, len(alive))
            yield str(number), tensor
            del tensor

    write_weights(tmp_path, tensors(), 3 * 4000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4 and most <= 5


def test_written_tensors_may_be_views_and_parameters(tmp_path):
    """Tied, transposed and sliced tensors share memory, which safetensors refuses."""
    base = torch.nn.Parameter(torch.randn(6, 4))
    tensors = {"a": base, "tied": base, "transposed": base.T, "row": base[1]}
    write_layout(tmp_path, tensors)
    found = Checkpoint(tmp_path)
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in tensors.items())


def test_resolve_of_folders(teacher, tmp_path):
    assert resolve(str(teacher)) == teacher
    assert resolve("demo") == shipped("assets", "demo-teacher")
    for name in (str(tmp_path), str(tmp_path / "missing"), "./missing", "~/missing", "a/b/c"):
        with refused(name, "config.json"):
            resolve(name)


def test_resolve_of_what_the_hub_does_not_give():
    """Tests are offline, so this is also what a machine without network says."""
    with refused("nobody/nothing-of-this-name", "hub"):
        resolve("nobody/nothing-of-this-name", "some-revision")


@pytest.mark.parametrize(
    "text", [None, "{", "{}", '{"model_type": "unheard_of"}'], ids=["missing", "broken", "empty", "unknown"]
)
def test_load_config_refuses_what_is_no_config(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with refused(tmp_path, "config.json"):
        load_config(tmp_path)


def test_load_model_gives_the_dtype_asked_for(teacher, prepared):
    for folder in (teacher, prepared / "student-0"):
        for dtype in (torch.float32, torch.bfloat16):
            assert {p.dtype for p in load_model(folder, dtype).parameters()} == {dtype}


def broken_copy(teacher: Path, folder: Path, change: str) -> Path:
    write_config(folder, load_config(teacher))
    content = (teacher / WEIGHTS).read_bytes()
    if change != "no weights":
        (folder / WEIGHTS).write_bytes({"cut short": content[: len(content) // 2], "garbage": b"garbage" * 9}[change])
    return folder


@pytest.mark.parametrize("change", ["no weights", "cut short", "garbage"])
def test_load_model_refuses_broken_folders(teacher, tmp_path, change):
    with refused(tmp_path / "model"):
        load_model(broken_copy(teacher, tmp_path / "model", change), torch.float32)


def test_load_model_refuses_weights_of_another_shape(teacher, tmp_path):
    config = load_config(teacher)
    config.moe_intermediate_size = 20
    write_config(tmp_path, config)
    (tmp_path / WEIGHTS).write_bytes((teacher / WEIGHTS).read_bytes())
    with refused(tmp_path):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize("missing", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_load_model_refuses_missing_tensors(teacher, tmp_path, missing):
    """transformers would fill them with random numbers and only warn."""
    checkpoint = Checkpoint(teacher)
    write_weights(tmp_path, ((name, checkpoint.tensor(name)) for name in checkpoint.files if name != missing))
    write_config(tmp_path, load_config(teacher))
    with refused(tmp_path, missing):
        load_model(tmp_path, torch.float32)


def test_config_is_written_whole(teacher, tmp_path):
    write_config(tmp_path / "new", load_config(teacher))
    assert "_name_or_path" not in (tmp_path / "new" / "config.json").read_text()
    theirs, mine = ({**load_config(folder).to_dict(), "_name_or_path": ""} for folder in (teacher, tmp_path / "new"))
    assert mine == theirs


def test_side_files_are_those_that_are_neither_config_nor_weights(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    copied = [
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "generation_config.json",
    ]
    for name in [*copied, "config.json", INDEX, WEIGHTS, "compress.json", "training.json", "README.md"]:
        (source / name).write_text(name)
    (source / "folder.json").mkdir()
    copy_side_files(source, target)
    assert {p.name: p.read_text() for p in target.iterdir()} == {name: name for name in copied}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_named(layout, value, tmp_path):
    tensors = LAYOUTS[layout]()
    name = next(name for name in tensors if "layers.1" in name and "down_proj" in name)
    tensors[name].view(-1)[7] = value
    write_layout(tmp_path, tensors)
    with refused(WEIGHTS, name, "NaN or infinite"):
        experts_in(tmp_path, 1, "down")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_place_in_a_tensor_hides_them(dtype, value, tmp_path):
    """In registers of any width and what is left behind them."""
    weights = torch.randn(6, 10, dtype=torch.float64).repeat(7, 5).to(dtype)
    write_weights(tmp_path, [("x", torch.zeros(1))])
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check("x", weights)
    for place in range(0, weights.numel(), 13):
        broken = weights.clone()
        broken.view(-1)[place] = value
        with refused("NaN or infinite"):
            checkpoint.check("x", broken)


@pytest.mark.parametrize("dtype, stored", [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantised_weights_without_scales_are_refused_by_type(dtype, stored, tmp_path):
    tensors = hub_layout()
    name = "model.layers.0.mlp.experts.2.gate_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    write_layout(tmp_path, tensors)
    with refused(name, f"stored as {stored}", "bfloat16"):
        experts_in(tmp_path, 0, "gate")


def test_large_sums_are_no_infinite_weights(tmp_path):
    tensors = {name: torch.full_like(tensor, 3e38) for name, tensor in hub_layout().items()}
    write_layout(tmp_path, tensors)
    assert (experts_in(tmp_path, 0, "gate") == 3e38).all()


def edited(teacher: Path, folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A copy of a teacher with tensors added or replaced, and entries of its config.json."""
    shutil.copytree(teacher, folder)
    if tensors:
        save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS, metadata={"format": "pt"})
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(value | config))
    return folder


BIAS = "model.layers.0.self_attn.q_proj.bias"


def test_tensors_that_config_leaves_out_are_said_and_left_out_by_every_reader(teacher, tmp_path, capsys):
    """transformers leaves them out of the targets; the student kept them."""
    folder = edited(teacher, tmp_path / "model", {BIAS: torch.ones(32)})
    load_model(folder, torch.float32)
    assert BIAS in capsys.readouterr().err
    names = sources_of(folder).made_by
    said = capsys.readouterr().err
    assert BIAS not in names and BIAS in said and "1 tensors" in said
    assert names.keys() == sources_of(teacher).made_by.keys()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_missing_and_misshapen_tensors_are_refused_before_compressing(teacher, tmp_path, name):
    folder = edited(teacher, tmp_path / "without")
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with refused(name, "missing"):
        sources_of(folder)
    folder = edited(teacher, tmp_path / "model", {name: torch.ones(7)})
    with refused(name, "(7,)"):
        sources_of(folder)


def test_tied_weights_that_differ_are_refused(teacher, tmp_path):
    assert load_config(teacher).tie_word_embeddings
    same = Checkpoint(teacher).tensor("model.embed_tokens.weight")
    load_model(edited(teacher, tmp_path / "tied", {"lm_head.weight": same}), torch.float32)
    with refused("tie_word_embeddings", "lm_head.weight"):
        load_model(edited(teacher, tmp_path / "model", {"lm_head.weight": same + 1}), torch.float32)


QUANTIZED = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
ODD = {
    "pad_token_id": 400,
    "rope_parameters": {"rope_type": "yarn"},
    "hidden_act": "swishy",
    "hidden_size": "32",
    "dtype": "float9",
    "attn_implementation": "flash_attention_2",
    "quantization_config": QUANTIZED,
    "transformers_weights": "other.safetensors",
}


@pytest.mark.parametrize("entry", ODD)
def test_odd_configs_are_one_line_that_names_the_folder(teacher, tmp_path, entry):
    folder = edited(teacher, tmp_path / "model", **{entry: ODD[entry]})
    with refused(folder) as error:
        load_model(folder, torch.float32)
    assert "\n" not in str(error.value)


def test_a_quantization_config_is_refused_where_raw_tensors_are_read(teacher, tmp_path):
    folder = edited(teacher, tmp_path / "model", quantization_config=QUANTIZED)
    with refused(folder, "gptq", "compress needs float weights"):
        check_readable(folder, load_config(folder), "compress")
    check_readable(teacher, load_config(teacher), "compress")
