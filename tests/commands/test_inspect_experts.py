"""What inspect says of models: sizes without reading tensors, and what experts are like against slow references."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
)

from megakd import cli
from megakd.compress.fewer import METHODS
from megakd.compress.forms import USUAL
from megakd.compress.predict import measure
from megakd.errors import UserError
from megakd.models.hub import INDEX, WEIGHTS, Checkpoint, model_of, write_config, write_weights
from megakd.models.shared_core import PROJECTIONS
from megakd.models.sources import as_stored
from megakd.models.spec import spec_for
from megakd.models.tiny import tiny_moe_config
from megakd.outputs import check_file
from megakd.report.describe import tensor_sizes
from megakd.report.experts import MARK, measure_projection, norms_and_cosines, singular_values
from megakd.system.files import read_json, write_json
from tests.models.students import expert_name

COMMON: dict[str, Any] = {"vocab_size": 64, "hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": tiny_moe_config(
        64, hidden_size=20, moe_intermediate_size=12, num_experts=6, num_hidden_layers=4, mlp_only_layers=[0]
    ),
    "mixtral": MixtralConfig(
        **COMMON, intermediate_size=28, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON, moe_intermediate_size=12, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        moe_intermediate_size=12,
        num_hidden_layers=3,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=12, num_hidden_layers=1, num_experts=5, num_experts_per_tok=3),
}


def experts_of(family: str, layer: int, projection: str) -> torch.Tensor:
    """[E, d_out, d_in]: a common part, and one expert that is twice as large."""
    spec = spec_for(CONFIGS[family], family)
    draw = torch.Generator().manual_seed(10 * layer + PROJECTIONS.index(projection))
    rows, columns = spec.shapes[projection]
    stack = torch.randn(spec.experts, rows, columns, generator=draw)
    stack += torch.randn(rows, columns, generator=draw)
    stack[2] *= 2
    return stack


def write_model(folder: Path, family: str, layout: str, shard_bytes: int = 2**30) -> Path:
    """A model folder with known experts and a few other tensors."""
    config = CONFIGS[family]
    spec, model = spec_for(config, family), model_of(config, family)
    tensors = {name: torch.ones(t.shape) for name, t in model.state_dict().items() if not spec.is_expert(name)}
    for layer in spec.layers:
        stacks = {p: experts_of(family, layer, p) for p in PROJECTIONS}
        names = spec.fused(layer)
        tensors |= {
            names["gate_up_proj"]: torch.cat([stacks["gate"], stacks["up"]], 1),
            names["down_proj"]: stacks["down"],
        }
    if layout == "hub":
        tensors = as_stored(model, tensors)
    write_weights(folder, tensors.items(), shard_bytes)
    write_config(folder, config)
    return folder


def inspect(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    cli.run_verb(["inspect", *map(str, argv)])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "family, layout",
    [
        ("qwen3_moe", "hub"),
        ("mixtral", "fused"),
        ("mixtral", "hub"),
        ("qwen2_moe", "hub"),
        ("olmoe", "fused"),
        ("deepseek_v3", "hub"),
    ],
)
def test_experts_are_measured_from_either_layout(family, layout, tmp_path, capsys):
    folder = write_model(tmp_path / "model", family, layout)
    known = spec_for(CONFIGS[family], family).layers
    out = tmp_path / "experts.json"
    text = inspect(capsys, folder, "--experts", "--layers", known[-1], "--json", out, "--shares", "0.3,3/4")
    found = read_json(out)
    assert [layer["layer"] for layer in found["layers"]] == [known[-1]]
    assert (found["model_type"], found["experts"], found["moe_layers"]) == (
        family,
        spec_for(CONFIGS[family], family).experts,
        len(known),
    )
    for projection in PROJECTIONS:
        stack, mine = experts_of(family, known[-1], projection), found["layers"][0][projection]
        assert mine["norms"] == pytest.approx([float(w.norm()) for w in stack], rel=1e-5)
        assert mine["outliers"] == [2]
        row = re.search(rf"^layer {known[-1]} {projection} .*$", text, re.MULTILINE)
        assert row is not None and f"2 ({float(stack[2].norm()):.3g})" in row[0]
        candidates = measure(stack, projection, found["active"])
        for error in mine["errors"]:
            share = {"0.3": 0.3, "3/4": 0.75}[error["share"]]
            if error["shape"] in METHODS:
                left = int(share * len(stack))
                assert error.get("experts") == (left if left >= found["active"] else None)
                continue
            fitting = [
                c.error for c in candidates if c.form.shape == error["shape"] and c.parameters <= share * stack.numel()
            ]
            assert error.get("relative_error") == (pytest.approx(min(fitting) ** 0.5) if fitting else None)
        assert len(mine["errors"]) == 2 * len((*USUAL, *METHODS))


def test_layouts_say_the_same(tmp_path, capsys):
    texts = []
    for layout in ("hub", "fused"):
        folder = write_model(tmp_path / layout, "qwen3_moe", layout)
        texts.append(inspect(capsys, folder, "--experts").replace(str(folder), "MODEL"))
    assert texts[0] == texts[1]
    # layer 0 is dense; three are shown
    assert set(re.findall(r"^layer (\d+) gate", texts[0], re.MULTILINE)) == {"1", "2", "3"}


def test_numbers_are_those_of_slow_references():
    weights = experts_of("mixtral", 0, "down")
    found = measure_projection(weights, "down", 2, {"1/2": 0.5})
    flat = weights.double().flatten(1)
    pairs = {}
    for i in range(len(flat)):
        for j in range(i):
            pairs[j, i] = float(flat[i] @ flat[j] / flat[i].norm() / flat[j].norm())
    assert found["cosine"]["mean"] == pytest.approx(sum(pairs.values()) / len(pairs), abs=1e-6)
    assert found["cosine"]["max"] == pytest.approx(max(pairs.values()), abs=1e-6)
    assert pairs[tuple(found["cosine"]["pair"])] == max(pairs.values())
    sigmas = [torch.linalg.svdvals(w.double()) for w in weights]
    ranks = [float(s.square().sum() / s[0] ** 2) for s in sigmas]
    assert found["spectrum"]["stable_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
    # 20 singular values: the largest 2, 3 and 5
    for label, count in (("1/16", 2), ("1/8", 3), ("1/4", 5)):
        shares = [float(s[:count].square().sum() / s.square().sum()) for s in sigmas]
        assert found["spectrum"]["top"][label] == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    mean = weights.double().mean(0)
    energy = mean.square().sum() / weights.double().square().sum((1, 2)).mean()
    assert found["mean_expert"]["energy"] == pytest.approx(float(energy), rel=1e-5)
    sigma = torch.linalg.svdvals(mean)
    assert found["mean_expert"]["singular_values"] == pytest.approx((sigma / sigma[0]).tolist(), abs=1e-4)


def test_cosines_do_not_depend_on_how_rows_are_cut(monkeypatch):
    weights = experts_of("qwen3_moe", 1, "up").bfloat16()
    norms, cosines = norms_and_cosines(weights)
    monkeypatch.setattr("megakd.report.experts.ROW_CHUNK", 7 * 6 * 20)
    again = norms_and_cosines(weights)
    assert torch.allclose(norms, again[0], rtol=1e-6) and torch.allclose(cosines, again[1], atol=1e-6)
    assert torch.allclose(cosines.diagonal(), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4)])
def test_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(singular_values(matrix), torch.linalg.svdvals(matrix).double(), atol=1e-5)


def test_permuted_copies_are_seen(tmp_path, capsys):
    """Experts that are one MLP with its hidden units shuffled, then nearly the same in order, then unrelated."""
    config = tiny_moe_config(
        64, hidden_size=24, moe_intermediate_size=32, num_experts=4, num_hidden_layers=3, num_experts_per_tok=2
    )
    spec, draw = spec_for(config, "here"), torch.Generator().manual_seed(0)
    empty = model_of(config, "here").state_dict()
    tensors = {name: torch.ones(tensor.shape) for name, tensor in empty.items() if not spec.is_expert(name)}
    gate, up, down = (torch.randn(shape, generator=draw) for shape in spec.shapes.values())
    for expert in range(4):
        order = torch.randperm(32, generator=draw)
        noise = [0.1 * torch.randn(shape, generator=draw) for shape in spec.shapes.values()]
        for layer, (a, b, c) in enumerate(
            [
                (gate[order], up[order], down[:, order]),
                (gate, up, down),
                tuple(torch.randn(x.shape, generator=draw) for x in (gate, up, down)),
            ]
        ):
            for p, matrix, more in zip(PROJECTIONS, (a, b, c), noise, strict=True):
                tensors[expert_name(layer, expert, p)] = matrix + more
    write_weights(tmp_path, tensors.items())
    write_config(tmp_path, config)
    lines = re.findall(r"^layer \d: hidden units .*$", inspect(capsys, tmp_path, "--experts"), re.MULTILINE)
    said = [line.split("by chance: ")[1] for line in lines]
    assert said == ["permuted copies; compress aligns them", "copies, in the same order", "no permuted copies"]


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_plots_are_drawn(suffix, magic, tmp_path, capsys):
    folder = write_model(tmp_path / "model", "olmoe", "hub")
    plot = tmp_path / f"experts{suffix}"
    inspect(capsys, folder, "--experts", "--plot", plot)
    assert plot.read_bytes().startswith(magic) and plot.stat().st_size > 10_000
    check_file(plot, MARK)  # it may be drawn again
    plot.write_bytes(magic)  # somebody else's
    for option in ("--plot", "--json"):
        with pytest.raises(UserError, match="exists already"):
            inspect(capsys, folder, "--experts", option, plot)
    assert plot.read_bytes() == magic
    assert sorted(p.name for p in tmp_path.iterdir()) == [plot.name, "model"]  # no leftovers of writing


def test_a_plot_of_many_layers(tmp_path, capsys):
    folder = write_model(tmp_path / "model", "qwen3_moe", "fused")
    inspect(capsys, folder, "--experts", "--layers", "all", "--plot", tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_small_shares_are_said_to_be_too_small(tmp_path, capsys):
    """A core of one fifth of the parameters does not fit in a tenth of them."""
    text = inspect(capsys, write_model(tmp_path / "model", "olmoe", "fused"), "--experts", "--shares", "0.1")
    row = re.search(r"^layer 0 gate .*too small.*$", text, re.MULTILINE)
    assert row is not None and re.search(r"0\.\d{3} \(r \d+( x 2 groups)?\)", row[0])  # a basis fits


def test_the_demo_by_name_and_progress(capsys):
    text = inspect(capsys, "demo")
    assert "4 layers of 8 experts, 2 active" in text and "81.7% of the parameters" in text
    capsys.readouterr()
    cli.run_verb(["inspect", "demo", "--experts", "--layers", "2"])
    captured = capsys.readouterr()
    assert "3 projections in" in captured.err and "layer 2 down" in captured.out


def test_sizes_come_from_headers_alone(tmp_path, capsys, monkeypatch):
    """A 61 GB checkpoint is described without reading it: no tensor is asked for; the sums are those of the tensors."""
    folder = write_model(tmp_path / "model", "mixtral", "hub", shard_bytes=20_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    total = sum(t.numel() for file in files for t in load_file(file).values())
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a tensor was read"))
    text = inspect(capsys, folder)
    last = re.search(r"^all +(\d+) +([\d,]+) +(\S+)$", text, re.MULTILINE)
    assert last is not None and int(last[2].replace(",", "")) == total
    assert re.search(r"^model.layers.block_sparse_moe.experts.w1.weight +8 +4,480 +17.9k$", text, re.MULTILINE)
    assert "2 layers of 4 experts, 2 active, hidden 20 → 28" in text
    tensors = load_file(files[0])
    sizes = tensor_sizes(Checkpoint(folder), files[0].name)
    assert sizes == {name: (t.numel(), t.numel() * t.element_size()) for name, t in tensors.items()}


def test_headers_of_types_that_torch_hardly_knows(tmp_path):
    tensors = {
        "a": torch.ones(3, 5).to(torch.float8_e4m3fn),
        "b": torch.ones(2, dtype=torch.int64),
        "c": torch.ones(()),
    }
    save_file(tensors, tmp_path / WEIGHTS)
    assert tensor_sizes(Checkpoint(tmp_path), WEIGHTS) == {"a": (15, 15), "b": (2, 16), "c": (1, 4)}


def test_files_that_are_not_what_they_should_be(tmp_path, capsys):
    folder = write_model(tmp_path / "model", "mixtral", "hub", shard_bytes=20_000)
    index = read_json(folder / INDEX)
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / sorted(set(index["weight_map"].values()))[1]).write_bytes(b"\x10\0\0\0\0\0\0\0{not json")
    with pytest.raises(UserError, match=r"model-00002-.*cannot be read as safetensors"):
        inspect(capsys, broken)
    index["weight_map"]["model.more.weight"] = "model-00001-of-" + next(iter(index["weight_map"].values()))[-17:]
    write_json(folder / INDEX, index)
    with pytest.raises(UserError, match=r"says that model\.more\.weight is in model-00001.*does not hold it"):
        inspect(capsys, folder)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--layers", "0"], r"--layers 0: \S+ has no experts in layer 0, but in 1 … 3"),
        (["--layers", "1,9"], "no experts in layer 9, but in 1 … 3"),
        (["--layers", "1,x"], r"--layers 1,x: 'x' is no layer; write numbers like 0,23,47, or all"),
        (["--layers", "-1"], "'-1' is no layer"),
        (["--layers", ""], "'' is no layer"),
        (["--shares", "1/8,2"], "--shares 1/8,2: '2' is no share"),
        (["--shares", "1/0"], "'1/0' is no share"),
        (["--plot", "experts.jpg"], r"--plot experts.jpg: what it ends in must be one of .png, .svg, .pdf"),
        (["--plot", "gone/experts.png"], "gone/experts.png: gone is no folder"),
        (["--json", "gone/experts.json"], "gone/experts.json: gone is no folder"),
    ],
)
def test_options_that_cannot_be_meant(options, message, tmp_path, capsys):
    folder = write_model(tmp_path / "model", "qwen3_moe", "hub")
    with pytest.raises(UserError, match=message) as caught:
        inspect(capsys, folder, "--experts", *[f"{options[0]}={options[1]}"])
    assert "\n" not in str(caught.value)


def test_options_of_experts_alone_are_refused(tmp_path, capsys):
    folder = write_model(tmp_path / "model", "olmoe", "hub")
    with pytest.raises(UserError, match="--layers is for --experts; add it"):
        inspect(capsys, folder, "--layers", "0")


def test_folders_without_experts_are_refused(tmp_path, capsys):
    dense = LlamaConfig(**{**COMMON, "hidden_size": 24}, intermediate_size=24, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(dense).save_pretrained(tmp_path / "llama")
    assert "active" not in inspect(capsys, tmp_path / "llama")
    with pytest.raises(UserError, match="llama: no layer of this llama has experts"):
        inspect(capsys, tmp_path / "llama", "--experts")
    without = tiny_moe_config(64, hidden_size=20, num_hidden_layers=2, mlp_only_layers=[0, 1])
    write_weights(tmp_path / "flat", [("model.norm.weight", torch.ones(20))])
    write_config(tmp_path / "flat", without)
    with pytest.raises(UserError, match="flat: no layer of this qwen3_moe has experts"):
        inspect(capsys, tmp_path / "flat", "--experts")
    with pytest.raises(UserError, match="gone: --experts measures a model folder"):
        inspect(capsys, tmp_path / "gone", "--experts")
    with pytest.raises(UserError, match="gone: neither a run, nor shards"):
        inspect(capsys, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    write_config(tmp_path / "empty", CONFIGS["olmoe"])
    with pytest.raises(UserError, match=f"empty: neither {WEIGHTS} nor {INDEX} here"):
        inspect(capsys, tmp_path / "empty", "--experts")


def test_damaged_experts_are_named(tmp_path, capsys):
    folder = write_model(tmp_path / "model", "olmoe", "hub")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"model.layers.0.mlp.experts.3.up_proj.weight holds NaN or infinite weights"):
        inspect(capsys, folder, "--experts")


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        cli.run_verb(["inspect", "--help"])
    text = capsys.readouterr().out
    assert "--experts --layers 0,23,47 --plot experts.png" in text and "inspect demo --experts" in text


def test_json_is_json(tmp_path, capsys):
    """No NaN, which JSON has not, even where experts are zeros."""
    config = CONFIGS["olmoe"]
    write_weights(tmp_path, [(n, torch.zeros(t.shape)) for n, t in model_of(config, "here").state_dict().items()])
    write_config(tmp_path, config)
    inspect(capsys, tmp_path, "--experts", "--json", tmp_path / "found.json", "--plot", tmp_path / "found.png")
    check_file(tmp_path / "found.json", MARK)
    text = (tmp_path / "found.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
