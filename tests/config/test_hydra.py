"""YAML recipes: numbers, Hydra's defaults lists, OmegaConf's interpolations."""

import math
from pathlib import Path

import pytest

from megakd.config.hydra import Unresolved, compose, read_yaml, resolve
from megakd.config.parsing import load_recipe
from megakd.errors import UserError
from tests.conftest import for_each


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "config.yaml"


SCALARS = [
    ("5e-5", 5e-5),
    ("1e6", 1e6),
    ("-2.5E+3", -2500.0),
    ("3", 3),
    ("1_000", 1000),
    (".5", 0.5),
    (".inf", math.inf),
]
SCALARS += [("yes", True), ("off", False), ("'no'", "no"), ("null", None), ("~", None), ("2024-01-02", "2024-01-02")]
SCALARS += [("1:30", "1:30"), ("0.5 - 0.7", "0.5 - 0.7"), ("e5", "e5"), ("1e", "1e"), ("[1e-4, 2]", [1e-4, 2])]


@for_each("text, value", SCALARS)
def test_scalars_are_read_as_omegaconf_reads_them(text: str, value: object, tmp_path: Path):
    found = read_yaml(write(tmp_path, config=f"a: {text}"))["a"]
    assert found == value and type(found) is type(value)


@for_each(
    "text, message",
    [
        ("a: 1\na: 2", "config.yaml:2:1: not valid YAML: the key 'a' stands twice"),
        ("a: [", "config.yaml:1:5: not valid YAML"),
        ("- a", "a recipe is a mapping of keys, not list"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: &x [*x]", "an alias contains itself"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("defaults: [x: y]", "config.yaml: defaults: x: no file "),
        ("defaults: 3", "defaults: a list is expected"),
    ],
)
def test_faults_of_a_file_name_the_place(text: str, message: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        compose(write(tmp_path, config=text), {})
    assert message in str(caught.value), caught.value


def test_defaults_are_composed_and_groups_chosen(tmp_path):
    path = write(
        tmp_path,
        config="defaults:\n  - distillation: default\n  - compression: default\n  - optional missing: x\n"
        "  - override hydra/launcher: basic\n  - _self_\nmodel: {name: org/t}\ndistillation: {loss: {alpha: 0.7}}",
        distillation__default="defaults: [base]\nloss: {temperature: 2}\nlr: '${model.name}'",
        distillation__base="loss: {alpha: 0.1, temperature: 9}",
        compression__default="rank: 8",
        compression__wide="# @package _global_\ncompression: {rank: 64}",
    )
    tree = resolve(compose(path, {}))
    assert tree == {
        "distillation": {"loss": {"alpha": 0.7, "temperature": 2}, "lr": "org/t"},
        "compression": {"rank": 8},
        "model": {"name": "org/t"},
    }
    assert compose(path, {"compression": "wide"})["compression"] == {"rank": 64}


def test_a_tree_of_groups_makes_a_run(tmp_path):
    path = write(
        tmp_path,
        config="defaults: [_self_, {distillation: default}, {compression: default}]\n"
        "model: {name: org/teacher}\noutput: {temp_dir: '${oc.env:HOME}/tmp'}",
        distillation__default="teacher: {model_path: '${model.name}', cache_dir: '${output.temp_dir}/logits'}\n"
        "training: {learning_rate: 1e-5}",
        compression__default="rank: 8",
        compression__wide="rank: 64",
    )
    config = load_recipe(path, ["compression=wide", "distillation.training.learning_rate=2e-5"])
    assert (config.model.teacher, config.compress.rank, config.optim.lr) == ("org/teacher", 64, 2e-5)
    with pytest.raises(UserError, match=r"no file .*compression/none\.yaml"):
        load_recipe(path, ["compression=none"])


def test_interpolations(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", "there")
    monkeypatch.delenv("NOWHERE", raising=False)
    tree = {
        "a": {"b": 3, "c": "${.b}", "d": "${..x}/${a.b}", "list": [1, "${a.b}"]},
        "x": "${oc.env:WHERE}",
        "y": "${oc.env:NOWHERE,here}",
        "none": "${oc.env:NOWHERE,null}",
        "copy": "${a.list}",
        "first": "${a.list[1]}",
    }
    assert resolve(tree) == {
        "a": {"b": 3, "c": 3, "d": "there/3", "list": [1, 3]},
        "x": "there", "y": "here", "none": None, "copy": [1, 3], "first": 3,
    }  # fmt: skip


@for_each(
    "text, why",
    [
        ("${nothing.here}", "there is no nothing.here"),
        ("${a}", "a refers to itself"),
        ("${oc.env:NO_SUCH_VARIABLE_HERE}", "the variable NO_SUCH_VARIABLE_HERE is not set"),
        ("${now:%Y}", "the resolver 'now' is not known here"),
        ("${a.${b}}", "an interpolation inside another"),
        ("???", "it has to be given"),
    ],
)
def test_what_has_no_value_says_why(text: str, why: str):
    found = resolve({"a": text, "b": "x"})["a"]
    assert isinstance(found, Unresolved) and why in found.why, found.why
