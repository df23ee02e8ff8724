"""`megakd plan --gpus`: known GPUs, divisions of a student over them, which one to take, times and their basis."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3MoeConfig

from megakd.config.parsing import load_recipe
from megakd.errors import UserError
from megakd.measured import NAME, record_rate
from megakd.models.flops import forward_flops
from megakd.models.hub import load_config, model_of
from megakd.models.shared_core import PROJECTIONS, Form
from megakd.models.student import student_config
from megakd.report import duration, layouts
from megakd.report.gpus import GIB, KNOWN, Gpu, find_gpu
from megakd.report.layouts import Division, Fleet, Step, advice, choose, divisions, micro_batches, open_step, pair_of
from megakd.report.memory import MASTERS_OF
from megakd.report.plan import cached_bytes, expert_flops
from megakd.run import Run
from megakd.train.memory import GRADIENTS, LOSS, MOMENTS_OF, STUDENT, UPDATE, WEIGHTS
from megakd.train.states import Layout, model_states, parameters_of
from tests.commands.test_plan import llama
from tests.conftest import ROOT, VOCABULARY, in_process


def test_known_gpus_and_gpus_by_their_memory():
    assert find_gpu("H100") is KNOWN["h100"] and find_gpu("80GB").memory == find_gpu("80 GiB").memory == 80 * GIB
    assert find_gpu("80GB").flops is None
    for text in ("h900", "80", "0GB", "-1GB"):
        with pytest.raises(UserError, match=r"expected one of a100-40, .*p100, or its memory, like 80GB"):
            find_gpu(text)


@pytest.mark.parametrize(
    "name, device",
    [
        ("h100", "NVIDIA H100 80GB HBM3"), ("a100-80", "NVIDIA A100-SXM4-80GB"), ("a100-40", "NVIDIA A100-SXM4-40GB"),
        ("4090", "NVIDIA GeForce RTX 4090"), ("t4", "Tesla T4"), ("p100", "Tesla P100-PCIE-16GB"),
        ("h200", "NVIDIA H200"), ("v100", "Tesla V100-SXM2-32GB"), ("l40s", "NVIDIA L40S"), ("b200", "NVIDIA B200"),
    ],
)  # fmt: skip
def test_rates_count_for_the_gpu_that_they_were_measured_on(name, device):
    assert [gpu for gpu in KNOWN if duration.on_gpu(device, Fleet(KNOWN[gpu], 1, 1))] == [name]


def test_options_that_do_not_fit_together(prepared):
    def refused(*options: object) -> str:
        return in_process("plan", prepared, *options, code=2)

    assert "--gpu is for --gpus N" in refused("--gpu", "h100")
    assert "say which with --gpu" in refused("--gpus", 8)
    assert "expected a multiple of --gpus-per-node 8" in refused("--gpus", 12, "--gpu", "h100")
    assert "expected one of a100-40" in refused("--gpus", 8, "--gpu", "h900")
    assert "--utilization 2: expected a share" in refused("--gpus", 8, "--gpu", "h100", "--utilization", 2)
    assert "which do not divide into 3 equal shares" in refused("--gpus", 3, "--gpu", "h100", "--gpus-per-node", 3)


def test_tables_say_what_is_an_estimate_and_what_is_measured(prepared, tmp_path):
    fleet = ["--gpus", 2, "--gpus-per-node", 2, "--gpu"]
    shown = in_process("plan", prepared, *fleet, "h100")
    assert "training memory" not in shown and "take: engine.config=zero2 engine.ranks=2 optim.micro_batch=8" in shown
    assert shown.count("estimate: ") == 4 and "at 30% of 989T FLOP/s" in shown  # measured, but on another device
    record_rate(tmp_path, "train", "NVIDIA H100 80GB HBM3", 8e6, 2.0, ranks=4)
    shown = in_process("plan", prepared, *fleet, "h100", "--measured", tmp_path / NAME, "--utilization", 0.5)
    assert shown.count("measured on 4 x NVIDIA H100 80GB HBM3") == 2 and shown.count("at 50% of") == 2
    assert "1M " in next(line for line in shown.splitlines() if line.startswith("train, stage all"))
    record_rate(tmp_path, "train", "NVIDIA H100 80GB HBM3", 8e6, 2.0, ranks=4, flops_per_token=1e12)
    shown = in_process("plan", prepared, *fleet, "h100", "--measured", tmp_path / NAME)
    assert shown.count("estimate: measured on 4 x NVIDIA H100 80GB HBM3 at 1T FLOPs per token, here") == 2
    shown = in_process("plan", prepared, *fleet, "80GB")
    assert shown.count("unknown: no FLOP/s of this GPU") == 4
    assert "p100 has no matrix units for bfloat16" not in in_process("plan", prepared, *fleet, "p100")  # it is float32


def test_a_student_that_compress_has_not_made_is_planned_as_it_will_be(recipe, prepared, tmp_path):
    in_process("new", tmp_path / "new", "--from", recipe)
    planned, note = pair_of(Run.open(tmp_path / "new"))
    made, _ = pair_of(Run.open(prepared))
    assert note == "" and planned.vocab_size == made.vocab_size
    counts = [sum(p.numel() for p in model_of(pair.student, "test").parameters()) for pair in (planned, made)]
    assert counts[0] == counts[1]
    in_process("new", tmp_path / "budget", "--from", recipe, "compress.budget=0.3")
    assert (
        "the planner has not chosen shapes yet; taken as wrappers of rank" in pair_of(Run.open(tmp_path / "budget"))[1]
    )


@pytest.fixture(scope="module")
def step(prepared) -> Step:
    run = Run.open(prepared)
    return open_step(run, pair_of(run)[0], checkpointing=False)


def test_divisions_are_files_times_sizes_that_divide(step):
    found = divisions(step, Fleet(KNOWN["h100"], 4, 4))
    assert [(each.file, each.expert_parallel) for each in found] == [
        (file, size)
        for file in ("zero2", "zero3", "zero3_offload")
        for size in (1, 2, 4)  # of 4 experts
    ]
    assert layouts.expert_sizes(step.model, Fleet(KNOWN["h100"], 16, 8)) == [1, 2, 4]
    assert layouts.expert_sizes(step.model, Fleet(KNOWN["h100"], 6, 6)) == [1, 2]
    # more ranks divide masters and moments, and experts' weights without ZeRO-3
    two, four = found[0], divisions(step, Fleet(KNOWN["h100"], 8, 8))[0]
    for name in (GRADIENTS, MASTERS_OF, MOMENTS_OF):
        assert four.shares[name] == pytest.approx(two.shares[name] / 2)
    assert found[2].shares[WEIGHTS] < found[1].shares[WEIGHTS] < found[0].shares[WEIGHTS]
    assert all(each.host > 0 for each in found[6:]) and not any(each.host for each in found[:6])


def test_the_largest_micro_batch_is_the_last_that_fits(step):
    """8 sequences per rank and step; memory that ends between the totals of 2 and of 4."""
    config, fleet = step.config, Fleet(KNOWN["h100"], 2, 2)
    assert micro_batches(config, fleet) == [8, 4, 2, 1]

    def total(size: int) -> float:
        rank = layouts.rank_of(step, fleet, "zero2", 1, size)
        return sum(layouts.shares_of_rank(rank, step.peak(size)).values())

    between = Gpu("small", (total(2) + total(4)) / 2 / layouts.SHARE)
    assert divisions(step, Fleet(between, 2, 2))[0].largest == 2
    assert divisions(step, Fleet(Gpu("tiny", 1e3), 2, 2))[0].largest == 0


def test_micro_batches_between_the_two_traced_ones_follow_a_line(step):
    """The peak of 8 sequences, predicted from those of 1 and 2."""
    config = layouts.with_micro_batch(step.config, 8)
    traced = layouts.training_peak(config, config.stages[-1], step.model.config, None, VOCABULARY, update=False)
    assert step.peak(8).total == pytest.approx(traced.total, rel=0.1)


def test_activations_are_counted_where_the_update_of_one_process_takes_more(prepared, step):
    """With activation checkpointing the peak of one process is its update, which ranks divide."""
    run = Run.open(prepared)
    less = open_step(run, pair_of(run)[0], checkpointing=True)
    names = (STUDENT, LOSS)
    whole, again = (sum(each.peak(8).parts.get(name, 0) for name in names) for each in (step, less))
    assert 0.05 * whole < again < whole and UPDATE not in less.peak(8).parts


def division(file: str, size: int, gib: float, largest: int) -> Division:
    return Division(file, size, {"weights": gib * GIB}, 0.0, largest)


def test_the_file_with_the_least_communication_that_fits_is_taken(step):
    fleet = Fleet(KNOWN["h100"], 64, 8)
    found = [division("zero2", 1, 90, 0), division("zero2", 2, 80, 0), division("zero3", 1, 60, 2)]
    chosen = choose(found)
    assert chosen is found[2]
    told = advice(chosen, found, step, fleet)
    assert told.startswith(
        "engine.config=zero3 engine.ranks=64 optim.micro_batch=2: the weights have to be divided too"
    )
    assert told.endswith("zero2 takes at least 80.0 of 72.0 GiB")
    spread = [division("zero2", 1, 90, 0), division("zero2", 2, 70, 1)]
    assert "engine.expert_parallel=2" in advice(choose(spread), spread, step, fleet)
    none = [division("zero2", 1, 90, 0), division("zero3_offload", 1, 75, 0)]
    assert choose(none) is None and "none fits: the least is 75.0 GiB with zero3_offload" in advice(
        None, none, step, fleet
    )


def test_flops_are_those_of_the_products():
    """Attention computes the masked half too: its share is twice ours."""
    config: Any = llama()
    config._attn_implementation = "eager"
    model, length = LlamaForCausalLM(config), 64
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    attention = 2.0 * length * config.hidden_size * config.num_hidden_layers
    assert forward_flops(config, length, "test") == pytest.approx(
        counted.get_total_flops() / length - attention, rel=1e-3
    )


def test_flops_of_experts_are_those_of_the_active_ones(prepared):
    run = Run.open(prepared)
    teacher: Path = Path(run.config.model.teacher)
    config = load_config(teacher)
    more = load_config(teacher)
    more.num_experts_per_tok += 1
    expert = 2 * 3 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    assert forward_flops(more, 32, "test") - forward_flops(config, 32, "test") == pytest.approx(expert)
    student = load_config(run.student_folder)
    less = forward_flops(config, 32, "test") - forward_flops(student, 32, "test")
    dense, shared = expert_flops(config, run.config.compress, "test")
    assert shared is not None and less == pytest.approx(config.num_hidden_layers * (dense - shared))


def test_durations():
    assert [duration.duration(s) for s in (15, 300, 9000, 400000)] == ["15 s", "5 min", "2.5 h", "4.63 days"]


def test_states_of_the_30b_tables_are_what_plan_computes():
    """The first columns of docs/scaling.md, at the published sizes of Qwen3-30B-A3B."""
    teacher = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, tie_word_embeddings=False,
    )  # fmt: skip
    config = load_recipe(ROOT / "launch" / "recipes" / "qwen3-30b-a3b-r64.json")
    form = Form("wrappers", config.compress.rank, config.compress.rank)
    student = student_config(teacher, {layer: dict.fromkeys(PROJECTIONS, form) for layer in range(48)})
    model = model_of(student, "test")
    parameters = parameters_of(model, config.stages[-1].lr_multipliers)
    assert sum(each.numel for each in parameters) == pytest.approx(6.9e9, rel=0.005)
    page = (ROOT / "docs" / "scaling.md").read_text()
    for gpus in (8, 64):
        table = page.partition(f"--gpus {gpus} --gpu h100`:")[2].partition("`megakd")[0]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| zero" in line]
        assert len(rows) == 12
        for file, size, *cells in rows[:8]:
            states = model_states(parameters, Layout(int(file[-1]), gpus, int(size)))
            assert [float(cell) for cell in cells[:4]] == pytest.approx([part / GIB for part in states], abs=0.006)


def test_states_of_the_dense_4b_table_are_what_plan_computes():
    """The same of a dense student, at the published sizes of Qwen3-4B."""
    config = load_recipe(ROOT / "launch" / "recipes" / "qwen3-4b-from-30b-a3b.json")
    student = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    parameters = parameters_of(model_of(student, "test"), config.stages[-1].lr_multipliers)
    assert sum(each.numel for each in parameters) == pytest.approx(4.02e9, rel=0.005)
    assert config.steps_of(config.stages[0]) == 1336 and round(cached_bytes(config.logits)) == 113
    page = (ROOT / "docs" / "scaling.md").read_text()
    table = page.partition("### A dense Qwen3-4B")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| zero" in line]
    assert len(rows) == 3
    for file, size, *cells in rows[:2]:
        states = model_states(parameters, Layout(int(file[-1]), 8, int(size)))
        assert [float(cell) for cell in cells[:4]] == pytest.approx([part / GIB for part in states], abs=0.006)


def test_memory_is_predicted_at_a_micro_batch_that_a_step_has(prepared):
    """The title named 4 where no rank has more than 2 sequences of a step."""
    said = in_process("plan", prepared, "--gpus", 8, "--gpu", "h100")
    assert "micro-batch 2 (optim.micro_batch=4 does not divide a GPU's share of a step)" in said
