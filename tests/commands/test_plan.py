"""The memory that `plan` predicts, against what a whole step of the local engine takes when it is really done."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from megakd.config.parsing import load_recipe
from megakd.config.run import RunConfig
from megakd.config.train import OptimConfig
from megakd.data.batches import to_device
from megakd.data.records import Batch, TeacherTargets
from megakd.data.shards import read_manifest
from megakd.models.hub import model_of
from megakd.models.memory import Peak
from megakd.models.offload import offload, offloaded
from megakd.models.quantizing import stored_as
from megakd.models.shared_core import PROJECTIONS, Form, SharedCoreExperts
from megakd.models.student import student_config as shared_core_config
from megakd.models.tiny import tiny_moe_config
from megakd.objectives.build import build
from megakd.report import memory, plan
from megakd.run import Run
from megakd.system.dist import World
from megakd.system.files import read_json
from megakd.system.text import short
from megakd.train.build import build_engine
from megakd.train.memory import LOSS, TEACHER_WEIGHTS, full_batch, full_targets, stored_facts, training_peak
from megakd.train.states import parameters_of
from tests.conftest import ROOT, in_process
from tests.models.students import make_model
from tests.objectives.sar import sar_recipe

VOCABULARY = 4000
FROZEN = [{"pattern": "embed_tokens|self_attn", "lr_multiplier": 0.0}]


def llama(**changes: Any) -> LlamaConfig:
    """4 layers, 2.1 M parameters."""
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
    return LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048,
        **{**sizes, **changes},
    )  # fmt: skip


def run_config(kind: str, dtype: str, length: int, micro: int, **sections: Any) -> RunConfig:
    value: dict[str, Any] = {
        "model": {"dtype": dtype},
        "data": {"sequence_length": length},
        "objective": {"kind": kind, "alpha": 0.7},
        "optim": {"micro_batch": micro, "batch_tokens": 2 * micro * length},
        "stages": [{"name": "all", "steps": 1}],
        "engine": {"kind": "local"},
    }
    for name, section in sections.items():
        value[name] = {**value.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig.model_validate(value)


def packed(batch: Batch) -> Batch:
    """Two documents a window, tokens of all kinds: what real windows are."""
    size, length = batch.tokens.shape
    positions = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)]).expand(size, -1)
    tokens, labels = (torch.randint(VOCABULARY, (size, length)) for _ in range(2))
    batch = batch._replace(tokens=tokens, labels=labels, position_ids=positions)
    if batch.paired is None:
        return batch
    sides = []
    for side in batch.paired[:2]:
        there = side.tokens.shape[1]
        spans = torch.arange(there).mul(length).div(there, rounding_mode="floor").expand(size, -1)
        tokens, labels = (torch.randint(VOCABULARY, (size, there)) for _ in range(2))
        sides.append(
            side._replace(
                tokens=tokens,
                labels=labels,
                position_ids=torch.arange(there).expand(size, -1),
                spans=spans,
                label_spans=spans,
            )
        )
    return batch._replace(paired=batch.paired._replace(student=sides[0], teacher=sides[1]))


def cached_targets(facts: dict[str, Any], size: int, length: int) -> TeacherTargets:
    """The same places as in the prediction, with a distribution: distinct ids, half of the mass stored."""
    targets, top_k = full_targets(facts, size, length), facts["top_k"]
    targets.ids.copy_(torch.arange(top_k))
    targets.logprobs.fill_(-math.log(2 * top_k))
    targets.log_tails.fill_(math.log(0.5))
    return targets


def real_step(
    config: RunConfig,
    teacher_config: Any,
    other: int | None,
    device: str = "cpu",
    foreach: bool | None = None,
    student_config: Any = None,
) -> tuple[Any, Any]:
    """(engine, a step that is done as train does it), after one step, with all that training holds."""
    torch.manual_seed(0)
    stage = config.stages[0]
    student = AutoModelForCausalLM.from_config(student_config or llama())
    facts, teacher = stored_facts(config, VOCABULARY), None
    if config.objective.live:
        facts = {"tokenizer": {"vocab_size": VOCABULARY}}
        teacher = AutoModelForCausalLM.from_config(teacher_config, dtype=getattr(torch, config.model.dtype))
    if teacher and config.engine.offload_teacher:
        offload(teacher, torch.device(device))
    elif teacher:
        teacher.to(device)
    objective = build(config, student, teacher, facts, other)
    for name, parameter in objective.named_parameters():
        if not name.startswith("student."):
            parameter.data = parameter.data.to(device, torch.float32)
    engine = build_engine(config, objective, stage, World(0, 1, torch.device(device)))
    size, length = config.optim.micro_batch, config.data.sequence_length
    batch = packed(full_batch(size, length, other is not None))
    if not config.objective.live:
        batch = batch._replace(targets=cached_targets(facts, size, length))
    batch = to_device(batch, torch.device(device))
    for group in engine.optimizer.param_groups:
        group["foreach"] = foreach
    objective.at(1.0, 0)

    def step() -> None:
        engine.step([batch] * 2, 2 * size * length, 1.0, norms=True)

    step()
    return engine, step


def measured_peak(config: RunConfig, teacher_config: Any, other: int | None, **changes: Any) -> int:
    """Bytes held before a step, of every storage; and the most more that the allocator of the CPU gave out in it.

    The profiler sees each allocation, also what kernels take for themselves: an instrument that shares nothing with
    the one that predicts.
    """
    engine, step = real_step(config, teacher_config, other, **changes)
    held = [*engine.objective.parameters(), *engine.objective.buffers()]
    if config.objective.live:
        teacher = engine.objective.held[0]
        away = offloaded(teacher) if config.engine.offload_teacher else ()
        held += [tensor for tensor in (*teacher.parameters(), *teacher.buffers()) if id(tensor) not in away]
    else:
        held += engine.objective.head.head.buffers_made.values()
        held += full_targets(stored_facts(config, VOCABULARY), config.optim.micro_batch, config.data.sequence_length)
    held += [p for module in getattr(engine.objective, "initial", ()) for p in module.parameters()]
    held += [moment for state in engine.optimizer.state.values() for moment in state.values()]
    before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    more = most = 0
    events: Any = watched.profiler
    changes = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        more += event.nbytes()
        most = max(most, more)
    return before + most


def predicted_peak(
    config: RunConfig, teacher: Any, other: int | None, gpu: bool = False, student_config: Any = None
) -> Peak:
    teacher = teacher if config.objective.live else None
    return training_peak(config, config.stages[0], student_config or llama(), teacher, VOCABULARY, other, gpu)


CHECKPOINTED = {"engine": {"activation_checkpointing": True}}
SETTINGS = {
    "cached, bfloat16": run_config("cached", "bfloat16", 256, 4, objective={"temperature": 2.0}),
    "sar, float16 with its scaler": run_config("sar", "float16", 64, 2),
    "sar, checkpointed, all experts": run_config(
        "sar", "float32", 192, 2, **CHECKPOINTED, objective={"routing": "all"}
    ),
    "sar, a part frozen": run_config(
        "sar", "bfloat16", 128, 4, stages=[{"name": "all", "steps": 1, "lr_multipliers": FROZEN}]
    ),
    "sar, teacher offloaded": run_config("sar", "bfloat16", 128, 2, engine={"offload_teacher": True}),
    "online, teacher offloaded": run_config(
        "online", "float32", 128, 2, engine={"offload_teacher": True}, objective={"attention": 0}
    ),
    "online with attention": run_config("online", "float32", 192, 4),
    "online, bfloat16, a learned router": run_config(
        "online", "bfloat16", 128, 4, **CHECKPOINTED, objective={"gap": 1.0, "importance": 0.5, "routing": "learned"}
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_what_a_real_step_takes(name: str):
    """The same count within 1 %, of more than 70 MB: all that is left is what kernels take for themselves."""
    config, teacher = SETTINGS[name], tiny_moe_config(VOCABULARY)
    peak = predicted_peak(config, teacher, None)
    assert sum(peak.parts.values()) == peak.total > 70e6
    assert peak.total == pytest.approx(measured_peak(config, teacher, None), rel=0.01)


@pytest.mark.parametrize("kind", ["sar", "online"])
def test_over_spans_it_is_near_too(kind):
    """Of a teacher with another tokenizer: a quarter more tokens, and spans as many as the student's tokens."""
    config, teacher = run_config(kind, "bfloat16", 256, 4), tiny_moe_config(VOCABULARY)
    measured = measured_peak(config, teacher, VOCABULARY)
    assert predicted_peak(config, teacher, VOCABULARY).total == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_other_families_can_be_teachers(family: str):
    """Experts of another kind, layers without experts, another attention: nothing of it is written down anywhere."""
    teacher = make_model(family).config
    teacher.vocab_size = VOCABULARY
    config = run_config("sar", "bfloat16", 192, 4)
    assert predicted_peak(config, teacher, None).total == pytest.approx(measured_peak(config, teacher, None), rel=0.05)


def test_a_student_of_shared_cores_is_near():
    """Its experts are a loop here and grouped products on a GPU; the prediction is of these."""
    teacher, config = tiny_moe_config(VOCABULARY), run_config("online", "bfloat16", 128, 4, objective={"attention": 0})
    layers = {i: {p: Form("wrappers", 16, 16) for p in PROJECTIONS} for i in range(teacher.num_hidden_layers)}
    student = shared_core_config(teacher, layers)
    predicted = predicted_peak(config, teacher, None, student_config=student).total
    assert predicted == pytest.approx(measured_peak(config, teacher, None, student_config=student), rel=0.15)


def test_where_the_update_is_the_peak_a_gpu_takes_more():
    """AdamW over all parameters at once: their size again, for the denominators."""
    config, teacher = run_config("sar", "float32", 16, 1), tiny_moe_config(VOCABULARY, num_hidden_layers=1)
    wide = {"student_config": llama(hidden_size=384, intermediate_size=1536)}
    peak = predicted_peak(config, teacher, None, gpu=True, **wide)
    assert peak.parts["update"] > 15e6 and peak.total > predicted_peak(config, teacher, None, **wide).total + 10e6
    assert peak.total == pytest.approx(measured_peak(config, teacher, None, foreach=True, **wide), rel=0.01)


ON_A_GPU = """if True:
    import torch
    from megakd.models.tiny import tiny_moe_config
    from tests.commands.test_plan import SETTINGS, VOCABULARY, predicted_peak, real_step
    for name, config in SETTINGS.items():
        teacher = tiny_moe_config(VOCABULARY)
        engine, step = real_step(config, teacher, None, "cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        ratio = predicted_peak(config, teacher, None, gpu=True).total / torch.cuda.max_memory_allocated()
        print(name, ratio)
        assert 0.85 < ratio < 1.15, (name, ratio)
        del engine, step
"""


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU here")
def test_a_gpu_takes_as_much():
    """In a process of its own: these tests hide GPUs from this one."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


# As published: HuggingFaceTB/SmolLM2-135M and -360M, Qwen/Qwen3-0.6B; the teacher is three of its MLPs a layer.
SMOLLM2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
QWEN3 = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        **SMOLLM2,
    ),
    "HuggingFaceTB/SmolLM2-360M": LlamaConfig(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
        **SMOLLM2,
    ),
    "Qwen/Qwen3-0.6B": Qwen3Config(**QWEN3),
    "huihui-ai/Huihui-MoE-1B-A0.6B": Qwen3MoeConfig(
        **QWEN3, moe_intermediate_size=3072, num_experts=3, num_experts_per_tok=1, norm_topk_prob=True
    ),
}  # fmt: skip
ENTRIES = {49152: 49152, 151936: 151669}  # of the tokenizer, by rows of the head


@pytest.mark.parametrize("card", memory.CARDS)
def test_presets_fit_their_cards(card: int):
    config = load_recipe(ROOT / "launch" / "recipes" / f"sar-{card}gb.json")
    assert config.model.student is not None and memory.predictable(config)
    student, teacher = (PUBLISHED[name] for name in (config.model.student, config.model.teacher))
    mine, theirs = ENTRIES[student.vocab_size], ENTRIES[teacher.vocab_size]
    peak = training_peak(config, config.stages[0], student, teacher, mine, None if mine == theirs else theirs)
    assert peak.parts["weights of the student"] == pytest.approx(4 * SIZES[config.model.student], rel=0.01)
    assert peak.parts["weights of the teacher"] == pytest.approx(2 * SIZES[config.model.teacher], rel=0.01)
    assert memory.fits(peak.total).startswith(f"a card of {card} GB"), peak


# parameters, tied ones once
SIZES = {
    "HuggingFaceTB/SmolLM2-135M": 134.5e6, "HuggingFaceTB/SmolLM2-360M": 361.8e6, "Qwen/Qwen3-0.6B": 596.0e6,
    "huihui-ai/Huihui-MoE-1B-A0.6B": 1125e6,
}  # fmt: skip


@pytest.fixture(scope="module")
def live_run(tmp_path_factory, recipe, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    in_process("new", folder / "run", "--from", sar_recipe(recipe, folder, tokenizer))
    return folder / "run"


def test_plan_shows_parts_and_the_card(live_run, tmp_path):
    shown = in_process("plan", live_run)
    assert "data/logits/holdout" in shown and "data/logits/train" not in shown
    assert "training memory" in shown and "a card of 8 GB" in shown and "(stage " in shown
    assert "weights of the teacher" in shown and "moments of AdamW" in shown
    assert "cache" not in shown and "compress" not in shown and "CPU memory" not in shown
    away = in_process("plan", Run.create(live_run, ["engine.offload_teacher=true"], tmp_path / "away").folder)
    assert "besides, in CPU memory" in away and "GiB: the teacher's layers" in away


def test_plan_says_what_to_change_first(live_run, tmp_path, monkeypatch):
    run = Run.create(live_run, ["data.sequence_length=128", "optim.batch_tokens=1024"], tmp_path / "run")
    whole, one = (
        training_peak(config, config.stages[0], *memory.models_of(run)).total / memory.GIB / memory.SHARE
        for config in (run.config, run.config.model_copy(update={"optim": OptimConfig(micro_batch=1)}))
    )
    monkeypatch.setattr(memory, "CARDS", ((whole + one) / 2,))
    assert "set optim.micro_batch=1: " in memory.memory(run)[-1][1]
    monkeypatch.setattr(memory, "CARDS", (1e-6,))
    told = memory.memory(run)[-1][1]
    assert "even optim.micro_batch=1 and engine.activation_checkpointing=true and engine.offload_teacher=true" in told
    assert "take a smaller student or teacher" in told


def test_a_student_that_compress_makes_is_awaited_then_predicted(recipe, prepared, tmp_path):
    live = ["objective.kind=online", "objective.layers=0", "objective.attention=0"]
    in_process("new", tmp_path / "new", "--from", recipe, *live)
    assert memory.memory(Run.open(tmp_path / "new"))[0][1].startswith("known when there is a student; run: megakd comp")
    run = Run.create(prepared, live, tmp_path / "run")
    assert memory.memory(run)[-1][1].startswith("a card of 8 GB")
    cached = Run.create(prepared, [], tmp_path / "cached")
    assert [row[0] for row in memory.memory(cached)][-1] == "fits"
    assert {"  cached teacher logits", "  moments of AdamW"} <= {row[0] for row in memory.memory(cached)}


def rank_of(file: str, student: Any, **engine: Any) -> memory.Rank:
    deepspeed = read_json(ROOT / f"ds_configs/{file}.json")
    engine = {"kind": "deepspeed", "config": file, "ranks": 4, "deepspeed": deepspeed, **engine}
    config = run_config("cached", "bfloat16", 128, 2, engine=engine)
    model = model_of(student, "test")
    return memory.Rank(config, model, parameters_of(model, config.stages[0].lr_multipliers))


def test_a_rank_of_deepspeed_holds_its_share():
    """Two bytes a weight and a gradient, twelve of the optimizer, divided as the ZeRO stage says; the rest is one's."""
    wide = llama(hidden_size=768)  # no parameter but norms is below ZeRO-3's threshold
    count = sum(p.numel() for p in AutoModelForCausalLM.from_config(wide).parameters())
    peak = predicted_peak(SETTINGS["cached, bfloat16"], None, None, student_config=wide)
    for file, ranks in (("zero0", (1, 1, 1)), ("zero2", (1, 4, 4)), ("zero3", (4, 4, 4)), ("zero3_offload", (0, 0, 0))):
        rank = rank_of(file, wide)
        found = memory.shares_of_rank(rank, peak)
        weights, gradients, optimizer = ranks
        over = (weights, gradients, optimizer, optimizer)
        expected = [count * size / each if each else 0 for size, each in zip((2, 2, 4, 8), over, strict=True)]
        assert [found.pop(name) for name in list(found)[:4]] == pytest.approx(expected, rel=0.05), file
        assert found["cached teacher logits"] > 0
        added = [found.pop(name) for name in (memory.GATHERED, memory.BUCKETS, memory.EXCHANGE)]
        assert added[0] == (2 * count if file.startswith("zero3") else 0) and added[2] == 0
        assert added[1] == {"zero0": 0, "zero2": 3e8}.get(file, 2e8) and sum(found.values()) < peak.total
        host = count * 16 / 4 if file == "zero3_offload" else 0
        assert memory.host_bytes(rank, peak) == pytest.approx(host, rel=0.05)
    title = memory.per_rank(rank.config, {"all": peak}, wide)[0][1]
    assert "per GPU with ZeRO 3 on 4 ranks; of it:" in title


def test_a_divided_teacher_is_a_piece_and_what_is_gathered_of_it():
    peak = Peak(1000, {TEACHER_WEIGHTS: 800, LOSS: 200})
    rank = rank_of("zero2", llama())
    whole = memory.shares_of_rank(rank, peak)
    engine = rank.config.engine.model_copy(update={"teacher_parallel": "zero3"})
    parts = memory.shares_of_rank(rank._replace(config=rank.config.model_copy(update={"engine": engine})), peak)
    assert whole[TEACHER_WEIGHTS] == 800 and parts[TEACHER_WEIGHTS] == 200
    assert whole[memory.GATHERED] == 0 and parts[memory.GATHERED] == 800


def test_rows_of_expert_parallelism_are_counted():
    """docs/scaling.md: D 2048, F 768, 8 of 128 experts on 8 ranks: 5.3 rows of 2048 + 2 x 768 and 768 + 2048."""
    assert memory.rows_per_token(128, 8, 8) == pytest.approx(5.3, abs=0.05)
    assert memory.rows_per_token(4, 2, 4) == 2 and memory.rows_per_token(8, 8, 2) == 2
    teacher = tiny_moe_config(VOCABULARY)
    student = shared_core_config(teacher, {i: dict.fromkeys(PROJECTIONS, Form("wrappers", 4, 4)) for i in range(4)})
    experts = next(m for m in model_of(student, "test").modules() if isinstance(m, SharedCoreExperts))
    hidden, inner = teacher.hidden_size, teacher.moe_intermediate_size
    assert memory.row_widths(experts) == (hidden + 2 * inner, inner + hidden)
    per_layer = memory.rows_per_token(teacher.num_experts, teacher.num_experts_per_tok, 2) * (2 * hidden + 3 * inner)
    rank = rank_of("zero2", student, expert_parallel=2)
    assert memory.exchanged(rank) == pytest.approx(256 * 4 * 2 * per_layer * 2)
    less = rank_of("zero2", student, expert_parallel=2, activation_checkpointing=True)
    assert memory.exchanged(less) == pytest.approx(256 * 2 * per_layer * 2)
    assert memory.exchanged(rank_of("zero2", student)) == 0


def test_the_cache_takes_at_most_what_plan_says(prepared):
    rows = {name: value for name, value, *_ in plan.lengths(Run.open(prepared))}
    found = re.fullmatch(r"at most about (\S+)([kMG])B \(\d+ bytes per token\)", rows["cache on disk"])
    assert found, rows
    stored = sum(path.stat().st_size for path in (prepared / "data" / "logits").rglob("*.tar"))
    assert stored / 2 < float(found[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[found[2]] and stored > 0


def test_shards_of_the_plan_are_those_that_the_tokens_are_in(prepared):
    """It counted the tokens of the validation set and not their shard."""
    run = Run.open(prepared)
    shards = read_manifest(run.path("data", "tokens", "train"))["shards"]
    tokens = short(sum(shard["samples"] for shard in shards) * 32)
    assert plan.lengths(run)[0] == ["tokens to cache", f"{tokens} in {len(shards)} shards of 2k, and 1k to validate"]


def test_bytes_in_few_bits_are_those_of_whole_models(tmp_path):
    """A student that keeps half of the experts, against the model that has half; a dense one is larger than int4."""
    whole, half = tiny_moe_config(), tiny_moe_config(num_experts=4)
    assert whole.num_experts == 8
    models = [model_of(config, "m") for config in (whole, half)]
    dense, compact = (sum(p.numel() for p in model.parameters() if p.ndim == 3) for model in models)
    assert dense == 2 * compact
    rows = dict(row for row in plan.few_bits(models[0], "m", dense, compact) if row[0])
    for name in ("int8", "int4", "int3"):
        first, second = (stored_as(model, name, "m").bytes for model in models)
        assert f"{short(first)}B {name}" in rows["teacher in few bits"]
        routers = 2 * whole.num_hidden_layers * 4 * whole.hidden_size  # half of their rows, which a plan keeps
        assert f"{short(second + routers)}B {name}" in rows["student in few bits"]
    advised = [row[1] for row in plan.few_bits(models[0], "m", dense, dense * 9 // 10) if not row[0]]
    assert "smaller than this student in bfloat16" in advised[0]
    assert not [row for row in plan.few_bits(models[0], "m", dense, dense // 100) if not row[0]]
