import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megakd.config.checks import check
from megakd.config.parsing import parse
from megakd.config.run import RunConfig
from megakd.data.shards import read_manifest
from megakd.models.loading import load_model
from megakd.models.tiny import train_tokenizer
from megakd.report.describe import describe_run
from megakd.report.memory import fits
from megakd.report.plan import lengths
from megakd.run import Run
from megakd.train.memory import training_peak
from tests.commands.test_plan import ENTRIES, PUBLISHED
from tests.conftest import ROOT, VOCABULARY, make_teacher, metrics
from tests.objectives.sar import dense_student
from tests.tools.examples import refused, tool

module = tool("compat/train_student_aware")
SHIPPED = ROOT / "launch" / "student-aware.json"
QUIET = ["log.tensorboard=false", "data.holdout_tokens=1000"]
PARTS = {"kl", "feature", "attention", "layers", "contrastive", "capacity", "experts", "gap_loss", "importance_loss"}


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("student")
    dense_student().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(teacher, student, tmp_path) -> dict[str, Any]:
    """Keys of a run in steps of 8 windows of 32 tokens."""
    return {
        "_comment": "a note",
        "comment_2": ["another"],
        "teacher_model": str(teacher),
        "student_model": str(student),
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_length": 32,
        "learning_rate": 1e-2,
        "num_epochs": 1,
        "eval_steps": 2,
        "warmup_steps": 1,
        "checkpoint_dir": str(tmp_path / "out"),
        "use_amp": False,
    }


def argv_of(small: dict[str, Any], tmp_path: Path, *more: str, **changes: Any) -> list[str]:
    """The command line for these keys, in a file."""
    (tmp_path / "config.json").write_text(json.dumps({**small, **changes}))
    return ["--config", str(tmp_path / "config.json"), *QUIET, *more]


@pytest.fixture
def text(recipe) -> str:
    return str(recipe.parent / "text.jsonl")


def settings_of(argv: list[str]) -> tuple[Any, Any]:
    args = module.build_parser().read(argv, greedy="datasets")
    return args, module.read_settings(args)


def config_of(argv: list[str]) -> RunConfig:
    args, settings = settings_of(argv)
    seed = module.SEED if args.seed is None else args.seed
    return parse(module.recipe(settings, Path("out"), "text", seed), "flags")


def test_a_config_trains_exports_measures_and_resumes(small, text, tmp_path, capsys):
    argv = argv_of(small, tmp_path, "--datasets", text, dataset_subset_size=20, num_experts=4, top_k=2)
    module.main(argv)
    printed, run = capsys.readouterr(), Run.open(tmp_path / "out")
    rows = metrics(run.folder)
    assert rows[0].keys() > PARTS and rows[-1]["loss"] < rows[0]["loss"]
    windows = read_manifest(run.path("data", "tokens", "train"))["windows"]
    assert len(rows) == -(-windows // 8)
    # plan and inspect name the steps of the data that exists, not of data.tokens
    assert ["stage online", f"{len(rows)} steps of 256 tokens"] == [
        lengths(run)[-1][0],
        lengths(run)[-1][1].split(",")[0],
    ]
    assert f"stage online: {len(rows)} steps of 256 tokens" in describe_run(run)
    assert run.config.objective.alpha == 1.0 and rows[0]["ce"] > 0
    assert AutoModelForCausalLM.from_pretrained(run.path("student")).config.model_type == "llama"
    assert not run.path("router_update.pt").exists()
    assert "\nonline/step-000002 " in printed.out and "KL to teacher" in printed.out
    assert "no effect" not in printed.err and "the teacher's to say" not in printed.err
    assert f"{text}: the first 20 documents" in printed.err
    (documents,) = run.folder.glob("documents-*.jsonl")
    lines = Path(text).read_text().splitlines()[:20]
    assert [json.loads(line) for line in documents.read_text().splitlines()] == [json.loads(line) for line in lines]

    module.main([*argv, "--resume", str(run.path("checkpoint_epoch_1.pt"))])  # the newest one
    assert metrics(run.folder) == rows
    assert "no such checkpoint" in refused(module, capsys, *argv, "--resume", run.path("checkpoint_epoch_2"))
    assert "data.source of the existing run" in refused(module, capsys, *argv, "--datasets", text, text)
    assert "optim.lr of the existing run is 0.01, asked for is 0.1" in refused(
        module, capsys, *argv, "--learning-rate", "0.1"
    )


def test_the_shipped_config_runs(teacher, student, text, tmp_path, capsys):
    """With models, sizes and data of a test, by overrides."""
    sizes = ["data.sequence_length=32", "optim.batch_tokens=256", "optim.micro_batch=4", "model.dtype=float32"]
    sizes += [f"model.teacher={teacher}", f"model.student={student}", 'stages=[{"name": "online", "steps": 3}]']
    sizes += ["objective.final_top_k=6"]
    folder = ["--output_dir", str(tmp_path / "out"), "--skip-eval"]
    module.main(["--config", str(SHIPPED), "--datasets", text, *QUIET, *sizes, *folder])
    printed, run = capsys.readouterr(), Run.open(tmp_path / "out")
    assert len(metrics(run.folder)) == 3 and metrics(run.folder)[0].keys() > PARTS
    assert load_model(run.path("student"), torch.float32).config.model_type == "llama"
    assert "evaluate" not in printed.out and not run.path("evals.jsonl").exists()
    assert "num_experts and top_k are the teacher's to say: 2 routers, 2 of 4 experts" in printed.err
    assert "\nfinal_top_k=6: a token takes at most the teacher's 4 experts\n" in printed.err
    assert f"{text}: all 60 documents" in printed.err


def test_the_shipped_config_fits_a_card_of_16_gb():
    settings = module.Settings.model_validate(
        {k: v for k, v in json.loads(SHIPPED.read_text()).items() if not k.startswith("_")}
    )
    config = parse(module.recipe(settings, Path("out"), "text", 0), str(SHIPPED))
    assert config.model.student is not None
    student, teacher = (PUBLISHED[name] for name in (config.model.student, config.model.teacher))
    peak = training_peak(config, config.stages[0], student, teacher, ENTRIES[student.vocab_size])
    assert fits(peak.total).startswith("a card of 16 GB"), peak


def test_the_recipe_says_what_the_keys_say(small, tmp_path):
    changes = {
        "alpha_kd": 0.6, "alpha_feature": 0.2, "alpha_attention": 0.3, "alpha_layerwise": 0.04, "max_grad_norm": 0.5,
        "alpha_contrastive": 0.02, "contrastive_temp": 0.2, "initial_top_k": 2, "final_top_k": 3, "temperature": 3,
        "weight_decay": 0.2, "scheduler_type": "linear", "use_gradient_checkpointing": True, "num_workers": 3,
        "use_amp": True, "amp_dtype": "float16", "use_wandb": True, "project_name": "mine", "num_epochs": 2,
        "use_temperature_curriculum": True, "min_temperature": 1.5, "router_lr": 0.02, "load_balance_weight": 0.3,
    }  # fmt: skip
    config = config_of([*argv_of(small, tmp_path, **changes), "--batch-size", "2", "--epochs", "0.5", "--seed", "7"])
    online, optim = config.objective, config.optim
    weights = online.kl, online.feature, online.attention, online.layers, online.contrastive
    assert weights == (0.6, 0.2, 0.3, 0.04, 0.02)
    assert (online.contrastive_temperature, online.routing, online.progressive_layers) == (0.2, "learned", True)
    assert (online.router_lr, online.router_balance, online.gap, online.importance) == (0.02, 0.3, 1, 1)
    assert (online.initial_top_k, online.final_top_k) == (2, 3)
    assert (config.objective.kind, config.objective.alpha, config.objective.temperature) == ("online", 1.0, (3.0, 1.5))
    assert (optim.lr, optim.weight_decay, optim.clip_norm, optim.schedule, optim.warmup_steps) == (
        1e-2, 0.2, 0.5, "linear", 1,
    )  # fmt: skip
    assert (optim.batch_tokens, optim.micro_batch, config.data.sequence_length) == (2 * 2 * 32, 2, 32)
    assert (config.stages[0].epochs, config.seed, config.stream.workers) == (0.5, 7, 3)
    assert (config.model.dtype, config.engine.kind, config.engine.activation_checkpointing) == (
        "float16",
        "local",
        True,
    )
    assert (config.checkpoint.every_steps, config.log.wandb, config.log.wandb_project) == (2, "online", "mine")


def test_defaults_of_the_keys(tmp_path):
    config = config_of(argv_of({}, tmp_path))
    online, optim = config.objective, config.optim
    weights = online.kl, online.feature, online.attention, online.layers, online.contrastive
    assert weights == (0.7, 0.1, 0.1, 0.05, 0.05) and online.contrastive_temperature == 0.07
    assert (optim.lr, optim.weight_decay, optim.clip_norm, optim.warmup_steps) == (5e-5, 0.01, 1.0, 500)
    assert (config.windows_per_step, optim.micro_batch, config.data.sequence_length) == (32, 4, 512)
    assert (config.stages[0].epochs, config.objective.temperature) == (3, 4.0)
    assert (config.checkpoint.every_steps, config.checkpoint.every_epochs) == (500, 1)
    assert (online.initial_top_k, online.final_top_k, config.seed, config.log.wandb) == (1, 4, 42, "disabled")
    assert (online.router_lr, online.router_balance, online.gap, online.importance) == (1e-4, 0.01, 1, 1)
    off = config_of(argv_of({}, tmp_path, alpha_kd=0, alpha_layerwise=0)).objective
    assert (off.gap, off.progressive_layers) == (0, False)
    args, settings = settings_of(argv_of({}, tmp_path))
    assert (settings.checkpoint_dir, settings.dataset_subset_size) == ("./checkpoints", 50000)
    assert (config.model.dtype, config.engine.activation_checkpointing, args.datasets) == ("bfloat16", False, [])


def test_phases_are_three_stages_whose_temperature_goes_on(small, tmp_path):
    argv = argv_of(small, tmp_path, num_epochs=3, temperature=4, use_temperature_curriculum=True)
    args, settings = settings_of([*argv, "--phases"])
    config = parse(module.recipe(settings, Path("out"), "text", 0, args.phases), "flags")
    stages = [(stage.name, stage.epochs, config.at(stage).objective) for stage in config.stages]
    assert [each[:2] for each in stages] == [(f"online-{name}", 1.0) for name in ("basic", "aligned", "all")]
    parts = ("kl", "feature", "attention", "layers", "contrastive")
    assert [[name for name in parts if getattr(each, name)] for *_, each in stages] == [["kl"], [*parts[:3]], [*parts]]
    assert [each.temperature for *_, each in stages] == [(4, 3), (3, 2), (2, 1)]
    check(config, "flags")


def test_keys_without_effect_are_named_in_one_line(small, tmp_path, capsys):
    """Once each, and only where something else is asked for than what happens in any case."""

    def said(**changes: Any) -> list[str]:
        argv = argv_of(small, tmp_path, **changes)
        module.warn(settings_of(argv)[1], config_of(argv))
        return capsys.readouterr().err.splitlines()

    every = {name: value for names in module.UNUSED.values() for name, value in names.items()}
    asked = {name: True if value is False else False if value is True else 3 for name, value in every.items()}
    asked |= {"log_dir": "a", "cache_dir": "b"}
    assert said(**asked) == [f"no effect here: {', '.join(every)}; --help says why"]
    assert said(**{name: value for name, value in every.items() if value is not ...}) == []
    assert said(min_temperature=2.0) == ["no effect here: min_temperature; --help says why"]
    assert said(min_temperature=2.0, use_temperature_curriculum=True) == []
    assert set(every) < set(module.Settings.model_fields)


def test_several_data_sets_are_cut_alike(small, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("\n\n\n".join(f"Document {number} is about numbers." for number in range(5)))
    argv = argv_of(small, tmp_path, "--skip-eval", 'stages=[{"name": "online", "steps": 1}]', dataset_subset_size=30)
    module.main([*argv, "--datasets", text, str(other), "log.every_steps=1"])
    said = capsys.readouterr().err
    assert f"{text}: the first 30 documents" in said and f"{other}: all 5 documents" in said
    run = Run.open(tmp_path / "out")
    assert run.config.log.every_steps == 1
    lines = Path(run.config.data.source).read_text().splitlines()
    assert len(lines) == 35 and json.loads(lines[-1]) == {"text": "Document 4 is about numbers."}


def test_published_names_of_data_sets_are_read_in_their_configurations(small, tmp_path, monkeypatch, capsys):
    asked = []

    def iter_documents(name: str, subset: str | None, *_: object, revision: str | None) -> list[str]:
        asked.append((name, subset, revision))
        return [f"A document of {name}."]

    monkeypatch.setattr(module, "iter_documents", iter_documents)
    monkeypatch.setattr(module, "to_the_end", lambda *_, **__: None)
    argv = argv_of(small, tmp_path, "--datasets", "wikitext", "openwebtext", "allenai/c4", "data.revision=main")
    for _ in range(2):
        module.main(argv)
    assert asked == [
        ("wikitext", "wikitext-103-raw-v1", "main"), ("openwebtext", None, None), ("allenai/c4", "en", None),
    ]  # fmt: skip
    assert Run.open(tmp_path / "out").config.data.revision is None
    assert capsys.readouterr().err.count("data.revision=main: for wikitext alone, the first of --datasets") == 2


def test_wandb_without_a_login_is_refused_before_documents_are_read(small, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megakd.tracking._logged_in", lambda: False)
    argv = argv_of(small, tmp_path, "--datasets", text, "--use-wandb")
    said = refused(module, capsys, *argv, "--project-name", "my-distillation")
    assert "log.wandb=online: no login to W&B is known here; run `wandb login`" in said
    assert not list((tmp_path / "out").glob("documents-*"))


def test_without_a_number_of_documents_one_data_set_is_read_in_its_place(small, text, tmp_path, capsys):
    argv = argv_of(small, tmp_path, "--skip-eval", 'stages=[{"name": "online", "steps": 1}]', dataset_subset_size=None)
    said = refused(module, capsys, *argv, "--datasets", text, text)
    assert "--datasets: 2 of them need dataset_subset_size" in said and not (tmp_path / "out").exists()
    module.main([*argv, "--datasets", text])
    assert Run.open(tmp_path / "out").config.data.source == text
    assert not list((tmp_path / "out").glob("documents-*"))


def test_a_teacher_with_another_tokenizer_teaches_over_spans(small, text, tmp_path, documents, capsys):
    tokenizer = train_tokenizer([each.upper() + each for each in documents[:20]], VOCABULARY)
    place = make_teacher(tmp_path / "other", tokenizer, documents, seed=3, steps=1)
    more = ("--datasets", text, 'stages=[{"name": "online", "steps": 2}]')
    module.main(argv_of(small, tmp_path, *more, teacher_model=str(place)))
    printed = capsys.readouterr().out
    assert "generate-logits" not in printed and "\nonline/step-000002 " in printed
    assert metrics(tmp_path / "out")[0].keys() > {"span_kl", *PARTS} - {"kl"}


def test_a_teacher_without_experts_is_refused(small, text, tmp_path, capsys):
    """But where nothing asks for experts."""
    argv = argv_of(small, tmp_path, "--datasets", text, "--skip-eval", teacher_model=small["student_model"])
    assert "no module with a matrix [experts, hidden]" in refused(module, capsys, *argv)
    assert not (tmp_path / "out").exists()
    plain = ["objective.routing=trained", "objective.importance=0"]
    module.main([*argv, *plain, 'stages=[{"name": "online", "steps": 1}]'])
    assert len(metrics(tmp_path / "out")) == 1


def test_mistakes_before_anything_was_made_can_be_mended(small, text, tmp_path, capsys):
    argv = argv_of(small, tmp_path, "--skip-eval", 'stages=[{"name": "online", "steps": 1}]')
    assert "no file at nowhere.jsonl" in refused(module, capsys, *argv, "--datasets", "nowhere.jsonl")
    assert "cannot open 'wikitext' as a file or a hub data set" in refused(module, capsys, *argv)
    assert Run.open(tmp_path / "out").config.data.subset is None
    module.main([*argv, "--datasets", text])
    assert len(metrics(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    "changes, more, said",
    [
        ({"alpha_features": 0.1}, "", "unknown key 'alpha_features'; did you mean 'alpha_feature'?"),
        ({"zzz": 0.1, "batch_size": 0}, "", "unknown key 'zzz'; --help lists the known ones"),
        ({"batch_size": 0}, "", "batch_size: input should be greater than or equal to 1, got 0"),
        ({"alpha_kd": -1}, "", "alpha_kd: input should be greater than or equal to 0, got -1"),
        ({"router_lr": 0}, "", "router_lr: input should be greater than 0, got 0"),
        ({"amp_dtype": "int8"}, "", "amp_dtype: input should be 'bfloat16' or 'float16', got \"int8\""),
        ({"use_amp": "perhaps"}, "", "use_amp: input should be a valid boolean"),
        ({"max_length": 100000}, "", "max_length: input should be less than or equal to 65535"),
        ({"teacher_model": "./nowhere"}, "", "teacher_model ./nowhere: not a model folder"),
        ({"student_model": "./nowhere"}, "", "student_model ./nowhere: not a model folder"),
        ({}, "--epochs 0", "argument --epochs: must be a number above 0, got '0'"),
        ({}, "--nothing 1", "unrecognized arguments: --nothing"),
        ({}, "--config nowhere.json", "nowhere.json: no such file"),
        ({}, "log.wandbs=disabled", "unknown key 'log.wandbs'; did you mean 'wandb'?"),
        ({}, "objective.kind=sar", "engine.kind and objective.kind: are local and online here"),
    ],
)
def test_bad_values_are_one_line(small, tmp_path, changes, more, said, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main([*argv_of(small, tmp_path, **changes), *shlex.split(more)])
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert ended.value.code == 2 and not printed.out
    assert line.startswith("train_student_aware: ") and said in line
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_no_object_and_a_missing_one(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    assert "a JSON object of keys and values, not list" in refused(module, capsys, "--config", tmp_path / "list.json")


def test_help_lists_keys_with_defaults_and_what_has_no_effect(capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(name in text for name in module.Settings.model_fields)
    assert all(why in " ".join(text.split()) for why in module.UNUSED)
