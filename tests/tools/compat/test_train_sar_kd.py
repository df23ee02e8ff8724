import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megakd.config.parsing import load_recipe, parse
from megakd.config.run import RunConfig
from megakd.data.shards import ShardSet
from megakd.models.loading import load_model
from megakd.models.tiny import train_tokenizer
from megakd.run import Run
from megakd.system.files import read_json, read_json_lines
from tests.conftest import ROOT, VOCABULARY, make_teacher, metrics, run_to_end
from tests.objectives.sar import dense_student
from tests.tools.examples import refused, tool

module, apply_router_update = tool("compat/train_sar_kd"), tool("compat/apply_router_update")
QUIET = ("log.wandb=disabled", "log.tensorboard=false")
TEACHER, STUDENT = "huihui-ai/Huihui-MoE-1B-A0.6B", "HuggingFaceTB/SmolLM-135M"

# as single-file scripts document them; where they run a folder of each name lies in the place of the hub's
PUBLISHED = {
    "whole": f"--teacher_model {TEACHER} --student_model {STUDENT} --dataset_name wikitext "
    "--dataset_config_name wikitext-103-raw-v1 --block_size 1024 --train_steps 1000 --per_device_batch_size 1 "
    "--grad_accum_steps 8 --student_lr 1e-4 --router_lr 5e-4 --temperature 2.0 --alpha_kd 0.9 --alpha_ce 0.1 "
    "--router_anchor_weight 1e-4 --router_load_balance_weight 1e-3 --router_entropy_weight 1e-4 --eval_steps 200 "
    "--save_steps 500 --output_dir outputs/sar_kd",
    "float16": f"--teacher_model {TEACHER} --student_model {STUDENT} --model_dtype float16 --per_device_batch_size 1 "
    "--grad_accum_steps 16 --block_size 512 --train_steps 1000 --output_dir outputs/sar_kd_fp16",
    "schedule": f"--teacher_model {TEACHER} --student_model {STUDENT} --model_dtype float16 --per_device_batch_size 2 "
    "--grad_accum_steps 8 --block_size 1024 --train_steps 1000 --use_scheduler --warmup_steps 100 "
    "--scheduler_type cosine --router_patterns gate router --output_dir outputs/sar_kd_opt",
    "memory": f"--teacher_model {TEACHER} --student_model {STUDENT} --offload_teacher_to_cpu "
    "--clear_cache_every_step --no_aggressive_gc --output_dir outputs/sar_kd_memory",
}
# what a test can wait for: 4 steps of 8 windows of 32 tokens
TINY = shlex.split(
    f"{' '.join(QUIET)} --block_size 32 --per_device_batch_size 4 --grad_accum_steps 2 --train_steps 4 --eval_steps 2 "
    "--save_steps 2 --eval_tokens 1000 --logging_steps 1"
)


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("student")
    dense_student().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(teacher, student, recipe, tmp_path, monkeypatch) -> Path:
    """The working directory, with small folders under the names that published command lines give."""
    for name, target in ((TEACHER, teacher), (STUDENT, student)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(target)
    (tmp_path / "wikitext").mkdir()
    shutil.copyfile(recipe.parent / "text.jsonl", tmp_path / "wikitext" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def flags(teacher, student, recipe, tmp_path) -> list[str]:
    text = recipe.parent / "text.jsonl"
    places = (
        f"--teacher_model {teacher} --student_model {student} --dataset_name {text} --output_dir {tmp_path / 'out'}"
    )
    return [*TINY, *shlex.split(places), "--student_lr", "1e-2", "--router_lr", "2e-3"]


def train(argv: list[str], *more: str) -> Run:
    module.main([*argv, *more])
    return Run.open(Path(argv[argv.index("--output_dir") + 1]))


def config_of(argv: list[str], *more: str) -> RunConfig:
    args = module.build_parser().read([*argv, *more], greedy="router_patterns")
    value = module.recipe(args)
    assert json.loads(json.dumps(value)) == value
    return parse(value, "flags")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command_lines(name, hub, capsys):
    """As they stand, made small by flags after them; what the scripts promise is there."""
    run = train(shlex.split(PUBLISHED[name]), *TINY)
    printed = capsys.readouterr()
    rows = metrics(run.folder)
    assert len(rows) == 4 and rows[0]["router_anchor"] == 0 < rows[-1]["router_anchor"]
    found = {row["model"]: row["perplexity"] for row in read_json_lines(run.path("evals.jsonl"))}
    measured = {f"sar/step-{row['step']:06d}": row.get("validation_perplexity") for row in rows if row["step"] % 2 == 0}
    close = 1e-5 if run.config.model.dtype == "float32" else 1e-2
    assert measured == pytest.approx({model: found.get(model) for model in measured}, rel=close)
    said = [line for line in printed.err.splitlines() if line.startswith("train: step 2: validation perplexity")]
    assert len(said) == 1
    assert found["teacher"] < found["sar/step-000004"] < found["student-0"]
    student = AutoModelForCausalLM.from_pretrained(run.folder / "student")
    assert student.config.model_type == "llama" and len(AutoTokenizer.from_pretrained(run.folder / "student")) > 300
    before = load_model(hub / TEACHER, torch.float32).state_dict()
    update = torch.load(run.folder / "router_update.pt", weights_only=True)
    assert len(update) == 2 and all(update[n].shape == before[n].shape for n in update)
    assert all(0 < (update[n].float() - before[n]).abs().max() < 0.01 for n in update)
    apply_router_update.main([TEACHER, str(run.folder / "router_update.pt"), "new"])
    assert load_model(hub / "new", torch.float32).config.model_type == "qwen3_moe"
    assert set(found) == {"teacher", "student-0", "sar/step-000002", "sar/step-000004"}
    assert all(f"\n{model} " in printed.out for model in found)
    assert f"student: {run.folder / 'student'}" in printed.out
    assert "train_sar_kd: learns 2 routers, 2 of 4 experts: model.layers.0.mlp.gate" in printed.err
    collapse = [line for line in printed.err.splitlines() if line.startswith("--router_lr 0.0005 is above")]
    assert len(collapse) == (name == "whole")


def test_published_command_lines_say_what_has_no_effect(hub, capsys):
    said = {}
    for name, line in PUBLISHED.items():
        args = module.build_parser().read(shlex.split(line), greedy="router_patterns")
        module.warn(args, module.recipe(args))
        said[name] = [each for each in capsys.readouterr().err.splitlines() if each.startswith("no effect")]
    vain = "no effect here: {}; --help says why"
    assert said.pop("whole") == [vain.format("--dataset_config_name")]
    assert said.pop("memory") == [vain.format("--clear_cache_every_step, --no_aggressive_gc")]
    assert said == {"float16": [], "schedule": []}


def test_the_same_command_resumes(flags, teacher, tmp_path, capsys, monkeypatch):
    """As a script of its own, then from elsewhere: after the checkpoint of step 2, then with nothing left to do."""
    monkeypatch.chdir(tmp_path)
    said = run_to_end(1, ROOT / "tools" / "compat" / "train_sar_kd.py", *flags)
    run = Run.open(tmp_path / "out")
    verbs = f"megakd run {run.folder} --until evaluate && megakd export {run.folder} --out {run.folder / 'student'}"
    assert said.startswith(f"recipe: {run.folder / 'recipe.json'}\nto go on by hand: {verbs}\n")
    rows, measured = metrics(run.folder), (run.folder / "evals.jsonl").read_text()
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] < rows[0]["loss"]
    assert {row["lr"] for row in rows} == {1e-2}  # constant without --use_scheduler
    update = load_file(run.folder / "router_update.safetensors")
    for name, tensor in load_model(teacher, torch.float32).state_dict().items():
        if name in update:  # Adam's steps at the routers' rate
            assert 0 < (tensor - update[name]).abs().max() <= 4 * 2e-3 * 1.01

    (run.folder / "checkpoints" / "sar" / "step-000004").rename(tmp_path / "away")
    (run.folder / "student" / "model.safetensors").unlink()
    (run.folder / "router_update.pt").write_bytes(b"cut short")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert metrics(train(flags).folder) == rows
        for again in (
            load_file(run.folder / "router_update.safetensors"),
            torch.load(run.folder / "router_update.pt", weights_only=True),
        ):
            assert again.keys() == update.keys() and all(torch.equal(again[n], update[n]) for n in update)
        assert load_model(run.folder / "student", torch.float32).config.model_type == "llama"
        assert (run.folder / "evals.jsonl").read_text() == measured
    resumed = [event["resumed"] for event in run.events("train")]
    assert [place and Path(place).name for place in resumed] == [None, "step-000002"]  # finished verbs do not start
    assert len(run.events("new")) == 1 and load_recipe(run.folder / "recipe.json") == run.config
    assert not list(run.folder.glob("*.tmp-*"))


def test_the_recipe_says_what_the_flags_say(flags, student):
    more = "--alpha_kd 3 --alpha_ce 1 --router_anchor_weight 0.4 --router_entropy_weight 0.04 --temperature 1.5 "
    more += "--router_load_balance_weight 0.08 --routing top_m --initial_top_k 2 --final_top_k 3 --weight_decay 0.2 "
    more += "--use_scheduler --warmup_steps 2 --scheduler_type linear --max_grad_norm 0.5 --gradient_checkpointing "
    more += "--seed 7 --train_tokens 2e3 --dataset_split a --text_field body --save_steps 3 --model_dtype float16 "
    more += "--offload_teacher_to_cpu --router_patterns gate$ router data.workers=1"
    config = config_of(flags, *shlex.split(more))
    sar, optim, data = config.objective, config.optim, config.data
    assert (config.objective.kind, config.objective.alpha, config.objective.temperature) == ("sar", 0.75, 1.5)
    assert (sar.anchor, sar.entropy, sar.balance) == (0.1, 0.01, 0.02)
    assert (sar.routing, sar.initial_top_k, sar.final_top_k) == ("top_m", 2, 3)
    assert sar.router_patterns == ("gate$", "router")
    assert (optim.lr, optim.weight_decay, optim.warmup_steps, optim.schedule) == (1e-2, 0.2, 2, "linear")
    assert (optim.batch_tokens, optim.micro_batch, config.windows_per_step, optim.clip_norm) == (256, 4, 8, 0.5)
    assert (data.subset, data.split, data.text_field, data.tokens, data.workers) == (None, "a", "body", 2000, 1)
    assert (data.sequence_length, data.holdout_tokens) == (32, 1000)
    (stage,) = config.stages
    assert stage.steps == 4 and not stage.lr_multipliers
    assert sar.router_lr_multiplier == pytest.approx(0.2)
    assert (config.engine.kind, config.engine.activation_checkpointing, config.seed) == ("local", True, 7)
    assert config.engine.offload_teacher
    assert (config.checkpoint.every_steps, config.log.every_steps, config.log.wandb) == (3, 1, "disabled")
    assert (config.eval.every_steps, config.objective.anchor_form) == (2, "absolute")
    assert (config.model.student, config.model.dtype) == (str(student), "float16")


def test_defaults_are_those_of_the_scripts_but_for_one(hub):
    config = config_of([])
    optim, data, sar = config.optim, config.data, config.objective
    assert (config.model.teacher, config.model.student) == tuple(str((hub / n).resolve()) for n in (TEACHER, STUDENT))
    assert (data.source, data.sequence_length, optim.micro_batch, config.windows_per_step) == (
        str(hub / "wikitext"), 1024, 1, 8,
    )  # fmt: skip
    assert (optim.lr, optim.weight_decay, optim.clip_norm) == (1e-4, 0.0, 1.0)
    assert (optim.schedule, optim.warmup_steps, config.stages[0].steps, data.tokens) == ("constant", 0, 1000, 8192000)
    assert (config.objective.alpha, config.objective.temperature) == (0.9, 2.0)
    assert (sar.balance, sar.entropy, sar.routing, sar.router_patterns) == (1e-3, 1e-4, "trained", ())
    assert (config.seed, config.model.dtype) == (42, "float32")
    assert (config.eval.every_steps, config.checkpoint.every_steps) == (200, 500)
    assert sar.router_lr_multiplier == pytest.approx(0.1) and (sar.anchor, sar.anchor_form) == (1e-4, "absolute")
    assert not config.engine.offload_teacher and config.engine.activation_checkpointing
    args = module.build_parser().read([], greedy="router_patterns")
    assert args.output_dir == Path("outputs/sar_kd")
    scheduled = config_of(["--use_scheduler"]).optim
    assert (scheduled.schedule, scheduled.warmup_steps) == ("cosine", 100)


@pytest.mark.parametrize("evals, saves, every", [(200, 500, 500), (200, 0, 1000), (0, 300, 300)])
def test_measurements_and_checkpoints_have_intervals_of_their_own(evals, saves, every, hub):
    config = config_of(["--eval_steps", str(evals), "--save_steps", str(saves)])
    assert (config.eval.every_steps, config.checkpoint.every_steps) == (evals, every)


def test_gradient_checkpointing_is_on_where_both_models_support_it(hub, monkeypatch, capsys):
    def said(*argv: str) -> tuple[bool, str]:
        args = module.build_parser().read(argv, greedy="router_patterns")
        value = module.recipe(args)
        module.warn(args, value)
        return value["engine"]["activation_checkpointing"], capsys.readouterr().err

    assert said()[0] and "gradient checkpointing is on: less memory, more time per step; off: --no_grad" in said()[1]
    assert said("--no_gradient_checkpointing") == (False, "") and said("--gradient_checkpointing") == (True, "")
    assert not said("engine.activation_checkpointing=false")[0]
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    assert not said()[0] and "gradient checkpointing is off; on, where both models support it" in said()[1]


def test_without_a_share_of_the_teacher_the_student_learns_from_cross_entropy_alone(flags, capsys):
    run = train(flags, "--alpha_kd", "0", "--eval_steps", "0", "--router_entropy_weight", "0.1")
    rows = metrics(run.folder)
    assert "objective.alpha=0: the student learns from cross entropy alone" in capsys.readouterr().err
    assert "validation_perplexity" not in rows[-1] and rows[-1]["ce"] < rows[0]["ce"]
    assert rows[0]["router_anchor"] == 0 < rows[-1]["router_anchor"]
    terms = {"ce": 1, "router_anchor": 1e-3, "router_certainty": 1, "router_balance": 1e-2}  # weights over alpha_ce
    assert rows[-1]["loss"] == pytest.approx(sum(w * rows[-1][name] for name, w in terms.items()), rel=1e-5)


def test_routers_may_be_frozen_and_data_few(flags, capsys):
    """In bfloat16, all experts a token."""
    more = "--train_tokens 1000 --model_dtype bfloat16 --router_lr 0 --gradient_checkpointing --routing all"
    run = train(flags, *shlex.split(f"{more} --initial_top_k 2"))
    assert "objective.initial_top_k=2 has no effect: objective.routing=top_m" in capsys.readouterr().err
    assert len(metrics(run.folder)) == 4 and len(ShardSet(run.path("data", "tokens", "train"))) == 32
    facts = read_json(run.path("router_update.json"))
    assert facts["routing"] == "all" and "initial_top_k" not in facts
    assert [router["change"] for router in facts["routers"].values()] == pytest.approx([0.0, 0.0], abs=2**-8)


def test_one_expert_of_weight_one_becomes_two(flags, tmp_path, tokenizer, documents, capsys):
    """Else nothing would reach the router: its only weight is x / x."""
    place = make_teacher(tmp_path / "one", tokenizer, documents, seed=5, steps=1, num_experts_per_tok=1)
    run = train(flags, "--teacher_model", str(place))
    sar = run.config.objective
    assert (sar.routing, sar.initial_top_k, sar.final_top_k) == ("top_m", 2, 2)
    assert "--routing top_m, 2 experts a token" in capsys.readouterr().err
    assert all(row["router_anchor"] > 0 for row in metrics(run.folder)[1:])
    for asked in (["--routing", "all"], ["objective.routing=all"]):
        assert config_of(flags, "--teacher_model", str(place), *asked).objective.routing == "all"
    assert "--routing" not in capsys.readouterr().err


def test_a_teacher_with_another_tokenizer(flags, tmp_path, documents, capsys):
    other = train_tokenizer([text.upper() + text for text in documents[:20]], VOCABULARY)
    place = make_teacher(tmp_path / "other", other, documents, seed=3, steps=1)
    run = train(flags, "--teacher_model", str(place))
    printed = capsys.readouterr().out
    assert "generate-logits" not in printed and "\nsar/step-000004 " in printed
    assert {"span_kl", "features"} <= metrics(run.folder)[0].keys() and not run.path("data", "logits").exists()
    assert len(torch.load(run.path("router_update.pt"), weights_only=True)) == 2


def test_live_flags_may_change_and_others_are_refused(flags, capsys):
    run = train(flags)
    live = ("--eval_steps", "1", "--save_steps", "1", "--per_device_batch_size", "2", "--grad_accum_steps", "4")
    train(flags, *live, "--offload_teacher_to_cpu")
    now = Run.open(run.folder).config
    assert (now.checkpoint.every_steps, now.optim.micro_batch, now.windows_per_step) == (1, 2, 8)
    assert now.eval.every_steps == 1
    assert now.engine.offload_teacher and load_recipe(run.folder / "recipe.json") == now
    said = refused(module, capsys, *flags, "--student_lr", "1e-3", "--router_lr", "2e-4")
    assert "optim.lr of the existing run is 0.01, asked for is 0.001; name another --output_dir" in said


def test_mistakes_before_anything_was_made_can_be_mended(flags, capsys):
    assert "data.source: no file at nowhere.jsonl" in refused(module, capsys, *flags, "--dataset_name", "nowhere.jsonl")
    assert "data.source: cannot open 'wikitext' as a file or a hub data set" in refused(
        module, capsys, *flags, "--dataset_name", "wikitext"
    )
    run = Run.open(Path(flags[flags.index("--output_dir") + 1]))
    assert (run.config.data.source, run.config.data.subset) == ("wikitext", "wikitext-103-raw-v1")
    assert len(metrics(train(flags, "--train_steps", "1").folder)) == 1


@pytest.mark.parametrize(
    "more, said",
    [
        ("--student_lr fast", "argument --student_lr: must be a number above 0, got 'fast'"),
        ("--student_lr 0", "argument --student_lr: must be a number above 0"),
        ("--temperature nan", "argument --temperature: must be a number above 0"),
        ("--router_lr -1", "argument --router_lr: must be a number from 0 on"),
        ("--train_steps 1.5", "argument --train_steps: must be a whole number from 1 on"),
        ("--eval_steps -1", "argument --eval_steps: must be a whole number from 0 on"),
        ("--train_tokens inf", "argument --train_tokens: must be a whole number from 1 on"),
        ("--alpha_kd 0 --alpha_ce 0", "--alpha_kd 0 and --alpha_ce 0: the student would learn nothing"),
        ("--routing some", "argument --routing: invalid choice: 'some'"),
        ("--scheduler_type constant", "argument --scheduler_type: invalid choice: 'constant'"),
        ("--model_dtype int8", "argument --model_dtype: invalid choice"),
        ("--block_size 100000", "--block_size: must be between 2 and 65535"),
        ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
        ("--train_step 4", "unrecognized arguments: --train_step"),
        ("--seed", "argument --seed: expected one argument"),
        ("--router_patterns '('", "is not a regular expression"),
        ("--router_patterns odd", "objective.router_patterns: 'odd' find no matrix in"),
        ("log.wandbs=disabled", "flags: unknown key 'log.wandbs'; did you mean 'wandb'?"),
        ("--router_patterns gate log.wandbs=no", "flags: unknown key 'log.wandbs'; did you mean 'wandb'?"),
        ("engine.kind=deepspeed", "engine.kind and objective.kind: are local and sar here"),
        ("--student_model ./nowhere", "student_model ./nowhere: not a model folder"),
        ("--teacher_model ./nowhere", "teacher_model ./nowhere: not a model folder"),
        ("--teacher_model no/where", "no/where: neither a folder nor a model the hub gives"),
        ("--teacher_model no/where", "; without a network: the path of a model folder"),
    ],
)
def test_bad_flags_are_one_line(flags, more, said, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main([*flags, *shlex.split(more)])
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert ended.value.code == 2 and not printed.out
    assert line.startswith("train_sar_kd: ") and said in line
    assert not Path(flags[flags.index("--output_dir") + 1]).exists()


def test_a_config_of_another_kind_is_not_taken_for_a_run(flags, teacher, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text((teacher / "config.json").read_text())
    assert "holds a config.json that this tool did not make" in refused(module, capsys, *flags)


def test_help_has_examples_and_says_what_alpha_is(capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "alpha = alpha_kd / (alpha_kd + alpha_ce)" in text
    assert "python tools/compat/train_sar_kd.py --teacher_model" in text
