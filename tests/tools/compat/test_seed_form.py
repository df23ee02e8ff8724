import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megakd.models.hub import Checkpoint, load_config, write_config, write_weights
from megakd.models.loading import load_model
from megakd.models.shared_core import PROJECTIONS, Form, dense_weight, make_form
from megakd.system.files import read_json
from tests.models.students import COMMON, EXPERTS, FAMILIES, FULL, logits, make_model, make_student, relative
from tests.tools.examples import refused, tool

TOKENS = torch.randint(1, 61, (3, 13), generator=torch.Generator().manual_seed(0))
FORMS = {
    "equal": {p: make_form("wrappers", p, 4, 4) for p in PROJECTIONS},
    "unequal": {p: Form("wrappers", 5, 2) for p in PROJECTIONS},
    "additive": {p: make_form("additive", p, 6, 0) for p in PROJECTIONS},
    "different": {"gate": Form("wrappers", 3, 7), "up": Form("additive", 4, 0), "down": Form("wrappers", 1, 2)},
}


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "deepseek_v3"])
def teacher(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "stock"
    make_model(request.param).save_pretrained(folder)
    return folder


def reference(checkpoint: Checkpoint, layer: int, projection: str, expert: int) -> Tensor:
    """(I + U_out S_out^T) C (I + U_in S_in^T) with whole identity matrices."""
    block = f"model.layers.{layer}.mlp"
    core = checkpoint.tensor(f"{block}.shared_core.{projection}_proj.weight").double()
    sides = []
    for wrapper, size in (("output", core.shape[0]), ("input", core.shape[1])):
        place = f"{block}.experts.{expert}.{projection}_proj.{wrapper}_wrapper"
        u, v = (checkpoint.tensor(f"{place}.{letter}").double() for letter in "uv")
        assert u.shape == v.shape == (size, u.shape[1])
        sides.append(torch.eye(size).double() + u @ v.T)
    return sides[0] @ core @ sides[1]


@pytest.mark.parametrize("name", FORMS)
def test_there_and_back(teacher, name, tmp_path, capsys):
    student = make_student(teacher, tmp_path / "student", FORMS[name])
    tool("compat/seed_form").main(["to-seed", str(student), str(tmp_path / "seed")])
    assert "largest relative error of an expert's matrix" in capsys.readouterr().out
    seed, config = Checkpoint(tmp_path / "seed"), load_config(student)
    own = Checkpoint(student)
    for layer in map(int, config.shared_core["layers"]):
        prefix = f"model.layers.{layer}.mlp."
        tensors = {n.removeprefix(prefix): own.tensor(n) for n in own.files if n.startswith(prefix)}
        for projection in PROJECTIONS:
            for expert in range(EXPERTS):
                expected = dense_weight(tensors, projection, expert).double()
                assert relative(reference(seed, layer, projection, expert), expected) <= 1e-4
    assert read_json(tmp_path / "seed" / "config.json")["model_type"] == load_config(teacher).model_type

    tool("compat/seed_form").main(["from-seed", str(tmp_path / "seed"), str(tmp_path / "again")])
    again = load_config(tmp_path / "again")
    assert again.shared_core == config.shared_core
    assert Checkpoint(tmp_path / "again").files.keys() == own.files.keys()
    before, after = (load_model(folder, torch.float32) for folder in (student, tmp_path / "again"))
    assert relative(logits(after, TOKENS), logits(before, TOKENS)) <= 1e-4


def test_what_a_trainer_wrote_is_read(teacher, tmp_path):
    """Made by hand in the layout of the tool's docstring, in bfloat16 and two ranks, with no student before it."""
    config, stock = load_config(teacher), Checkpoint(teacher)
    d = config.hidden_size
    generator = torch.Generator().manual_seed(0)
    layers = range(getattr(config, "first_k_dense_replace", 0), config.num_hidden_layers)
    tensors = {n: stock.tensor(n) for n in stock.files if ".experts." not in n}
    for layer in layers:
        for projection in PROJECTIONS:
            sizes = (d, 24) if projection == "down" else (24, d)
            block = f"model.layers.{layer}.mlp"
            core = torch.randn(*sizes, generator=generator) * 0.2
            tensors[f"{block}.shared_core.{projection}_proj.weight"] = core.bfloat16()
            for expert in range(EXPERTS):
                for wrapper, size, rank in (("output", sizes[0], 3), ("input", sizes[1], 2)):
                    for letter in "uv":
                        name = f"{block}.experts.{expert}.{projection}_proj.{wrapper}_wrapper.{letter}"
                        tensors[name] = (torch.randn(size, rank, generator=generator) * 0.2).bfloat16()
    write_weights(tmp_path / "seed", tensors.items())
    write_config(tmp_path / "seed", config)
    tool("compat/seed_form").main(
        ["from-seed", str(tmp_path / "seed"), str(tmp_path / "student"), "--dtype", "float32"]
    )
    seed, found = Checkpoint(tmp_path / "seed"), Checkpoint(tmp_path / "student")
    assert load_config(tmp_path / "student").forms(layers[0])["up"] == Form("wrappers", 2, 3)
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp."
        own = {n.removeprefix(prefix): found.tensor(n) for n in found.files if n.startswith(prefix)}
        for projection in PROJECTIONS:
            for expert in range(EXPERTS):
                expected = reference(seed, layer, projection, expert)
                assert relative(dense_weight(own, projection, expert).double(), expected) <= 1e-6
    assert torch.isfinite(logits(load_model(tmp_path / "student", torch.float32), TOKENS)).all()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    make_model("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "forms, exempt, said",
    [
        (FORMS["equal"] | {"up": FULL["two bases"]["up"]}, None, "layer 0 stores up in bases"),
        (FORMS["equal"], {1: (2,)}, "layer 1 keeps experts (2,) dense"),
    ],
)
def test_what_has_no_unfused_form_is_refused(qwen, forms, exempt, said, tmp_path, capsys):
    student = make_student(qwen, tmp_path / "student", forms, exempt)
    assert said in refused(tool("compat/seed_form"), capsys, "to-seed", student, tmp_path / "seed")
    assert not (tmp_path / "seed").exists()


def test_a_residual_is_refused(tmp_path, capsys):
    """With F > D the columns of L C do not span what Q may be; in bfloat16 nothing is exact enough."""
    fields = {**COMMON, **FAMILIES["qwen3_moe"][2], "moe_intermediate_size": 48}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "wide")
    student = make_student(tmp_path / "wide", tmp_path / "a", FORMS["equal"])
    said = refused(tool("compat/seed_form"), capsys, "to-seed", student, tmp_path / "seed")
    assert "layer 0, gate_proj of expert 0" in said and "more than 0.001" in said
    make_model("qwen3_moe").save_pretrained(tmp_path / "narrow")
    student = make_student(tmp_path / "narrow", tmp_path / "b", FORMS["equal"])
    said = refused(tool("compat/seed_form"), capsys, "to-seed", student, tmp_path / "seed", "--dtype", "bfloat16")
    assert "unfused in bfloat16" in said and not (tmp_path / "seed").exists()


def test_other_folders_are_refused(qwen, tmp_path, capsys):
    student = make_student(qwen, tmp_path / "student", FORMS["equal"])
    assert "is no compressed student" in refused(tool("compat/seed_form"), capsys, "to-seed", qwen, tmp_path / "x")
    for folder in (qwen, student):
        assert "unfused wrappers" in refused(tool("compat/seed_form"), capsys, "from-seed", folder, tmp_path / "x")
    assert "exists already" in refused(tool("compat/seed_form"), capsys, "to-seed", student, qwen)


@pytest.mark.parametrize("part, shape", [("input_wrapper.u", (32, 5)), ("output_wrapper.v", (32, 4))])
def test_a_wrapper_of_another_shape_is_named(qwen, part, shape, tmp_path, capsys):
    student = make_student(qwen, tmp_path / "student", FORMS["equal"])
    tool("compat/seed_form").main(["to-seed", str(student), str(tmp_path / "seed")])
    seed, name = Checkpoint(tmp_path / "seed"), f"model.layers.1.mlp.experts.2.up_proj.{part}"
    tensors = {n: seed.tensor(n) for n in seed.files} | {name: torch.zeros(shape)}
    write_weights(tmp_path / "seed", tensors.items())
    said = refused(tool("compat/seed_form"), capsys, "from-seed", tmp_path / "seed", tmp_path / "x")
    assert name in said and str(shape) in said
